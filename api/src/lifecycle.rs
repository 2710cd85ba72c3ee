//! Brings every session to where its row says it should be, and tells whoever watches.
//!
//! Level-triggered: each pass lists the rows, looks at what environments there are, decides and acts. Events only make a pass come
//! sooner; nothing depends on one being seen. Replicas may all run this: rows change by compare-and-set, environments are keyed by
//! name. What is kept in memory is who is at work, never what is true. This module knows no clients.
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{clock::Clock, early::Early, feed::Feed, flight::Flight, pool::Failing};
use crate::{
    environment::{Environment, link::Links},
    identity::{EnvironmentId, SessionId},
    reason::{Reason, ReasonCode},
    session::{Session, State},
    store::{Actor, Store, StoreError, Transition},
};

mod act;
mod clock;
pub mod decide;
mod early;
mod feed;
mod flight;
mod make;
mod pass;
mod pool;
mod start;
mod sweep;

/// Calls to the backend and to agents at once, for starting; as many again for looking at what seems lost, so that neither waits for the other.
const PARALLEL: usize = 32;
/// Environments that are being ended at once: more than one node has, which may be away and keep each of them waiting.
const ENDING: usize = 128;
/// Calls to the backend and to agents at once, for what is kept warm.
const WARMING: usize = 8;
/// Readings of a row that keeps changing under us.
const ATTEMPTS: usize = 8;

/// Why a session was not ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndError {
    /// There is no such session.
    #[error("there is no such session")]
    NotFound,
    /// It has ended before.
    #[error("the session has already ended")]
    AlreadyTerminated(Box<Session>),
    /// The store did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What somebody is at work on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Subject {
    /// A session's environment.
    Session(SessionId),
    /// The end of a session's row.
    End(SessionId),
    /// The name of a session on an environment that was kept warm.
    Adopt(SessionId),
    /// An environment that is kept warm.
    Warm(EnvironmentId),
    /// An environment that nobody has.
    Orphan(EnvironmentId),
}

/// The lifecycle of all sessions of one database and one backend.
pub struct Lifecycle {
    store: Store,
    environment: Arc<dyn Environment>,
    links: Arc<Links>,
    /// The one session that is looked after; without it all of them, and what no session has.
    only: Option<SessionId>,
    clock: Clock,
    feed: Feed,
    wake: Notify,
    flights: Mutex<HashMap<Subject, Flight>>,
    failing: Mutex<BTreeMap<String, Failing>>,
    tasks: TaskTracker,
    /// Ends the tasks that wait.
    end: CancellationToken,
    starting: Semaphore,
    warming: Semaphore,
    early: Early,
    ending: Semaphore,
    confirming: Semaphore,
}

impl Lifecycle {
    /// Does nothing yet: see [`Lifecycle::run`].
    #[must_use]
    pub fn new(store: Store, environment: Arc<dyn Environment>, links: Arc<Links>) -> Arc<Self> {
        Self::with(store, environment, links, None)
    }

    /// For one session and a short while, beside or without a server: nothing else is looked at.
    #[must_use]
    pub fn only(
        id: SessionId,
        store: Store,
        environment: Arc<dyn Environment>,
        links: Arc<Links>,
    ) -> Arc<Self> {
        Self::with(store, environment, links, Some(id))
    }

    fn with(
        store: Store,
        environment: Arc<dyn Environment>,
        links: Arc<Links>,
        only: Option<SessionId>,
    ) -> Arc<Self> {
        Arc::new(Self {
            only,
            store,
            environment,
            links,
            clock: Clock::new(),
            feed: Feed::default(),
            wake: Notify::new(),
            flights: Mutex::default(),
            failing: Mutex::default(),
            tasks: TaskTracker::new(),
            end: CancellationToken::new(),
            starting: Semaphore::new(PARALLEL),
            warming: Semaphore::new(WARMING),
            early: Early::new(),
            ending: Semaphore::new(ENDING),
            confirming: Semaphore::new(PARALLEL),
        })
    }

