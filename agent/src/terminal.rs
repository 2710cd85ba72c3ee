//! Terminals: one task owns each, with its process, its screen and everybody who is attached.
//!
//! A client alone at a terminal holds the process back when it does not keep up. Among several, nobody waits for a slow one: it
//! gets a redraw when it has caught up.
use std::{io, os::fd::OwnedFd, process::Stdio, sync::Arc, time::Duration};

use bytes::{Buf as _, Bytes};
use carrel_agent::{
    flow::Blocks,
    wire::{self, Join, ProcessSpec},
};
use rustix::process::Pid;
use tokio::{
    io::Interest,
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};

use crate::{
    attachment::{Attachment, Gone, Input},
    process::{self, answer, spawn_failure, trailers},
    pty::{self, Master},
    reap::{Ending, Exit},
    registry::Handle,
    request::{Exchange, Refusal, Start},
    screen::Screen,
    seats::Seat,
    serve::Agent,
    session,
};

/// Keys that wait for the process, bytes: beyond it, clients wait.
const PENDING: usize = 64 * 1024;
/// Orders and pieces of input that wait for the terminal's task: beyond it, whoever sends waits.
const QUEUE: usize = 16;

/// What a terminal stays at least when its last client's connection was lost.
const LOST: Duration = Duration::from_secs(wire::limits::LOST_SECONDS);

/// What is still read after the process's end, bytes: more than the kernel holds for a terminal. Who writes on and on in the
/// background is not waited for.
const LAST: usize = 1 << 20;

/// What a terminal is asked to do.
pub enum Order {
    /// Take a client.
    Attach(Box<Attach>),
    /// Take another size.
    Resize(u16, u16),
}

/// A client that wants to be attached.
pub struct Attach {
    /// Its request.
    pub exchange: Exchange,
    /// Its place; `None` at a terminal that nobody else can join any more.
    pub seat: Option<Seat>,
    /// As whom.
    pub join: Join,
    /// Its name.
    pub name: Option<String>,
    /// It was here before: if the process has been told to end, it waits for the end.
    pub again: bool,
    /// Its size.
    pub window: (u16, u16),
    /// How long the terminal is kept after it.
    pub keep: Option<Duration>,
}

/// What others may do with a terminal.
#[derive(Debug, Clone)]
pub struct Control {
    orders: mpsc::Sender<Order>,
    master: Arc<Master>,
}

impl Control {
    /// The process group in the foreground.
    pub fn foreground(&self) -> Option<Pid> {
        self.master.foreground()
    }

    /// Sets the size.
    ///
    /// # Errors
    /// When the terminal has ended or has no time.
    pub fn resize(&self, cols: u16, rows: u16) -> Result<(), Refusal> {
        self.orders.try_send(Order::Resize(cols, rows)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refusal::Busy("the terminal is busy".into()),
            mpsc::error::TrySendError::Closed(_) => Refusal::NotFound("this terminal has ended"),
        })
    }

    /// Brings a client.
    ///
    /// # Errors
    /// The client, when the terminal has ended.
    pub async fn attach(&self, attach: Attach) -> Result<(), Box<Attach>> {
        match self.orders.send(Order::Attach(Box::new(attach))).await {
            Err(mpsc::error::SendError(Order::Attach(attach))) => Err(attach),
            _ => Ok(()),
        }
    }
}

/// Starts a shell or command at a new terminal, and stays with it until it has ended.
pub async fn run(agent: Arc<Agent>, start: Start, pty: wire::Pty, exchange: Exchange) {
    let (orders, received) = mpsc::channel(QUEUE);
    match Terminal::start(&agent, &start, &pty, received) {
        Ok(mut terminal) => {
            let control = Control { orders, master: Arc::clone(&terminal.master) };
            agent.registry.insert(&start.id, Handle { leader: terminal.leader, terminal: Some(control) });
            terminal.seat_first(exchange, &start.spec);
            terminal.serve().await;
        }
        Err(refusal) => exchange.refuse(&refusal),
    }
}

struct Terminal {
    agent: Arc<Agent>,
    id: String,
    leader: Pid,
    ending: Ending,
    master: Arc<Master>,
    /// For those who may attach later.
    screen: Option<Screen>,
    attached: Vec<Attachment>,
    orders: mpsc::Receiver<Order>,
    keys: (mpsc::Sender<Input>, mpsc::Receiver<Input>),
    progress: Arc<Notify>,
    /// Keys that the process has not taken yet.
    pending: Blocks,
    writing: Bytes,
    /// How long it stays without anybody. `None`: it goes with its client.
    keep: Option<Duration>,
    deadline: Option<Instant>,
    ended: bool,
    /// Nobody holds the process's side any more.
    hung_up: bool,
}

