//! What runs, by the ids that clients chose; and the meeting point of a process with the request for its stderr.
use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use carrel_agent::wire::limits;
use http::HeaderMap;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{net::unix::pipe, sync::oneshot};

use crate::{request::Refusal, terminal::Control};

/// Ids of ended processes that are remembered, so that they are not used again. Older ones are forgotten.
const REMEMBERED: usize = 4096;

/// All processes of this agent.
#[derive(Debug, Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    running: HashMap<String, Handle>,
    ended: VecDeque<String>,
    /// How kept terminals have ended, as trailers.
    ends: VecDeque<(String, HeaderMap)>,
    stderr: HashMap<String, Slot>,
}

/// A running process.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Leader of its session and process group.
    pub leader: Pid,
    /// Its terminal, if it has one.
    pub terminal: Option<Control>,
}

/// The reading end of a process's stderr.
#[derive(Debug)]
pub struct Stderr {
    /// The pipe.
    pub pipe: pipe::Receiver,
    /// Dropped when all of it has been sent.
    pub done: oneshot::Sender<()>,
}

/// Either side may come first, and takes its half.
#[derive(Debug)]
struct Slot {
    give: Option<oneshot::Sender<Stderr>>,
    take: Option<oneshot::Receiver<Stderr>>,
}

impl Default for Slot {
    fn default() -> Self {
        let (give, take) = oneshot::channel();
        Self { give: Some(give), take: Some(take) }
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// May a process of this id be started?
    ///
    /// # Errors
    /// When the id was used, or there are too many.
    pub fn admit(&self, id: &str) -> Result<(), Refusal> {
        let inner = self.lock();
        if inner.running.contains_key(id) || inner.ended.iter().any(|ended| ended == id) {
            return Err(Refusal::Conflict("this process id was used before"));
        }
        if inner.running.len() >= limits::PROCESSES {
            return Err(Refusal::Busy(format!("{} processes run already", limits::PROCESSES)));
        }
        Ok(())
    }

    /// Adds what was admitted.
    pub fn insert(&self, id: &str, handle: Handle) {
        self.lock().running.insert(id.into(), handle);
    }

    /// Forgets a process that has ended. Whoever waits for its stderr sees the end.
    pub fn remove(&self, id: &str) {
        let mut inner = self.lock();
        inner.running.remove(id);
        inner.stderr.remove(id);
        inner.ended.push_back(id.into());
        if inner.ended.len() > REMEMBERED {
            inner.ended.pop_front();
        }
    }

    /// Remembers how a kept terminal has ended, for clients that were not connected at that moment.
    pub fn remember_end(&self, id: &str, trailers: HeaderMap) {
        let mut inner = self.lock();
        inner.ends.push_back((id.into(), trailers));
        if inner.ends.len() > limits::ENDS {
            inner.ends.pop_front();
        }
    }

    /// How a kept terminal has ended, if it has and is remembered.
    pub fn end_of(&self, id: &str) -> Option<HeaderMap> {
        self.lock().ends.iter().find(|(ended, _)| ended == id).map(|(_, trailers)| trailers.clone())
    }

    /// A running process.
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn get(&self, id: &str) -> Result<Handle, Refusal> {
        self.lock().running.get(id).cloned().ok_or(Refusal::NotFound("no process of this id runs"))
    }

    /// Processes and terminals.
    pub fn len(&self) -> usize {
        self.lock().running.len()
    }

    /// Leaders of all sessions.
    pub fn leaders(&self) -> Vec<Pid> {
        self.lock().running.values().map(|handle| handle.leader).collect()
    }

    /// For the request: resolves with the stderr of the process of this id, once it is there; closes when there will be none.
    ///
    /// # Errors
    /// When somebody has asked before.
    pub fn take_stderr(&self, id: &str) -> Result<oneshot::Receiver<Stderr>, Refusal> {
        let mut inner = self.lock();
        if inner.ended.iter().any(|ended| ended == id) {
            return Ok(oneshot::channel().1);
        }
        let slot = inner.stderr.entry(id.into()).or_default();
        slot.take.take().ok_or(Refusal::Conflict("this stderr was asked for before"))
    }

    /// For the process: gives its stderr to the request, which may come later. `false` when the request has gone.
    pub fn give_stderr(&self, id: &str, stderr: Stderr) -> bool {
        let mut inner = self.lock();
        let slot = inner.stderr.entry(id.into()).or_default();
        slot.give.take().is_some_and(|give| give.send(stderr).is_ok())
    }

    /// A request for stderr has gone, or nobody will ask any more: what is left of the pair is dropped.
    pub fn drop_stderr(&self, id: &str) {
        self.lock().stderr.remove(id);
    }

    /// Does the stderr of this process wait for a request that may never come?
    pub fn is_stderr_unasked(&self, id: &str) -> bool {
        self.lock().stderr.get(id).is_some_and(|slot| slot.take.is_some())
    }
}

impl Handle {
    /// Sends a signal: to the foreground of a terminal, else to the process's group.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<(), Refusal> {
        let group = self.terminal.as_ref().and_then(Control::foreground).unwrap_or(self.leader);
        kill_process_group(group, signal).map_err(|_| Refusal::NotFound("this process has ended"))
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// When it is no terminal or has ended.
    pub fn resize(&self, cols: u16, rows: u16) -> Result<(), Refusal> {
        let terminal = self.terminal.as_ref().ok_or(Refusal::NotFound("this process has no terminal"))?;
        terminal.resize(cols, rows)
    }
}
