//! `/v1/sessions`.
use axum::{
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;
use utoipa::ToSchema;

use super::{
    ApiState,
    body::{CreatedBody, SessionBody, TerminatedBody, TicketBody, time},
    create::{CreateError, create},
    error::{ApiError, Data, Failure, Success},
    extract::{Body, Nothing, Seen, Source, user_id},
};
use crate::{
    access::Caller,
    credential::PublicKey,
    identity::UserId,
    lifecycle::EndError,
    reason::ReasonCode,
    store::{Channel, Outcome},
};

/// What a session is wanted for.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSessionBody {
    /// Which exam.
    exam_id: String,
    /// For whom: needed with a platform's or operator's key, and the caller's own id otherwise.
    #[serde(default, deserialize_with = "user_id")]
    user_id: Option<UserId>,
    /// One OpenSSH public key that gets in beside the password, as in `id_ed25519.pub`.
    #[serde(default)]
    ssh_public_key: Option<String>,
}

/// Starts a session: its environment is provisioned from now on, and its clock starts when the candidate first connects.
#[utoipa::path(
    post, path = "/v1/sessions", tag = "sessions", request_body = NewSessionBody, security(("bearer" = [])),
    responses(
        (status = 201, body = Success<CreatedBody>, description = "Created"),
        (status = 400, body = Failure, description = "`INVALID_REQUEST` or `INVALID_EXAM_ID`"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`"),
        (status = 409, body = Failure, description = "`ACTIVE_SESSION_EXISTS`"),
        (status = 413, body = Failure, description = "`PAYLOAD_TOO_LARGE`"),
        (status = 415, body = Failure, description = "`UNSUPPORTED_MEDIA_TYPE`"),
        (status = 500, body = Failure, description = "`SESSION_CREATE_FAILED`"),
        (status = 503, body = Failure, description = "`NOT_READY`, `OVERLOADED` or `BACKEND_UNAVAILABLE`, with `Retry-After`"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn post(
    State(state): State<ApiState>,
    caller: Caller,
    source: Source,
    Body(body): Body<NewSessionBody>,
) -> Result<Response, ApiError> {
    if body.user_id.is_none()
        && caller.user_id().is_none()
        && caller.may_create_for(Some(UserId::new())).is_some()
    {
        return Err(ApiError::InvalidRequest("user_id: a key must say for whom".into()));
    }
    let Some(user_id) = caller.may_create_for(body.user_id) else {
        state.auth().record(Channel::Api, source.0, (None, caller.user_id()), Outcome::Denied);
        return Err(ApiError::AccessDenied);
    };
    let key = body.ssh_public_key.as_deref().map(PublicKey::parse).transpose();
    let key = key.map_err(|error| ApiError::InvalidRequest(format!("ssh_public_key: {error}")))?;
    state.provisions()?;
    let made = create(state.store(), state.auth(), user_id, &body.exam_id, key, &caller.actor()).await;
    let (session, password) = made.map_err(|error| match error {
        CreateError::InvalidExamId => ApiError::InvalidExamId,
        CreateError::ActiveSessionExists => ApiError::ActiveSessionExists,
        CreateError::Overloaded => ApiError::Overloaded,
        CreateError::Store(error) => match ApiError::from(error) {
            ApiError::Internal => ApiError::SessionCreateFailed,
            other => other,
        },
    })?;
    state.lifecycle().wake();
    state.auth().metrics().session_created();
    state.auth().record(Channel::Api, source.0, (Some(session.id), Some(user_id)), Outcome::Granted);
    let body = CreatedBody::new(&session, &password, state.public());
    let mut response = Data(StatusCode::CREATED, body).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/sessions/{}", session.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// One session.
#[utoipa::path(
    get, path = "/v1/sessions/{session_id}", tag = "sessions", security(("bearer" = [])),
    params(("session_id" = String, Path, format = Uuid)),
    responses(
        (status = 200, body = Success<SessionBody>, description = "The session"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`: not yours, or no such session"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn get(State(state): State<ApiState>, seen: Seen) -> Data<SessionBody> {
    Data(
        StatusCode::OK,
        SessionBody::new(&seen.session, state.lifecycle().now_ms(), seen.caller.sees_details()),
    )
}

/// Whose active session.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActiveQuery {
    /// For staff and platforms; default: the caller.
    #[serde(default, deserialize_with = "user_id")]
    user_id: Option<UserId>,
}

