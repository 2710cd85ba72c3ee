//! The loop: one pass after another, and who is at work meanwhile.
use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Lifecycle, Subject,
    decide::{Seen, Step, decide, next_deadline},
    flight::Kind,
    sweep::Swept,
};
use crate::{
    environment::Observation,
    session::{Session, State},
    store::{StoreError, WarmEnvironment},
};

/// Passes without an event: what other replicas changed is seen this soon.
const PASS_EVERY: Duration = Duration::from_secs(1);
/// Between the beginnings of two passes: a burst of events is one pass.
const PASS_APART: Duration = Duration::from_millis(20);
/// Between two looks at the pool: a burst of sessions does not wait for it.
const POOL_APART: Duration = Duration::from_millis(200);
/// How long tasks may take to end when the server does. What they leave is found again.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// What one pass keeps for the next.
#[derive(Debug, Default)]
struct Memory {
    clock_read: Option<Instant>,
    pool_read: Option<Instant>,
    sweep: Swept,
    unavailable: bool,
}

impl Lifecycle {
    /// Runs until the token is cancelled; environments stay as they are then.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut observation = self.environment.observe();
        let mut memory = Memory::default();
        loop {
            let began = Instant::now();
            let next = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                next = self.pass(&mut memory) => next,
            };
            let next = match next {
                Ok(next) => {
                    if std::mem::take(&mut memory.unavailable) {
                        tracing::info!("the database answers again");
                    }
                    next
                }
                Err(error) => {
                    if !std::mem::replace(&mut memory.unavailable, true) {
                        tracing::error!(%error, "the lifecycle cannot read the database: deadlines are late until it can");
                    }
                    PASS_EVERY
                }
            };
            let until = Instant::now() + next.min(PASS_EVERY);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = self.wake.notified() => {}
                () = changed(&mut observation) => {}
                () = tokio::time::sleep_until(until) => {}
            }
            tokio::time::sleep_until(began + PASS_APART).await;
        }
        self.end.cancel();
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                "some of the lifecycle's tasks did not end in time: what they left is found at the next start"
            );
        }
    }

    /// One look at everything. Returns how long there is nothing to do.
    async fn pass(self: &Arc<Self>, memory: &mut Memory) -> Result<Duration, StoreError> {
        if memory.clock_read.is_none_or(|at| at.elapsed() >= Duration::from_secs(10)) {
            self.clock.set(self.store.now().await?);
            memory.clock_read = Some(Instant::now());
        }
        // In this order: an environment that is seen has had its row before, and goes from the pool to a session, never back; so
        // that one without a row is nobody's.
        let observation = Arc::clone(&self.environment.observe().borrow());
        let warm = self.pool_rows(memory).await?;
        let rows = match self.only {
            Some(id) => self
                .store
                .session(id)
                .await?
                .into_iter()
                .filter(|session| session.released_at.is_none())
                .collect(),
            None => self.store.unreleased_sessions().await?,
        };
        self.tell(&rows).await?;
        let now = self.now_ms();
        let mut next = i64::MAX;
        let mut subjects = HashSet::new();
        for session in &rows {
            subjects.extend([
                Subject::Session(session.id),
                Subject::End(session.id),
                Subject::Adopt(session.id),
            ]);
            if let Some(until) = next_deadline(session).filter(|until| *until > now) {
                next = next.min(until.saturating_sub(now));
            }
            self.see_adopted(session, &observation);
            match decide(session, &Seen::of(session, &observation), now) {
                Step::Wait { .. } => {
                    self.rest(Subject::Session(session.id), session.state == State::Initializing);
                }
                step => {
                    if let Some(pause) = self.begin(session, step) {
                        next = next.min(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX));
                    }
                }
            }
        }
        if let Some(warm) = warm {
            self.tend(&warm, &observation, &mut subjects).await?;
            let named = rows.iter().filter_map(|session| session.environment_id);
            let named = named.chain(warm.iter().map(|warm| warm.id));
            self.sweep(named, &observation, &mut memory.sweep, now);
        }
        self.forget_pauses(&subjects);
        Ok(Duration::from_millis(next.max(1).unsigned_abs()))
    }

    /// The pool's rows when it is time to look at them.
    async fn pool_rows(&self, memory: &mut Memory) -> Result<Option<Vec<WarmEnvironment>>, StoreError> {
        if self.only.is_some() || memory.pool_read.is_some_and(|at| at.elapsed() < POOL_APART) {
            return Ok(None);
        }
        let rows = self.store.warm_environments().await?;
        memory.pool_read = Some(Instant::now());
        Ok(Some(rows))
    }

    /// An environment that was kept warm carries its session's name from soon after the claim.
    fn see_adopted(self: &Arc<Self>, session: &Session, observation: &Observation) {
        let (State::Initializing | State::Ready | State::Running, Some(id)) =
            (session.state, session.environment_id)
        else {
            return;
        };
        if observation.environments.get(&id).is_none_or(|observed| observed.owner.is_some()) {
            return;
        }
        let (this, owner) = (Arc::clone(self), (session.user_id, session.id));
        let span = tracing::info_span!("session", session_id = %session.id, environment_id = %id);
        self.take_off(Subject::Adopt(session.id), Kind::Start, span, move |_| async move {
            this.adopt(id, owner).await
        });
    }

    /// Tells whoever watches what the rows say now.
    async fn tell(&self, rows: &[Session]) -> Result<(), StoreError> {
        let mut watched: HashSet<_> = self.feed.watched().into_iter().collect();
        if watched.is_empty() {
            return Ok(());
        }
        for session in rows {
            if watched.remove(&session.id) {
                self.feed.publish(session);
            }
        }
        // Another replica may have ended and released it since the last pass.
        for id in watched {
            if let Some(session) = self.store.session(id).await? {
                self.feed.publish(&session);
            }
        }
        Ok(())
    }

    /// Begins what is to be done unless it is being done; the pause that is left, if it failed before.
    fn begin(self: &Arc<Self>, session: &Session, step: Step) -> Option<Duration> {
        let kind = match step {
            Step::Wait { .. } => return None,
            Step::Provision | Step::Start => Kind::Start,
            Step::Confirm => Kind::Confirm,
            Step::End { .. } => Kind::End,
            Step::Destroy | Step::Release => Kind::Destroy,
        };
        let span = tracing::info_span!(
            "session",
            session_id = %session.id,
            user_id = %session.user_id,
            environment_id = session.environment_id.map(tracing::field::display),
        );
        let (this, session) = (Arc::clone(self), session.clone());
        // An end is a change of the row and waits for nobody who is at work on the environment.
        let subject = if kind == Kind::End { Subject::End(session.id) } else { Subject::Session(session.id) };
        self.take_off(subject, kind, span, |cancel| async move {
            match step {
                Step::Provision | Step::Start => this.start(session, &cancel).await,
                Step::Confirm => this.confirm(session).await,
                Step::End { to, reason } => this.finish(&session, to, reason).await,
                Step::Destroy | Step::Release | Step::Wait { .. } => this.destroy(&session).await,
            }
        })
    }
}

/// Resolves when something about environments has changed; never when the backend has gone.
async fn changed(observation: &mut tokio::sync::watch::Receiver<Arc<Observation>>) {
    if observation.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
