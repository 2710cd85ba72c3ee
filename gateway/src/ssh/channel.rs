//! What one channel does, from its request to its close, each in one function read from top to bottom.
mod shell;

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use carrel_agent::{
    flow::{Inbound, Outbound},
    wire::{Join, ProcessSpec, Pty},
};
use carrel_api::environment::link::{self, Control, Exit, Process};
use russh::{
    ChannelOpenFailure, ChannelWriteHalf,
    server::{ChannelOpenHandle, Msg},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{connection::Entry, inbox::Inbox};
use crate::bridge::{
    Refusal, Visit,
    terminal::{Sizes, resizes},
};

/// The status of everything that is not a process's own.
const LOST: u32 = 255;
const STDERR: u32 = 1;

/// What the client sends on a channel.
pub struct Inputs {
    /// Its bytes.
    pub inbox: Arc<Inbox>,
    /// The latest size of its window.
    pub sizes: Sizes,
    /// Signals, by name.
    pub signals: mpsc::Receiver<&'static str>,
    /// The client has closed the channel, or is gone.
    pub gone: CancellationToken,
    /// The server ends.
    pub shutdown: CancellationToken,
}

impl Inputs {
    /// At the end the channel's place on its connection is free again, and what nobody has read counts no more: russh does not
    /// tell of a close that answers ours.
    fn freed(&self) -> impl Drop + use<> {
        struct Free(CancellationToken, Arc<Inbox>);
        impl Drop for Free {
            fn drop(&mut self) {
                self.0.cancel();
                self.1.close();
            }
        }
        Free(self.gone.clone(), Arc::clone(&self.inbox))
    }
}

/// The request that makes a channel do something.
pub struct Start {
    pub what: What,
    pub pty: Option<Pty>,
    pub env: Vec<(String, String)>,
}

pub enum What {
    Shell,
    Command(Vec<u8>),
    Sftp,
}

/// How a channel ends: its status, and a line that says why if there is a reason to.
struct Ending {
    status: u32,
    why: Option<String>,
}

impl Ending {
    fn because(why: impl ToString) -> Self {
        Self { status: LOST, why: Some(why.to_string()) }
    }
}

/// The client's side of a channel: what is written to it, and how.
struct Outlet {
    write: ChannelWriteHalf<Msg>,
    gone: CancellationToken,
    terminal: bool,
}

/// The client is gone.
struct Gone;

/// Why a process has no exit status to report.
enum Stop {
    Gone,
    Refused(Refusal),
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Outlet {
    async fn data(&self, data: Bytes) -> Result<(), Gone> {
        self.unless_gone(self.write.data_bytes(data)).await
    }

    async fn error_data(&self, data: Bytes) -> Result<(), Gone> {
        self.unless_gone(self.write.extended_data_bytes(STDERR, data)).await
    }

    /// A writer that waits for window is not woken when the client goes.
    async fn unless_gone(&self, sent: impl Future<Output = Result<(), russh::Error>>) -> Result<(), Gone> {
        tokio::select! {
            biased;
            sent = sent => sent.map_err(|_| Gone),
            () = self.gone.cancelled() => Err(Gone),
        }
    }

    /// A line of our own: on the terminal where there is one, else on stderr.
    async fn line(&self, text: &str) -> Result<(), Gone> {
        if self.terminal {
            self.data(format!("\r\ncarrel: {text}\r\n").into()).await
        } else {
            self.error_data(format!("carrel: {text}\n").into()).await
        }
    }

    /// Why, the status, the end of data, the close: in this order, always.
    async fn end(&self, ending: Ending) {
        let told = async {
            if let Some(why) = ending.why {
                self.line(&why).await?;
            }
            // Before the end of data: a client that shares its connection may be done with the channel at that.
            self.unless_gone(self.write.exit_status(ending.status)).await?;
            self.unless_gone(self.write.eof()).await?;
            self.unless_gone(self.write.close()).await
        };
        // `Gone` is the client's own end.
        let _ = told.await;
    }
}

/// A session channel: waits for its request, then for its environment, runs the process and reports how it ended.
pub async fn session(
    write: ChannelWriteHalf<Msg>,
    inputs: Inputs,
    started: oneshot::Receiver<Start>,
    entry: Entry,
) {
    let _free = inputs.freed();
    let start = tokio::select! {
        start = started => match start { Ok(start) => start, Err(_) => return },
        () = inputs.gone.cancelled() => return,
    };
    let outlet = Outlet { write, gone: inputs.gone.clone(), terminal: start.pty.is_some() };
    let ending = match entry {
        Ok(visit) => {
            tokio::select! {
                // The session's end first: the loss of its environment follows from it and is no news.
                biased;
                () = inputs.gone.cancelled() => return,
                over = visit.over() => Ending::because(over),
                () = inputs.shutdown.cancelled() => Ending::because("the exam server restarts; connect again, your shell goes on"),
                ending = run(&outlet, inputs.inbox, inputs.sizes, inputs.signals, start, &visit) => ending,
            }
        }
        Err(refusal) => Ending::because(refusal),
    };
    outlet.end(ending).await;
}

async fn run(
    outlet: &Outlet,
    inbox: Arc<Inbox>,
    sizes: Sizes,
    signals: mpsc::Receiver<&'static str>,
    start: Start,
    visit: &Visit,
) -> Ending {
    if let Err(refusal) = ready(outlet, visit).await {
        return Ending::because(refusal);
    }
    if visit.access.only_watches() {
        return Ending::because(Refusal::Forbidden("your access is for watching only; use the staff page"));
    }
    let ended = match start {
        Start { what: What::Shell, pty: Some(pty), env } => {
            let spec = ProcessSpec { env, pty: Some(pty), join: Join::Ssh, ..ProcessSpec::default() };
            shell::run(outlet, &inbox, sizes, signals, spec, visit).await
        }
        start => process(outlet, &inbox, sizes, signals, start, visit).await,
    };
    match ended {
        Ok(Exit::Signal { out_of_memory: true, .. }) => Ending {
            status: 128 + 9,
            why: Some("the process was ended: your environment is out of memory".to_owned()),
        },
        Ok(Exit::Lost(reason)) => {
            tracing::warn!(reason, "a process's exit status was lost");
            Ending::because(visit.lost().await)
        }
        Ok(exit) => Ending { status: exit.status(), why: None },
        Err(Stop::Refused(refusal)) => Ending::because(refusal),
        Err(Stop::Gone) => std::future::pending().await,
    }
}

/// A command, or a shell without a terminal of its own: what it was doing is lost with its link.
async fn process(
    outlet: &Outlet,
    inbox: &Inbox,
    sizes: Sizes,
    signals: mpsc::Receiver<&'static str>,
    start: Start,
    visit: &Visit,
) -> Result<Exit, Stop> {
    let Start { what, mut pty, env } = start;
    if let Some(pty) = &mut pty {
        latest(pty, &sizes);
    }
    let spec = ProcessSpec { env, pty, sftp: matches!(what, What::Sftp), ..ProcessSpec::default() };
    let command = match &what {
        What::Command(command) => Some(command.as_slice()),
        What::Shell | What::Sftp => None,
    };
    let Process { stdin, stdout, stderr, control, .. } = visit.start(command, spec).await?;
    let control = watch::channel(control).1;
    tokio::select! {
        exit = output(outlet, stdout, stderr) => Ok(exit?),
        // A process that reads no more, or has read all, is not an end.
        never = async { let _stdin = input(inbox, stdin).await; std::future::pending().await } => never,
        never = resizes(control.clone(), sizes) => match never {},
        never = pass_on(&control, signals) => match never {},
    }
}

/// The size that the window has by now.
fn latest(pty: &mut Pty, sizes: &Sizes) {
    if let Some((cols, rows)) = *sizes.borrow() {
        (pty.cols, pty.rows) = (cols, rows);
    }
}

/// A terminal shows numbered progress; a command waits without a word, its stdin is kept.
async fn ready(outlet: &Outlet, visit: &Visit) -> Result<(), Refusal> {
    if !outlet.terminal {
        return visit.ready(|_| ()).await;
    }
    let (progress, mut steps) = mpsc::unbounded_channel();
    let show = async {
        while let Some(line) = steps.recv().await {
            if outlet.data(line).await.is_err() {
                break;
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        biased;
        // At most one message a step.
        ready = visit.ready(|step| {
            let _ = progress.send(Bytes::from(format!("[{}/{}] {}\r\n", step.step, step.of, step.text)));
        }) => ready,
        never = show => never,
    }
}

/// stdout and stderr to the client until both have ended, then the status.
async fn output(outlet: &Outlet, mut stdout: Inbound, mut stderr: Option<Inbound>) -> Result<Exit, Gone> {
    let mut stdout_open = true;
    while stdout_open || stderr.is_some() {
        tokio::select! {
            chunk = stdout.read(), if stdout_open => match chunk {
                Ok(Some(chunk)) => outlet.data(chunk).await?,
                Ok(None) => stdout_open = false,
                Err(closed) => return Ok(Exit::Lost(closed.to_string())),
            },
            chunk = async { match &mut stderr { Some(stderr) => stderr.read().await, None => std::future::pending().await } } => match chunk {
                Ok(Some(chunk)) => outlet.error_data(chunk).await?,
                Ok(None) => stderr = None,
                // A status without the last of stderr would be half the truth.
                Err(closed) => return Ok(Exit::Lost(closed.to_string())),
            },
        }
    }
    Ok(link::exit(&mut stdout).await)
}

/// The client's bytes to a stream, then its end. The stream comes back: dropping an unfinished one resets it.
async fn input(inbox: &Inbox, mut stream: Outbound) -> Outbound {
    while let Some(chunk) = inbox.read().await {
        if stream.write(chunk).await.is_err() {
            // Nobody reads: what else comes is dropped, and the window stays open.
            inbox.close();
            return stream;
        }
    }
    stream.finish();
    stream
}

/// Signals to the process. Never resolves.
async fn pass_on(
    control: &watch::Receiver<Control>,
    mut signals: mpsc::Receiver<&'static str>,
) -> Infallible {
    while let Some(name) = signals.recv().await {
        let control = control.borrow().clone();
        if let Err(error) = control.signal(name).await {
            tracing::debug!(%error, "a signal did not reach its process");
        }
    }
    std::future::pending().await
}

/// A `direct-tcpip` channel to a port of the environment's loopback.
pub async fn tcp(
    write: ChannelWriteHalf<Msg>,
    inputs: Inputs,
    visit: Arc<Visit>,
    port: u16,
    reply: ChannelOpenHandle,
) {
    let _free = inputs.freed();
    let connected = async {
        visit.ready(|_| ()).await?;
        visit.tcp(port).await
    };
    let (to, mut from) = tokio::select! {
        connected = connected => match connected {
            Ok(streams) => streams,
            Err(refusal) => {
                tracing::info!(%refusal, port, "a forwarded connection was refused");
                return reply.reject(ChannelOpenFailure::ConnectFailed).await;
            }
        },
        () = inputs.gone.cancelled() => return,
    };
    reply.accept().await;
    let outlet = Outlet { write, gone: inputs.gone.clone(), terminal: false };
    let down = async {
        while let Ok(Some(chunk)) = from.read().await {
            outlet.data(chunk).await?;
        }
        outlet.unless_gone(outlet.write.eof()).await
    };
    // Each direction has its own end.
    let both = async { tokio::join!(down, input(&inputs.inbox, to)) };
    tokio::select! {
        _ = both => {}
        _ = visit.over() => {}
        () = inputs.shutdown.cancelled() => {}
        () = inputs.gone.cancelled() => return,
    }
    let _ = outlet.unless_gone(outlet.write.close()).await;
}
