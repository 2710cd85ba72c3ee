//! Has one environment made, reaches its agent and prepares the exam in it: for a session, or to keep it warm.
//!
//! Each part may be done again by whoever goes on after a restart. Nothing here has a deadline over all: whoever asked cancels.
use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Lifecycle,
    decide::Seen,
    early::{self, Waiting},
    flight::pause,
};
use crate::{
    environment::{
        Create, EnvironmentError, Observation, Phase,
        link::{Link, LinkError},
    },
    reason::{Reason, ReasonCode},
    store::StoreError,
};

/// Attempts to have an environment made while the backend does not answer.
const CREATE_ATTEMPTS: u32 = 3;
/// Made, and still not to be seen: asked for again this often.
const CREATE_AGAIN: Duration = Duration::from_secs(2);
/// The first and the longest pause between two attempts to reach the agent of an environment that is up.
const PROBE: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(100));
/// One attempt to reach the agent: longer than a connection has to open, in which an agent may have to be sent.
const PROBE_LIMIT: Duration = Duration::from_secs(12);
/// A look without an event while there is nothing to reach.
const LOOK: Duration = Duration::from_secs(1);
/// Between two attempts to reach an agent whose connection was lost under the setup script.
const REACH_AGAIN: Duration = Duration::from_millis(500);
/// Index into [`crate::session::STEPS`] while the setup script runs.
const PREPARING: usize = 3;

/// Why a start stops before it is ready.
pub(super) enum Stop {
    /// Somebody else's turn: the next pass decides.
    Yield,
    /// To be tried again after a pause.
    Again,
    /// It has failed.
    Fail(Reason),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict | StoreError::IllegalTransition { .. } => Self::Yield,
            error => {
                tracing::warn!(%error, "the start could not be recorded");
                Self::Again
            }
        }
    }
}

/// Is told each later step, an index into [`crate::session::STEPS`].
pub(super) trait Witness: Send {
    fn step(&mut self, step: usize) -> impl Future<Output = Result<(), Stop>> + Send;
}

/// One environment on its way.
pub(super) struct Making<'a> {
    pub lifecycle: &'a Arc<Lifecycle>,
    pub request: &'a Create,
    /// Its name was given by this process just now: nobody else can have begun.
    pub new: bool,
    /// How many may call the backend and agents at once.
    pub turns: &'a Semaphore,
    pub cancel: &'a CancellationToken,
}

