//! A terminal that outlives the link to its environment.
//!
//! The agent keeps a terminal whose client is gone. So when the link is lost while the client is still here, [`Output::next`] says so,
//! opens the link anew and takes the very same terminal again, by the name that the agent knows it by: the next output is a redraw.
//! SSH and the browser use it alike; what they tell their client meanwhile is theirs.
//!
//! | what happens while the link is away | what becomes of it |
//! | --- | --- |
//! | keys | dropped: some before them are lost without anybody knowing which, and half a command must not be carried out. The redraw shows what has arrived |
//! | the end of the client's input | reaches the terminal as soon as it is there again |
//! | another size | so does the latest |
//! | the shell's end | told with its status, if the agent still knows it |
use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use carrel_agent::{
    flow::{Inbound, Outbound},
    wire::{ProcessSpec, limits::LOST_SECONDS},
};
use carrel_api::{
    environment::link::{Control, Exit, LinkError, Links, Process, exit},
    identity::EnvironmentId,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};

use super::{ANSWER_WITHIN, retry::Retry};

/// What a client is told when the link is lost.
pub const LOST: &str = "the connection to your environment was lost; reconnecting (your shell goes on, keys are dropped until then)";
/// Ends whatever sequence the client's terminal may be in the middle of, and colours: what is told after it can be read.
pub const PLAIN: &str = "\x1b\\\x1b[0m";
/// A link that was there for less did not end the outage before it.
const STEADY: Duration = Duration::from_secs(10);

/// The size of a client's window: the latest, `None` before the first.
pub type Sizes = watch::Receiver<Option<(u16, u16)>>;

/// A terminal, in the parts that its user drives at the same time.
pub struct Terminal {
    /// It was there before; a redraw comes first.
    pub resumed: bool,
    /// Drives the others: without [`Output::next`] nothing is reconnected.
    pub output: Output,
    /// The client's keys.
    pub input: Input,
    /// The latest way to resize and signal it.
    pub control: watch::Receiver<Control>,
}

/// What a terminal's output brings.
#[derive(Debug)]
pub enum News {
    /// What the terminal wrote, or a redraw.
    Bytes(Bytes),
    /// The link was lost: tell the client [`LOST`].
    Lost,
    /// The same terminal again: a redraw comes next.
    Back,
    /// The shell has ended.
    Ended(Exit),
}

/// Where the terminal is and how to get there again.
pub struct Place {
    /// All links.
    pub links: Arc<Links>,
    /// The one that the terminal is in.
    pub environment: EnvironmentId,
    /// As it was asked for at first, with a name in `attachment`.
    pub spec: ProcessSpec,
    /// What size it has to have.
    pub sizes: Sizes,
}

/// See [`Terminal::output`].
pub struct Output {
    place: Place,
    /// As long as the agent keeps the terminal without us.
    window: Duration,
    stdout: Inbound,
    stdin: Arc<Latest>,
    control: watch::Sender<Control>,
    since: Instant,
    retry: Retry,
    lost: bool,
}

/// See [`Terminal::input`].
pub struct Input {
    latest: Arc<Latest>,
    stream: Option<Outbound>,
}

/// The stream of the latest link, until it is taken.
#[derive(Default)]
struct Latest {
    stream: Mutex<Option<Outbound>>,
    arrived: Notify,
}

impl Latest {
    fn give(&self, stream: Outbound) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        self.arrived.notify_one();
    }

    fn take(&self) -> Option<Outbound> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Terminal {
    /// Of what was started or joined at `place`.
    pub fn new(mut place: Place, process: Process) -> Self {
        let Process { id, resumed, stdin, stdout, control, .. } = process;
        let kept = Duration::from_secs(place.spec.keep_seconds.unwrap_or_default().max(LOST_SECONDS));
        place.spec.terminal = Some(id);
        // For a new shell only.
        place.spec.env.clear();
        let (control_sender, control) = watch::channel(control);
        let latest = Arc::new(Latest::default());
        let output = Output {
            place,
            window: kept,
            stdout,
            stdin: Arc::clone(&latest),
            control: control_sender,
            since: Instant::now(),
            retry: Retry::within(kept),
            lost: false,
        };
        Self { resumed, output, input: Input { latest, stream: Some(stdin) }, control }
    }
}

