//! A session as a value: states, steps and the row.
use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    identity::{EnvironmentId, SessionId, UserId},
    reason::Reason,
};

/// The lifecycle of `docs/api.md`. `terminated` and `failed` are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Row committed, nothing provisioned yet.
    Created,
    /// Environment being provisioned.
    Initializing,
    /// The environment answers, the candidate has not connected yet.
    Ready,
    /// The candidate has connected at least once.
    Running,
    /// Ended as it should.
    Terminated,
    /// Ended by an error, or cancelled before it was ready.
    Failed,
}

impl State {
    /// All of them, in order.
    pub const ALL: [Self; 6] =
        [Self::Created, Self::Initializing, Self::Ready, Self::Running, Self::Terminated, Self::Failed];

    /// Where it may go from here. The same table stands in the schema, which has the last word.
    #[must_use]
    pub const fn next(self) -> &'static [Self] {
        match self {
            Self::Created => &[Self::Initializing, Self::Failed],
            Self::Initializing => &[Self::Ready, Self::Failed],
            Self::Ready => &[Self::Running, Self::Terminated, Self::Failed],
            Self::Running => &[Self::Terminated, Self::Failed],
            Self::Terminated | Self::Failed => &[],
        }
    }

    /// Final?
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Terminated | Self::Failed)
    }

    /// As stored and as shown in `lifecycle_state`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Initializing => "initializing",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Terminated => "terminated",
            Self::Failed => "failed",
        }
    }

    /// `display_state`.
    #[must_use]
    pub const fn display(self) -> &'static str {
        match self {
            Self::Created => "creating",
            Self::Failed => "error",
            other => other.as_str(),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a state: created, initializing, ready, running, terminated or failed")]
pub struct UnknownState;

impl FromStr for State {
    type Err = UnknownState;

    fn from_str(word: &str) -> Result<Self, UnknownState> {
        Self::ALL.into_iter().find(|state| state.as_str() == word).ok_or(UnknownState)
    }
}

/// The steps of provisioning, as a candidate is told them. `current_step` counts from 1.
pub const STEPS: [&str; 5] = [
    "Finding a place for your environment",
    "Fetching the exam's image",
    "Starting your environment",
    "Preparing the exam",
    "Your environment is ready",
];

/// One row of `session`, with the exam's limits as they stood when it was made. Times are milliseconds since 1970 by the database's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Its name.
    pub id: SessionId,
    /// Whose it is; never changes.
    pub user_id: UserId,
    /// Which exam; never changes.
    pub exam_id: String,
    /// Where it runs; set once, when provisioning begins.
    pub environment_id: Option<EnvironmentId>,
    /// Where it stands.
    pub state: State,
    /// Counts changes; every write names the version that it read.
    pub version: i64,
    /// Why it ended, once it has.
    pub reason: Option<Reason>,
    /// Index into [`STEPS`].
    pub step: usize,
    /// Length of the exam, ms.
    pub duration_ms: i64,
    /// How long it may stay `ready` and unused, ms.
    pub start_within_ms: i64,
    /// How long a shell is kept without its client, ms.
    pub reconnect_window_ms: i64,
    /// Row made.
    pub created_at: i64,
    /// Provisioning began.
    pub initializing_at: Option<i64>,
    /// Became ready.
    pub ready_at: Option<i64>,
    /// First became running: the exam clock's start.
    pub started_at: Option<i64>,
    /// Ended.
    pub ended_at: Option<i64>,
    /// Environment, secrets and storage gone.
    pub released_at: Option<i64>,
    /// Somebody was attached, last.
    pub active_at: i64,
    /// Last change of state.
    pub updated_at: i64,
}

impl Session {
    /// When the exam ends, once its clock runs.
    #[must_use]
    pub fn ends_at(&self) -> Option<i64> {
        self.started_at.map(|at| at.saturating_add(self.duration_ms))
    }

    /// What is left of it at `now`, whole seconds rounded down so that a client never shows more than there is; the full duration before the clock runs, 0 after the end.
    #[must_use]
    pub fn remaining_seconds(&self, now: i64) -> i64 {
        if self.state.is_terminal() {
            return 0;
        }
        let left = self.ends_at().map_or(self.duration_ms, |end| end.saturating_sub(now));
        left.clamp(0, self.duration_ms).div_euclid(1000)
    }
}