/// The session of the caller that has not ended.
#[utoipa::path(
    get, path = "/v1/sessions/active", tag = "sessions", params(("user_id" = Option<String>, Query, format = Uuid, description = "Whose, for staff and platforms; default: the caller")), security(("bearer" = [])),
    responses(
        (status = 200, body = Success<SessionBody>, description = "The session"),
        (status = 400, body = Failure, description = "`INVALID_REQUEST`"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 404, body = Failure, description = "`NO_ACTIVE_SESSION`"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn active(
    State(state): State<ApiState>,
    caller: Caller,
    query: Result<Query<ActiveQuery>, QueryRejection>,
) -> Result<Data<SessionBody>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::InvalidRequest(error.body_text()))?;
    let user = query.user_id.or(caller.user_id()).ok_or(ApiError::NoActiveSession)?;
    let found = state.store().active_session(user).await?;
    // Somebody else's is not there, as far as they are told.
    let session = found.filter(|session| caller.may_read(session)).ok_or(ApiError::NoActiveSession)?;
    Ok(Data(StatusCode::OK, SessionBody::new(&session, state.lifecycle().now_ms(), caller.sees_details())))
}

/// The candidate hands in: the session ends as `submitted`.
#[utoipa::path(
    post, path = "/v1/sessions/{session_id}/submit", tag = "sessions", security(("bearer" = [])),
    params(("session_id" = String, Path, format = Uuid)),
    responses(
        (status = 200, body = Success<TerminatedBody>, description = "Handed in"),
        (status = 400, body = Failure, description = "`SESSION_ALREADY_TERMINATED`, or a body that says something"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn submit(
    State(state): State<ApiState>,
    seen: Seen,
    _: Nothing,
) -> Result<Data<TerminatedBody>, ApiError> {
    if !seen.caller.may_submit(&seen.session) {
        return Err(seen.denied(&state));
    }
    end(&state, &seen, ReasonCode::Submitted).await
}

/// Ends the session, as staff or as the candidate.
#[utoipa::path(
    post, path = "/v1/sessions/{session_id}/terminate", tag = "sessions", security(("bearer" = [])),
    params(("session_id" = String, Path, format = Uuid)),
    responses(
        (status = 200, body = Success<TerminatedBody>, description = "Ended"),
        (status = 400, body = Failure, description = "`SESSION_ALREADY_TERMINATED`, or a body that says something"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn terminate(
    State(state): State<ApiState>,
    seen: Seen,
    _: Nothing,
) -> Result<Data<TerminatedBody>, ApiError> {
    if !seen.caller.may_end(&seen.session) {
        return Err(seen.denied(&state));
    }
    let own = seen.caller.ends_as_candidate(&seen.session);
    let code = if own { ReasonCode::EndedByCandidate } else { ReasonCode::EndedByStaff };
    end(&state, &seen, code).await
}

async fn end(state: &ApiState, seen: &Seen, code: ReasonCode) -> Result<Data<TerminatedBody>, ApiError> {
    let ended = state.lifecycle().end(seen.session.id, code, &seen.caller.actor()).await;
    let session = ended.map_err(|error| match error {
        EndError::AlreadyTerminated(_) => ApiError::AlreadyTerminated,
        EndError::NotFound => ApiError::AccessDenied,
        EndError::Store(error) => error.into(),
    })?;
    let terminated_at = time(session.ended_at.unwrap_or(session.updated_at));
    Ok(Data(StatusCode::OK, TerminatedBody { session_id: session.id, terminated_at }))
}

/// A single-use ticket, good for 30 s, for the WebSockets of this session.
#[utoipa::path(
    post, path = "/v1/sessions/{session_id}/terminal-ticket", tag = "sessions", security(("bearer" = [])),
    params(("session_id" = String, Path, format = Uuid)),
    responses(
        (status = 200, body = Success<TicketBody>, description = "The ticket"),
        (status = 400, body = Failure, description = "A body that says something"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn ticket(
    State(state): State<ApiState>,
    seen: Seen,
    _: Nothing,
) -> Result<Data<TicketBody>, ApiError> {
    if seen.caller.may_enter(&seen.session).is_none() {
        return Err(seen.denied(&state));
    }
    let ticket = state.auth().terminal_ticket(&seen.caller, &seen.session).await?;
    Ok(Data(StatusCode::OK, TicketBody { ticket: ticket.expose().to_owned(), expires_in: ticket.expires_in }))
}
