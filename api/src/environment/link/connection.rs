//! One connection to one agent: requests, answers and their limits.
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use carrel_agent::{
    flow::{Inbound, Outbound},
    wire::{
        COMMAND, ERROR, Health, PROCESS, ProcessSpec, RESUMED, SIGNAL, SPEC, SetupResult, WINDOW,
        limits::{COMMAND_BYTES, HEADER_LIST, SETUP_BYTES},
    },
};
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request, StatusCode};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::LinkError;

/// How long the agent may take for the head of an answer.
pub(super) const ANSWER: Duration = Duration::from_secs(15);
/// How long a setup script may take: far more than the start timeout of a session, which ends it first.
const SETUP: Duration = Duration::from_secs(600);
/// The largest JSON answer that is read, bytes.
const ANSWER_BYTES: usize = 64 * 1024;
/// Left for the small headers beside [`SPEC`] and [`COMMAND`], bytes.
const SMALL_HEADERS: usize = 2048;
/// Longest sentence that is taken from an agent, characters.
const SENTENCE: usize = 300;

/// An open connection to the agent of one environment, shared by all that use it.
///
/// Get it anew from [`super::Links::get`] for each use: one that is kept goes stale once it was without streams for a while.
pub struct Link {
    requests: SendRequest<Bytes>,
    state: Mutex<State>,
}

struct State {
    used: Instant,
    lost: Option<String>,
}

/// A running process.
pub struct Process {
    /// Its name for the agent; for a joined terminal the name that this one was started with.
    pub id: String,
    /// An existing terminal was joined instead of starting a shell.
    pub resumed: bool,
    /// Its stdin; finishing it is EOF, resetting it tells the agent that the client is gone.
    pub stdin: Outbound,
    /// Its stdout, or its terminal. [`super::exit`] after the end says how the process ended.
    pub stdout: Inbound,
    /// Its stderr; `None` on a terminal.
    pub stderr: Option<Inbound>,
    /// Resizes and signals.
    pub control: Control,
}

/// Resizes and signals one process. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    link: Arc<Link>,
    id: Arc<str>,
}

impl Control {
    /// Tells the terminal its size.
    ///
    /// # Errors
    /// `Refused` when there is no such process any more.
    pub async fn resize(&self, cols: u16, rows: u16) -> Result<(), LinkError> {
        let request = Request::post(format!("http://agent/v1/processes/{}/resize", self.id));
        self.link.tell(request.header(WINDOW, format!("{cols}x{rows}"))).await
    }

    /// Sends a signal, named without `SIG`, to the process group.
    ///
    /// # Errors
    /// `Refused` when there is no such process any more, or no such signal.
    pub async fn signal(&self, name: &str) -> Result<(), LinkError> {
        let request = Request::post(format!("http://agent/v1/processes/{}/signal", self.id));
        self.link.tell(request.header(SIGNAL, name)).await
    }
}

impl Link {
    pub(super) fn new(requests: SendRequest<Bytes>) -> Self {
        Self { requests, state: Mutex::new(State { used: Instant::now(), lost: None }) }
    }

    /// The agent's state of health; that it answers means that the environment is ready.
    ///
    /// # Errors
    /// `Lost` after 15 s without an answer.
    pub async fn health(&self) -> Result<Health, LinkError> {
        let request = finish(Request::get("http://agent/v1/health"))?;
        self.json(request, None, ANSWER).await
    }

    /// Runs a setup script, or waits for the one that runs. It runs once in an environment: later calls get the first
    /// one's result.
    ///
    /// # Errors
    /// `Refused` when the script is longer than [`SETUP_BYTES`], `Lost` after 10 minutes without an answer.
    pub async fn setup(&self, script: &str) -> Result<SetupResult, LinkError> {
        if script.len() > SETUP_BYTES {
            return Err(LinkError::Refused(format!("the setup script is longer than {SETUP_BYTES} bytes")));
        }
        let request = finish(Request::post("http://agent/v1/setup"))?;
        self.json(request, Some(script), SETUP).await
    }

