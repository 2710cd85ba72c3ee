//! Collecting the statuses of all children: own ones are told to whoever waits, orphans that fell to PID 1 are forgotten.
//!
//! One place calls `waitpid(-1)`, so that no status is taken from somebody who waits for it. Children are started on the same
//! thread, so that none can end before it is expected.
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code, 0 to 255.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    fn of(status: WaitStatus) -> Option<Self> {
        match (status.exit_status(), status.terminating_signal()) {
            // The kernel keeps eight bits.
            (Some(code), _) => Some(Self::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX))),
            (None, Some(signal)) => Some(Self::Signal(signal)),
            (None, None) => None,
        }
    }

    /// As a shell says it: 128+n for a signal.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => i32::from(code),
            Self::Signal(signal) => 128_i32.saturating_add(signal),
        }
    }
}

/// Who waits for which child.
#[derive(Debug, Default)]
pub struct Reaper {
    expected: Mutex<HashMap<Pid, watch::Sender<Option<Exit>>>>,
}

/// A child's end, once it has come.
#[derive(Debug, Clone)]
pub struct Ending(watch::Receiver<Option<Exit>>);

impl Ending {
    /// Waits for it. Cancel-safe.
    pub async fn wait(&mut self) -> Exit {
        match self.0.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Code(255)),
            // The reaper lives as long as the agent.
            Err(_) => Exit::Code(255),
        }
    }

    /// Has it come?
    pub fn is_known(&self) -> bool {
        self.0.borrow().is_some()
    }
}

impl Reaper {
    /// Starts collecting.
    ///
    /// # Errors
    /// When the signal handler cannot be set up.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let children = signal(SignalKind::child())?;
        tokio::spawn(Arc::clone(&reaper).collect(children));
        Ok(reaper)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pid, watch::Sender<Option<Exit>>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called right after a child was started, before the runtime gets to do anything else.
    pub fn expect(&self, pid: Pid) -> Ending {
        let (sender, receiver) = watch::channel(None);
        self.lock().insert(pid, sender);
        Ending(receiver)
    }

    /// Is a child of this number running?
    pub fn is_running(&self, pid: Pid) -> bool {
        self.lock().contains_key(&pid)
    }

    async fn collect(self: Arc<Self>, mut children: Signal) {
        loop {
            // One signal may stand for many children.
            while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                if let Some(exit) = Exit::of(status)
                    && let Some(waiting) = self.lock().remove(&pid)
                {
                    let _ = waiting.send(Some(exit));
                }
            }
            if children.recv().await.is_none() {
                return;
            }
        }
    }
}
