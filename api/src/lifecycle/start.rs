//! From `created` to `ready`: name an environment, have it made, reach its agent, prepare the exam.
//!
//! Has no deadline of its own: when the session's is over, the loop ends the session and cancels this.
use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Lifecycle,
    pass::{Done, pause},
};
use crate::{
    environment::{
        Create, EnvironmentError, Observation, Phase,
        link::{Link, LinkError},
    },
    exam::Exam,
    identity::EnvironmentId,
    reason::{Reason, ReasonCode},
    session::{STEPS, Session, State},
    store::{Actor, StoreError, Transition},
};

/// Attempts to have an environment made while the backend does not answer.
const CREATE_ATTEMPTS: u32 = 3;
/// Made, and still not to be seen: asked for again this often.
const CREATE_AGAIN: Duration = Duration::from_secs(2);
/// The first and the longest pause between two attempts to reach the agent.
const PROBE: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(100));
/// One attempt to reach the agent.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// A look without an event while there is nothing to reach.
const LOOK: Duration = Duration::from_secs(1);
/// Attempts to run the setup script when the connection is lost under it; it runs once, the agent sees to that.
const SETUP_ATTEMPTS: usize = 3;
/// Index into [`STEPS`] while the setup script runs.
const PREPARING: usize = 3;
/// What an environment may live beyond its session's longest life: the backend's own net must never be the first to act.
const LIFETIME_SLACK_MS: i64 = 15 * 60_000;

/// Why a start stops before it is ready.
enum Stop {
    /// Somebody else's turn: the next pass decides.
    Yield,
    /// To be tried again after a pause.
    Again,
    /// The session has failed.
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

impl Lifecycle {
    /// All of it, as far as it has not been done.
    pub(super) async fn start(self: &Arc<Self>, mut session: Session, cancel: &CancellationToken) -> Done {
        match self.try_start(&mut session, cancel).await {
            Ok(()) | Err(Stop::Yield) => Done::Yes,
            Err(Stop::Again) => Done::Again,
            Err(Stop::Fail(reason)) => match self.latest(&mut session).await {
                Ok(()) => self.finish(&session, State::Failed, reason).await,
                Err(Stop::Again) => Done::Again,
                Err(_) => Done::Yes,
            },
        }
    }