    /// Starts a command, or with `None` a login shell. The requests for its stdout and its stderr travel together.
    ///
    /// # Errors
    /// `Refused` when the command is longer than [`COMMAND_BYTES`], the headers are too large, or the agent cannot start it.
    pub async fn start(
        self: &Arc<Self>,
        command: Option<&[u8]>,
        spec: &ProcessSpec,
    ) -> Result<Process, LinkError> {
        let id = Uuid::new_v4().simple().to_string();
        let request = finish(start_request(&id, command, spec)?)?;
        let stderr = match spec.pty {
            Some(_) => None,
            None => Some(finish(Request::get(format!("http://agent/v1/processes/{id}/stderr")))?),
        };
        // Both travel in one round trip. First the one that has no effect by itself: a process that is done before anybody asks for its
        // stderr keeps none.
        let stderr = match stderr {
            Some(request) => Some(self.send(request, true).await?),
            None => None,
        };
        let main = self.send(request, false).await?;
        let ((head, stdin, stdout), stderr) = tokio::try_join!(main.answer(ANSWER), async {
            match stderr {
                Some(sent) => sent.answer(ANSWER).await.map(|(_, _, body)| Some(body)),
                None => Ok(None),
            }
        })?;
        let id = process_id(&head)?;
        if spec.terminal.as_ref().is_some_and(|wanted| *wanted != id) {
            return Err(LinkError::Refused("the agent gave another terminal than it was asked for".into()));
        }
        Ok(Process {
            resumed: head.get(RESUMED).is_some_and(|value| value == "1"),
            stdin,
            stdout,
            stderr,
            control: Control { link: Arc::clone(self), id: Arc::from(id.as_str()) },
            id,
        })
    }

    /// Connects to a port of the environment's own loopback.
    ///
    /// # Errors
    /// `Refused` when nothing listens there.
    pub async fn tcp(&self, port: u16) -> Result<(Outbound, Inbound), LinkError> {
        let request = finish(Request::builder().method(Method::CONNECT).uri(format!("127.0.0.1:{port}")))?;
        let (_, outbound, inbound) = self.send(request, false).await?.answer(ANSWER).await?;
        Ok((outbound, inbound))
    }

    /// When a request was last made.
    pub(super) fn used(&self) -> Instant {
        self.state().used
    }

    /// Counts as a use: whoever was given the link has the full idle time for its first request.
    pub(super) fn touch(&self) {
        self.state().used = Instant::now();
    }

    /// Streams that are open, or still held by somebody.
    pub(super) fn streams(&self) -> usize {
        self.requests.num_wired_streams()
    }

    /// Said once, by the task that drives the connection.
    pub(super) fn set_lost(&self, why: &str) {
        self.state().lost.get_or_insert_with(|| why.to_owned());
    }

    /// Why the connection has ended, once it has.
    pub(super) fn lost(&self) -> Option<String> {
        self.state().lost.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, error: &dyn std::fmt::Display) -> LinkError {
        LinkError::Lost(self.lost().unwrap_or_else(|| error.to_string()))
    }

    /// Nothing was asked when this fails.
    async fn send(&self, request: Request<()>, end: bool) -> Result<Sent<'_>, LinkError> {
        let unsent = |error: h2::Error| LinkError::Unreachable(self.lost().unwrap_or(error.to_string()));
        // The agent chooses how many streams it allows: the wait for a free one has an end.
        let mut requests = timeout(ANSWER, self.requests.clone().ready())
            .await
            .map_err(|_| LinkError::Lost("the environment takes no more requests".into()))?
            .map_err(unsent)?;
        self.touch();
        let (response, stream) = requests.send_request(request, end).map_err(unsent)?;
        let mut outbound = Outbound::new(stream);
        if end {
            // Says so to the buffer too, which would else reset the stream when it is dropped.
            outbound.finish();
        }
        Ok(Sent { link: self, response, outbound })
    }

    async fn tell(&self, request: http::request::Builder) -> Result<(), LinkError> {
        self.send(finish(request)?, true).await?.answer(ANSWER).await.map(|_| ())
    }

    async fn json<T: DeserializeOwned>(
        &self,
        request: Request<()>,
        body: Option<&str>,
        limit: Duration,
    ) -> Result<T, LinkError> {
        timeout(limit, async {
            let mut sent = self.send(request, body.is_none()).await?;
            if let Some(text) = body {
                let text = Bytes::copy_from_slice(text.as_bytes());
                // An agent may answer without having read everything: what it says is what counts.
                if sent.outbound.write(text).await.is_ok() {
                    sent.outbound.finish();
                }
            }
            let (_, _, mut inbound) = sent.answer(limit).await?;
            let mut answer = Vec::new();
            while let Some(chunk) = inbound.read().await.map_err(|error| self.error(&error))? {
                if answer.len() + chunk.len() > ANSWER_BYTES {
                    return Err(LinkError::Refused("the agent's answer is too long".into()));
                }
                answer.extend_from_slice(&chunk);
            }
            serde_json::from_slice(&answer)
                .map_err(|error| LinkError::Refused(format!("the agent's answer is malformed: {error}")))
        })
        .await
        .unwrap_or_else(|_| Err(LinkError::Lost("the agent does not answer".into())))
    }
}

