//! What handlers ask for in their signatures: a caller, a session that the caller may see, a body.
use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use axum::{
    body::Bytes,
    extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use uuid::Uuid;

use super::{ApiState, error::ApiError};
use crate::{
    access::{Caller, LoginError},
    identity::{SessionId, UserId},
    session::Session,
    store::{Channel, Outcome},
};

/// Largest body of a request, bytes.
const BODY: usize = 64 * 1024;
/// A body arrives within this.
const BODY_WITHIN: Duration = Duration::from_secs(5);

/// The token of `Authorization: Bearer …`; `None` for any other header or none.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

impl FromRequestParts<ApiState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let token = bearer(&parts.headers).ok_or(ApiError::Unauthenticated)?;
        state.auth().caller(token).await.map_err(|error| match error {
            LoginError::Denied => ApiError::Unauthenticated,
            other => other.into(),
        })
    }
}

/// Where a request comes from, for records.
#[derive(Debug, Clone, Copy)]
pub struct Source(pub IpAddr);

impl<S: Sync> FromRequestParts<S> for Source {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        Ok(Self(peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0.ip())))
    }
}

/// The session of the path, which the caller may see. Any other is denied, in one way: one that does not exist, one of
/// somebody else, and one whose name is malformed.
#[derive(Debug)]
pub struct Seen {
    /// Who asks.
    pub caller: Caller,
    /// From where.
    pub source: Source,
    /// Which.
    pub session: Session,
}

impl FromRequestParts<ApiState> for Seen {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, state).await?;
        let Ok(source) = Source::from_request_parts(parts, state).await;
        let named = session_in_path(parts).await;
        // A malformed name is looked for as well: the same work.
        let wanted = named.unwrap_or_else(|| Uuid::nil().into());
        let found = state.store().session(wanted).await?;
        match found.filter(|session| caller.may_read(session)) {
            Some(session) => Ok(Self { caller, source, session }),
            None => {
                state.auth().record(Channel::Api, source.0, (named, caller.user_id()), Outcome::Denied);
                Err(ApiError::AccessDenied)
            }
        }
    }
}

impl Seen {
    /// Denies, and writes it down.
    pub fn denied(&self, state: &ApiState) -> ApiError {
        let ids = (Some(self.session.id), self.caller.user_id());
        state.auth().record(Channel::Api, self.source.0, ids, Outcome::Denied);
        ApiError::AccessDenied
    }
}

/// The session's name in the path; `None` for a malformed one.
pub async fn session_in_path(parts: &mut Parts) -> Option<SessionId> {
    Path::<String>::from_request_parts(parts, &()).await.ok()?.0.parse().ok()
}

/// A body of JSON, of at most 64 KiB, of which every field is known.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<ApiState> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &ApiState) -> Result<Self, ApiError> {
        json_type(request.headers())?;
        Ok(Self(parse(&read(request, BODY).await?)?))
    }
}

/// No body, or one that says nothing.
#[derive(Debug)]
pub struct Nothing;

impl FromRequest<ApiState> for Nothing {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &ApiState) -> Result<Self, ApiError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Empty {}
        let body = read(request, BODY).await?;
        if !body.is_empty() {
            parse::<Empty>(&body)?;
        }
        Ok(Self)
    }
}

/// Is the body said to be JSON?
pub fn json_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let said = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = said.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") { Ok(()) } else { Err(ApiError::UnsupportedMediaType) }
}

/// Reads a body to its end, or to the limit.
pub async fn read(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let said = request.headers().get(header::CONTENT_LENGTH);
    let said = said.and_then(|value| value.to_str().ok()).and_then(|text| text.parse::<u64>().ok());
    if said.is_some_and(|said| said > limit as u64) {
        return Err(ApiError::PayloadTooLarge);
    }
    let whole = Limited::new(request.into_body(), limit).collect();
    match tokio::time::timeout(BODY_WITHIN, whole).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::PayloadTooLarge),
        Ok(Err(_)) => Err(ApiError::InvalidRequest("the request's body broke off".into())),
        Err(_) => Err(ApiError::RequestTimeout),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner();
        ApiError::InvalidRequest(if path == "." { message.to_string() } else { format!("{path}: {message}") })
    })?;
    reader.end().map_err(|error| ApiError::InvalidRequest(error.to_string()))?;
    Ok(value)
}

/// A user's id in a body: the hyphenated form only.
pub fn user_id<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<UserId>, D::Error> {
    let text = Option::<String>::deserialize(reader)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}
