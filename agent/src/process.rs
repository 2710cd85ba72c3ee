//! Processes on pipes: a command's stdin, stdout and stderr, and how it ended.
use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, process::CommandExt as _},
    },
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use bytes::Bytes;
use carrel_agent::{
    flow::{Closed, Inbound, Outbound},
    wire,
};
use http::{HeaderMap, HeaderValue, Response};
use rustix::{io::Errno, process::Pid};
use tokio::{io::AsyncWriteExt as _, net::unix::pipe, sync::oneshot};

use crate::{
    join,
    reap::{Ending, Exit},
    registry::{Handle, Stderr},
    request::{Exchange, Refusal, Start},
    serve::Agent,
    session,
};

/// Most that is read from a process at once, bytes.
const READ: usize = 64 * 1024;

/// Where distributions keep the file transfer server of OpenSSH.
const SFTP_SERVERS: [&str; 3] =
    ["/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server"];

thread_local! {
    /// One buffer for all reads: the agent has one thread, and nothing waits between a read and its copy.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ]);
}

/// Reads what is there, at most [`READ`] bytes. Empty: the end.
///
/// # Errors
/// Of `read`.
pub fn read_some(read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<Bytes> {
    SCRATCH.with_borrow_mut(|scratch| {
        let length = read(scratch)?;
        Ok(Bytes::copy_from_slice(scratch.get(..length).unwrap_or_default()))
    })
}

/// Starts what is asked for and stays with it until it has ended.
pub async fn run(agent: Arc<Agent>, start: Start, exchange: Exchange) {
    if let Err(refusal) = agent.registry.admit(&start.id) {
        return exchange.refuse(&refusal);
    }
    if let Some(pty) = start.spec.pty.clone() {
        return join::run(agent, start, pty, exchange).await;
    }
    match Pipes::start(&agent, &start) {
        Ok(pipes) => pipes.serve(agent, start.id, exchange).await,
        Err(refusal) => exchange.refuse(&refusal),
    }
}

/// What is to be run: a command, a login shell, or the file transfer server.
pub fn command(agent: &Agent, start: &Start) -> Command {
    let shell = &agent.account.shell;
    let mut command = if start.spec.sftp {
        match SFTP_SERVERS.into_iter().find(|server| Path::new(server).exists()) {
            Some(server) => Command::new(server),
            None => {
                let mut own = Command::new("/proc/self/exe");
                own.arg("sftp");
                own
            }
        }
    } else {
        let mut command = Command::new(shell);
        match &start.command {
            Some(raw) => {
                command.arg("-c").arg(OsStr::from_bytes(raw));
            }
            None => {
                let name = Path::new(shell).file_name().unwrap_or_default();
                let mut login = OsStr::new("-").to_owned();
                login.push(name);
                command.arg0(login);
            }
        }
        command
    };
    agent.surround(&mut command, &start.spec.env);
    command
}

/// Why a program did not start, for people.
pub fn spawn_failure(program: &str, error: &io::Error) -> Refusal {
    match Errno::from_io_error(error) {
        Some(Errno::TOOBIG) => {
            Refusal::TooLarge("the command and its variables are longer than this system takes".into())
        }
        Some(Errno::AGAIN) => {
            Refusal::Busy("the limit of processes is reached: no further one can be started".into())
        }
        Some(Errno::NOMEM) => Refusal::Busy("there is not enough memory to start a process".into()),
        Some(Errno::MFILE | Errno::NFILE) => {
            Refusal::Busy("too many files are open to start a process".into())
        }
        Some(Errno::NOENT) => Refusal::Failed(format!("there is no {program} in this environment")),
        Some(Errno::ACCESS | Errno::PERM) => Refusal::Failed(format!("{program} may not be executed")),
        _ => Refusal::Failed(format!("{program} cannot be started: {error}")),
    }
}

/// How a process ended, as trailers tell.
pub fn trailers(agent: &Agent, exit: Exit) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    match exit {
        Exit::Signal(signal) if session::name_of(signal).is_some() => {
            let name = session::name_of(signal).unwrap_or_default();
            trailers.insert(wire::EXIT_SIGNAL, HeaderValue::from_static(name));
        }
        // A real-time signal has no name there.
        exit => {
            trailers.insert(wire::EXIT_CODE, HeaderValue::from(exit.code()));
        }
    }
    if agent.memory.explains(exit) {
        trailers.insert(wire::EXIT_REASON, HeaderValue::from_static("out_of_memory"));
    }
    trailers
}

/// The answer to a started or joined process.
pub fn answer(id: &str, resumed: bool) -> Response<()> {
    let mut response = Response::new(());
    if let Ok(id) = HeaderValue::from_str(id) {
        response.headers_mut().insert(wire::PROCESS, id);
    }
    if resumed {
        response.headers_mut().insert(wire::RESUMED, HeaderValue::from_static("1"));
    }
    response
}

struct Pipes {
    leader: Pid,
    ending: Ending,
    stdin: pipe::Sender,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
}

