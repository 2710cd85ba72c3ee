//! Tools about one session: its names, its state, its status, its candidate.
use serde_json::{Value, json};

use super::{
    Context, EnvironmentAccess, ExamVerb, Exit, Failed, FailureClassification, Identity, Output,
    SessionIdentity, SessionLifecycle, SessionStatus, failed, identity, invalid_identity, no_session, value,
};
use crate::{
    access::{Auth, JwtOptions},
    http::{
        self, CreateError,
        body::{StatusBody, time},
    },
    identity::{EnvironmentId, SessionId, UserId},
    reason::{Reason, ReasonCode},
    session::{Session, State},
    store::{Actor, StoreError, Transition},
};

/// Tries at a row that somebody else keeps changing.
const ATTEMPTS: usize = 5;

pub fn validate(verb: &SessionIdentity) -> Result<Output, Failed> {
    let SessionIdentity::Validate { user_id, session_id, environment_id } = verb;
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let (user, session, environment) = (given(user_id), given(session_id), given(environment_id));
    let mut missing = Vec::new();
    let mut invalid = Vec::new();
    let user: Option<UserId> = checked("user_id", user.as_deref(), true, &mut missing, &mut invalid);
    let session: Option<SessionId> =
        checked("session_id", session.as_deref(), true, &mut missing, &mut invalid);
    let environment: Option<EnvironmentId> =
        checked("environment_id", environment.as_deref(), false, &mut missing, &mut invalid);
    let (Some(user_id), Some(exam_session_id), true) = (user, session, invalid.is_empty()) else {
        return Err(invalid_identity(&missing, &invalid));
    };
    let identity = Identity { user_id, exam_session_id, environment_id: environment };
    Ok(Output::ok(json!({"valid": true, "identity": value(identity)})))
}

fn checked<T: std::str::FromStr>(
    field: &'static str,
    text: Option<&str>,
    needed: bool,
    missing: &mut Vec<&str>,
    invalid: &mut Vec<&str>,
) -> Option<T> {
    match text.map(str::parse) {
        Some(Ok(name)) => return Some(name),
        Some(Err(_)) => invalid.push(field),
        None if needed => missing.push(field),
        None => {}
    }
    None
}

pub async fn lifecycle(verb: &SessionLifecycle, context: &Context) -> Result<Output, Failed> {
    match verb {
        SessionLifecycle::Transition { session_id, to, reason } => {
            let (previous, current) = transition(context, session_id, *to, reason.as_deref()).await?;
            Ok(Output::ok(json!({
                "session_id": current.id,
                "previous_state": previous,
                "current_state": current.state,
                "transitioned_at": time(last_transition(&current)),
                "state": current.state,
                "previous": previous,
            })))
        }
        SessionLifecycle::Status { session_id } => {
            let session = context.session(session_id).await?;
            Ok(Output::ok(json!({
                "session_id": session.id,
                "state": session.state,
                "reason": session.reason.as_ref().map(|reason| reason.code),
                "started_at": session.started_at.map(time),
                "last_transition_at": time(last_transition(&session)),
            })))
        }
    }
}

async fn transition(
    context: &Context,
    id: &str,
    to: State,
    reason: Option<&str>,
) -> Result<(State, Session), Failed> {
    let mut last = StoreError::Conflict;
    for _ in 0..ATTEMPTS {
        let session = context.session(id).await?;
        // What the lifecycle refuses is said before what is missing.
        let change =
            if session.state.next().contains(&to) { change(to, reason)? } else { Transition::to(to) };
        match context.store.transition(&session, change, &Actor::System).await {
            Ok(changed) => return Ok((session.state, changed)),
            Err(StoreError::Conflict) => last = StoreError::Conflict,
            Err(error) => return Err(error.into()),
        }
    }
    Err(last.into())
}

fn change(to: State, reason: Option<&str>) -> Result<Transition, Failed> {
    let given = |text: &str| match text.parse::<ReasonCode>() {
        Ok(code) => Reason::new(code, "Ended on the command line."),
        Err(_) => Reason::new(ReasonCode::Internal, text),
    };
    Ok(match (to, reason.filter(|text| !text.trim().is_empty())) {
        (State::Failed, None) => {
            let details = json!({"missing_fields": ["reason"]});
            return Err(failed(
                Exit::ValidationFailed,
                "REASON_REQUIRED",
                "to fail a session needs --reason",
                details,
            ));
        }
        (State::Terminated, None) => {
            Transition::end(to, Reason::new(ReasonCode::EndedByStaff, "Ended on the command line."))
        }
        (State::Failed | State::Terminated, Some(text)) => Transition::end(to, given(text)),
        (State::Initializing, _) => {
            Transition { environment_id: Some(EnvironmentId::new()), ..Transition::to(to) }
        }
        _ => Transition::to(to),
    })
}

