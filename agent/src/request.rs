//! Reading requests: every header and path comes from outside and may be anything.
use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use carrel_agent::{
    flow::{Inbound, Outbound},
    wire::{self, Health, ProcessSpec, limits},
};
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use serde::Serialize;

use crate::{process, serve::Agent, session, setup, tcp};

/// Why a request is not done, as its status and [`wire::ERROR`] tell.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// 400
    #[error("{0}")]
    BadRequest(String),
    /// 404
    #[error("{0}")]
    NotFound(&'static str),
    /// 409
    #[error("{0}")]
    Conflict(&'static str),
    /// 413
    #[error("{0}")]
    TooLarge(String),
    /// 500
    #[error("{0}")]
    Failed(String),
    /// 502
    #[error("{0}")]
    Unreachable(String),
    /// 503
    #[error("{0}")]
    Busy(String),
}

impl Refusal {
    const fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unreachable(_) => StatusCode::BAD_GATEWAY,
            Self::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn response(&self) -> Response<()> {
        let sentence: String = self
            .to_string()
            .chars()
            .map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' })
            .take(512)
            .collect();
        let mut response = Response::new(());
        *response.status_mut() = self.status();
        response.headers_mut().insert(
            wire::ERROR,
            HeaderValue::from_str(&sentence).unwrap_or(HeaderValue::from_static("refused")),
        );
        response
    }
}

fn bad(sentence: &str) -> Refusal {
    Refusal::BadRequest(sentence.into())
}

/// One request: its body, and where the answer goes. A client that has gone meanwhile is noticed by whoever writes.
pub struct Exchange {
    /// The request's body.
    pub body: RecvStream,
    respond: SendResponse<Bytes>,
}

impl Exchange {
    /// Answers and goes on with a body in both directions; `None` when the client has gone.
    pub fn open(mut self, response: Response<()>) -> Option<(Inbound, Outbound)> {
        let stream = self.respond.send_response(response, false).ok()?;
        Some((Inbound::new(self.body), Outbound::new(stream)))
    }

    /// Answers with a body, reading no more of the request.
    pub async fn answer<T: Serialize>(self, value: &T) {
        let json = serde_json::to_vec(value).unwrap_or_default();
        if let Some((_input, mut output)) = self.open(Response::new(())) {
            // The client may have gone.
            if output.write(json.into()).await.is_ok() {
                output.finish();
            }
        }
    }

    /// Answers without a body.
    pub fn finish(mut self, response: Response<()>) {
        // The client may have gone.
        let _ = self.respond.send_response(response, true);
    }

    /// Refuses.
    pub fn refuse(self, refusal: &Refusal) {
        self.finish(refusal.response());
    }
}

/// Does what is asked and answers.
pub async fn handle(agent: Arc<Agent>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
    let (head, body) = request.into_parts();
    let exchange = Exchange { body, respond };
    let path: Vec<&str> = head.uri.path().split('/').skip(1).collect();
    if head.method == Method::CONNECT {
        let authority = head.uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        return tcp::connect(authority, exchange).await;
    }
    match (&head.method, path.as_slice()) {
        (&Method::POST, ["v1", "processes", id]) => match Start::read(id, &head.headers) {
            Ok(start) => process::run(agent, start, exchange).await,
            Err(refusal) => exchange.refuse(&refusal),
        },
        (&Method::GET, ["v1", "processes", id, "stderr"]) => match valid_id(id) {
            Ok(()) => process::stderr(agent, id, exchange).await,
            Err(refusal) => exchange.refuse(&refusal),
        },
        (&Method::POST, ["v1", "processes", id, "resize"]) => {
            finish(exchange, resize(&agent, id, &head.headers));
        }
        (&Method::POST, ["v1", "processes", id, "signal"]) => {
            finish(exchange, signal(&agent, id, &head.headers))
        }
        (&Method::POST, ["v1", "setup"]) => setup::run(agent, exchange).await,
        (&Method::GET, ["v1", "health"]) => {
            let health = Health {
                version: env!("CARGO_PKG_VERSION").into(),
                processes: agent.registry.len(),
                oom_kills: agent.memory.kills(),
            };
            exchange.answer(&health).await;
        }
        _ => exchange.refuse(&Refusal::NotFound("there is nothing at this path")),
    }
}

fn finish(exchange: Exchange, result: Result<(), Refusal>) {
    match result {
        Ok(()) => {
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::NO_CONTENT;
            exchange.finish(response);
        }
        Err(refusal) => exchange.refuse(&refusal),
    }
}

fn valid_id(id: &str) -> Result<(), Refusal> {
    let valid =
        (1..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if valid { Ok(()) } else { Err(bad("an id is 1 to 64 of the characters A-Z a-z 0-9 -")) }
}

fn resize(agent: &Agent, id: &str, headers: &HeaderMap) -> Result<(), Refusal> {
    valid_id(id)?;
    let (cols, rows) = window(headers.get(wire::WINDOW))?;
    agent.registry.get(id)?.resize(cols, rows)
}

/// Sends a signal to the process's group.
fn signal(agent: &Agent, id: &str, headers: &HeaderMap) -> Result<(), Refusal> {
    valid_id(id)?;
    let name = headers.get(wire::SIGNAL).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let signal = session::signal_named(name).ok_or_else(|| bad("this is no signal's name"))?;
    agent.registry.get(id)?.signal(signal)
}

/// `{cols}x{rows}` within the terminal's limits.
fn window(value: Option<&HeaderValue>) -> Result<(u16, u16), Refusal> {
    value
        .and_then(|value| value.to_str().ok()?.split_once('x'))
        .and_then(|(cols, rows)| Some((cols.parse().ok()?, rows.parse().ok()?)))
        .filter(|window| is_window(*window))
        .ok_or_else(|| bad("a window is {cols}x{rows}, 1 to 500 columns and 1 to 300 rows"))
}

fn is_window((cols, rows): (u16, u16)) -> bool {
    (1..=500).contains(&cols) && (1..=300).contains(&rows)
}

/// A checked request for a process.
#[derive(Debug)]
pub struct Start {
    /// Its id.
    pub id: String,
    /// How.
    pub spec: ProcessSpec,
    /// For the shell's `-c`; `None`: a login shell.
    pub command: Option<Vec<u8>>,
}

impl Start {
    /// A login shell?
    pub const fn is_shell(&self) -> bool {
        self.command.is_none() && !self.spec.sftp
    }

    fn read(id: &str, headers: &HeaderMap) -> Result<Self, Refusal> {
        valid_id(id)?;
        let spec = match headers.get(wire::SPEC) {
            None => ProcessSpec::default(),
            Some(value) => decode(value)
                .and_then(|json| serde_json::from_slice(&json).ok())
                .ok_or_else(|| bad("carrel-spec is not the base64url of a process's JSON"))?,
        };
        check(&spec)?;
        for id in spec.attachment.iter().chain(&spec.terminal) {
            valid_id(id)?;
        }
        let command = headers
            .get(wire::COMMAND)
            .map(|value| decode(value).ok_or_else(|| bad("carrel-command is not base64url")))
            .transpose()?;
        if let Some(command) = &command {
            if command.len() > limits::COMMAND_BYTES {
                return Err(Refusal::TooLarge(format!(
                    "a command has at most {} bytes",
                    limits::COMMAND_BYTES
                )));
            }
            if command.contains(&0) {
                return Err(bad("a command has no NUL byte"));
            }
        }
        Ok(Self { id: id.into(), spec, command })
    }
}

fn check(spec: &ProcessSpec) -> Result<(), Refusal> {
    if spec.env.len() > limits::ENV_VARS {
        return Err(Refusal::TooLarge(format!("a process has at most {} variables", limits::ENV_VARS)));
    }
    if spec
        .env
        .iter()
        .any(|(name, value)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0'))
    {
        return Err(bad("a variable's name is not empty and has no = or NUL, its value no NUL"));
    }
    match &spec.pty {
        Some(pty) if !is_window((pty.cols, pty.rows)) => {
            Err(bad("a terminal has 1 to 500 columns and 1 to 300 rows"))
        }
        Some(pty) if pty.term.len() > 64 || pty.term.contains('\0') => {
            Err(bad("TERM has at most 64 bytes and no NUL"))
        }
        _ => Ok(()),
    }
}

fn decode(value: &HeaderValue) -> Option<Vec<u8>> {
    BASE64_URL_SAFE_NO_PAD.decode(value.as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn encoded(bytes: &[u8]) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(bytes)
    }

    #[test]
    fn an_id_is_what_the_protocol_says() {
        for good in ["a", "0-Z", &"x".repeat(64)] {
            assert_eq!(valid_id(good), Ok(()));
        }
        for bad in ["", "a/b", "ä", "a b", "..", &"x".repeat(65)] {
            assert!(valid_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_window_is_within_the_limits() {
        let read = |text: &str| window(Some(&HeaderValue::from_str(text).unwrap()));
        assert_eq!(read("500x300"), Ok((500, 300)));
        for bad in ["", "x", "80", "0x24", "80x0", "501x24", "80x301", "-1x5", "80x24x1", "99999999x1"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(window(None).is_err());
    }

    #[test]
    fn commands_are_raw_bytes_within_limits() {
        let raw = b"printf '\xff\n'";
        let start = Start::read("a", &headers(&[(wire::COMMAND, &encoded(raw))])).unwrap();
        assert_eq!(start.command.as_deref(), Some(raw.as_slice()));
        let longest = vec![b'x'; limits::COMMAND_BYTES];
        assert!(Start::read("a", &headers(&[(wire::COMMAND, &encoded(&longest))])).is_ok());
        let longer = vec![b'x'; limits::COMMAND_BYTES + 1];
        assert!(matches!(
            Start::read("a", &headers(&[(wire::COMMAND, &encoded(&longer))])),
            Err(Refusal::TooLarge(_))
        ));
        assert!(Start::read("a", &headers(&[(wire::COMMAND, &encoded(b"a\0b"))])).is_err());
        assert!(Start::read("a", &headers(&[(wire::COMMAND, "!!")])).is_err());
    }

    #[test]
    fn a_spec_is_checked() {
        let read = |spec: &ProcessSpec| {
            Start::read("a", &headers(&[(wire::SPEC, &encoded(&serde_json::to_vec(spec).unwrap()))]))
        };
        assert!(read(&ProcessSpec::default()).is_ok());
        let env = |name: &str, value: &str| ProcessSpec {
            env: vec![(name.into(), value.into())],
            ..ProcessSpec::default()
        };
        for bad in [env("", "x"), env("a=b", "x"), env("a\0", "x"), env("a", "\0")] {
            assert!(read(&bad).is_err());
        }
        let many = ProcessSpec { env: vec![("A".into(), "b".into()); 129], ..ProcessSpec::default() };
        assert!(read(&many).is_err());
        assert!(Start::read("a", &headers(&[(wire::SPEC, &encoded(b"{"))])).is_err());
    }

    #[test]
    fn a_sentence_is_always_a_valid_header() {
        let response = Refusal::Failed("no\nsuch \u{1b}[31m thing ü".into()).response();
        assert_eq!(response.headers()[wire::ERROR], "no?such ?[31m thing ?");
    }
}
