//! From an accepted login to a process in its environment. SSH and the browser use the same bridge.
//!
//! A [`Visit`] is one connection of somebody with access. It waits until the environment is ready, opens processes
//! and terminals in it, and knows by itself when the session is over: from the session's feed and, independently,
//! from the exam's deadline. This module knows neither SSH nor WebSockets.
pub mod terminal;

mod retry;

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use carrel_agent::{
    flow::{Inbound, Outbound},
    wire::ProcessSpec,
};
use carrel_api::{
    access::Access,
    environment::link::{Link, LinkError, Links, Process},
    exam::Exam,
    identity::{EnvironmentId, SessionId},
    lifecycle::Lifecycle,
    reason::ReasonCode,
    session::{STEPS, Session, State},
    store::{Store, StoreError},
};
use tokio::{sync::watch, time::timeout};
use uuid::Uuid;

use self::{
    retry::Retry,
    terminal::{Place, Sizes, Terminal},
};

/// Connections of one session at once, SSH and browsers together.
pub const CONNECTIONS_PER_SESSION: usize = 32;
/// Provisioning ends within 60 s; a visit waits a little longer, so that the reason arrives first.
const READY_WITHIN: Duration = Duration::from_secs(75);
/// How long the reason of a lost environment is waited for before it is reported without one.
const REASON_WITHIN: Duration = Duration::from_secs(4);
/// The connection to the environment, or an answer from its agent.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// So long somebody who asks for something waits for an environment that cannot be reached: an API server that starts again
/// is away for some 20 s.
const REACH_WITHIN: Duration = Duration::from_secs(60);
/// While somebody is connected the session's activity is recorded this often.
const TOUCH_EVERY: Duration = Duration::from_secs(60);

/// Why somebody who may come in still does not get what was asked for. The text is for the candidate.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The session is over.
    #[error("{0}")]
    Over(Over),
    /// Too many connections.
    #[error("this session has {CONNECTIONS_PER_SESSION} connections already; close one and try again")]
    TooManyConnections,
    /// The environment did not become ready in time.
    #[error("your environment did not become ready in time; tell your proctor")]
    NotReady,
    /// The exam forbids it.
    #[error("{0}")]
    Forbidden(&'static str),
    /// The agent answered with a refusal.
    #[error("{0}")]
    Refused(String),
    /// The environment's connection failed and no end of the session explains it.
    #[error(
        "the connection to your environment was lost; connect again, and tell your proctor if this repeats"
    )]
    Lost,
    /// The database does not answer.
    #[error("the exam server cannot reach its database now; your session goes on, try again in a moment")]
    Unavailable,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Over {
    /// From the closed list.
    pub code: ReasonCode,
    /// For the candidate, with what to do next.
    pub message: String,
}

impl std::fmt::Display for Over {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl Over {
    fn because(code: ReasonCode) -> Self {
        Self { code, message: code.user_message().to_owned() }
    }

    fn of(session: &Session) -> Option<Self> {
        session.state.is_terminal().then(|| {
            Self::because(session.reason.as_ref().map_or(ReasonCode::Internal, |reason| reason.code))
        })
    }
}

/// How far provisioning is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Counts from 1.
    pub step: usize,
    /// [`STEPS`]' length.
    pub of: usize,
    /// For people.
    pub text: &'static str,
}

impl Progress {
    /// Of a session that is not ready yet.
    pub fn of(session: &Session) -> Self {
        let index = session.step.min(STEPS.len() - 1);
        Self { step: index + 1, of: STEPS.len(), text: STEPS.get(index).copied().unwrap_or_default() }
    }
}

/// Opens visits. One for the whole server.
pub struct Bridge {
    store: Store,
    lifecycle: Arc<Lifecycle>,
    links: Arc<Links>,
    connections: Arc<Mutex<HashMap<SessionId, usize>>>,
}