impl Output {
    /// What comes next. Between [`News::Lost`] and [`News::Back`] it tries for as long as the agent keeps the terminal without its client: the
    /// exam's reconnect window, 90 s at least. Cancel-safe.
    ///
    /// # Errors
    /// `Refused` when the terminal is no more, else the last failure once there is no further try.
    pub async fn next(&mut self) -> Result<News, LinkError> {
        if self.lost {
            self.reconnect().await?;
            self.lost = false;
            return Ok(News::Back);
        }
        match self.stdout.read().await {
            Ok(Some(bytes)) => Ok(News::Bytes(bytes)),
            Ok(None) => Ok(News::Ended(exit(&mut self.stdout).await)),
            Err(closed) => {
                tracing::info!(%closed, "a terminal's link was lost");
                self.lost = true;
                Ok(News::Lost)
            }
        }
    }

    async fn reconnect(&mut self) -> Result<(), LinkError> {
        if self.since.elapsed() >= STEADY {
            self.retry = Retry::within(self.window);
        } else if !self.retry.wait().await {
            return Err(LinkError::Lost("it is lost again and again".to_owned()));
        }
        loop {
            let error = match self.attempt().await {
                Ok(process) => {
                    tracing::info!("a terminal is there again");
                    self.stdout = process.stdout;
                    self.stdin.give(process.stdin);
                    self.control.send_replace(process.control);
                    self.since = Instant::now();
                    return Ok(());
                }
                Err(error @ LinkError::Refused(_)) => return Err(error),
                Err(error) => error,
            };
            tracing::debug!(%error, "a terminal is not there again yet");
            if !self.retry.wait().await {
                return Err(error);
            }
        }
    }

    async fn attempt(&mut self) -> Result<Process, LinkError> {
        let Place { links, environment, spec, sizes } = &mut self.place;
        if let (Some(pty), Some((cols, rows))) = (&mut spec.pty, *sizes.borrow()) {
            (pty.cols, pty.rows) = (cols, rows);
        }
        // Asked twice it is the same: whoever has our name there is let go.
        let answer = async { links.get(*environment).await?.start(None, spec).await };
        timeout(ANSWER_WITHIN, answer).await.unwrap_or_else(|_| Err(LinkError::Lost("no answer".to_owned())))
    }
}

impl Input {
    /// Takes keys. Without a link they are dropped.
    pub async fn write(&mut self, keys: Bytes) {
        if let Some(stream) = self.latest.take() {
            self.stream = Some(stream);
        }
        if let Some(stream) = &mut self.stream
            && stream.write(keys).await.is_err()
        {
            self.stream = None;
        }
    }

    /// The client sends no more: ends the terminal's input, and again on each later link. Never resolves.
    pub async fn finish(mut self) -> Infallible {
        loop {
            if let Some(stream) = self.latest.take() {
                self.stream = Some(stream);
            }
            if let Some(stream) = &mut self.stream {
                stream.finish();
            }
            self.latest.arrived.notified().await;
        }
    }
}

/// Keeps the terminal at the client's size, over all its links. Never resolves.
pub async fn resizes(mut control: watch::Receiver<Control>, mut sizes: Sizes) -> Infallible {
    loop {
        tokio::select! {
            Ok(()) = sizes.changed() => {}
            Ok(()) = control.changed() => {}
            else => return std::future::pending().await,
        }
        let size = *sizes.borrow_and_update();
        let now = control.borrow_and_update().clone();
        if let Some((cols, rows)) = size
            && let Err(error) = now.resize(cols, rows).await
        {
            tracing::debug!(%error, "a resize did not reach its terminal");
        }
    }
}

#[cfg(test)]
mod tests;
