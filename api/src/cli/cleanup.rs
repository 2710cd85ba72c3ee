//! `cleanup-ttl`: what is over by its own limits. The rules are the lifecycle's; here they are only asked.
use serde_json::json;

use super::{CleanupTtl, Context, Failed, Output, environment::remove};
use crate::{
    http::body::time,
    lifecycle::decide::{Seen, Step, decide, next_deadline},
    reason::ReasonCode,
    session::Session,
    store::{Actor, StoreError, Transition},
};

/// What a session's limits say.
struct Verdict {
    cleanup: bool,
    reason: Option<ReasonCode>,
    remaining_ms: i64,
}

fn verdict(session: &Session, now: i64) -> Verdict {
    let Some(until) = next_deadline(session) else {
        let reason = session.reason.as_ref().map(|reason| reason.code);
        return Verdict { cleanup: session.released_at.is_none(), reason, remaining_ms: 0 };
    };
    // What it ends for, once its deadline has come.
    let reason = match decide(session, &Seen::Unknown, until) {
        Step::End { reason, .. } => Some(reason.code),
        _ => None,
    };
    Verdict { cleanup: now >= until, reason, remaining_ms: until.saturating_sub(now).max(0) }
}

pub async fn run(verb: &CleanupTtl, context: &Context) -> Result<Output, Failed> {
    match verb {
        CleanupTtl::Check { session_id } => {
            let session = context.session(session_id).await?;
            let verdict = verdict(&session, context.store.now().await?);
            Ok(Output::ok(json!({
                "session_id": session.id,
                "should_cleanup": verdict.cleanup,
                "reason": verdict.reason,
                "ttl_remaining_seconds": verdict.remaining_ms.div_euclid(1000),
            })))
        }
        CleanupTtl::Sweep { dry_run } => sweep(context, *dry_run).await,
    }
}

async fn sweep(context: &Context, dry_run: bool) -> Result<Output, Failed> {
    let started = context.store.now().await?;
    let sessions = context.store.unreleased_sessions().await?;
    let mut cleaned = Vec::new();
    for session in &sessions {
        if !verdict(session, started).cleanup {
            continue;
        }
        if !dry_run && !clean(context, session, started).await? {
            continue;
        }
        cleaned.push(session.id);
    }
    Ok(Output::ok(json!({
        "sweep_started_at": time(started),
        "sweep_completed_at": time(context.store.now().await?),
        "sessions_checked": sessions.len(),
        "sessions_cleaned": cleaned.len(),
        "cleaned_session_ids": cleaned,
        "dry_run": dry_run,
    })))
}

/// Ends it if it has not ended, and removes what is left of it. `false`: somebody else is at it.
async fn clean(context: &Context, session: &Session, now: i64) -> Result<bool, Failed> {
    let ended = match decide(session, &Seen::Unknown, now) {
        Step::End { to, reason } => {
            match context.store.transition(session, Transition::end(to, reason), &Actor::System).await {
                Ok(ended) => ended,
                Err(StoreError::Conflict) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        _ => session.clone(),
    };
    remove(context.environment()?, &ended).await?;
    context.store.mark_released(ended.id).await?;
    Ok(true)
}
