//! For whoever watches the server: alive, ready, numbers, description.
use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    ApiState,
    error::{ApiError, Data, Failure, Success},
};
use crate::session::State as SessionState;

/// Sessions are counted at most this often: anybody may ask.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// Sessions by state, when they were last counted.
pub type Counted = Option<(Instant, Arc<[(SessionState, u64)]>)>;

/// One word.
#[derive(Debug, Serialize, ToSchema)]
pub struct HealthBody {
    status: &'static str,
}

/// Alive: it answers.
#[utoipa::path(
    get, path = "/healthz", tag = "health",
    responses((status = 200, body = Success<HealthBody>, description = "Alive"))
)]
pub async fn alive() -> Data<HealthBody> {
    Data(StatusCode::OK, HealthBody { status: "ok" })
}

/// Ready: the database answers and environments can be had.
#[utoipa::path(
    get, path = "/readyz", tag = "health",
    responses(
        (status = 200, body = Success<HealthBody>, description = "Ready"),
        (status = 503, body = Failure, description = "`NOT_READY` or `BACKEND_UNAVAILABLE`, with the cause"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn ready(State(state): State<ApiState>) -> Result<Data<HealthBody>, ApiError> {
    state
        .store()
        .ping()
        .await
        .map_err(|error| ApiError::BackendUnavailable(Cow::Owned(error.to_string())))?;
    state.provisions()?;
    Ok(Data(StatusCode::OK, HealthBody { status: "ready" }))
}

/// Numbers in the text format of Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "health",
    responses((status = 200, body = String, content_type = "text/plain", description = "Prometheus text"))
)]
pub async fn metrics(State(state): State<ApiState>) -> impl IntoResponse {
    let states = count(&state).await;
    let text = state.auth().metrics().render(states.as_deref());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

async fn count(state: &ApiState) -> Option<Arc<[(SessionState, u64)]>> {
    let mut counted = state.counted().lock().await;
    if let Some((at, states)) = counted.as_ref()
        && at.elapsed() < COUNT_EVERY
    {
        return Some(Arc::clone(states));
    }
    let sessions = state.store().unreleased_sessions().await.ok()?;
    let of = |state| sessions.iter().filter(|session| session.state == state).count() as u64;
    let states: Arc<[_]> = SessionState::ALL.into_iter().map(|state| (state, of(state))).collect();
    *counted = Some((Instant::now(), Arc::clone(&states)));
    Some(states)
}
