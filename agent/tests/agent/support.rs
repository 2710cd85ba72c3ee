//! A running agent, and requests to it.
use std::{
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use carrel_agent::{
    flow::{self, Inbound, Outbound},
    wire::{self, Join, ProcessSpec, Pty},
};
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout},
};

/// For anything that should happen soon.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_carrel-agent");

/// An agent of its own for one test; it is ended with it.
pub struct Agent {
    child: Child,
    directory: TempDir,
    requests: SendRequest<Bytes>,
}

impl Agent {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    pub async fn start_with(options: &[&str]) -> Self {
        Self::start_surrounded(options, &[]).await
    }

    /// With options and variables of the agent's own.
    pub async fn start_surrounded(options: &[&str], env: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("direct")).unwrap();
        let child = Command::new(PROGRAM)
            .args(["serve", "--listen-fd", "0", "--shell", "/bin/bash", "--home"])
            .arg(directory.path())
            .arg("--socket")
            .arg(directory.path().join("handed"))
            .args(options)
            .envs(env.iter().copied())
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        let requests = connect(&directory.path().join("direct")).await;
        let agent = Self { child, directory, requests };
        // Once it answers, it listens everywhere.
        assert!(agent.open(Method::GET, "/v1/health", HeaderMap::new()).await.is_ok());
        agent
    }

    pub fn home(&self) -> &Path {
        self.directory.path()
    }

    pub fn direct_socket(&self) -> PathBuf {
        self.home().join("direct")
    }

    pub fn handed_socket(&self) -> PathBuf {
        self.home().join("handed")
    }

    pub fn requests(&self) -> SendRequest<Bytes> {
        self.requests.clone()
    }

    /// Is it still there and of use?
    pub async fn assert_usable(&self) {
        let outcome = self.run("echo usable").await;
        assert_eq!((outcome.stdout.as_slice(), outcome.code()), (b"usable\n".as_slice(), 0));
    }

    pub async fn open(&self, method: Method, path: &str, headers: HeaderMap) -> Result<Stream, Refused> {
        open(self.requests(), method, path, headers).await
    }

    /// A process of `spec`; its stderr is not asked for.
    pub async fn process(&self, spec: &ProcessSpec, command: Option<&[u8]>) -> Result<Stream, Refused> {
        self.open(Method::POST, &format!("/v1/processes/{}", new_id()), process_headers(spec, command)).await
    }

    pub async fn command(&self, command: &str) -> Stream {
        self.process(&ProcessSpec::default(), Some(command.as_bytes())).await.unwrap()
    }

    /// Runs a command without input to its end.
    pub async fn run(&self, command: &str) -> Outcome {
        self.run_with(&ProcessSpec::default(), command.as_bytes(), b"").await
    }

    pub async fn run_with(&self, spec: &ProcessSpec, command: &[u8], stdin: &[u8]) -> Outcome {
        let id = new_id();
        let path = format!("/v1/processes/{id}");
        let mut stderr = self.open(Method::GET, &format!("{path}/stderr"), HeaderMap::new()).await.unwrap();
        let mut stream = self.open(Method::POST, &path, process_headers(spec, Some(command))).await.unwrap();
        let feed = async {
            // A process need not read all of it.
            let _ = stream.output.write(Bytes::copy_from_slice(stdin)).await;
            stream.output.finish();
        };
        let (stdout, stderr, ()) = timeout(DEADLINE, async {
            tokio::join!(read_all(&mut stream.input), read_all(&mut stderr.input), feed)
        })
        .await
        .expect("the command did not end");
        Outcome { stdout, stderr, trailers: stream.input.trailers().await.unwrap() }
    }

    /// A shell at a terminal.
    pub async fn shell(&self, join: Join, keep_seconds: Option<u64>) -> Result<Stream, Refused> {
        let spec = ProcessSpec {
            pty: Some(Pty { term: "xterm-256color".into(), cols: 80, rows: 24, modes: Vec::new() }),
            env: vec![("PS1".into(), "$ ".into())],
            keep_seconds,
            join,
            ..ProcessSpec::default()
        };
        self.process(&spec, None).await
    }

    pub async fn post(&self, path: &str, name: &'static str, value: &str) -> StatusCode {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        match self.open(Method::POST, path, headers).await {
            Ok(stream) => stream.status,
            Err(refused) => refused.status,
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

/// A connection that stays to the test's end. Of one that closes with its last stream it is left to chance whether the agent hears that
/// the stream was reset, or only that the connection is gone.
pub async fn connect(socket: &Path) -> SendRequest<Bytes> {
    let (requests, connection) = flow::client(UnixStream::connect(socket).await.unwrap()).await.unwrap();
    let held = requests.clone();
    tokio::spawn(async move {
        // Its end is seen by whoever reads a stream of it.
        let _ = connection.await;
        drop(held);
    });
    requests
}

/// An answer with a body.
pub struct Stream {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub input: Inbound,
    pub output: Outbound,
}

/// An answer that is a refusal.
#[derive(Debug)]
pub struct Refused {
    pub status: StatusCode,
    pub sentence: String,
}

pub async fn open(
    requests: SendRequest<Bytes>,
    method: Method,
    path: &str,
    headers: HeaderMap,
) -> Result<Stream, Refused> {
    let uri = if method == Method::CONNECT { path.to_owned() } else { format!("http://agent{path}") };
    let mut request = Request::builder().method(method).uri(uri).body(()).unwrap();
    *request.headers_mut() = headers;
    let mut requests = requests.ready().await.unwrap();
    let (response, stream) = requests.send_request(request, false).unwrap();
    let output = Outbound::new(stream);
    let response = timeout(DEADLINE, response).await.expect("no answer").unwrap();
    let (head, body) = response.into_parts();
    if head.status.is_success() {
        Ok(Stream { status: head.status, headers: head.headers, input: Inbound::new(body), output })
    } else {
        let sentence =
            head.headers.get(wire::ERROR).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
        Err(Refused { status: head.status, sentence })
    }
}

pub fn process_headers(spec: &ProcessSpec, command: Option<&[u8]>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let spec = serde_json::to_vec(spec).unwrap();
    headers.insert(wire::SPEC, BASE64_URL_SAFE_NO_PAD.encode(spec).parse().unwrap());
    if let Some(command) = command {
        headers.insert(wire::COMMAND, BASE64_URL_SAFE_NO_PAD.encode(command).parse().unwrap());
    }
    headers
}

pub fn new_id() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("test-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Stream {
    pub fn process_id(&self) -> &str {
        self.headers[wire::PROCESS].to_str().unwrap()
    }

    pub fn resumed(&self) -> bool {
        self.headers.contains_key(wire::RESUMED)
    }

    pub async fn send(&mut self, text: &str) {
        timeout(DEADLINE, self.output.write(Bytes::copy_from_slice(text.as_bytes()))).await.unwrap().unwrap();
    }

    /// Reads until `text` has come; returns everything up to there.
    pub async fn expect(&mut self, text: &str) -> String {
        let mut got = Vec::new();
        let found = timeout(DEADLINE, async {
            while let Some(bytes) = self.input.read().await.unwrap() {
                got.extend_from_slice(&bytes);
                if String::from_utf8_lossy(&got).contains(text) {
                    return true;
                }
            }
            false
        })
        .await;
        let got = String::from_utf8_lossy(&got).into_owned();
        assert_eq!(found, Ok(true), "no {text:?} in {got:?}");
        got
    }

    /// The rest, and how it ended.
    pub async fn end(&mut self) -> Outcome {
        timeout(DEADLINE, async {
            let stdout = read_all(&mut self.input).await;
            Outcome { stdout, stderr: Vec::new(), trailers: self.input.trailers().await.unwrap_or_default() }
        })
        .await
        .expect("the process did not end")
    }
}

pub async fn read_all(input: &mut Inbound) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = input.read().await.expect("the stream was lost") {
        all.extend_from_slice(&bytes);
    }
    all
}

#[derive(Debug)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub trailers: HeaderMap,
}

impl Outcome {
    pub fn code(&self) -> i32 {
        self.trailers[wire::EXIT_CODE].to_str().unwrap().parse().unwrap()
    }

    pub fn signal(&self) -> &str {
        self.trailers[wire::EXIT_SIGNAL].to_str().unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Is there such a process (one that is not merely waiting to be collected)?
pub fn is_running(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

/// Waits for something that nobody announces.
pub async fn eventually(what: &str, deadline: Duration, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !holds() {
        assert!(Instant::now() < end, "{what}: not within {deadline:?}");
        sleep(Duration::from_millis(10)).await;
    }
}
