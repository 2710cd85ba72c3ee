//! `/v1/sessions/{session_id}/status`: once as JSON, or as a WebSocket for every change.
use std::{sync::Arc, time::Duration};

use axum::{
    extract::{
        FromRequestParts as _, Request, State, WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket},
    },
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::timeout};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{
    ApiState,
    body::StatusBody,
    error::{ApiError, Data, Failure, Success},
    extract::{Seen, Source, bearer, session_in_path},
};
use crate::{
    access::{COOKIE, LoginError},
    identity::SessionId,
    session::{Session, State as SessionState},
    store::{Channel, Outcome, StoreError},
};

/// In front of a ticket, as a subprotocol.
const TICKET: &str = "carrel.ticket.";
/// A ticket arrives within this, and is looked up.
const LOGIN_WITHIN: Duration = Duration::from_secs(10);
/// Without any change, the time left is told this often; a client that is gone is noticed by it.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// A frame is taken by the client's side within this, else it is too slow.
const SEND_WITHIN: Duration = Duration::from_secs(10);
/// The last frame is sent and answered within this.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);
/// Largest frame from a client, bytes: a ticket and its wrapping.
const FRAME: usize = 4096;

/// Close codes of the contract.
mod code {
    pub const AWAY: u16 = 1001;
    pub const UNAVAILABLE: u16 = 1011;
    pub const UNAUTHENTICATED: u16 = 4001;
    pub const DENIED: u16 = 4003;
    pub const TERMINATED: u16 = 4006;
    pub const TOO_SLOW: u16 = 4008;
}

/// How the session does. With `Upgrade: websocket` every change is sent as a frame.
#[utoipa::path(
    get, path = "/v1/sessions/{session_id}/status", tag = "sessions", security(("bearer" = [])),
    params(("session_id" = String, Path, format = Uuid)),
    responses(
        (status = 101, description = "A WebSocket of `status_update` and `error` frames"),
        (status = 200, body = Success<StatusBody>, description = "How it does now"),
        (status = 401, body = Failure, description = "`UNAUTHENTICATED`"),
        (status = 403, body = Failure, description = "`ACCESS_DENIED`; `ORIGIN_NOT_ALLOWED` for a WebSocket"),
        (status = "default", body = Failure, description = "Any other error"),
    )
)]
pub async fn get(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let (mut parts, _) = request.into_parts();
    let wants_socket = parts.headers.get(header::UPGRADE).is_some();
    if wants_socket {
        let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &state).await;
        let upgrade = upgrade.map_err(|error| ApiError::InvalidRequest(error.body_text()))?;
        return socket(state, parts, upgrade).await;
    }
    let seen = Seen::from_request_parts(&mut parts, &state).await?;
    let body = StatusBody::new(&seen.session, state.lifecycle().now_ms());
    Ok(Data(StatusCode::OK, body).into_response())
}

/// What a client shows at its door.
enum Credential {
    Bearer(Zeroizing<String>),
    Ticket(Zeroizing<String>),
    Cookie(Zeroizing<String>),
}

/// A refusal: close code and sentence.
type Close = (u16, &'static str);

async fn socket(
    state: ApiState,
    mut parts: Parts,
    mut upgrade: WebSocketUpgrade,
) -> Result<Response, ApiError> {
    if !state.origins().allow(&parts.headers) {
        return Err(ApiError::OriginNotAllowed);
    }
    let place = state.socket_place().ok_or(ApiError::Overloaded)?;
    let Ok(source) = Source::from_request_parts(&mut parts, &state).await;
    let named = session_in_path(&mut parts).await;
    let protocol: Option<HeaderValue> = upgrade
        .requested_protocols()
        .find(|protocol| protocol.to_str().is_ok_and(|text| text.starts_with(TICKET)))
        .cloned();
    let credential = credential(&parts.headers, protocol.as_ref());
    if let Some(protocol) = protocol {
        upgrade.set_selected_protocol(protocol);
    }
    let upgrade = upgrade.max_frame_size(FRAME).max_message_size(FRAME);
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        let _open = state.auth().metrics().web_socket();
        let _place = place;
        let login = login(&state, &mut socket, named, credential);
        let entered = tokio::select! {
            entered = timeout(LOGIN_WITHIN, login) => entered.unwrap_or(Err((code::UNAUTHENTICATED, "authentication failed"))),
            () = state.shutdown().cancelled() => Err((code::AWAY, "the server restarts; connect again")),
        };
        let outcome = if entered.is_ok() { Outcome::Granted } else { Outcome::Denied };
        state.auth().record(Channel::Browser, source.0, (named, None), outcome);
        let (code, reason) = match entered {
            Ok(feed) => follow(&state, &mut socket, feed).await,
            Err(close) => close,
        };
        close(socket, code, reason).await;
    }))
}