impl Terminal {
    fn start(
        agent: &Arc<Agent>,
        start: &Start,
        wanted: &wire::Pty,
        orders: mpsc::Receiver<Order>,
    ) -> Result<Self, Refusal> {
        let (master, slave) = pty::open(wanted)
            .map_err(|error| Refusal::Failed(format!("no terminal can be opened: {error}")))?;
        let mut command = process::command(agent, start);
        command.env("TERM", &wanted.term).env("SSH_TTY", &slave.name);
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |error: io::Error| spawn_failure(&program, &error);
        let copy = |descriptor: &OwnedFd| descriptor.try_clone().map(Stdio::from).map_err(failed);
        command.stdin(copy(&slave.descriptor)?).stdout(copy(&slave.descriptor)?).stderr(slave.descriptor);
        let (child, ending) = agent.spawn(&mut command, true).map_err(failed)?;
        let keep = start.spec.keep_seconds.filter(|_| start.is_shell()).map(Duration::from_secs);
        Ok(Self {
            agent: Arc::clone(agent),
            id: start.id.clone(),
            leader: Pid::from_child(&child),
            ending,
            master: Arc::new(master),
            screen: keep.map(|_| Screen::new(wanted.cols, wanted.rows)),
            attached: Vec::new(),
            orders,
            keys: mpsc::channel(QUEUE),
            progress: Arc::new(Notify::new()),
            pending: Blocks::default(),
            writing: Bytes::new(),
            keep,
            deadline: None,
            ended: false,
            hung_up: false,
        })
    }

    fn seat_first(&mut self, exchange: Exchange, spec: &ProcessSpec) {
        let seat = self.screen.as_ref().map(|_| self.agent.terminals.add(&self.id, spec.join));
        if let Some(streams) = exchange.open(answer(&self.id, false)) {
            let keys = self.keys.0.clone();
            let progress = Arc::clone(&self.progress);
            self.attached.push(Attachment::new(
                streams,
                spec.attachment.clone(),
                keys,
                progress,
                false,
                seat,
            ));
        }
        self.settle();
    }

