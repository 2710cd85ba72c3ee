//! `execution-environment`: made, shown and removed by the same lifecycle that a server runs.
use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Context, ExecutionEnvironment, Exit, Failed, Output, failed};
use crate::{
    environment::{Environment, EnvironmentError, Observed, Phase, link::Links},
    http::body::time,
    lifecycle::{EndError, Lifecycle},
    reason::{Reason, ReasonCode},
    session::{Session, State},
    store::{Actor, Transition},
};

/// What is being destroyed is gone within this.
const GONE_WITHIN: Duration = Duration::from_secs(60);
/// How often it is looked whether it is gone.
const LOOK_EVERY: Duration = Duration::from_millis(100);

impl From<EnvironmentError> for Failed {
    fn from(error: EnvironmentError) -> Self {
        let code = match &error {
            EnvironmentError::NotFound => return no_environment(),
            EnvironmentError::Unavailable(_) => "BACKEND_UNAVAILABLE",
            EnvironmentError::Refused(_) => "ENVIRONMENT_FAILED",
        };
        failed(Exit::General, code, &error.to_string(), json!({}))
    }
}

fn no_environment() -> Failed {
    failed(Exit::NotFound, "ENVIRONMENT_NOT_FOUND", "the session has no environment", json!({}))
}

pub async fn run(verb: &ExecutionEnvironment, context: &Context) -> Result<Output, Failed> {
    match verb {
        ExecutionEnvironment::Create { session_id, timeout } => {
            create(context, session_id, Duration::from_secs(*timeout)).await
        }
        ExecutionEnvironment::Status { session_id } => {
            let session = context.session(session_id).await?;
            let id = session.environment_id.ok_or_else(no_environment)?;
            let seen = context.environment()?.inspect(id).await?;
            Ok(Output::ok(body(&session, seen.as_ref())))
        }
        ExecutionEnvironment::Destroy { session_id } => destroy(context, session_id).await,
    }
}

/// Runs the lifecycle of this session as one more replica until it is ready.
async fn create(context: &Context, id: &str, within: Duration) -> Result<Output, Failed> {
    let refused = |reason: &str, message: &str| {
        failed(Exit::General, "ENVIRONMENT_CREATE_FAILED", message, json!({"reason": reason}))
    };
    let session = context.session(id).await?;
    let environment = context.environment()?;
    environment.check().await?;
    let lifecycle = Lifecycle::only(
        session.id,
        context.store.clone(),
        Arc::clone(environment),
        Links::new(Arc::clone(environment)),
    );
    let mut feed = lifecycle.watch(session.id).await?;
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&lifecycle).run(shutdown.clone()));
    let settled = timeout(within, feed.wait_for(|session| session.state >= State::Ready)).await;
    let settled = settled.ok().and_then(Result::ok).map(|session| Arc::clone(&session));
    let outcome = match settled {
        Some(session) => Ok(session),
        None => {
            // Nobody may be there to end it later.
            let late = context.session(id).await?;
            let reason =
                Reason::new(ReasonCode::StartTimeout, "Not ready in the time given on the command line.");
            let _ =
                context.store.transition(&late, Transition::end(State::Failed, reason), &Actor::System).await;
            Err(refused("start_timeout", "the environment did not become ready in time"))
        }
    };
    shutdown.cancel();
    let _ = timeout(GONE_WITHIN, running).await;
    let session = outcome?;
    if let Some(reason) = &session.reason {
        return Err(refused(reason.code.as_str(), &reason.technical_details));
    }
    let id = session.environment_id.ok_or_else(no_environment)?;
    let seen = environment.inspect(id).await?;
    Ok(Output::ok(body(&session, seen.as_ref())))
}

async fn destroy(context: &Context, id: &str) -> Result<Output, Failed> {
    let session = context.session(id).await?;
    let environment = context.environment()?;
    if !session.state.is_terminal() {
        let lifecycle = Lifecycle::only(
            session.id,
            context.store.clone(),
            Arc::clone(environment),
            Links::new(Arc::clone(environment)),
        );
        match lifecycle.end(session.id, ReasonCode::EndedByStaff, &Actor::System).await {
            Ok(_) | Err(EndError::AlreadyTerminated(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // Read again: the name is given with the change to `initializing`, which may have come in between.
    let session = context.session(id).await?;
    let Some(environment_id) = session.environment_id else { return Err(no_environment()) };
    let seen = environment.inspect(environment_id).await?;
    remove(environment, &session).await?;
    let released = context.store.mark_released(session.id).await?;
    let mut body = body(&released, seen.as_ref());
    if let Some(fields) = body.as_object_mut() {
        fields.insert("status".into(), json!("destroyed"));
        fields.insert("destroyed_at".into(), json!(released.released_at.map(time)));
    }
    Ok(Output::ok(body))
}

/// Destroys a session's environment and waits until it is gone.
pub async fn remove(environment: &Arc<dyn Environment>, session: &Session) -> Result<(), Failed> {
    let Some(id) = session.environment_id else { return Ok(()) };
    let until = Instant::now() + GONE_WITHIN;
    environment.destroy(id).await?;
    while environment.inspect(id).await?.is_some() {
        if Instant::now() >= until {
            let message = "the environment is being destroyed, and is still there";
            return Err(failed(Exit::General, "BACKEND_UNAVAILABLE", message, json!({})));
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(())
}

fn body(session: &Session, seen: Option<&Observed>) -> Value {
    let status = match seen.map(|seen| &seen.phase) {
        None => "destroyed",
        Some(Phase::Starting { .. }) => "creating",
        Some(Phase::Up) if session.ready_at.is_some() => "ready",
        Some(Phase::Up) => "creating",
        Some(Phase::Ending) => "destroying",
        Some(Phase::Failed(_)) => "failed",
    };
    json!({
        "environment_id": session.environment_id,
        "session_id": session.id,
        "pod_name": seen.map(|seen| &seen.name),
        "pod_namespace": seen.map(|seen| &seen.namespace),
        "status": status,
        "created_at": seen.map(|seen| time(seen.created_at)),
        "ready_at": session.ready_at.map(time),
    })
}
