//! Why a session ended: a closed list of codes, each with what a candidate is told and what staff may do.
//!
//! Nothing here knows how a fault is noticed.
use std::{fmt, str::FromStr};

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

impl Reason {
    /// A reason with the details of this case.
    #[must_use]
    pub fn new(code: ReasonCode, technical_details: impl Into<String>) -> Self {
        Self { code, technical_details: technical_details.into() }
    }

    /// Everything that callers are told about it.
    #[must_use]
    pub fn classification(&self) -> Classification {
        Classification {
            kind: self.code.kind(),
            severity: self.code.severity(),
            message: self.code.summary(),
            user_message: self.code.user_message(),
            technical_details: self.technical_details.clone(),
            recoverable: self.code.recoverable(),
            recovery_action: self.code.recovery_action(),
        }
    }
}

impl From<ReasonCode> for Reason {
    /// With the code's own summary as details.
    fn from(code: ReasonCode) -> Self {
        Self::new(code, code.summary())
    }
}

/// A reason in full, as `failure-classification classify` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Classification {
    /// Where in a session's life it belongs.
    #[serde(rename = "type")]
    pub kind: ReasonKind,
    /// How bad it is.
    pub severity: Severity,
    /// One sentence for staff: what the code means.
    pub message: &'static str,
    /// For the candidate, with what to do next.
    pub user_message: &'static str,
    /// About this case, for staff.
    pub technical_details: String,
    /// Is a new session likely to work?
    pub recoverable: bool,
    /// What brings the candidate on.
    pub recovery_action: RecoveryAction,
}

/// Where in a session's life a reason belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReasonKind {
    /// Before it was ready.
    Init,
    /// While the candidate worked.
    Runtime,
    /// Somebody decided it, or the exam's limits did.
    Access,
    /// What Carrel runs on.
    Infra,
}

/// How bad a reason is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Info,
    /// Unwanted, and nobody's fault.
    Warning,
    /// This session is harmed.
    Error,
    /// Others are probably harmed too: staff should look now.
    Critical,
}

/// What brings the candidate on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryAction {
    /// Nothing is to be done.
    None,
    /// Start a new session.
    StartNewSession,
    /// Wait a minute, then start a new session.
    RetryLater,
    /// Staff must act first.
    ContactStaff,
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

/// A word that is no code of the closed list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a reason code: see the list in docs/api.md")]
pub struct UnknownReason;