    async fn serve(mut self) {
        let exit = self.follow().await;
        self.agent.terminals.remove(&self.id);
        self.orders.close();
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Attach(attach) if attach.again => self.attach(*attach),
                Order::Attach(attach) => {
                    attach.exchange.refuse(&Refusal::Busy("this terminal has just ended".into()));
                }
                Order::Resize(..) => {}
            }
        }
        let trailers = trailers(&self.agent, exit);
        if self.screen.is_some() {
            self.agent.registry.remember_end(&self.id, trailers.clone());
        }
        for attachment in &self.attached {
            if attachment.is_stale()
                && let Some(screen) = &mut self.screen
            {
                attachment.redraw(&screen.redraw(false));
            }
            attachment.finish(trailers.clone());
        }
        self.agent.registry.remove(&self.id);
    }

    /// Everything, until the process has ended and all that it wrote was passed on.
    async fn follow(&mut self) -> Exit {
        let mut exit = None;
        let mut last: usize = 0;
        loop {
            let may_read = self.may_read();
            if let Some(exit) = exit
                && may_read
            {
                // Others may hold the terminal open: what is there now is the end.
                match self.master.drain() {
                    Ok(bytes) if !bytes.is_empty() && last < LAST => {
                        last = last.saturating_add(bytes.len());
                        self.deliver(&bytes);
                        // Let those who send take some.
                        tokio::task::yield_now().await;
                        continue;
                    }
                    _ => return exit,
                }
            }
            if self.writing.is_empty()
                && let Some(bytes) = self.pending.pop()
            {
                self.writing = bytes;
            }
            let deadline = self.deadline;
            tokio::select! {
                order = self.orders.recv() => match order {
                    Some(Order::Attach(attach)) => self.attach(*attach),
                    Some(Order::Resize(cols, rows)) => self.resize(cols, rows),
                    // The registry holds a sender for as long as this runs.
                    None => {}
                },
                ended = self.ending.wait(), if exit.is_none() => exit = Some(ended),
                _ = self.master.ready(Interest::READABLE), if may_read && !self.hung_up => self.read(),
                _ = self.master.ready(Interest::WRITABLE), if !self.writing.is_empty() => self.write(),
                input = self.keys.1.recv(), if self.pending.len() < PENDING => self.take(input),
                () = self.progress.notified() => self.settle(),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => self.end(),
            }
        }
    }

    /// One that is alone holds the process back; several do not.
    fn may_read(&self) -> bool {
        match self.attached.as_slice() {
            [alone] => !alone.is_busy(),
            _ => true,
        }
    }

    fn read(&mut self) {
        match self.master.read() {
            Ok(bytes) if bytes.is_empty() => self.hung_up = true,
            Ok(bytes) => self.deliver(&bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.hung_up = true,
        }
    }

    fn deliver(&mut self, bytes: &[u8]) {
        if let Some(screen) = &mut self.screen {
            screen.feed(bytes);
        }
        let shared = self.attached.len() > 1;
        for attachment in &self.attached {
            attachment.push(bytes, shared);
        }
    }

    fn write(&mut self) {
        match self.master.write(&self.writing) {
            Ok(written) => self.writing.advance(written.min(self.writing.len())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Nobody will read it.
            Err(_) => {
                self.writing.clear();
                self.pending.clear();
            }
        }
    }

    fn take(&mut self, input: Option<Input>) {
        match input {
            Some(Input::Bytes(bytes)) => self.pending.push(&bytes),
            Some(Input::End) if self.people() == 1 => {
                if let Some(code) = self.master.end_of_file() {
                    self.pending.push(&[code]);
                }
            }
            // One of several that sends no more does not end the others' shell.
            Some(Input::End) | None => {}
        }
    }

    fn people(&self) -> usize {
        self.attached.iter().filter(|attachment| !attachment.watches).count()
    }

    /// A redraw and everything after it: nothing is read in between.
    fn attach(&mut self, attach: Attach) {
        let Attach { exchange, seat, join, name, again, window: (cols, rows), keep } = attach;
        let watches = join == Join::Watch;
        if self.ended && !again {
            return exchange.refuse(&Refusal::Busy("this terminal is ending".into()));
        }
        let Some(screen) = &mut self.screen else {
            return exchange.refuse(&Refusal::NotFound("this terminal is for one client only"));
        };
        if !watches {
            // A terminal that has hung up has no size.
            let _ = self.master.resize(cols, rows);
            screen.resize(cols, rows);
        }
        let redraw = screen.redraw(true);
        if name.is_some() {
            for left in self.attached.extract_if(.., |attachment| attachment.name == name) {
                left.abandon();
            }
        }
        let Some(streams) = exchange.open(answer(&self.id, true)) else { return self.settle() };
        let keys = self.keys.0.clone();
        let attachment = Attachment::new(streams, name, keys, Arc::clone(&self.progress), watches, seat);
        if !watches {
            self.keep = keep.or(self.keep);
            self.deadline = None;
        }
        attachment.redraw(&redraw);
        self.attached.push(attachment);
    }

    fn resize(&mut self, cols: u16, rows: u16) {
        // A terminal that has hung up has no size.
        let _ = self.master.resize(cols, rows);
        if let Some(screen) = &mut self.screen {
            screen.resize(cols, rows);
        }
    }

    /// Lets go of those who have gone, and brings stale ones up to date.
    fn settle(&mut self) {
        let mut lost = false;
        self.attached.retain(|attachment| {
            lost |= attachment.gone() == Some(Gone::Lost) && !attachment.watches;
            attachment.gone().is_none()
        });
        for attachment in &self.attached {
            if attachment.wants_redraw()
                && let Some(screen) = &mut self.screen
            {
                attachment.redraw(&screen.redraw(false));
            }
        }
        if self.people() == 0 && !self.ended && self.deadline.is_none() {
            match self.keep {
                Some(keep) => {
                    let least = if lost { LOST } else { Duration::ZERO };
                    self.deadline = Instant::now().checked_add(keep.max(least));
                }
                None => self.end(),
            }
        }
    }

    /// Ends the process and all of its session.
    fn end(&mut self) {
        self.deadline = None;
        if !self.ended {
            self.ended = true;
            self.agent.terminals.remove(&self.id);
            tokio::spawn(session::end(self.leader, self.ending.clone(), Arc::clone(&self.agent.reaper)));
        }
    }
}
