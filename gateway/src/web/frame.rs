//! The frames of `docs/websocket.md`, in both dialects. Knows neither sockets nor sessions.
use axum::extract::ws::{Message, Utf8Bytes};
use bytes::{BufMut, Bytes, BytesMut};
use carrel_api::{environment::link::Exit, identity::SessionId, session::STEPS};
use serde::{Deserialize, Serialize};

use crate::bridge::{Over, Progress};

/// The binary dialect's name as a subprotocol.
pub const BINARY: &str = "carrel.v1";
/// The JSON dialect's name, for a browser that offers a ticket as a subprotocol and must be answered with one.
pub const JSON: &str = "carrel.json";
/// Largest frame taken, bytes.
pub const FRAME_BYTES: usize = 64 << 10;
/// Bytes of input that a binary client may have under way, not yet reported as taken.
pub const INPUT_WINDOW: usize = 64 << 10;
/// The sizes that a terminal may have.
const COLS: std::ops::RangeInclusive<u16> = 1..=500;
const ROWS: std::ops::RangeInclusive<u16> = 1..=300;

/// How a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Subprotocol [`BINARY`]: binary frames, acknowledged.
    Binary,
    /// Text frames with one JSON object each.
    Json,
}

/// What a client says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// Keys.
    Input(Bytes),
    /// The window's new size, within what a terminal may have.
    Resize(u16, u16),
    /// So many bytes more of the output are on the screen.
    Ack(usize),
    /// A ticket; only as the first frame.
    Auth(String),
}

/// No frame of the dialect. The text is for whoever writes a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// What the server says.
#[derive(Debug)]
pub enum Say {
    /// From the terminal.
    Output(Bytes),
    /// How the session stands.
    Status(Status),
    /// The session is over.
    Termination(Over),
    /// The terminal is there; binary only.
    Attached(Attached),
    /// So many bytes more of the input were taken; binary only.
    Taken(usize),
    /// The shell has ended; binary only.
    Exit(Exit),
}

/// How a session stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// `lifecycle_state`.
    pub state: &'static str,
    /// By the server's clock.
    pub remaining_seconds: i64,
    /// Which session.
    pub session_id: SessionId,
    /// Which exam.
    pub exam_id: String,
    /// Only while the environment is being made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Steps>,
}

/// How far the environment is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Steps {
    current_step: usize,
    total_steps: usize,
    step_description: &'static str,
    steps: [&'static str; STEPS.len()],
}

impl From<Progress> for Steps {
    fn from(progress: Progress) -> Self {
        Self {
            current_step: progress.step,
            total_steps: progress.of,
            step_description: progress.text,
            steps: STEPS,
        }
    }
}

