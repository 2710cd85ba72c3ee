//! What is to be done about one session: a pure function of the row, of what is seen of its environment, and of the time.
//!
//! Everything the lifecycle knows about *when* stands here; how it is done is `act`'s.
use crate::{
    environment::{Observation, Phase},
    identity::EnvironmentId,
    reason::{Reason, ReasonCode},
    session::{STEPS, Session, State},
};

/// From the making of a session until it must be ready, ms.
pub const START_TIMEOUT_MS: i64 = 60_000;
/// A session that nobody was attached to for this many times its exam's duration is abandoned.
pub const ABANDONED_AFTER_DURATIONS: i64 = 2;

/// Of a session whose backend cannot be seen from here, ms: perhaps another replica can see it, and starts it.
pub const LEFT_TO_OTHERS_MS: i64 = 5_000;

/// What is known about a session's environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// The backend cannot be seen, or has not been seen completely yet: nothing follows.
    Unknown,
    /// It was not in the last complete look.
    Absent,
    /// It was there, so far.
    Present(Phase),
}

impl Seen {
    /// What the last look says about this session.
    #[must_use]
    pub fn of(session: &Session, observation: &Observation) -> Self {
        Self::at(session.environment_id, observation)
    }

    /// What the last look says about this environment.
    #[must_use]
    pub fn at(id: Option<EnvironmentId>, observation: &Observation) -> Self {
        match id.and_then(|id| observation.environments.get(&id)) {
            Some(observed) => Self::Present(observed.phase.clone()),
            None if observation.is_current() => Self::Absent,
            None => Self::Unknown,
        }
    }

    /// Why an environment that is there is lost all the same, if it is.
    #[must_use]
    pub fn loss(&self) -> Option<Reason> {
        match self {
            Self::Present(phase) => Phase::loss(Some(phase)),
            Self::Absent | Self::Unknown => None,
        }
    }
}

/// What is to be done next. Each may be done twice without harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing, until this time (ms) or until something changes.
    Wait {
        /// The session's next deadline.
        until: i64,
    },
    /// Give it an environment's name and begin.
    Provision,
    /// See that the environment is made and answers, then `ready`.
    Start,
    /// The environment seems lost: look at it directly, and only then fail the session.
    Confirm,
    /// To this final state, for this reason.
    End {
        /// `terminated` or `failed`.
        to: State,
        /// Why.
        reason: Reason,
    },
    /// End the environment, and then release the session.
    Destroy,
    /// There never was an environment: release the session.
    Release,
}

/// Decides.
#[must_use]
pub fn decide(session: &Session, seen: &Seen, now: i64) -> Step {
    if session.state.is_terminal() {
        return if session.environment_id.is_some() { Step::Destroy } else { Step::Release };
    }
    let (until, to, code) = deadline(session);
    if now >= until {
        return end(to, overdue(session, code));
    }
    if session.state != State::Created
        && let Some(reason) = seen.loss()
    {
        return end(State::Failed, reason);
    }
    match (session.state, seen) {
        (State::Created, Seen::Unknown) if now < left_to_others(session) => {
            Step::Wait { until: left_to_others(session) }
        }
        (State::Created, _) => Step::Provision,
        (State::Initializing, _) => Step::Start,
        (_, Seen::Absent) => Step::Confirm,
        (_, Seen::Unknown | Seen::Present(_)) => Step::Wait { until },
    }
}

/// When the session's row says that something happens by itself, ms; `None` once it has ended.
#[must_use]
pub fn next_deadline(session: &Session) -> Option<i64> {
    (!session.state.is_terminal()).then(|| deadline(session).0)
}

const fn left_to_others(session: &Session) -> i64 {
    session.created_at.saturating_add(LEFT_TO_OTHERS_MS)
}

/// The next deadline of a session that has not ended, and how and why it ends then.
fn deadline(session: &Session) -> (i64, State, ReasonCode) {
    let since = |at: Option<i64>| at.unwrap_or(session.updated_at);
    let idle = session.duration_ms.saturating_mul(ABANDONED_AFTER_DURATIONS);
    let abandoned = (session.active_at.saturating_add(idle), ReasonCode::Abandoned);
    match session.state {
        State::Ready => {
            let unused = since(session.ready_at).saturating_add(session.start_within_ms);
            let (until, code) = earlier((unused, ReasonCode::NeverStarted), abandoned);
            (until, State::Terminated, code)
        }
        State::Running => {
            let over = since(session.started_at).saturating_add(session.duration_ms);
            let (until, code) = earlier((over, ReasonCode::TimeExpired), abandoned);
            (until, State::Terminated, code)
        }
        _ => (session.created_at.saturating_add(START_TIMEOUT_MS), State::Failed, ReasonCode::StartTimeout),
    }
}

/// The reason of a session whose deadline has passed; a late start says where it stood.
fn overdue(session: &Session, code: ReasonCode) -> Reason {
    if code != ReasonCode::StartTimeout {
        return code.into();
    }
    let step = session.step.min(STEPS.len() - 1);
    let details = format!(
        "The environment was not ready within {} seconds. It stood at step {} of {}: {}",
        START_TIMEOUT_MS / 1000,
        step + 1,
        STEPS.len(),
        STEPS.get(step).copied().unwrap_or_default()
    );
    Reason::new(code, details)
}

/// The earlier of two deadlines; the first when they are equal.
const fn earlier(first: (i64, ReasonCode), second: (i64, ReasonCode)) -> (i64, ReasonCode) {
    if second.0 < first.0 { second } else { first }
}

const fn end(to: State, reason: Reason) -> Step {
    Step::End { to, reason }
}

#[cfg(test)]
mod tests;
