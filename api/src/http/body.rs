//! The bodies of answers about sessions. The command line prints the same.
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::Public;
use crate::{
    credential::Password,
    identity::{EnvironmentId, SessionId, UserId},
    reason::ReasonCode,
    session::{STEPS, Session, State},
};

/// RFC 3339, UTC, with milliseconds.
#[must_use]
pub fn time(ms: i64) -> String {
    let time = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{time:.3}")
}

/// A new session, and what gets into it. The password is shown this once.
#[derive(Serialize, ToSchema)]
pub struct CreatedBody {
    pub session_id: SessionId,
    pub user_id: UserId,
    pub exam_id: String,
    /// `created`.
    pub status: State,
    pub websocket_url: String,
    pub status_url: String,
    pub ssh: SshBody,
}

/// What an ssh client needs.
#[derive(Serialize, ToSchema)]
pub struct SshBody {
    pub host: String,
    pub port: u16,
    pub username: String,
    pub password: String,
    /// To be pasted.
    pub command: String,
    /// `SHA256:…`, as ssh shows it.
    pub host_key_fingerprint: String,
    /// A line for `known_hosts`.
    pub known_hosts: String,
}

impl CreatedBody {
    pub fn new(session: &Session, password: &Password, public: &Public) -> Self {
        let id = session.id;
        Self {
            session_id: id,
            user_id: session.user_id,
            exam_id: session.exam_id.clone(),
            status: session.state,
            websocket_url: format!("{}/v1/sessions/{id}/terminal", public.web_socket_url()),
            status_url: format!("{}/v1/sessions/{id}/status", public.url),
            ssh: SshBody {
                host: public.ssh_host.clone(),
                port: public.ssh_port,
                username: id.to_string(),
                password: password.expose().to_owned(),
                command: format!("ssh -p {} {id}@{}", public.ssh_port, public.ssh_host),
                host_key_fingerprint: public.host_key_fingerprint.clone(),
                known_hosts: public.known_hosts.clone(),
            },
        }
    }
}

/// One session.
#[derive(Debug, Serialize, ToSchema)]
pub struct SessionBody {
    pub session_id: SessionId,
    pub user_id: UserId,
    pub exam_id: String,
    pub lifecycle_state: State,
    /// Why it ended; `null` before.
    pub lifecycle_reason: Option<ReasonBody>,
    /// When the exam's clock started.
    pub started_at: Option<String>,
    pub ready_at: Option<String>,
    /// When the exam ends, once its clock runs.
    pub ends_at: Option<String>,
    pub remaining_seconds: i64,
    pub environment: EnvironmentBody,
}

/// Why a session ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReasonBody {
    pub code: ReasonCode,
    /// For the candidate, with what to do next.
    pub message: &'static str,
    /// What happened, for staff and platforms only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub technical_details: Option<String>,
}

/// A session's environment.
#[derive(Debug, Serialize, ToSchema)]
pub struct EnvironmentBody {
    pub ready: bool,
    pub environment_id: Option<EnvironmentId>,
}

const fn is_ready(state: State) -> bool {
    matches!(state, State::Ready | State::Running)
}

impl SessionBody {
    /// `details`: also what is for staff.
    pub fn new(session: &Session, now: i64, details: bool) -> Self {
        Self {
            session_id: session.id,
            user_id: session.user_id,
            exam_id: session.exam_id.clone(),
            lifecycle_state: session.state,
            lifecycle_reason: session.reason.as_ref().map(|reason| ReasonBody {
                code: reason.code,
                message: reason.code.user_message(),
                technical_details: details.then(|| reason.technical_details.clone()),
            }),
            started_at: session.started_at.map(time),
            ready_at: session.ready_at.map(time),
            ends_at: session.ends_at().map(time),
            remaining_seconds: session.remaining_seconds(now),
            environment: EnvironmentBody {
                ready: is_ready(session.state),
                environment_id: session.environment_id,
            },
        }
    }
}

/// How a session does, for the candidate's eyes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct StatusBody {
    pub session_id: SessionId,
    /// `creating`, `initializing`, `ready`, `running`, `terminated` or `error`.
    pub display_state: &'static str,
    pub message: &'static str,
    pub progress: Progress,
    pub environment_ready: bool,
    pub remaining_seconds: i64,
    /// Why it failed; `null` for a session that has not.
    pub error_reason: Option<ReasonCode>,
    /// Is a new session likely to work? `null` for a session that has not failed.
    pub recoverable: Option<bool>,
    pub updated_at: String,
}

/// How far provisioning is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Progress {
    /// From 1.
    pub current_step: usize,
    pub total_steps: usize,
    pub step_description: &'static str,
}

impl StatusBody {
    pub fn new(session: &Session, now: i64) -> Self {
        let last = STEPS.len().saturating_sub(1);
        let step = if is_ready(session.state) { last } else { session.step.min(last) };
        let description = STEPS.get(step).copied().unwrap_or_default();
        let failed = session.reason.as_ref().filter(|_| session.state == State::Failed);
        Self {
            session_id: session.id,
            display_state: session.state.display(),
            message: match (&session.reason, session.state) {
                (Some(reason), _) => reason.code.user_message(),
                (None, State::Running) => "Your exam is running",
                (None, _) => description,
            },
            progress: Progress {
                current_step: step + 1,
                total_steps: STEPS.len(),
                step_description: description,
            },
            environment_ready: is_ready(session.state),
            remaining_seconds: session.remaining_seconds(now),
            error_reason: failed.map(|reason| reason.code),
            recoverable: failed.map(|reason| reason.code.recoverable()),
            updated_at: time(session.updated_at),
        }
    }
}

/// A session that was just ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct TerminatedBody {
    pub session_id: SessionId,
    pub terminated_at: String,
}

/// A way into a terminal for a browser, which cannot set a header on a WebSocket.
#[derive(Serialize, ToSchema)]
pub struct TicketBody {
    pub ticket: String,
    /// Seconds.
    pub expires_in: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_with_milliseconds() {
        assert_eq!(time(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(time(1_795_000_000_007), "2026-11-18T11:06:40.007Z");
        assert_eq!(time(i64::MAX), "1970-01-01T00:00:00.000Z");
    }
}