/// One line of the table below: word, kind, severity, recovery, summary for staff, message for the candidate.
type Row = (&'static str, ReasonKind, Severity, RecoveryAction, &'static str, &'static str);

impl ReasonCode {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Submitted,
        Self::TimeExpired,
        Self::EndedByStaff,
        Self::EndedByCandidate,
        Self::NeverStarted,
        Self::Abandoned,
        Self::Cancelled,
        Self::StartTimeout,
        Self::ImagePullFailed,
        Self::Unschedulable,
        Self::QuotaExceeded,
        Self::EnvironmentCrashed,
        Self::EnvironmentLost,
        Self::ClusterUnavailable,
        Self::OutOfMemory,
        Self::SetupFailed,
        Self::Internal,
    ];

    /// The whole table in one place, so that no code can lack a part.
    const fn row(self) -> Row {
        use ReasonKind::{Access, Infra, Init, Runtime};
        use RecoveryAction::{ContactStaff, None, RetryLater, StartNewSession};
        use Severity::{Critical, Error, Info, Warning};
        match self {
            Self::Submitted => (
                "submitted",
                Access,
                Info,
                None,
                "The candidate handed in.",
                "Your exam has been handed in. There is nothing more to do.",
            ),
            Self::TimeExpired => (
                "time_expired",
                Access,
                Info,
                None,
                "The exam's time is over.",
                "The time for this exam is over. Your work was taken as it stood; there is nothing more to do.",
            ),
            Self::EndedByStaff => (
                "ended_by_staff",
                Access,
                Info,
                ContactStaff,
                "A proctor, an operator or the exam platform ended the session.",
                "Your exam was ended by the staff. If you did not expect this, ask your proctor.",
            ),
            Self::EndedByCandidate => (
                "ended_by_candidate",
                Access,
                Info,
                None,
                "The candidate ended the session.",
                "You have ended this exam. There is nothing more to do.",
            ),
            Self::NeverStarted => (
                "never_started",
                Access,
                Warning,
                StartNewSession,
                "The session was ready, and nobody connected in the time allowed.",
                "This session was not used in time and has been closed. Start a new session, or ask your proctor if you cannot.",
            ),
            Self::Abandoned => (
                "abandoned",
                Access,
                Warning,
                ContactStaff,
                "Nobody was attached for longer than twice the exam's duration.",
                "This session was unused for too long and has been closed. If you still need it, ask your proctor.",
            ),
            Self::Cancelled => (
                "cancelled",
                Init,
                Info,
                StartNewSession,
                "The session was cancelled before it was ready.",
                "This session was cancelled before it was ready. Start a new session when you want to begin.",
            ),
            Self::StartTimeout => (
                "start_timeout",
                Init,
                Error,
                RetryLater,
                "The environment was not ready within 60 seconds.",
                "Your environment did not start in time. Wait a minute and start a new session; if it happens again, tell your proctor.",
            ),
            Self::ImagePullFailed => (
                "image_pull_failed",
                Init,
                Critical,
                ContactStaff,
                "The exam's image cannot be had.",
                "The exam's software could not be loaded. Tell your proctor: trying again does not help until it is put right.",
            ),
            Self::Unschedulable => (
                "unschedulable",
                Infra,
                Error,
                RetryLater,
                "No node has room for the environment.",
                "There is no room for your environment at the moment. Wait a minute and start a new session; if it happens again, tell your proctor.",
            ),
            Self::QuotaExceeded => (
                "quota_exceeded",
                Infra,
                Error,
                RetryLater,
                "A quota is used up.",
                "All places are taken at the moment. Wait a minute and start a new session; if it happens again, tell your proctor.",
            ),
            Self::EnvironmentCrashed => (
                "environment_crashed",
                Runtime,
                Error,
                StartNewSession,
                "The environment's first process ended.",
                "Your environment stopped unexpectedly. Start a new session and tell your proctor about the time you lost.",
            ),
            Self::EnvironmentLost => (
                "environment_lost",
                Infra,
                Error,
                StartNewSession,
                "The environment is no longer there.",
                "Your environment was lost. Start a new session and tell your proctor about the time you lost.",
            ),
            Self::ClusterUnavailable => (
                "cluster_unavailable",
                Infra,
                Critical,
                RetryLater,
                "What environments run on did not answer three attempts.",
                "The exam system cannot be reached at the moment. Wait a minute and start a new session; if it happens again, tell your proctor.",
            ),
            Self::OutOfMemory => (
                "out_of_memory",
                Runtime,
                Error,
                StartNewSession,
                "The environment used more memory than it has.",
                "Your environment ran out of memory and was stopped. Start a new session and tell your proctor about the time you lost.",
            ),
            Self::SetupFailed => (
                "setup_failed",
                Init,
                Critical,
                ContactStaff,
                "The exam's setup script failed.",
                "This exam could not be prepared. Tell your proctor: trying again does not help until it is put right.",
            ),
            Self::Internal => (
                "internal",
                Infra,
                Critical,
                RetryLater,
                "A fault of Carrel's own.",
                "Something went wrong on our side. Start a new session; if it happens again, tell your proctor.",
            ),
        }
    }

    /// As stored and as shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        self.row().0
    }

    /// Where in a session's life it belongs.
    #[must_use]
    pub const fn kind(self) -> ReasonKind {
        self.row().1
    }

    /// How bad it is.
    #[must_use]
    pub const fn severity(self) -> Severity {
        self.row().2
    }

    /// What brings the candidate on.
    #[must_use]
    pub const fn recovery_action(self) -> RecoveryAction {
        self.row().3
    }

    /// One sentence for staff.
    #[must_use]
    pub const fn summary(self) -> &'static str {
        self.row().4
    }

    /// For the candidate, with what to do next.
    #[must_use]
    pub const fn user_message(self) -> &'static str {
        self.row().5
    }

    /// Is a new session likely to work without anybody's help?
    #[must_use]
    pub const fn recoverable(self) -> bool {
        matches!(self.recovery_action(), RecoveryAction::StartNewSession | RecoveryAction::RetryLater)
    }
}

impl fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ReasonCode {
    type Err = UnknownReason;

    fn from_str(word: &str) -> Result<Self, UnknownReason> {
        Self::ALL.into_iter().find(|code| code.as_str() == word).ok_or(UnknownReason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_read_back_from_the_word_it_is_stored_as() {
        for code in ReasonCode::ALL {
            assert_eq!(code.as_str().parse(), Ok(code));
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
        assert_eq!("Submitted".parse::<ReasonCode>(), Err(UnknownReason));
    }

    #[test]
    fn every_message_to_a_candidate_is_whole_sentences_that_say_what_to_do() {
        for code in ReasonCode::ALL {
            let message = code.user_message();
            assert!(message.matches(". ").count() + message.matches(": ").count() >= 1, "{code}: {message}");
            assert!(message.ends_with('.') && code.summary().ends_with('.'), "{code}");
            assert!(
                !message.contains(code.as_str()) || code == ReasonCode::Cancelled,
                "{code}: a code is no sentence"
            );
            let next = match code.recovery_action() {
                RecoveryAction::None => "nothing more to do",
                RecoveryAction::StartNewSession | RecoveryAction::RetryLater => "tart a new session",
                RecoveryAction::ContactStaff => "your proctor",
            };
            assert!(message.contains(next), "{code}: {message}");
        }
    }

    #[test]
    fn a_classification_has_the_fields_of_the_contract() {
        let json =
            serde_json::to_value(Reason::new(ReasonCode::SetupFailed, "exit 3").classification()).unwrap();
        let fields: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut wanted = [
            "type",
            "severity",
            "message",
            "user_message",
            "technical_details",
            "recoverable",
            "recovery_action",
        ];
        wanted.sort_unstable();
        let mut sorted = fields.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, wanted);
        assert_eq!(json["type"], "init");
        assert_eq!(json["technical_details"], "exit 3");
    }
}
