//! `/v1/exams`.
use axum::{
    extract::{Path, Request, State, rejection::PathRejection},
    http::StatusCode,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    ApiState,
    error::{ApiError, Data, Failure, Success},
    extract::{json_type, read},
};
use crate::{access::Caller, exam::Exam};

/// Largest exam, bytes: a setup script of 256 KiB, each byte written as an escape of two, and the rest.
const BODY: usize = 640 * 1024;

/// All exams by id, the first 1000.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExamsBody {
    exams: Vec<Exam>,
}

/// All exams.
#[utoipa::path(
    get, path = "/v1/exams", tag = "exams", security(("bearer" = [])),
    responses(
        (status = 200, body = Success<ExamsBody>, description = "The exams"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`: an exam's setup may hold its answers"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn list(State(state): State<ApiState>, caller: Caller) -> Result<Data<ExamsBody>, ApiError> {
    if !caller.may_read_exams() {
        return Err(ApiError::AccessDenied);
    }
    Ok(Data(StatusCode::OK, ExamsBody { exams: state.store().exams().await? }))
}

/// One exam.
#[utoipa::path(
    get, path = "/v1/exams/{exam_id}", tag = "exams", security(("bearer" = [])),
    params(("exam_id" = String, Path)),
    responses(
        (status = 200, body = Success<Exam>, description = "The exam"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`"),
        (status = 404, body = Failure, description = "`EXAM_NOT_FOUND`"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn get(
    State(state): State<ApiState>,
    caller: Caller,
    path: Result<Path<String>, PathRejection>,
) -> Result<Data<Exam>, ApiError> {
    if !caller.may_read_exams() {
        return Err(ApiError::AccessDenied);
    }
    let Path(id) = path.map_err(|_| ApiError::ExamNotFound)?;
    let exam = state.store().exam(&id).await?.ok_or(ApiError::ExamNotFound)?;
    Ok(Data(StatusCode::OK, exam))
}

/// Makes or replaces an exam. Sessions that exist keep it as it was.
#[utoipa::path(
    put, path = "/v1/exams/{exam_id}", tag = "exams", request_body = Exam, security(("bearer" = [])),
    params(("exam_id" = String, Path)),
    responses(
        (status = 200, body = Success<Exam>, description = "As it is now"),
        (status = 400, body = Failure, description = "`INVALID_REQUEST`, with the path of the fault"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`: needs the scope operator"),
        (status = 413, body = Failure, description = "`PAYLOAD_TOO_LARGE`"),
        (status = 415, body = Failure, description = "`UNSUPPORTED_MEDIA_TYPE`"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn put(
    State(state): State<ApiState>,
    caller: Caller,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Data<Exam>, ApiError> {
    if !caller.may_write_exams() {
        return Err(ApiError::AccessDenied);
    }
    json_type(request.headers())?;
    let body = read(request, BODY).await?;
    let exam = Exam::from_json(&body).map_err(|error| ApiError::InvalidRequest(error.to_string()))?;
    if path.is_err() || path.is_ok_and(|Path(id)| id != exam.id) {
        return Err(ApiError::InvalidRequest("id: must be the one in the path".into()));
    }
    state.store().put_exam(&exam).await?;
    tracing::info!(exam_id = exam.id, actor = %caller.actor(), "exam put");
    Ok(Data(StatusCode::OK, exam))
}
