//! `/v1/sessions/{id}/terminal`: who is it, and how do they speak. What follows is [`attachment`](super::attachment)'s.
use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    extract::{
        ConnectInfo, Path, State, WebSocketUpgrade,
        ws::{Message, WebSocket, close_code, rejection::WebSocketUpgradeRejection},
    },
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use carrel_api::{access::Access, identity::SessionId};
use tokio::time::timeout;
use tracing::Instrument;

use super::{
    WebState, attachment,
    close::{code, refuse},
    error,
    frame::{BINARY, Dialect, FRAME_BYTES, JSON, Malformed, Said},
    login::{self, Credential, NotIn},
};

/// Before a ticket as a subprotocol.
const TICKET: &str = "carrel.ticket.";
/// From the upgrade to a credential.
const LOGIN_WITHIN: Duration = Duration::from_secs(10);
/// tungstenite's buffer of reads, bytes: its default of 128 KiB for each connection is more than a terminal needs.
const READ_BUFFER: usize = 16 << 10;

/// What a client offers in `Sec-WebSocket-Protocol`.
struct Offered {
    dialect: Dialect,
    ticket: Option<String>,
    /// What it is answered: a browser ends a connection when none of its offers is chosen.
    chosen: Option<HeaderValue>,
}

fn offered<'a>(protocols: impl Iterator<Item = &'a HeaderValue>) -> Offered {
    let mut offered = Offered { dialect: Dialect::Json, ticket: None, chosen: None };
    let mut json = false;
    let mut with_ticket = None;
    for protocol in protocols {
        let Ok(text) = protocol.to_str() else { continue };
        if text == BINARY {
            offered.dialect = Dialect::Binary;
        } else if text == JSON {
            json = true;
        } else if let Some(ticket) = text.strip_prefix(TICKET) {
            offered.ticket = Some(ticket.to_owned());
            with_ticket = Some(protocol.clone());
        }
    }
    offered.chosen = match offered.dialect {
        Dialect::Binary => Some(HeaderValue::from_static(BINARY)),
        Dialect::Json if json => Some(HeaderValue::from_static(JSON)),
        // Used up by now.
        Dialect::Json => with_ticket,
    };
    offered
}

/// The route. Refusals that a browser's script is to see are close codes: it cannot read the status of a failed upgrade.
pub async fn terminal(
    State(state): State<WebState>,
    Path(session_id): Path<String>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let Ok(mut upgrade) = upgrade else {
        return error(
            StatusCode::UPGRADE_REQUIRED,
            "WEBSOCKET_REQUIRED",
            "this is a WebSocket; see docs/websocket.md",
        );
    };
    if !state.0.origins.allow(&headers) {
        tracing::info!(%peer, "a page of a foreign origin was refused");
        return error(
            StatusCode::FORBIDDEN,
            "ORIGIN_NOT_ALLOWED",
            "this page's origin is not let in; see --allowed-origins",
        );
    }
    let Ok(stranger) = Arc::clone(&state.0.strangers).try_acquire_owned() else {
        let mut busy = error(StatusCode::SERVICE_UNAVAILABLE, "NOT_READY", "too many logins at this moment");
        busy.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        return busy;
    };
    let offered = offered(upgrade.requested_protocols());
    if let Some(chosen) = offered.chosen {
        upgrade.set_selected_protocol(chosen);
    }
    let dialect = offered.dialect;
    let credential = login::credential(&headers, offered.ticket);
    let seen = state.0.sockets.token();
    // A malformed id is a session that does not exist, and is answered like one.
    let session_id = session_id.parse::<SessionId>().ok();
    let span = tracing::info_span!(
        "terminal",
        %peer,
        session_id = session_id.map(tracing::field::display),
        user_id = tracing::field::Empty
    );
    upgrade.max_frame_size(FRAME_BYTES).max_message_size(FRAME_BYTES).read_buffer_size(READ_BUFFER).on_upgrade(
        move |mut socket| {
            async move {
                let _seen = seen;
                let _open = state.0.auth.metrics().web_socket();
                let entered = tokio::select! {
                    entered = enter(&state, &mut socket, dialect, session_id, credential, peer) => entered,
                    () = state.0.shutdown.cancelled() => Err((close_code::AWAY, "the server restarts; connect again")),
                };
                drop(stranger);
                let access = match entered {
                    Ok(access) => access,
                    Err((code, reason)) => {
                        tracing::info!(code, reason, "a terminal was refused");
                        return refuse(socket, code, reason).await;
                    }
                };
                tracing::Span::current().record("user_id", tracing::field::display(access.user_id()));
                tracing::info!(?dialect, watching = access.only_watches(), "a terminal's connection is in");
                let visit = state.0.bridge.enter(access).await;
                attachment::run(socket, dialect, visit, &state.0.bridge, &state.0.shutdown).await;
            }
            .instrument(span)
        },
    )
}

/// Finds out who it is: by what the request carried, else by the first frame.
async fn enter(
    state: &WebState,
    socket: &mut WebSocket,
    dialect: Dialect,
    session_id: Option<SessionId>,
    credential: Option<Credential>,
    peer: SocketAddr,
) -> Result<Access, (u16, &'static str)> {
    let login = async {
        let credential = match credential {
            Some(credential) => credential,
            None => Credential::Ticket(first_frame(socket, dialect).await?.into()),
        };
        login::enter(&state.0.auth, session_id, credential, peer.ip()).await
    };
    timeout(LOGIN_WITHIN, login).await.unwrap_or(Err(NotIn::Unauthenticated)).map_err(|not_in| match not_in {
        NotIn::Unauthenticated => (code::UNAUTHENTICATED, "authentication failed"),
        NotIn::Denied => (code::DENIED, "access denied"),
        NotIn::Unavailable => {
            (close_code::ERROR, "the server cannot check logins now; try again in a moment")
        }
    })
}

async fn first_frame(socket: &mut WebSocket, dialect: Dialect) -> Result<String, NotIn> {
    loop {
        let message = match socket.recv().await {
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(message)) => message,
            Some(Err(_)) | None => return Err(NotIn::Unauthenticated),
        };
        return match dialect.read(&message) {
            Ok(Said::Auth(ticket)) => Ok(ticket),
            Ok(_) | Err(Malformed(_)) => Err(NotIn::Unauthenticated),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(offers: &[&'static str]) -> (Dialect, Option<String>, Option<String>) {
        let values: Vec<_> = offers.iter().map(|offer| HeaderValue::from_static(offer)).collect();
        let Offered { dialect, ticket, chosen } = offered(values.iter());
        (dialect, ticket, chosen.map(|value| value.to_str().unwrap().to_owned()))
    }

    #[test]
    fn a_client_is_answered_one_of_its_offers_and_with_the_ticket_only_if_there_is_no_other() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(choose(&[]), (Dialect::Json, None, None));
        assert_eq!(choose(&["other"]), (Dialect::Json, None, None));
        assert_eq!(choose(&["carrel.v1"]), (Dialect::Binary, None, text("carrel.v1")));
        assert_eq!(
            choose(&["carrel.ticket.T", "carrel.v1"]),
            (Dialect::Binary, text("T"), text("carrel.v1"))
        );
        assert_eq!(
            choose(&["carrel.json", "carrel.ticket.T"]),
            (Dialect::Json, text("T"), text("carrel.json"))
        );
        assert_eq!(choose(&["carrel.ticket.T"]), (Dialect::Json, text("T"), text("carrel.ticket.T")));
    }
}