impl Pipes {
    fn start(agent: &Agent, start: &Start) -> Result<Self, Refusal> {
        let mut command = command(agent, start);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |error: io::Error| spawn_failure(&program, &error);
        let (mut child, ending) = agent.spawn(&mut command, false).map_err(failed)?;
        let leader = Pid::from_child(&child);
        let lost = || io::Error::from(io::ErrorKind::BrokenPipe);
        let stdin = child.stdin.take().map(OwnedFd::from).ok_or_else(lost);
        let stdout = child.stdout.take().map(OwnedFd::from).ok_or_else(lost);
        let stderr = child.stderr.take().map(OwnedFd::from).ok_or_else(lost);
        let pipes = || {
            Ok(Self {
                leader,
                ending,
                stdin: pipe::Sender::from_owned_fd(stdin?)?,
                stdout: pipe::Receiver::from_owned_fd(stdout?)?,
                stderr: pipe::Receiver::from_owned_fd(stderr?)?,
            })
        };
        pipes().map_err(|error| {
            session::kill(leader);
            failed(error)
        })
    }

    async fn serve(self, agent: Arc<Agent>, id: String, exchange: Exchange) {
        let Self { leader, mut ending, stdin, stdout, stderr } = self;
        agent.registry.insert(&id, Handle { leader, terminal: None });
        let (done, sent) = oneshot::channel();
        // Without a request for it, stderr waits in its pipe; when that request was reset, it is closed.
        agent.registry.give_stderr(&id, Stderr { pipe: stderr, done });
        let served = match exchange.open(answer(&id, false)) {
            Some((input, mut output)) => {
                let feeding = tokio::spawn(feed(input, stdin)).abort_handle();
                let served = Self::follow(&agent, &id, &stdout, sent, &mut ending, &mut output).await;
                feeding.abort();
                if let Ok(exit) = served {
                    output.finish_with(trailers(&agent, exit));
                }
                served
            }
            None => Err(Closed { reason: None }),
        };
        if served.is_err() {
            // The client is gone. Whoever still writes gets EPIPE.
            drop(stdout);
            agent.registry.drop_stderr(&id);
            tokio::spawn(session::end(leader, ending.clone(), Arc::clone(&agent.reaper)));
            ending.wait().await;
        }
        agent.registry.remove(&id);
    }

    /// All output, then the end: as sshd does it, the end of a command is the end of whoever holds its stdout or stderr.
    async fn follow(
        agent: &Agent,
        id: &str,
        stdout: &pipe::Receiver,
        stderr_sent: oneshot::Receiver<()>,
        ending: &mut Ending,
        output: &mut Outbound,
    ) -> Result<Exit, Closed> {
        forward(stdout, output).await?;
        let rest = async {
            let exit = ending.wait().await;
            if agent.registry.is_stderr_unasked(id) {
                agent.registry.drop_stderr(id);
            }
            // Resolves when the other half is dropped.
            let _ = stderr_sent.await;
            exit
        };
        tokio::select! {
            closed = output.closed() => Err(closed),
            exit = rest => Ok(exit),
        }
    }
}

/// Answers with the stderr of a process, which may come later, and ends with it.
pub async fn stderr(agent: Arc<Agent>, id: &str, exchange: Exchange) {
    let wanted = match agent.registry.take_stderr(id) {
        Ok(wanted) => wanted,
        Err(refusal) => return exchange.refuse(&refusal),
    };
    let Some((_input, mut output)) = exchange.open(Response::new(())) else {
        return agent.registry.drop_stderr(id);
    };
    let stderr = tokio::select! {
        stderr = wanted => stderr.ok(),
        _ = output.closed() => return agent.registry.drop_stderr(id),
    };
    if let Some(Stderr { pipe, done }) = stderr {
        if forward(&pipe, &mut output).await.is_err() {
            return;
        }
        drop(done);
    }
    output.finish();
}

/// Bytes from the client into the process, until one of them ends. What a process does not want to read is dropped.
async fn feed(mut input: Inbound, mut stdin: pipe::Sender) {
    while let Ok(Some(bytes)) = input.read().await {
        if stdin.write_all(&bytes).await.is_err() {
            break;
        }
    }
    drop(stdin);
    while let Ok(Some(_)) = input.read().await {}
}

/// Bytes from the process to the client, until the process's end of the pipe is closed.
///
/// # Errors
/// When the client is gone.
async fn forward(pipe: &pipe::Receiver, output: &mut Outbound) -> Result<(), Closed> {
    loop {
        let bytes = tokio::select! {
            biased;
            closed = output.closed() => return Err(closed),
            ready = pipe.readable() => match ready.and_then(|()| read_some(|buffer| pipe.try_read(buffer))) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                // A pipe fails in no other way that could pass.
                Err(_) => return Ok(()),
            },
        };
        if bytes.is_empty() {
            return Ok(());
        }
        output.write(bytes).await?;
    }
}