/// One connection of somebody with access to one session.
pub struct Visit {
    /// Who, and to what.
    pub access: Access,
    /// The exam as it stood when the session was made.
    pub exam: Exam,
    /// The session's latest row.
    pub feed: watch::Receiver<Arc<Session>>,
    lifecycle: Arc<Lifecycle>,
    links: Arc<Links>,
    _seat: Seat,
}

/// One of the session's connections, given back when dropped.
struct Seat {
    connections: Arc<Mutex<HashMap<SessionId, usize>>>,
    session_id: SessionId,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = connections.get_mut(&self.session_id) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                connections.remove(&self.session_id);
            }
        }
    }
}

impl Bridge {
    /// One for the whole server.
    pub fn new(store: Store, lifecycle: Arc<Lifecycle>, links: Arc<Links>) -> Self {
        Self { store, lifecycle, links, connections: Arc::default() }
    }

    /// The database's clock, ms since 1970.
    pub fn now_ms(&self) -> i64 {
        self.lifecycle.now_ms()
    }

    /// Counts the connection and follows its session. Also for a session that is over: [`Visit::over`] says so at once.
    pub async fn enter(&self, access: Access) -> Result<Visit, Refusal> {
        let session_id = access.session_id();
        let seat = self.seat(session_id)?;
        let feed = bounded(self.lifecycle.watch(session_id)).await?;
        let session = Arc::clone(&feed.borrow());
        let exam = bounded(self.store.environment_exam(&session)).await?;
        Ok(Visit {
            access,
            exam,
            feed,
            lifecycle: Arc::clone(&self.lifecycle),
            links: Arc::clone(&self.links),
            _seat: seat,
        })
    }

    fn seat(&self, session_id: SessionId) -> Result<Seat, Refusal> {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let count = connections.entry(session_id).or_default();
        if *count >= CONNECTIONS_PER_SESSION {
            return Err(Refusal::TooManyConnections);
        }
        *count += 1;
        Ok(Seat { connections: Arc::clone(&self.connections), session_id })
    }
}

async fn bounded<T>(query: impl Future<Output = Result<T, StoreError>>) -> Result<T, Refusal> {
    match timeout(ANSWER_WITHIN, query).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            tracing::warn!(%error, "the database did not answer a connection");
            Err(Refusal::Unavailable)
        }
        Err(_) => Err(Refusal::Unavailable),
    }
}

impl Visit {
    /// Waits until the environment is ready, tells each step to `progress`, and starts the exam's clock if nobody has.
    pub async fn ready(&self, mut progress: impl FnMut(Progress)) -> Result<(), Refusal> {
        let mut feed = self.feed.clone();
        let ready = async {
            let mut told = None;
            loop {
                let session = Arc::clone(&feed.borrow_and_update());
                if let Some(over) = Over::of(&session) {
                    return Err(Refusal::Over(over));
                }
                match session.state {
                    State::Running => return Ok(()),
                    State::Ready => return self.connected().await,
                    _ => {}
                }
                let now = Progress::of(&session);
                if told != Some(now) {
                    told = Some(now);
                    progress(now);
                }
                if feed.changed().await.is_err() {
                    return Err(Refusal::Unavailable);
                }
            }
        };
        timeout(READY_WITHIN, ready).await.unwrap_or(Err(Refusal::NotReady))
    }

    /// Somebody who only watches does not start the clock.
    async fn connected(&self) -> Result<(), Refusal> {
        if self.access.only_watches() {
            return Ok(());
        }
        let session = bounded(self.lifecycle.connected(self.access.session_id())).await?;
        Over::of(&session).map_or(Ok(()), |over| Err(Refusal::Over(over)))
    }

    /// Starts a process. Its environment adds the exam's variables.
    pub async fn start(&self, command: Option<&[u8]>, spec: ProcessSpec) -> Result<Process, Refusal> {
        self.ask(|link| {
            let spec = &spec;
            async move { link.start(command, spec).await }
        })
        .await
    }

