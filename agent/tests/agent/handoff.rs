//! `connect`: stdin and stdout handed to the agent.
use std::{
    ffi::OsStr,
    fs::Permissions,
    io::Write as _,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            process::CommandExt as _,
        },
    },
    process::Stdio,
};

use carrel_agent::{flow, packed::Packed};
use http::{HeaderMap, Method};
use rustix::fs::OFlags;
use tokio::{io::join, net::UnixStream, time::timeout};

use crate::support::{Agent, DEADLINE, PROGRAM, new_id, open, read_all};

fn connect(agent: &Agent) -> tokio::process::Child {
    tokio::process::Command::new(PROGRAM)
        .args(["connect", "--socket"])
        .arg(agent.handed_socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn http2_passes_over_the_pipes_of_connect_which_ends_with_them() {
    let agent = Agent::start().await;
    let mut child = connect(&agent);
    let io = Packed::new(join(child.stdout.take().unwrap(), child.stdin.take().unwrap()));
    let (requests, connection) = flow::client(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut stream = open(requests, Method::GET, "/v1/health", HeaderMap::new()).await.unwrap();
    assert!(!read_all(&mut stream.input).await.is_empty());
    drop(stream);
    connection.abort();
    let status = timeout(DEADLINE, child.wait()).await.expect("connect did not end").unwrap();
    assert!(status.success());
    agent.assert_usable().await;
}

#[tokio::test]
async fn when_connect_is_killed_its_connection_is_lost() {
    let agent = Agent::start().await;
    let mut child = connect(&agent);
    let io = Packed::new(join(child.stdout.take().unwrap(), child.stdin.take().unwrap()));
    let (requests, connection) = flow::client(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut stream = open(requests, Method::GET, "/v1/health", HeaderMap::new()).await.unwrap();
    read_all(&mut stream.input).await;
    child.kill().await.unwrap();
    // Both ends of the pipes are still held here: only the agent can end it.
    let _ =
        timeout(DEADLINE, connection).await.expect("the agent held on to a connection whose connect is gone");
}

#[tokio::test]
async fn a_socket_that_is_stdin_and_stdout_is_left_as_it_was() {
    let agent = Agent::start().await;
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let end = || Stdio::from(OwnedFd::from(far.try_clone().unwrap()));
    let before = rustix::fs::fcntl_getfl(&far).unwrap();
    let mut command = tokio::process::Command::new(PROGRAM);
    command.args(["connect", "--socket"]).arg(agent.handed_socket());
    let mut child = command.stdin(end()).stdout(end()).kill_on_drop(true).spawn().unwrap();
    drop(command);
    near.set_nonblocking(true).unwrap();
    let (requests, connection) =
        flow::client(Packed::new(UnixStream::from_std(near).unwrap())).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut stream = open(requests, Method::GET, "/v1/health", HeaderMap::new()).await.unwrap();
    assert!(!read_all(&mut stream.input).await.is_empty());
    assert!(rustix::fs::fcntl_getfl(&far).unwrap().contains(OFlags::NONBLOCK), "it is in use");
    drop(stream);
    connection.abort();
    timeout(DEADLINE, child.wait()).await.expect("connect did not end").unwrap();
    // What the other side of it has closed, the agent lets go of before it says that it is done.
    assert_eq!(rustix::fs::fcntl_getfl(&far).unwrap(), before);
}

#[tokio::test]
async fn without_an_agent_or_with_one_that_goes_it_fails() {
    let agent = Agent::start().await;
    let mut child = connect(&agent);
    // Its HTTP/2 settings show that it was taken.
    let mut stdout = child.stdout.take().unwrap();
    let mut byte = [0];
    let preface = tokio::io::AsyncReadExt::read_exact(&mut stdout, &mut byte);
    timeout(DEADLINE, preface).await.unwrap().unwrap();
    let socket = agent.handed_socket();
    drop(agent);
    assert_eq!(timeout(DEADLINE, child.wait()).await.unwrap().unwrap().code(), Some(1));
    let status = tokio::process::Command::new(PROGRAM)
        .args(["connect", "--socket"])
        .arg(socket)
        .stderr(Stdio::null())
        .status()
        .await
        .unwrap();
    assert_eq!(status.code(), Some(1));
}

#[tokio::test]
async fn a_peer_that_hands_nothing_over_is_let_go() {
    let agent = Agent::start().await;
    let stream = UnixStream::connect(agent.handed_socket()).await.unwrap();
    stream.writable().await.unwrap();
    stream.try_write(b"no descriptors").unwrap();
    timeout(DEADLINE, stream.readable()).await.expect("it was not let go").unwrap();
    assert_eq!(stream.try_read(&mut [0]).unwrap_or(0), 0);
    agent.assert_usable().await;
}

#[tokio::test]
async fn only_its_own_user_reaches_the_socket() {
    let agent = Agent::start().await;
    let metadata = std::fs::metadata(agent.handed_socket()).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600);
}

/// A serving agent at a socket without a file, and how `connect` to it ends when nothing is said on its stdin.
struct Nameless {
    child: std::process::Child,
    socket: String,
}

impl Nameless {
    fn start() -> Self {
        let socket = format!("@carrel-test-{}", new_id());
        let child = std::process::Command::new(PROGRAM).args(["serve", "--socket", &socket]).spawn().unwrap();
        Self { child, socket }
    }

    fn connect(&self, program: impl AsRef<OsStr>) -> std::process::Command {
        let mut command = std::process::Command::new(program);
        command.args(["connect", "--socket", &self.socket]).stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }
}

impl Drop for Nameless {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[tokio::test]
async fn an_agent_that_is_just_starting_is_waited_for_and_needs_no_file() {
    let agent = Nameless::start();
    let mut child = tokio::process::Command::from(agent.connect(PROGRAM));
    let mut child = child.stdin(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let io = Packed::new(join(child.stdout.take().unwrap(), child.stdin.take().unwrap()));
    let (requests, connection) = timeout(DEADLINE, flow::client(io)).await.unwrap().unwrap();
    tokio::spawn(connection);
    let mut stream = open(requests, Method::GET, "/v1/health", HeaderMap::new()).await.unwrap();
    assert!(!read_all(&mut stream.input).await.is_empty());
}

#[test]
fn another_user_is_let_go_at_a_socket_without_a_file() {
    if !rustix::process::geteuid().is_root() {
        // Past the test runner, which would keep it to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: only root can be another user");
        return;
    }
    let agent = Nameless::start();
    // Where every user may run it.
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("agent");
    std::fs::copy(PROGRAM, &program).unwrap();
    // The agent says its settings to whom it serves.
    let other = agent.connect(&program).uid(65534).output().unwrap();
    assert_eq!((other.status.code(), other.stdout.as_slice()), (Some(1), b"".as_slice()));
}

#[tokio::test]
async fn install_copies_the_program() {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("bin/carrel-agent");
    for _ in 0..2 {
        let status = std::process::Command::new(PROGRAM).arg("install").arg(&copy).status().unwrap();
        assert!(status.success());
    }
    assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o7777, 0o555);
    let output = std::process::Command::new(&copy).arg("--version").output().unwrap();
    assert_eq!(output.stdout, format!("carrel-agent {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
}