/// The terminal that a client got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attached {
    /// It was there before; its screen comes first.
    pub resumed: bool,
    /// What the client sends is dropped.
    pub watching: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum JsonSaid {
    Input { data: String },
    Resize { cols: u16, rows: u16 },
    Auth { ticket: String },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum JsonSay<'a> {
    Output { data: &'a str },
    Status(&'a Status),
    Termination { reason: &'a str, message: &'a str },
}

#[derive(Serialize)]
struct ExitBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

impl Dialect {
    /// Reads a frame.
    pub fn read(self, message: &Message) -> Result<Said, Malformed> {
        match (self, message) {
            // The first frame may carry a ticket in either dialect.
            (_, Message::Text(text)) => json_said(text, self),
            (Self::Binary, Message::Binary(bytes)) => binary_said(bytes),
            (Self::Json, Message::Binary(_)) => {
                Err(Malformed("binary frames need the subprotocol carrel.v1"))
            }
            _ => Err(Malformed("not a data frame")),
        }
    }

    /// Writes a frame; `None` for what the dialect has no word for.
    pub fn write(self, say: &Say) -> Option<Message> {
        match self {
            Self::Binary => Some(Message::Binary(binary_say(say))),
            Self::Json => json_say(say).map(|text| Message::Text(Utf8Bytes::from(text))),
        }
    }
}

fn size(cols: u16, rows: u16) -> Said {
    Said::Resize(cols.clamp(*COLS.start(), *COLS.end()), rows.clamp(*ROWS.start(), *ROWS.end()))
}

fn json_said(text: &str, dialect: Dialect) -> Result<Said, Malformed> {
    match (dialect, serde_json::from_str(text)) {
        (_, Ok(JsonSaid::Auth { ticket })) => Ok(Said::Auth(ticket)),
        (Dialect::Binary, _) => Err(Malformed("carrel.v1 takes binary frames")),
        (Dialect::Json, Ok(JsonSaid::Input { data })) => Ok(Said::Input(data.into())),
        (Dialect::Json, Ok(JsonSaid::Resize { cols, rows })) => Ok(size(cols, rows)),
        (Dialect::Json, Err(_)) => {
            Err(Malformed(r#"not {"type":"input","data":"…"} or {"type":"resize","cols":80,"rows":24}"#))
        }
    }
}

fn binary_said(bytes: &Bytes) -> Result<Said, Malformed> {
    match bytes.split_first() {
        Some((0, input)) => Ok(Said::Input(bytes.slice_ref(input))),
        Some((1, &[c1, c0, r1, r0])) => Ok(size(u16::from_be_bytes([c1, c0]), u16::from_be_bytes([r1, r0]))),
        Some((2, &[b3, b2, b1, b0])) => {
            let count = u32::from_be_bytes([b3, b2, b1, b0]);
            Ok(Said::Ack(usize::try_from(count).unwrap_or(usize::MAX)))
        }
        Some((1, _)) => Err(Malformed("a resize has two numbers of two bytes")),
        Some((2, _)) => Err(Malformed("an acknowledgement has four bytes")),
        _ => Err(Malformed("no frame of carrel.v1 begins like this")),
    }
}

fn binary_say(say: &Say) -> Bytes {
    match say {
        Say::Output(bytes) => typed(0, bytes),
        Say::Status(status) => typed_json(1, &JsonSay::Status(status)),
        Say::Termination(over) => typed_json(2, &termination(over)),
        Say::Attached(attached) => typed_json(3, attached),
        Say::Taken(count) => typed(4, &u32::try_from(*count).unwrap_or(u32::MAX).to_be_bytes()),
        Say::Exit(exit) => typed_json(5, &exit_body(exit)),
    }
}

fn json_say(say: &Say) -> Option<String> {
    let text = match say {
        Say::Output(bytes) => {
            serde_json::to_string(&JsonSay::Output { data: &String::from_utf8_lossy(bytes) })
        }
        Say::Status(status) => serde_json::to_string(&JsonSay::Status(status)),
        Say::Termination(over) => serde_json::to_string(&termination(over)),
        Say::Attached(_) | Say::Taken(_) | Say::Exit(_) => return None,
    };
    text.ok()
}

fn termination(over: &Over) -> JsonSay<'_> {
    JsonSay::Termination { reason: over.code.as_str(), message: &over.message }
}

fn exit_body(exit: &Exit) -> ExitBody<'_> {
    match exit {
        Exit::Code(code) => ExitBody { code: Some(*code), signal: None, reason: None },
        Exit::Signal { name, out_of_memory } => {
            ExitBody { code: None, signal: Some(name), reason: out_of_memory.then_some("out_of_memory") }
        }
        Exit::Lost(_) => ExitBody { code: None, signal: None, reason: None },
    }
}

fn typed(kind: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(1 + payload.len());
    frame.put_u8(kind);
    frame.put_slice(payload);
    frame.freeze()
}

fn typed_json(kind: u8, payload: &impl Serialize) -> Bytes {
    // These types have only string keys and finite numbers: it does not fail.
    typed(kind, &serde_json::to_vec(payload).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use carrel_api::reason::ReasonCode;

    use super::*;

    fn binary(bytes: &'static [u8]) -> Result<Said, Malformed> {
        Dialect::Binary.read(&Message::Binary(Bytes::from_static(bytes)))
    }

    fn json(text: &str) -> Result<Said, Malformed> {
        Dialect::Json.read(&Message::Text(text.to_owned().into()))
    }

    fn text(say: &Say) -> serde_json::Value {
        match Dialect::Json.write(say) {
            Some(Message::Text(text)) => serde_json::from_str(&text).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn bytes(say: &Say) -> Bytes {
        match Dialect::Binary.write(say) {
            Some(Message::Binary(bytes)) => bytes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn binary_frames_are_read_as_documented() {
        assert_eq!(binary(b"\0ls\r"), Ok(Said::Input(Bytes::from_static(b"ls\r"))));
        assert_eq!(binary(b"\0"), Ok(Said::Input(Bytes::new())));
        assert_eq!(binary(&[1, 0, 120, 0, 40]), Ok(Said::Resize(120, 40)));
        assert_eq!(binary(&[2, 0, 1, 0, 0]), Ok(Said::Ack(65_536)));
        for bad in [&b""[..], b"\x01", b"\x01\0\0\0", b"\x02\0", b"\x03x", b"\xff"] {
            let bad: &'static [u8] = bad;
            assert!(binary(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_are_brought_into_what_a_terminal_may_have() {
        assert_eq!(binary(&[1, 0, 0, 0, 0]), Ok(Said::Resize(1, 1)));
        assert_eq!(json(r#"{"type":"resize","cols":65535,"rows":65535}"#), Ok(Said::Resize(500, 300)));
    }

    #[test]
    fn json_frames_are_read_as_documented() {
        assert_eq!(json(r#"{"type":"input","data":"é\r"}"#), Ok(Said::Input("é\r".into())));
        assert_eq!(json(r#"{"type":"auth","ticket":"t"}"#), Ok(Said::Auth("t".to_owned())));
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"type":"input"}"#,
            r#"{"type":"resize","cols":-1,"rows":2}"#,
            r#"{"type":"x"}"#,
        ] {
            assert!(json(bad).is_err(), "{bad}");
        }
        assert!(Dialect::Json.read(&Message::Binary(Bytes::from_static(b"\0x"))).is_err());
    }

    #[test]
    fn output_keeps_its_bytes_in_binary_and_shows_bad_ones_in_json() {
        let output = Say::Output(Bytes::from_static(b"a\xffb"));
        assert_eq!(bytes(&output), b"\0a\xffb"[..]);
        assert_eq!(text(&output), serde_json::json!({"type": "output", "data": "a\u{fffd}b"}));
    }

    #[test]
    fn the_end_says_why_in_both() {
        let over =
            || Say::Termination(Over { code: ReasonCode::TimeExpired, message: "Time is up.".to_owned() });
        let expected =
            serde_json::json!({"type": "termination", "reason": "time_expired", "message": "Time is up."});
        assert_eq!(text(&over()), expected);
        let frame = bytes(&over());
        assert_eq!(frame.first(), Some(&2));
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&frame[1..]).unwrap(), expected);
    }

    #[test]
    fn what_the_contract_has_no_word_for_is_not_said_in_json() {
        assert!(Dialect::Json.write(&Say::Taken(3)).is_none());
        assert!(Dialect::Json.write(&Say::Exit(Exit::Code(0))).is_none());
        assert_eq!(bytes(&Say::Taken(65_536)), [4, 0, 1, 0, 0][..]);
        assert_eq!(bytes(&Say::Exit(Exit::Code(3))), b"\x05{\"code\":3}"[..]);
    }
}