    /// The database's clock, ms since 1970, as last read and carried on; never waits.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// Makes the next pass come at once: a row was made or changed.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// The latest row of a session: changes made by this process at once, those of other replicas within a second, while
    /// [`Lifecycle::run`] runs. Only state, step and release count as changes.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn watch(&self, id: SessionId) -> Result<watch::Receiver<Arc<Session>>, StoreError> {
        if let Some(receiver) = self.feed.existing(id) {
            return Ok(receiver);
        }
        let session = self.store.session(id).await?.ok_or(StoreError::NotFound)?;
        Ok(self.feed.subscribe(session))
    }

    /// Somebody has connected: the first time, the exam's clock starts. Returns the row as it then is, which may have ended.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Unavailable`].
    pub async fn connected(&self, id: SessionId) -> Result<Session, StoreError> {
        for _ in 0..ATTEMPTS {
            let session = self.store.session(id).await?.ok_or(StoreError::NotFound)?;
            match session.state {
                State::Ready => {
                    let candidate = Actor::Candidate(session.user_id);
                    match self.transition(&session, Transition::to(State::Running), &candidate).await {
                        Err(StoreError::Conflict) => {}
                        other => return other,
                    }
                }
                State::Running => {
                    self.touch(id).await;
                    return Ok(session);
                }
                _ => return Ok(session),
            }
        }
        Err(StoreError::Conflict)
    }

    /// Somebody is attached now. Best effort: a failure is logged and the next touch is as good.
    pub async fn touch(&self, id: SessionId) {
        if let Err(error) = self.store.touch(id).await {
            tracing::warn!(session_id = %id, %error, "activity was not recorded");
        }
    }

    /// Somebody has gone; until now they were active.
    pub async fn disconnected(&self, id: SessionId) {
        self.touch(id).await;
    }

    /// Ends a session: one that is not ready yet has failed as `cancelled`, any other is terminated for this reason. Committed when this returns;
    /// its environment goes soon after.
    ///
    /// # Errors
    /// [`EndError::AlreadyTerminated`], [`EndError::NotFound`], and the store's.
    pub async fn end(&self, id: SessionId, code: ReasonCode, actor: &Actor) -> Result<Session, EndError> {
        for _ in 0..ATTEMPTS {
            let session = self.store.session(id).await?.ok_or(EndError::NotFound)?;
            let change = match session.state {
                State::Created | State::Initializing => {
                    let details = format!("Ended as {code} by {actor} before it was ready.");
                    Transition::end(State::Failed, Reason::new(ReasonCode::Cancelled, details))
                }
                State::Ready | State::Running => {
                    Transition::end(State::Terminated, Reason::new(code, format!("Ended by {actor}.")))
                }
                State::Terminated | State::Failed => {
                    return Err(EndError::AlreadyTerminated(Box::new(session)));
                }
            };
            match self.transition(&session, change, actor).await {
                Err(StoreError::Conflict) => {}
                other => return Ok(other?),
            }
        }
        Err(StoreError::Conflict.into())
    }

    /// Changes a row, tells whoever watches, and lets the loop look at what follows.
    async fn transition(
        &self,
        session: &Session,
        change: Transition,
        actor: &Actor,
    ) -> Result<Session, StoreError> {
        let changed = self.store.transition(session, change, actor).await?;
        self.changed(session, &changed, actor);
        Ok(changed)
    }

    /// A change of state has been committed.
    fn changed(&self, session: &Session, changed: &Session, actor: &Actor) {
        tracing::info!(
            session_id = %changed.id,
            user_id = %changed.user_id,
            environment_id = changed.environment_id.map(tracing::field::display),
            from = session.state.as_str(),
            to = changed.state.as_str(),
            reason = changed.reason.as_ref().map(|reason| reason.code.as_str()),
            details = changed.reason.as_ref().map(|reason| reason.technical_details.as_str()),
            %actor,
            "session changed"
        );
        self.feed.publish(changed);
        self.wake();
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Subject, Flight>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
