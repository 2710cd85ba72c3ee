//! Who is at work on what: one act at a time on a subject, a growing pause after a failure, and a panic that is a failure.
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

use super::{Lifecycle, Subject};

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

impl Lifecycle {
    /// Nothing is to be done: whatever was begun for an earlier reading has no point any more, unless it still starts.
    pub(super) fn rest(&self, subject: Subject, starts: bool) {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(&subject) {
            if flight.pause_until.is_some() {
                flights.remove(&subject);
            } else if flight.kind == Kind::Start && !starts {
                flight.cancel.cancel();
            }
        }
    }

    /// Pauses of what is no more.
    pub(super) fn forget_pauses(&self, subjects: &HashSet<Subject>) {
        self.flights().retain(|subject, flight| {
            flight.pause_until.is_none_or(|until| until > Instant::now() || subjects.contains(subject))
        });
    }

    /// Begins an act unless one is at work on the subject, or pauses; the pause that is left.
    pub(super) fn take_off<F, A>(
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
    pause_between(BACKOFF, failures)
}

/// As [`pause`], with another first and longest one.
pub(super) fn pause_between((first, longest): (Duration, Duration), failures: u32) -> Duration {
    let factor = 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
    first.saturating_mul(factor).min(longest).mul_f64(rand::random_range(0.75..1.25))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        environment::{
            Agent,
            link::Links,
            local::{LocalEnvironment, LocalOptions},
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