    /// Joins or starts a terminal that outlives its link.
    pub async fn terminal(&self, mut spec: ProcessSpec, sizes: Sizes) -> Result<Terminal, Refusal> {
        spec.keep_seconds = Some(u64::from(self.exam.reconnect_window_seconds));
        spec.attachment = Some(Uuid::new_v4().simple().to_string());
        let process = self.start(None, spec.clone()).await?;
        match self.environment() {
            Ok(environment) => {
                let place = Place { links: Arc::clone(&self.links), environment, spec, sizes };
                Ok(Terminal::new(place, process))
            }
            Err(_) => Err(self.lost().await),
        }
    }

    /// TCP to a port of the environment's own loopback, if the exam allows it.
    pub async fn tcp(&self, port: u16) -> Result<(Outbound, Inbound), Refusal> {
        if !self.exam.environment.allow_port_forward {
            return Err(Refusal::Forbidden("this exam does not allow port forwarding"));
        }
        self.ask(|link| async move { link.tcp(port).await }).await
    }

    fn environment(&self) -> Result<EnvironmentId, LinkError> {
        let environment = self.feed.borrow().environment_id;
        environment.ok_or_else(|| LinkError::Unreachable("the session has no environment".to_owned()))
    }

    /// Asks the agent once, and waits for a link to ask on. What was asked and not answered is not asked again: it may have been done.
    async fn ask<T, F>(&self, request: impl Fn(Arc<Link>) -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<T, LinkError>>,
    {
        let mut retry = Retry::within(REACH_WITHIN);
        loop {
            let asked = async {
                // Has a time limit of its own.
                let link = self.links.get(self.environment()?).await?;
                let late = || LinkError::Lost("no answer in time".to_owned());
                timeout(ANSWER_WITHIN, request(link)).await.unwrap_or_else(|_| Err(late()))
            };
            let error = match asked.await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if matches!(error, LinkError::Unreachable(_)) && retry.wait().await {
                tracing::debug!(%error, "the environment is asked again");
                continue;
            }
            return Err(self.refusal(error).await);
        }
    }

    /// What is told when the agent has not done what was asked.
    pub async fn refusal(&self, error: LinkError) -> Refusal {
        match error {
            LinkError::Refused(sentence) => Refusal::Refused(sentence),
            error => {
                tracing::warn!(%error, "the environment's agent did not take a request");
                self.lost().await
            }
        }
    }

    /// The environment is gone or does not answer: the session's end if it has one by now, else [`Refusal::Lost`].
    pub async fn lost(&self) -> Refusal {
        timeout(REASON_WITHIN, self.over()).await.map_or(Refusal::Lost, Refusal::Over)
    }

    /// Records that somebody is here, for as long as it is polled: a connection does so once, whatever goes on in it. Never resolves.
    pub async fn active(&self) -> Infallible {
        loop {
            tokio::time::sleep(TOUCH_EVERY).await;
            self.lifecycle.touch(self.access.session_id()).await;
        }
    }

    /// Resolves when the session is over: when its row says so, or when the exam's time is, whichever is known first.
    pub async fn over(&self) -> Over {
        let mut feed = self.feed.clone();
        loop {
            let session = Arc::clone(&feed.borrow_and_update());
            if let Some(over) = Over::of(&session) {
                return over;
            }
            let left = session.ends_at().map(|end| end.saturating_sub(self.lifecycle.now_ms()).max(0));
            let deadline = async {
                match left {
                    Some(ms) => tokio::time::sleep(Duration::from_millis(ms.unsigned_abs())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = deadline => return Over::because(ReasonCode::TimeExpired),
                changed = feed.changed() => if changed.is_err() {
                    // The lifecycle is gone: the server is ending, and its listeners say so themselves.
                    std::future::pending::<()>().await;
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_is_given_back_and_leaves_nothing_behind() {
        let connections: Arc<Mutex<HashMap<SessionId, usize>>> = Arc::default();
        let session_id = SessionId::new();
        connections.lock().unwrap().insert(session_id, 1);
        drop(Seat { connections: Arc::clone(&connections), session_id });
        assert!(connections.lock().unwrap().is_empty());
    }
}
