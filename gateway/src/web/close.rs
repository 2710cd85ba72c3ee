//! How a terminal's WebSocket is closed: the codes of `docs/websocket.md`, and why.
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use futures_util::StreamExt;
use tokio::time::timeout;

use super::frame::Malformed;
use crate::bridge::{Over, Refusal};

/// How long the last words and the client's own close may take.
pub const LAST_WORDS: Duration = Duration::from_secs(5);

/// Close codes of the contract beside those of RFC 6455.
pub mod code {
    /// No credential, or a wrong one.
    pub const UNAUTHENTICATED: u16 = 4001;
    /// No such session, or not the caller's.
    pub const DENIED: u16 = 4003;
    /// The environment did not become ready.
    pub const NOT_READY: u16 = 4005;
    /// The session was over before.
    pub const OVER: u16 = 4006;
    /// The client takes nothing.
    pub const SLOW: u16 = 4008;
    /// The session has too many connections.
    pub const CROWDED: u16 = 4009;
}

/// Why a socket is closed.
pub enum End {
    /// The session was over before it came.
    AlreadyOver(Over),
    /// The session is over now.
    Over(Over),
    /// The shell has ended, all of it was said.
    Exited,
    /// The environment or the server cannot.
    Refused(Refusal),
    /// The client takes nothing.
    Slow,
    /// The client sends what is no frame.
    Malformed(Malformed),
    /// The client sends too much at once, or breaks the protocol.
    Broken,
    /// The server ends.
    Shutdown,
    /// The client has gone.
    Gone,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Over(over) => Self::Over(over),
            other => Self::Refused(other),
        }
    }
}

impl End {
    /// The close frame, unless there is nobody to send it to.
    pub fn close(&self) -> Option<Message> {
        let (code, reason) = match self {
            Self::AlreadyOver(over) => (code::OVER, over.code.as_str().to_owned()),
            Self::Over(over) => (close_code::NORMAL, over.code.as_str().to_owned()),
            Self::Exited => (close_code::NORMAL, "the shell has ended".to_owned()),
            Self::Refused(refusal) => (refused(refusal), refusal.to_string()),
            Self::Slow => (code::SLOW, "too slow: nothing was taken for 60 s".to_owned()),
            Self::Malformed(malformed) => (close_code::UNSUPPORTED, malformed.to_string()),
            Self::Broken => (close_code::SIZE, "a frame is larger than 64 KiB, or malformed".to_owned()),
            Self::Shutdown => (close_code::AWAY, "the server restarts; connect again".to_owned()),
            Self::Gone => return None,
        };
        Some(close(code, &reason))
    }
}

pub fn refused(refusal: &Refusal) -> u16 {
    match refusal {
        Refusal::Over(_) => code::OVER,
        Refusal::TooManyConnections => code::CROWDED,
        Refusal::NotReady => code::NOT_READY,
        Refusal::Forbidden(_) => code::DENIED,
        Refusal::Refused(_) | Refusal::Lost | Refusal::Unavailable => close_code::ERROR,
    }
}

/// A close frame; its reason is cut to what one holds.
pub fn close(code: u16, reason: &str) -> Message {
    let end = (0..=reason.len().min(123)).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
    Message::Close(Some(CloseFrame { code, reason: reason.get(..end).unwrap_or_default().into() }))
}

/// Says why there is nothing, waits a moment for the client's own close, and is gone.
pub async fn refuse(mut socket: WebSocket, code: u16, reason: &str) {
    let words = async {
        socket.send(close(code, reason)).await?;
        while let Some(message) = socket.next().await {
            message?;
        }
        Ok::<_, axum::Error>(())
    };
    // A client that does not close is left.
    let _ = timeout(LAST_WORDS, words).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_close_reason_is_cut_between_characters() {
        let reason = format!("{}é", "x".repeat(122));
        let Message::Close(Some(frame)) = close(4008, &reason) else { panic!() };
        assert_eq!(frame.reason.as_str(), "x".repeat(122));
        assert_eq!(frame.code, 4008);
    }
}
