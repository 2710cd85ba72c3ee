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
use crate::{metrics::Counts, session::State as SessionState, store::WarmState};

/// Sessions are counted at most this often: anybody may ask.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// What was counted, and when.
pub type Counted = Option<(Instant, Arc<Counts>)>;

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
    let counts = count(&state).await;
    let text = state.auth().metrics().render(counts.as_deref());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

async fn count(state: &ApiState) -> Option<Arc<Counts>> {
    let mut counted = state.counted().lock().await;
    if let Some((at, counts)) = counted.as_ref()
        && at.elapsed() < COUNT_EVERY
    {
        return Some(Arc::clone(counts));
    }
    let sessions = state.store().unreleased_sessions().await.ok()?;
    let warm = state.store().warm_environments().await.ok()?;
    let in_state = |state| sessions.iter().filter(|session| session.state == state).count() as u64;
    let warm_in_state = |state| warm.iter().filter(|warm| warm.state == state).count() as u64;
    let counts = Arc::new(Counts {
        sessions: SessionState::ALL.into_iter().map(|state| (state, in_state(state))).collect(),
        warm: WarmState::ALL.into_iter().map(|state| (state, warm_in_state(state))).collect(),
    });
    *counted = Some((Instant::now(), Arc::clone(&counts)));
    Some(counts)
}