/// A request that is on its way.
struct Sent<'a> {
    link: &'a Link,
    response: h2::client::ResponseFuture,
    outbound: Outbound,
}

impl Sent<'_> {
    /// Waits for the answer's head; anything but a success is `Refused`.
    async fn answer(self, limit: Duration) -> Result<(HeaderMap, Outbound, Inbound), LinkError> {
        let response = timeout(limit, self.response)
            .await
            .map_err(|_| LinkError::Lost("the agent does not answer".into()))?
            .map_err(|error| self.link.error(&error))?;
        let (head, body) = response.into_parts();
        if head.status.is_success() {
            Ok((head.headers, self.outbound, Inbound::new(body)))
        } else {
            Err(LinkError::Refused(refusal(head.status, &head.headers)))
        }
    }
}

/// The agent's sentence, made fit for a terminal and a log: a tenant may have written it.
fn refusal(status: StatusCode, headers: &HeaderMap) -> String {
    let sentence: String = headers
        .get(ERROR)
        .map(|value| String::from_utf8_lossy(value.as_bytes()))
        .unwrap_or_default()
        .chars()
        .filter(|character| !character.is_control())
        .take(SENTENCE)
        .collect();
    match sentence.trim() {
        "" => format!("the agent answered {}", status.as_u16()),
        sentence => sentence.to_owned(),
    }
}

fn process_id(head: &HeaderMap) -> Result<String, LinkError> {
    head.get(PROCESS)
        .and_then(|value| value.to_str().ok())
        .filter(|id| {
            (1..=64).contains(&id.len())
                && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
        .map(str::to_owned)
        .ok_or_else(|| LinkError::Refused("the agent's answer is malformed: no process".into()))
}

fn start_request(
    id: &str,
    command: Option<&[u8]>,
    spec: &ProcessSpec,
) -> Result<http::request::Builder, LinkError> {
    let spec = serde_json::to_vec(spec).map_err(|error| LinkError::Refused(error.to_string()))?;
    let spec = BASE64_URL_SAFE_NO_PAD.encode(spec);
    let mut size = spec.len();
    let mut request = Request::post(format!("http://agent/v1/processes/{id}"));
    if let Some(command) = command {
        if command.len() > COMMAND_BYTES {
            return Err(LinkError::Refused(format!("the command is longer than {COMMAND_BYTES} bytes")));
        }
        let command = BASE64_URL_SAFE_NO_PAD.encode(command);
        size += command.len();
        request = request.header(COMMAND, command);
    }
    if size > HEADER_LIST as usize - SMALL_HEADERS {
        return Err(LinkError::Refused("the command and its variables are too long together".into()));
    }
    Ok(request.header(SPEC, spec))
}

fn finish(request: http::request::Builder) -> Result<Request<()>, LinkError> {
    request.body(()).map_err(|error| LinkError::Refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_no_control_characters_and_has_an_end() {
        let mut headers = HeaderMap::new();
        let hostile = [b"\x1b[2J".as_slice(), "é".repeat(1000).as_bytes()].concat();
        // A header value cannot hold the escape; a tab it can.
        assert!(http::HeaderValue::from_bytes(&hostile).is_err());
        headers.insert(ERROR, http::HeaderValue::from_bytes("\té".repeat(1000).as_bytes()).unwrap());
        let sentence = refusal(StatusCode::BAD_GATEWAY, &headers);
        assert_eq!(sentence, "é".repeat(SENTENCE));
        assert_eq!(refusal(StatusCode::NOT_FOUND, &HeaderMap::new()), "the agent answered 404");
    }

    #[test]
    fn a_process_id_that_could_change_a_path_is_refused() {
        for id in ["", "a/b", "..", "a b", "é", &"a".repeat(65)] {
            let mut head = HeaderMap::new();
            head.insert(PROCESS, http::HeaderValue::from_bytes(id.as_bytes()).unwrap());
            assert!(process_id(&head).is_err(), "{id}");
        }
        assert!(process_id(&HeaderMap::new()).is_err());
    }

    #[test]
    fn the_longest_command_fits_and_one_byte_more_does_not() {
        let spec = ProcessSpec::default();
        assert!(start_request("a", Some(&vec![b'x'; COMMAND_BYTES]), &spec).is_ok());
        assert!(start_request("a", Some(&vec![b'x'; COMMAND_BYTES + 1]), &spec).is_err());
        let spec = ProcessSpec { env: vec![("A".into(), "x".repeat(70_000))], ..spec };
        assert!(start_request("a", Some(&vec![b'x'; COMMAND_BYTES]), &spec).is_err());
    }
}
