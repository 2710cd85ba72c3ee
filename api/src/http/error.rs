//! The table of statuses: one variant for each answer that is no success.
use std::borrow::Cow;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{access::LoginError, store::StoreError};

/// Why a request did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Malformed, unknown fields, impossible values; names the field.
    #[error("{0}")]
    InvalidRequest(String),
    /// No such exam.
    #[error("there is no exam of this id")]
    InvalidExamId,
    /// No or no good token.
    #[error("a bearer token is needed: an API key or a signed token")]
    Unauthenticated,
    /// Not theirs, or not there: one answer.
    #[error("access denied")]
    AccessDenied,
    /// A page of another site.
    #[error("pages of this origin may not connect; see --allowed-origins")]
    OriginNotAllowed,
    /// They have none.
    #[error("there is no active session")]
    NoActiveSession,
    /// No such exam, where it is named by the path.
    #[error("there is no exam of this id")]
    ExamNotFound,
    /// No such route.
    #[error("there is nothing at this path; see /openapi.json")]
    NotFound,
    /// A route, but not by this method.
    #[error("this path does not take this method; see the Allow header")]
    MethodNotAllowed,
    /// The body did not arrive in time.
    #[error("the request's body did not arrive in time")]
    RequestTimeout,
    /// One is under way already.
    #[error("the user has an active session already; GET /v1/sessions/active shows it")]
    ActiveSessionExists,
    /// Too late.
    #[error("the session has ended already")]
    AlreadyTerminated,
    /// Too large a body.
    #[error("the request's body is too large")]
    PayloadTooLarge,
    /// Not JSON.
    #[error("the request's body must be JSON: send content-type application/json")]
    UnsupportedMediaType,
    /// The session could not be made.
    #[error("the session could not be made")]
    SessionCreateFailed,
    /// A fault of Carrel's own.
    #[error("something went wrong inside carrel; its log says what")]
    Internal,
    /// Database or cluster away.
    #[error("{0}")]
    BackendUnavailable(Cow<'static, str>),
    /// Just started.
    #[error("{0}")]
    NotReady(Cow<'static, str>),
    /// More at once than fits.
    #[error("too many requests at this moment; try again in a few seconds")]
    Overloaded,
}

impl ApiError {
    /// Database away.
    pub(crate) const DATABASE: Self =
        Self::BackendUnavailable(Cow::Borrowed("the database does not answer; try again in a moment"));

    /// Status, code, and seconds after which another try is worth it.
    #[must_use]
    pub const fn row(&self) -> (StatusCode, &'static str, Option<u16>) {
        match self {
            Self::InvalidRequest(_) => (StatusCode::BAD_REQUEST, "INVALID_REQUEST", None),
            Self::InvalidExamId => (StatusCode::BAD_REQUEST, "INVALID_EXAM_ID", None),
            Self::AlreadyTerminated => (StatusCode::BAD_REQUEST, "SESSION_ALREADY_TERMINATED", None),
            Self::Unauthenticated => (StatusCode::UNAUTHORIZED, "UNAUTHENTICATED", None),
            Self::AccessDenied => (StatusCode::FORBIDDEN, "ACCESS_DENIED", None),
            Self::OriginNotAllowed => (StatusCode::FORBIDDEN, "ORIGIN_NOT_ALLOWED", None),
            Self::NoActiveSession => (StatusCode::NOT_FOUND, "NO_ACTIVE_SESSION", None),
            Self::ExamNotFound => (StatusCode::NOT_FOUND, "EXAM_NOT_FOUND", None),
            Self::NotFound => (StatusCode::NOT_FOUND, "NOT_FOUND", None),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", None),
            Self::RequestTimeout => (StatusCode::REQUEST_TIMEOUT, "REQUEST_TIMEOUT", None),
            Self::ActiveSessionExists => (StatusCode::CONFLICT, "ACTIVE_SESSION_EXISTS", None),
            Self::PayloadTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "PAYLOAD_TOO_LARGE", None),
            Self::UnsupportedMediaType => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "UNSUPPORTED_MEDIA_TYPE", None)
            }
            Self::SessionCreateFailed => (StatusCode::INTERNAL_SERVER_ERROR, "SESSION_CREATE_FAILED", None),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", None),
            Self::BackendUnavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "BACKEND_UNAVAILABLE", Some(5)),
            Self::NotReady(_) => (StatusCode::SERVICE_UNAVAILABLE, "NOT_READY", Some(2)),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED", Some(2)),
        }
    }

    /// The code.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        self.row().1
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::ActiveSessionExists(_) => Self::ActiveSessionExists,
            StoreError::Unavailable(_) | StoreError::Conflict => {
                tracing::warn!(%error, "a request cannot be answered");
                Self::DATABASE
            }
            error => {
                tracing::error!(%error, "a request failed");
                Self::Internal
            }
        }
    }
}

impl From<LoginError> for ApiError {
    /// What a denial means depends on what was asked: this is for a session's door.
    fn from(error: LoginError) -> Self {
        match error {
            LoginError::Denied => Self::AccessDenied,
            LoginError::Overloaded => Self::Overloaded,
            LoginError::Unavailable => Self::DATABASE,
        }
    }
}

/// An answer that is no success.
#[derive(Debug, Serialize, ToSchema)]
pub struct Failure {
    /// `false`.
    #[schema(default = false)]
    success: bool,
    error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// A stable word for programs.
    #[schema(example = "ACCESS_DENIED", pattern = "^[A-Z][A-Z0-9_]+$")]
    code: &'static str,
    /// A sentence for people.
    message: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, code, retry_after) = self.row();
        let error = ErrorBody { code, message: self.to_string() };
        let mut response = (status, Json(Failure { success: false, error })).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// An answer that is a success.
#[derive(Debug, Serialize, ToSchema)]
pub struct Success<T> {
    /// `true`.
    #[schema(default = true)]
    success: bool,
    data: T,
}

/// A success with this status. Never cached: some answers hold secrets, the others change.
#[derive(Debug)]
pub struct Data<T>(pub StatusCode, pub T);

impl<T: Serialize> IntoResponse for Data<T> {
    fn into_response(self) -> Response {
        let mut response = (self.0, Json(Success { success: true, data: self.1 })).into_response();
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}
