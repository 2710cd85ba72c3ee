//! Why a session ended: a closed list of codes, each with what a candidate is told and what staff may do.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A reason as recorded: the code and the details of this case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reason {
    /// From the closed list.
    pub code: ReasonCode,
    /// One sentence about this case, for staff.
    pub technical_details: String,
}

/// The closed list of `docs/api.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReasonCode {
    /// Handed in.
    Submitted,
    /// The exam's time is over.
    TimeExpired,
    /// A proctor, operator or platform ended it.
    EndedByStaff,
    /// The candidate ended it.
    EndedByCandidate,
    /// Ready, and nobody came.
    NeverStarted,
    /// Idle for longer than twice the exam's duration.
    Abandoned,
    /// Cancelled before it was ready.
    Cancelled,
    /// Not ready within 60 s.
    StartTimeout,
    /// The image cannot be had.
    ImagePullFailed,
    /// No node takes it.
    Unschedulable,
    /// A quota is used up.
    QuotaExceeded,
    /// The environment's first process ended.
    EnvironmentCrashed,
    /// The environment is no longer there.
    EnvironmentLost,
    /// The cluster does not answer.
    ClusterUnavailable,
    /// The environment used more memory than it has.
    OutOfMemory,
    /// The exam's setup script failed.
    SetupFailed,
    /// A fault of Carrel's own.
    Internal,
}