/// The one that counts: the header before the ticket before the cookie.
fn credential(headers: &HeaderMap, protocol: Option<&HeaderValue>) -> Option<Credential> {
    let secret = |text: &str| Zeroizing::new(text.to_owned());
    if headers.contains_key(header::AUTHORIZATION) {
        // A header that is no bearer token is a wrong credential, not none.
        return Some(Credential::Bearer(secret(bearer(headers).unwrap_or_default())));
    }
    if let Some(ticket) =
        protocol.and_then(|text| text.to_str().ok()).and_then(|text| text.strip_prefix(TICKET))
    {
        return Some(Credential::Ticket(secret(ticket)));
    }
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find_map(|(name, value)| (name == COOKIE).then(|| Credential::Cookie(secret(value))))
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum First {
    Auth { ticket: String },
}

/// Finds out whether they may see the session, by what the request carried or by the first frame.
async fn login(
    state: &ApiState,
    socket: &mut WebSocket,
    named: Option<SessionId>,
    credential: Option<Credential>,
) -> Result<watch::Receiver<Arc<Session>>, Close> {
    const UNAUTHENTICATED: Close = (code::UNAUTHENTICATED, "authentication failed");
    const DENIED: Close = (code::DENIED, "access denied");
    const UNAVAILABLE: Close = (code::UNAVAILABLE, "the database does not answer; connect again");
    let refused = |error: LoginError, denied: Close| match error {
        LoginError::Denied => denied,
        LoginError::Overloaded | LoginError::Unavailable => UNAVAILABLE,
    };
    let wanted = named.unwrap_or_else(|| Uuid::nil().into());
    let credential = match credential {
        Some(credential) => credential,
        None => match socket.recv().await {
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                Ok(First::Auth { ticket }) => Credential::Ticket(Zeroizing::new(ticket)),
                Err(_) => return Err(UNAUTHENTICATED),
            },
            _ => return Err(UNAUTHENTICATED),
        },
    };
    let auth = state.auth();
    match &credential {
        Credential::Bearer(token) => {
            let caller = auth.caller(token).await.map_err(|error| refused(error, UNAUTHENTICATED))?;
            let session = state.store().session(wanted).await.map_err(|_| UNAVAILABLE)?;
            if !session.is_some_and(|session| caller.may_read(&session)) {
                return Err(DENIED);
            }
        }
        Credential::Ticket(ticket) => {
            auth.ticket(wanted, ticket).await.map_err(|error| refused(error, UNAUTHENTICATED))?;
        }
        Credential::Cookie(value) => {
            auth.cookie(wanted, value).await.map_err(|error| refused(error, UNAUTHENTICATED))?;
        }
    }
    state.lifecycle().watch(wanted).await.map_err(|error| match error {
        StoreError::NotFound => DENIED,
        _ => UNAVAILABLE,
    })
}

#[derive(Serialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
enum Frame {
    StatusUpdate {
        lifecycle_state: SessionState,
        #[serde(flatten)]
        status: StatusBody,
    },
    Error {
        code: &'static str,
        message: &'static str,
        recoverable: bool,
    },
}

/// Sends the status now, at every change, and the time left in between.
async fn follow(state: &ApiState, socket: &mut WebSocket, mut feed: watch::Receiver<Arc<Session>>) -> Close {
    const RESTART: Close = (code::AWAY, "the server restarts; connect again");
    const GONE: Close = (code::AWAY, "");
    let mut tick = tokio::time::interval(TELL_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.reset();
    loop {
        let session = Arc::clone(&feed.borrow_and_update());
        let status = StatusBody::new(&session, state.lifecycle().now_ms());
        let update = Frame::StatusUpdate { lifecycle_state: session.state, status };
        match timeout(SEND_WITHIN, send(socket, &update)).await {
            Ok(true) => {}
            Ok(false) => return GONE,
            Err(_) => return (code::TOO_SLOW, "frames are not taken"),
        }
        if session.state.is_terminal() {
            if let (SessionState::Failed, Some(reason)) = (session.state, &session.reason) {
                let error = Frame::Error {
                    code: "ENVIRONMENT_FAILED",
                    message: reason.code.user_message(),
                    recoverable: reason.code.recoverable(),
                };
                let _ = timeout(SEND_WITHIN, send(socket, &error)).await;
            }
            return (code::TERMINATED, "the session has ended");
        }
        loop {
            tokio::select! {
                changed = feed.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return RESTART,
                },
                _ = tick.tick() => break,
                () = state.shutdown().cancelled() => return RESTART,
                heard = socket.recv() => match heard {
                    // Pings are answered by the library; nothing else is listened to.
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return GONE,
                    Some(Ok(_)) => {}
                },
            }
        }
    }
}

async fn send(socket: &mut WebSocket, frame: &Frame) -> bool {
    let Ok(text) = serde_json::to_string(frame) else { return false };
    socket.send(Message::Text(text.into())).await.is_ok()
}

async fn close(mut socket: WebSocket, code: u16, reason: &'static str) {
    let frame = CloseFrame { code, reason: reason.into() };
    let farewell = async {
        if socket.send(Message::Close(Some(frame))).await.is_ok() {
            // Until the other side has answered, so that the frame is not lost with the connection.
            while let Some(Ok(_)) = socket.recv().await {}
        }
    };
    let _ = timeout(CLOSE_WITHIN, farewell).await;
}
