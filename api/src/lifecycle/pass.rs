//! The loop: one pass after another, and who is at work meanwhile.
use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{
    Lifecycle, Subject,
    decide::{Seen, Step, decide, next_deadline},
};
use crate::{
    environment::Observation,
    identity::EnvironmentId,
    session::{Session, State},
    store::StoreError,
};

/// Passes without an event: what other replicas changed is seen this soon.
const PASS_EVERY: Duration = Duration::from_secs(1);
/// Between the beginnings of two passes: a burst of events is one pass.
const PASS_APART: Duration = Duration::from_millis(20);
/// Expired tickets and credentials are removed, and environments without a session looked for, this often.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// An environment without a session is given this long, ms by its own making, before the first sweep may end it.
const ORPHAN_GRACE_MS: i64 = 60_000;
/// How long tasks may take to end when the server does. What they leave is found again.
const SHUTDOWN: Duration = Duration::from_secs(5);
/// The first and the longest pause after an act that failed.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// What kind of act is at work on a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Start,
    Confirm,
    End,
    Destroy,
}

/// Somebody at work on a subject, or the pause after a failure.
#[derive(Debug)]
pub(super) struct Flight {
    generation: u64,
    kind: Kind,
    cancel: CancellationToken,
    failures: u32,
    /// Not at work: not again before this.
    pause_until: Option<Instant>,
}

/// How an act ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    /// The next pass sees what follows.
    Yes,
    /// Not yet: again after a pause that grows.
    Again,
}

/// What one pass keeps for the next.
#[derive(Debug, Default)]
struct Memory {
    clock_read: Option<Instant>,
    swept: Option<Instant>,
    /// Environments without a session in the last sweep.
    orphans: HashSet<EnvironmentId>,
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
            let asked = std::time::Instant::now();
            self.clock.set(self.store.now().await?, asked);
            memory.clock_read = Some(Instant::now());
        }
        // In this order: an environment that is seen has had its row before, so that one without a row is nobody's.
        let observation = Arc::clone(&self.environment.observe().borrow());
        let rows = self.store.unreleased_sessions().await?;
        self.tell(&rows).await?;
        let now = self.now_ms();
        let mut next = i64::MAX;
        let mut subjects = HashSet::new();
        for session in &rows {
            subjects.extend([Subject::Session(session.id), Subject::End(session.id)]);
            if let Some(until) = next_deadline(session).filter(|until| *until > now) {
                next = next.min(until.saturating_sub(now));
            }
            match decide(session, &Seen::of(session, &observation), now) {
                Step::Wait { .. } => self.rest(session),
                step => {
                    if let Some(pause) = self.begin(session, step) {
                        next = next.min(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX));
                    }
                }
            }
        }
        if memory.swept.is_none_or(|at| at.elapsed() >= SWEEP_EVERY) && observation.complete {
            memory.swept = Some(Instant::now());
            self.sweep(&rows, &observation, memory, now);
        }
        // Pauses of what is no more.
        self.flights().retain(|subject, flight| {
            flight.pause_until.is_none_or(|until| until > Instant::now() || subjects.contains(subject))
        });
        Ok(Duration::from_millis(next.max(1).unsigned_abs()))
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

    /// Nothing is to be done: whatever was begun for an earlier reading has no point any more.
    fn rest(&self, session: &Session) {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(&Subject::Session(session.id)) {
            if flight.pause_until.is_some() {
                flights.remove(&Subject::Session(session.id));
            } else if flight.kind == Kind::Start && session.state != State::Initializing {
                flight.cancel.cancel();
            }
        }
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

    /// Begins an act unless one is at work on the subject, or pauses; the pause that is left.
    fn take_off<F, A>(
        self: &Arc<Self>,
        subject: Subject,
        kind: Kind,
        span: tracing::Span,
        act: F,
    ) -> Option<Duration>
    where
        F: FnOnce(CancellationToken) -> A,
        A: Future<Output = Done> + Send + 'static,
    {
        static GENERATION: AtomicU64 = AtomicU64::new(0);
        let mut flights = self.flights();
        let mut failures = 0;
        if let Some(flight) = flights.get(&subject) {
            match flight.pause_until {
                Some(until) if flight.kind == kind => {
                    let left = until.saturating_duration_since(Instant::now());
                    if !left.is_zero() {
                        return Some(left);
                    }
                    failures = flight.failures;
                }
                Some(_) => {}
                None => {
                    if flight.kind != kind {
                        // What is begun next waits until this has stopped: a destruction must find all that was made.
                        flight.cancel.cancel();
                    }
                    return None;
                }
            }
        }
        let generation = GENERATION.fetch_add(1, Ordering::Relaxed);
        let cancel = self.end.child_token();
        flights.insert(
            subject,
            Flight { generation, kind, cancel: cancel.clone(), failures, pause_until: None },
        );
        drop(flights);
        // Made before the task runs and dropped with it: also when it panics.
        let landing =
            Landing { lifecycle: Arc::clone(self), subject, generation, failures, done: Done::Again };
        let act = act(cancel);
        self.tasks.spawn(async move { landing.down(act.await) }.instrument(span));
        None
    }

    /// Ends environments that no session has, and removes what has expired.
    fn sweep(self: &Arc<Self>, rows: &[Session], observation: &Observation, memory: &mut Memory, now: i64) {
        let named: HashSet<_> = rows.iter().filter_map(|session| session.environment_id).collect();
        // Warm ones belong to nobody by design; their pool judges them.
        let orphans: Vec<_> = observation
            .environments
            .iter()
            .filter(|(id, observed)| !observed.warm && !named.contains(id))
            .map(|(id, observed)| (*id, observed.created_at))
            .collect();
        for (id, created_at) in &orphans {
            if created_at.saturating_add(ORPHAN_GRACE_MS) < now || memory.orphans.contains(id) {
                let (this, id) = (Arc::clone(self), *id);
                let span = tracing::info_span!("orphan", environment_id = %id);
                self.take_off(Subject::Orphan(id), Kind::Destroy, span, |_| async move {
                    this.destroy_orphan(id).await
                });
            }
        }
        memory.orphans = orphans.into_iter().map(|(id, _)| id).collect();
        let store = self.store.clone();
        self.tasks.spawn(async move {
            if let Err(error) = store.delete_expired().await {
                tracing::warn!(%error, "expired tickets and credentials were not removed");
            }
        });
    }
}