    async fn try_start(
        self: &Arc<Self>,
        session: &mut Session,
        cancel: &CancellationToken,
    ) -> Result<(), Stop> {
        if session.state == State::Created {
            // The name is committed before anything has it: whatever is found later can be traced to its session.
            let named = Transition {
                environment_id: Some(EnvironmentId::new()),
                step: Some(0),
                ..Transition::to(State::Initializing)
            };
            *session = self.transition(session, named, &Actor::System).await?;
        }
        let Some(id) = session.environment_id else { return Err(Stop::Yield) };
        let exam = self.store.environment_exam(session).await?;
        let mut observation = self.environment.observe();
        self.create(session, id, &exam, cancel).await?;
        let link = self.reach(session, id, &exam, &mut observation, cancel).await?;
        if let Some(script) = &exam.environment.setup {
            self.progress(session, PREPARING).await?;
            self.set_up(id, link, script, cancel).await?;
        }
        loop {
            let ready = Transition { step: Some(STEPS.len() - 1), ..Transition::to(State::Ready) };
            match self.transition(session, ready, &Actor::System).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict) => self.latest(session).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Has the environment made. Is never broken off half-way: a destruction that follows must find all of it.
    async fn create(
        &self,
        session: &Session,
        id: EnvironmentId,
        exam: &Exam,
        cancel: &CancellationToken,
    ) -> Result<(), Stop> {
        let lifetime = session
            .duration_ms
            .saturating_add(session.start_within_ms)
            .saturating_add(LIFETIME_SLACK_MS)
            .max(0);
        let request = Create {
            environment_id: id,
            owner: Some((session.user_id, session.id)),
            exam_id: session.exam_id.clone(),
            spec: exam.environment.clone(),
            lifetime_seconds: lifetime.unsigned_abs() / 1000,
        };
        let mut attempt = 1;
        loop {
            let Ok(turn) = self.starting.acquire().await else { return Err(Stop::Yield) };
            if cancel.is_cancelled() {
                return Err(Stop::Yield);
            }
            let created = self.environment.create(&request).await;
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
            sleep(pause(attempt), cancel).await?;
            attempt += 1;
        }
    }

    /// Waits for the agent to answer, and tells the steps until then.
    async fn reach(
        self: &Arc<Self>,
        session: &mut Session,
        id: EnvironmentId,
        exam: &Exam,
        observation: &mut watch::Receiver<Arc<Observation>>,
        cancel: &CancellationToken,
    ) -> Result<Arc<Link>, Stop> {
        let mut asked = Instant::now();
        let mut delay = PROBE.0;
        loop {
            let look = Arc::clone(&observation.borrow_and_update());
            let reachable = match look.environments.get(&id).map(|observed| &observed.phase) {
                Some(Phase::Up) => true,
                Some(Phase::Starting { step, reachable }) => {
                    self.progress(session, *step).await?;
                    *reachable
                }
                // The next pass ends the session for it.
                Some(Phase::Ending | Phase::Failed(_)) => return Err(Stop::Yield),
                None => {
                    if look.complete && look.unavailable.is_none() && asked.elapsed() >= CREATE_AGAIN {
                        self.create(session, id, exam, cancel).await?;
                        asked = Instant::now();
                    }
                    false
                }
            };
            let wait = if reachable {
                if let Some(link) = self.probe(id, cancel).await? {
                    return Ok(link);
                }
                let wait = delay;
                delay = (delay * 2).min(PROBE.1);
                wait
            } else {
                LOOK
            };
            tokio::select! {
                () = cancel.cancelled() => return Err(Stop::Yield),
                _ = observation.changed(), if !reachable => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// One attempt.
    async fn probe(
        self: &Arc<Self>,
        id: EnvironmentId,
        cancel: &CancellationToken,
    ) -> Result<Option<Arc<Link>>, Stop> {
        let attempt = async {
            let _turn = self.starting.acquire().await.ok()?;
            let answer = async {
                let link = self.links.get(id).await?;
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
                    self.links.close(id);
                    None
                }
            }
        };
        tokio::select! {
            () = cancel.cancelled() => Err(Stop::Yield),
            link = attempt => Ok(link),
        }
    }

    /// Runs the exam's script, which has until the session's start is overdue.
    async fn set_up(
        self: &Arc<Self>,
        id: EnvironmentId,
        mut link: Arc<Link>,
        script: &str,
        cancel: &CancellationToken,
    ) -> Result<(), Stop> {
        let failed = |details: String| Stop::Fail(Reason::new(ReasonCode::SetupFailed, details));
        let mut attempt = 1;
        loop {
            let result = tokio::select! {
                () = cancel.cancelled() => return Err(Stop::Yield),
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
                Err(error) if attempt >= SETUP_ATTEMPTS => {
                    return Err(failed(format!("The setup script's end was not learned: {error}")));
                }
                Err(error) => tracing::warn!(%error, "the connection was lost under the setup script"),
            }
            attempt += 1;
            sleep(PROBE.1, cancel).await?;
            if let Some(again) = self.probe(id, cancel).await? {
                link = again;
            }
        }
    }

    /// Tells a later step; an earlier one changes nothing.
    async fn progress(&self, session: &mut Session, step: usize) -> Result<(), Stop> {
        // Not the last one, which says ready.
        let step = step.min(STEPS.len() - 2);
        while step > session.step {
            match self.store.set_step(session, step).await {
                Ok(changed) => {
                    self.feed.publish(&changed);
                    *session = changed;
                }
                Err(StoreError::Conflict) => self.latest(session).await?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads the row again after somebody else changed it; only a start that is still wanted goes on.
    async fn latest(&self, session: &mut Session) -> Result<(), Stop> {
        match self.store.session(session.id).await? {
            Some(latest)
                if matches!(latest.state, State::Created | State::Initializing)
                    && latest.environment_id == session.environment_id =>
            {
                *session = latest;
                Ok(())
            }
            _ => Err(Stop::Yield),
        }
    }
}

async fn sleep(duration: Duration, cancel: &CancellationToken) -> Result<(), Stop> {
    tokio::select! {
        () = cancel.cancelled() => Err(Stop::Yield),
        () = tokio::time::sleep(duration) => Ok(()),
    }
}