/// When the state last changed; a row changes for other causes too.
fn last_transition(session: &Session) -> i64 {
    let times = [session.initializing_at, session.ready_at, session.started_at, session.ended_at];
    times.into_iter().flatten().max().unwrap_or(session.created_at)
}

pub async fn authorize(verb: &EnvironmentAccess, context: &Context) -> Result<Output, Failed> {
    let EnvironmentAccess::Authorize { session_id, user_id } = verb;
    let session: SessionId = identity("session_id", session_id)?;
    let user: UserId = identity("user_id", user_id)?;
    let found = context.store.session(session).await?;
    // One answer to a foreign, an unknown and an ended session.
    match found.filter(|found| found.user_id == user && !found.state.is_terminal()) {
        Some(found) => {
            Ok(Output::ok(json!({"authorized": true, "session_id": found.id, "user_id": found.user_id})))
        }
        None => Err(failed(Exit::AccessDenied, "ACCESS_DENIED", "access denied", json!({}))),
    }
}

pub async fn status(verb: &SessionStatus, context: &Context) -> Result<Output, Failed> {
    let SessionStatus::Get { session_id } = verb;
    let session = context.session(session_id).await?;
    Ok(Output::ok(value(StatusBody::new(&session, context.store.now().await?))))
}

pub fn classify(verb: &FailureClassification) -> Result<Output, Failed> {
    let FailureClassification::Classify { kind, context } = verb;
    let wrong = |field: &str, message: &str| {
        failed(Exit::ValidationFailed, "VALIDATION_FAILED", message, json!({"invalid_fields": [field]}))
    };
    let context: serde_json::Map<String, Value> =
        serde_json::from_str(context).map_err(|_| wrong("context", "--context must be a JSON object"))?;
    let word = |name: &str| context.get(name).and_then(Value::as_str);
    let code = match kind.parse::<ReasonCode>() {
        Ok(code) => code,
        Err(_) => {
            let named = word("reason").or(word("code")).and_then(|word| word.parse::<ReasonCode>().ok());
            let belongs = named.filter(|code| value(code.kind()) == kind.as_str());
            belongs.ok_or_else(|| {
                wrong("type", "--type must be a reason code, or init, runtime, access or infra with the code as reason in --context")
            })?
        }
    };
    let details =
        word("technical_details").map_or_else(|| Value::Object(context.clone()).to_string(), str::to_owned);
    let details = if context.is_empty() { code.summary().to_owned() } else { details };
    Ok(Output::ok(value(Reason::new(code, details).classification())))
}

pub async fn start(verb: &ExamVerb, context: &Context) -> Result<Output, Failed> {
    let ExamVerb::Start { exam_id, user_id } = verb;
    let user: UserId = identity("user_id", user_id)?;
    let Some(public) = &context.public else {
        return Err(failed(
            Exit::BadArguments,
            "INVALID_ARGUMENTS",
            "the server's public address is needed",
            json!({}),
        ));
    };
    let auth = Auth::new(context.store.clone(), &JwtOptions::default())
        .map_err(|error| failed(Exit::General, "INTERNAL", &error.to_string(), json!({})))?;
    let made = http::start((&context.store, &auth, public), user, exam_id, &Actor::System).await;
    match made {
        Ok((_, body)) => Ok(Output::ok(body)),
        Err(CreateError::InvalidExamId) => {
            Err(failed(Exit::NotFound, "INVALID_EXAM_ID", "there is no exam of this id", json!({})))
        }
        Err(CreateError::ActiveSessionExists) => {
            let active = context.store.active_session(user).await?;
            let details = json!({"session_id": active.map(|session| session.id)});
            let message = "the user has an active session already";
            Err(failed(Exit::General, "ACTIVE_SESSION_EXISTS", message, details))
        }
        Err(CreateError::Store(StoreError::NotFound)) => Err(no_session()),
        Err(CreateError::Store(error)) => Err(error.into()),
        Err(error @ CreateError::Overloaded) => {
            Err(failed(Exit::General, "OVERLOADED", &error.to_string(), json!({})))
        }
    }
}