impl Making<'_> {
    /// Until the agent has answered and the exam's setup script, if there is one, has run.
    pub(super) async fn run(&self, witness: &mut impl Witness) -> Result<(), Stop> {
        let mut observation = self.lifecycle.environment.observe();
        // Whoever named it has it made; if it does not appear, it is made here.
        if self.new {
            self.create().await?;
        }
        let link = self.reach(&mut observation, witness).await?;
        if let Some(script) = &self.request.spec.setup {
            witness.step(PREPARING).await?;
            tokio::select! {
                done = self.set_up(link, script) => done?,
                reason = self.lost(&mut observation) => return Err(Stop::Fail(reason)),
            }
        }
        Ok(())
    }

    /// Resolves when the environment, which has been there, is lost.
    async fn lost(&self, observation: &mut watch::Receiver<Arc<Observation>>) -> Reason {
        loop {
            let seen = self.seen(observation);
            if let Some(reason) = self.loss(&seen).await {
                return reason;
            }
            tokio::select! {
                _ = observation.changed() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    fn seen(&self, observation: &mut watch::Receiver<Arc<Observation>>) -> Seen {
        Seen::at(Some(self.request.environment_id), &observation.borrow_and_update())
    }

    /// Why an environment that has been there is lost, if it is. One that is gone need not have been seen to end.
    async fn loss(&self, seen: &Seen) -> Option<Reason> {
        match seen {
            Seen::Absent => self.lifecycle.loss(self.request.environment_id).await,
            Seen::Present(_) | Seen::Unknown => seen.loss(),
        }
    }

    /// Has the environment made. Is never broken off half-way: a destruction that follows must find all of it.
    async fn create(&self) -> Result<(), Stop> {
        let mut attempt = 1;
        loop {
            let Ok(turn) = self.turns.acquire().await else { return Err(Stop::Yield) };
            if self.cancel.is_cancelled() {
                return Err(Stop::Yield);
            }
            let created = self.lifecycle.environment.create(self.request).await;
            drop(turn);
            let said = match created {
                Ok(()) => return Ok(()),
                Err(EnvironmentError::Refused(reason)) => return Err(Stop::Fail(reason)),
                Err(error @ (EnvironmentError::Unavailable(_) | EnvironmentError::NotFound)) => {
                    error.to_string()
                }
            };
            tracing::warn!(attempt, error = said, "the environment could not be made");
            if attempt >= CREATE_ATTEMPTS {
                let details =
                    format!("{CREATE_ATTEMPTS} attempts to make the environment failed; the last: {said}");
                return Err(Stop::Fail(Reason::new(ReasonCode::ClusterUnavailable, details)));
            }
            self.sleep(pause(attempt)).await?;
            attempt += 1;
        }
    }

    /// Waits for the agent to answer, and tells the steps until then.
    async fn reach(
        &self,
        observation: &mut watch::Receiver<Arc<Observation>>,
        witness: &mut impl Witness,
    ) -> Result<Arc<Link>, Stop> {
        let mut asked = Instant::now();
        let mut waits = None;
        let mut delay = PROBE.0;
        let mut there = false;
        loop {
            let seen = self.seen(observation);
            there |= matches!(seen, Seen::Present(_));
            if there && let Some(reason) = self.loss(&seen).await {
                return Err(Stop::Fail(reason));
            }
            if !matches!(seen, Seen::Present(Phase::Starting { reachable: true, .. })) {
                waits = None;
            }
            let wait = match seen {
                Seen::Present(Phase::Starting { step, reachable: maybe }) => {
                    witness.step(step).await?;
                    if maybe && self.is_awaited() {
                        let waiting = waits.get_or_insert_with(|| self.lifecycle.early.join());
                        if waiting.is_one_of_few() {
                            if let Some(link) = self.probe_early(waiting, observation).await? {
                                return Ok(link);
                            }
                            continue;
                        }
                    }
                    LOOK
                }
                // Up: in any other phase it is lost.
                Seen::Present(_) => {
                    if let Some(link) = self.probe().await? {
                        return Ok(link);
                    }
                    let wait = delay;
                    delay = (delay * 2).min(PROBE.1);
                    wait
                }
                Seen::Absent if !there && asked.elapsed() >= CREATE_AGAIN => {
                    self.create().await?;
                    asked = Instant::now();
                    LOOK
                }
                Seen::Absent | Seen::Unknown => LOOK,
            };
            tokio::select! {
                () = self.cancel.cancelled() => return Err(Stop::Yield),
                _ = observation.changed() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// A session has it, and somebody waits: its agent is tried before the backend says that it is up. One that is kept warm is ready only
    /// after that: whoever claims it relies on what the backend says of it from then on.
    fn is_awaited(&self) -> bool {
        self.request.owner.is_some()
    }

    /// One attempt at an agent that is perhaps there; none when the backend has news first.
    async fn probe_early(
        &self,
        waiting: &Waiting<'_>,
        observation: &mut watch::Receiver<Arc<Observation>>,
    ) -> Result<Option<Arc<Link>>, Stop> {
        let turn = tokio::select! {
            () = self.cancel.cancelled() => return Err(Stop::Yield),
            _ = observation.changed() => return Ok(None),
            turn = waiting.turn() => turn,
        };
        let link = self.probe().await?;
        if link.is_none() {
            // With the turn in hand: this is what bounds the attempts of all.
            tokio::select! {
                () = self.cancel.cancelled() => return Err(Stop::Yield),
                _ = observation.changed() => {}
                () = tokio::time::sleep(early::APART) => {}
            }
        }
        drop(turn);
        Ok(link)
    }

    /// One attempt.
    async fn probe(&self) -> Result<Option<Arc<Link>>, Stop> {
        let (id, links) = (self.request.environment_id, &self.lifecycle.links);
        let attempt = async {
            let _turn = self.turns.acquire().await.ok()?;
            let answer = async {
                let link = links.get(id).await?;
                link.health().await.map(|_| link)
            };
            match tokio::time::timeout(PROBE_LIMIT, answer).await {
                Ok(Ok(link)) => Some(link),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "the agent does not answer yet");
                    None
                }
                Err(_) => {
                    // Whatever hangs is not tried again.
                    tracing::debug!("the agent has not answered in time");
                    links.close(id);
                    None
                }
            }
        };
        tokio::select! {
            () = self.cancel.cancelled() => Err(Stop::Yield),
            link = attempt => Ok(link),
        }
    }

    /// Runs the exam's script, which has until the start is overdue. The agent runs it once, however often it is asked: when the
    /// connection is lost under it, the next one learns its end.
    async fn set_up(&self, mut link: Arc<Link>, script: &str) -> Result<(), Stop> {
        let failed = |details: String| Stop::Fail(Reason::new(ReasonCode::SetupFailed, details));
        loop {
            let result = tokio::select! {
                () = self.cancel.cancelled() => return Err(Stop::Yield),
                result = link.setup(script) => result,
            };
            match result {
                Ok(result) if result.exit_code == 0 => return Ok(()),
                Ok(result) => {
                    let tail = result.tail.trim_end();
                    return Err(failed(format!(
                        "The setup script ended with {}; its last lines:\n{tail}",
                        result.exit_code
                    )));
                }
                Err(LinkError::Refused(said)) => {
                    return Err(failed(format!("The setup script was refused: {said}")));
                }
                Err(error) => tracing::warn!(%error, "the connection was lost under the setup script"),
            }
            link = loop {
                self.sleep(REACH_AGAIN).await?;
                if let Some(link) = self.probe().await? {
                    break link;
                }
            };
        }
    }

    async fn sleep(&self, duration: Duration) -> Result<(), Stop> {
        tokio::select! {
            () = self.cancel.cancelled() => Err(Stop::Yield),
            () = tokio::time::sleep(duration) => Ok(()),
        }
    }
}