/// Takes a subject's entry away, or turns it into a pause, when its task ends in whatever way.
struct Landing {
    lifecycle: Arc<Lifecycle>,
    subject: Subject,
    generation: u64,
    failures: u32,
    done: Done,
}

impl Landing {
    /// The act has ended, and how.
    fn down(mut self, done: Done) {
        self.done = done;
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a task of the lifecycle panicked; it is tried again");
        }
        let mut flights = self.lifecycle.flights();
        // Superseded: the entry is another's.
        if flights.get(&self.subject).is_none_or(|flight| flight.generation != self.generation) {
            return;
        }
        match self.done {
            Done::Yes => {
                flights.remove(&self.subject);
                self.lifecycle.wake();
            }
            Done::Again => {
                if let Some(flight) = flights.get_mut(&self.subject) {
                    flight.failures = self.failures.saturating_add(1);
                    flight.pause_until = Some(Instant::now() + pause(flight.failures));
                }
                // The next pass reckons with the pause.
                self.lifecycle.wake();
            }
        }
    }
}

/// Doubles with each failure, up to a limit, with jitter, so that replicas do not fall into step.
pub(super) fn pause(failures: u32) -> Duration {
    let factor = 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
    BACKOFF.0.saturating_mul(factor).min(BACKOFF.1).mul_f64(rand::random_range(0.75..1.25))
}

/// Resolves when something about environments has changed; never when the backend has gone.
async fn changed(observation: &mut tokio::sync::watch::Receiver<Arc<Observation>>) {
    if observation.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        environment::{
            link::Links,
            local::{Agent, LocalEnvironment, LocalOptions},
        },
        identity::SessionId,
        store::Store,
    };

    async fn lifecycle(directory: &std::path::Path) -> Arc<Lifecycle> {
        let store = Store::open(&format!("sqlite:{}/db", directory.display())).await.unwrap();
        let options = LocalOptions {
            data_dir: directory.join("data"),
            agent: Agent::Bytes(b"none"),
            shared: Vec::new(),
        };
        let environment = Arc::new(LocalEnvironment::new(options).unwrap());
        Lifecycle::new(store, environment.clone(), Links::new(environment))
    }

    async fn landed(lifecycle: &Lifecycle) {
        tokio::time::timeout(Duration::from_secs(10), lifecycle.wake.notified()).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_of_its_own_session_only_and_is_tried_again_after_a_pause() {
        let directory = tempfile::tempdir().unwrap();
        let lifecycle = lifecycle(directory.path()).await;
        let subject = Subject::Session(SessionId::new());
        let span = tracing::Span::none;
        assert_eq!(lifecycle.take_off(subject, Kind::Start, span(), |_| async { panic!("a fault") }), None);
        landed(&lifecycle).await;
        let again = || lifecycle.take_off(subject, Kind::Start, span(), |_| async { Done::Yes });
        let left = again().expect("there is a pause");
        assert!(left <= Duration::from_millis(320), "{left:?}");
        // Another kind of act does not wait for it.
        assert_eq!(lifecycle.take_off(subject, Kind::Destroy, span(), |_| async { Done::Yes }), None);
        landed(&lifecycle).await;
        assert!(lifecycle.flights().is_empty());
    }

    #[tokio::test]
    async fn one_act_at_a_time_and_what_follows_waits_for_what_it_cancelled() {
        let directory = tempfile::tempdir().unwrap();
        let lifecycle = lifecycle(directory.path()).await;
        let subject = Subject::Session(SessionId::new());
        let span = tracing::Span::none;
        let (stopped, stop) = tokio::sync::oneshot::channel::<()>();
        let slow = |cancel: CancellationToken| async move {
            cancel.cancelled().await;
            // Cancelled, and still at work.
            let _ = stop.await;
            Done::Yes
        };
        lifecycle.take_off(subject, Kind::Start, span(), slow);
        let count = Arc::new(AtomicU64::new(0));
        let destroy = || {
            let count = Arc::clone(&count);
            lifecycle.take_off(subject, Kind::Destroy, span(), |_| async move {
                count.fetch_add(1, Ordering::Relaxed);
                Done::Yes
            })
        };
        destroy();
        destroy();
        assert_eq!(count.load(Ordering::Relaxed), 0);
        stopped.send(()).unwrap();
        landed(&lifecycle).await;
        destroy();
        landed(&lifecycle).await;
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn pauses_grow_and_have_a_limit() {
        for (failures, least, most) in [(1, 187, 313), (2, 375, 625), (3, 750, 1250), (60, 22_500, 37_500)] {
            for _ in 0..100 {
                let pause = pause(failures).as_millis();
                assert!((least..=most).contains(&pause), "{failures}: {pause}");
            }
        }
    }
}
