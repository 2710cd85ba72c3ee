//! From an accepted login to a process in its environment. SSH and the browser use the same bridge.
//!
//! A [`Visit`] is one connection of somebody with access. It waits until the environment is ready, opens processes
//! and terminals in it, and knows by itself when the session is over: from the session's feed and, independently,
//! from the exam's deadline. This module knows neither SSH nor WebSockets.
use std::{
    collections::HashMap,
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
    identity::SessionId,
    lifecycle::Lifecycle,
    reason::ReasonCode,
    session::{STEPS, Session, State},
    store::{Store, StoreError},
};
use tokio::{sync::watch, time::timeout};

/// Connections of one session at once, SSH and browsers together.
pub const CONNECTIONS_PER_SESSION: usize = 32;
/// Provisioning ends within 60 s; a visit waits a little longer, so that the reason arrives first.
const READY_WITHIN: Duration = Duration::from_secs(75);
/// How long the reason of a lost environment is waited for before it is reported without one.
const REASON_WITHIN: Duration = Duration::from_secs(4);
/// The connection to the environment, or an answer from its agent.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
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

    /// Starts a process, or joins a terminal. The exam's variables are added here.
    pub async fn start(&self, command: Option<&[u8]>, mut spec: ProcessSpec) -> Result<Process, Refusal> {
        let exam = self.exam.environment.env.iter().map(|(name, value)| (name.clone(), value.clone()));
        spec.env = exam.chain(spec.env).collect();
        if spec.keep_seconds.is_some() {
            spec.keep_seconds = Some(u64::from(self.exam.reconnect_window_seconds));
        }
        let answer = async { self.link().await?.start(command, &spec).await };
        self.answer(answer).await
    }

    /// TCP to a port of the environment's own loopback, if the exam allows it.
    pub async fn tcp(&self, port: u16) -> Result<(Outbound, Inbound), Refusal> {
        if !self.exam.environment.allow_port_forward {
            return Err(Refusal::Forbidden("this exam does not allow port forwarding"));
        }
        let answer = async { self.link().await?.tcp(port).await };
        self.answer(answer).await
    }

    async fn link(&self) -> Result<Arc<Link>, LinkError> {
        let environment = self.feed.borrow().environment_id;
        match environment {
            Some(id) => self.links.get(id).await,
            None => Err(LinkError::Unreachable("the session has no environment".to_owned())),
        }
    }

    async fn answer<T>(&self, answer: impl Future<Output = Result<T, LinkError>>) -> Result<T, Refusal> {
        match timeout(ANSWER_WITHIN, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(LinkError::Refused(sentence))) => Err(Refusal::Refused(sentence)),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the environment's agent did not take a request");
                Err(self.lost().await)
            }
            Err(_) => Err(self.lost().await),
        }
    }

    /// The environment is gone or does not answer: the session's end if it has one by now, else [`Refusal::Lost`].
    pub async fn lost(&self) -> Refusal {
        timeout(REASON_WITHIN, self.over()).await.map_or(Refusal::Lost, Refusal::Over)
    }

    /// Resolves when the session is over: when its row says so, or when the exam's time is, whichever is known first.
    /// While it waits, the session counts as active.
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
                () = tokio::time::sleep(TOUCH_EVERY) => self.lifecycle.touch(self.access.session_id()).await,
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
