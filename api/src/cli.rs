//! The command line tools: each speaks JSON, and ends with the exit code of the contract.
//!
//! They work on the same database and environments as a server, beside it or without one. Nothing here prints: what a tool has
//! to say is a value, [`Output`].
use std::sync::Arc;

use clap::Subcommand;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    environment::Environment,
    http::Public,
    identity::{EnvironmentId, SessionId, UserId},
    lifecycle::EndError,
    session::Session,
    store::{Store, StoreError},
};

mod cleanup;
mod environment;
mod session;

/// The names under which the tools may be started: as first word, or as the program's own name.
pub const NAMES: [&str; 8] = [
    "session-identity",
    "session-lifecycle",
    "execution-environment",
    "environment-access",
    "session-status",
    "failure-classification",
    "cleanup-ttl",
    "exam",
];

/// How a tool ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Anything else.
    General = 1,
    /// Arguments that are none.
    BadArguments = 2,
    /// Arguments whose values cannot be.
    ValidationFailed = 3,
    /// No such thing.
    NotFound = 4,
    /// Not theirs.
    AccessDenied = 5,
    /// The lifecycle has no such change.
    TransitionRefused = 6,
}

/// What a tool has to say: on stdout with [`Exit::Ok`], else on stderr.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code.
    pub exit: Exit,
    /// One document.
    pub json: Value,
}

impl Output {
    fn ok(json: Value) -> Self {
        Self { exit: Exit::Ok, json }
    }

    /// An error in the contract's form.
    #[must_use]
    pub fn error(exit: Exit, code: &str, message: &str, details: Value) -> Self {
        Self { exit, json: json!({"error": true, "code": code, "message": message, "details": details}) }
    }

    /// For a command line that clap refuses.
    #[must_use]
    pub fn bad_arguments(error: &clap::Error) -> Self {
        let text = error.to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Self::error(Exit::BadArguments, "INVALID_ARGUMENTS", &message, json!({"usage": text}))
    }
}

/// Why a tool did not do it: an [`Output`] that is an error.
type Failed = Box<Output>;

fn failed(exit: Exit, code: &str, message: &str, details: Value) -> Failed {
    Box::new(Output::error(exit, code, message, details))
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound => no_session(),
            StoreError::IllegalTransition { current, requested, allowed } => failed(
                Exit::TransitionRefused,
                "INVALID_TRANSITION",
                &error.to_string(),
                json!({"current_state": current, "requested_state": requested, "allowed_transitions": allowed}),
            ),
            StoreError::ActiveSessionExists(id) => {
                failed(Exit::General, "ACTIVE_SESSION_EXISTS", &error.to_string(), json!({"session_id": id}))
            }
            StoreError::Unavailable(_) | StoreError::Conflict => {
                failed(Exit::General, "BACKEND_UNAVAILABLE", &error.to_string(), json!({}))
            }
            error => failed(Exit::General, "INTERNAL", &error.to_string(), json!({})),
        }
    }
}

impl From<EndError> for Failed {
    fn from(error: EndError) -> Self {
        match error {
            EndError::NotFound => no_session(),
            EndError::Store(error) => error.into(),
            EndError::AlreadyTerminated(session) => failed(
                Exit::TransitionRefused,
                "SESSION_ALREADY_TERMINATED",
                "the session has ended already",
                json!({"current_state": session.state}),
            ),
        }
    }
}

fn no_session() -> Failed {
    failed(Exit::NotFound, "SESSION_NOT_FOUND", "there is no session of this id", json!({}))
}

/// What the tools work on.
pub struct Context {
    /// The sessions.
    pub store: Store,
    /// Where they run; needed by `execution-environment` and `cleanup-ttl sweep`.
    pub environment: Option<Arc<dyn Environment>>,
    /// How candidates reach the server; needed by `exam start`.
    pub public: Option<Public>,
}

impl Context {
    fn environment(&self) -> Result<&Arc<dyn Environment>, Failed> {
        self.environment.as_ref().ok_or_else(|| {
            failed(Exit::General, "BACKEND_UNAVAILABLE", "there is no environment to work on", json!({}))
        })
    }

    async fn session(&self, id: &str) -> Result<Session, Failed> {
        let id: SessionId = identity("session_id", id)?;
        self.store.session(id).await?.ok_or_else(no_session)
    }
}

/// A tool and what it is to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Tool {
    /// Are these the three names of a session?
    SessionIdentity {
        /// What to do.
        #[command(subcommand)]
        verb: SessionIdentity,
    },
    /// Where a session stands, and where it may go
    SessionLifecycle {
        /// What to do.
        #[command(subcommand)]
        verb: SessionLifecycle,
    },
    /// A session's environment
    ExecutionEnvironment {
        /// What to do.
        #[command(subcommand)]
        verb: ExecutionEnvironment,
    },
    /// Who may have a session's environment
    EnvironmentAccess {
        /// What to do.
        #[command(subcommand)]
        verb: EnvironmentAccess,
    },
    /// How a session does
    SessionStatus {
        /// What to do.
        #[command(subcommand)]
        verb: SessionStatus,
    },
    /// What a failure means, and for whom
    FailureClassification {
        /// What to do.
        #[command(subcommand)]
        verb: FailureClassification,
    },
    /// Which sessions are over, and their end
    CleanupTtl {
        /// What to do.
        #[command(subcommand)]
        verb: CleanupTtl,
    },
    /// Exams
    Exam {
        /// What to do.
        #[command(subcommand)]
        verb: ExamVerb,
    },
}

/// `session-identity`.
#[derive(Debug, Clone, Subcommand)]
pub enum SessionIdentity {
    /// Checks their form
    Validate {
        /// A candidate's UUID
        #[arg(long)]
        user_id: Option<String>,
        /// A session's UUID
        #[arg(long)]
        session_id: Option<String>,
        /// An environment's UUID
        #[arg(long)]
        environment_id: Option<String>,
    },
}

/// `session-lifecycle`.
#[derive(Debug, Clone, Subcommand)]
pub enum SessionLifecycle {
    /// Changes its state
    Transition {
        /// Which session
        #[arg(long)]
        session_id: String,
        /// created, initializing, ready, running, terminated or failed
        #[arg(long)]
        to: crate::session::State,
        /// Why: a code of the list, or a sentence; needed for failed
        #[arg(long)]
        reason: Option<String>,
    },
    /// Shows its state
    Status {
        /// Which session
        #[arg(long)]
        session_id: String,
    },
}

/// `execution-environment`.
#[derive(Debug, Clone, Subcommand)]
pub enum ExecutionEnvironment {
    /// Provisions it and waits until it is ready
    Create {
        /// Which session
        #[arg(long)]
        session_id: String,
        /// Seconds to wait
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
        timeout: u64,
    },
    /// Shows it
    Status {
        /// Which session
        #[arg(long)]
        session_id: String,
    },
    /// Ends its session, if need be, and removes it
    Destroy {
        /// Which session
        #[arg(long)]
        session_id: String,
    },
}

/// `environment-access`.
#[derive(Debug, Clone, Subcommand)]
pub enum EnvironmentAccess {
    /// May this candidate have this session's environment?
    Authorize {
        /// Which session
        #[arg(long)]
        session_id: String,
        /// Which candidate
        #[arg(long)]
        user_id: String,
    },
}

/// `session-status`.
#[derive(Debug, Clone, Subcommand)]
pub enum SessionStatus {
    /// As the candidate is told
    Get {
        /// Which session
        #[arg(long)]
        session_id: String,
    },
}

/// `failure-classification`.
#[derive(Debug, Clone, Subcommand)]
pub enum FailureClassification {
    /// Explains a reason
    Classify {
        /// A reason code; or init, runtime, access or infra, with the code as `reason` in the context
        #[arg(long = "type", value_name = "TYPE")]
        kind: String,
        /// A JSON object about this case; `technical_details` in it is passed on
        #[arg(long, value_name = "JSON")]
        context: String,
    },
}

/// `cleanup-ttl`.
#[derive(Debug, Clone, Subcommand)]
pub enum CleanupTtl {
    /// Is this session over by its own limits?
    Check {
        /// Which session
        #[arg(long)]
        session_id: String,
    },
    /// Ends and removes everything that is over
    Sweep {
        /// Only says what would be done
        #[arg(long)]
        dry_run: bool,
    },
}

/// `exam`.
#[derive(Debug, Clone, Subcommand)]
pub enum ExamVerb {
    /// Starts a session, as POST /v1/sessions does
    Start {
        /// Which exam
        #[arg(long)]
        exam_id: String,
        /// For whom
        #[arg(long)]
        user_id: String,
    },
}

impl Tool {
    /// Does it work on the database? Else [`run`] needs no context.
    #[must_use]
    pub const fn needs_store(&self) -> bool {
        !matches!(self, Self::SessionIdentity { .. } | Self::FailureClassification { .. })
    }

    /// Does it work on environments?
    #[must_use]
    pub const fn needs_environment(&self) -> bool {
        matches!(
            self,
            Self::ExecutionEnvironment { .. }
                | Self::CleanupTtl { verb: CleanupTtl::Sweep { dry_run: false } }
        )
    }
}

/// Runs a tool.
pub async fn run(tool: &Tool, context: Option<&Context>) -> Output {
    let done = match (tool, context) {
        (Tool::SessionIdentity { verb }, _) => session::validate(verb),
        (Tool::FailureClassification { verb }, _) => session::classify(verb),
        (_, None) => {
            Err(failed(Exit::General, "BACKEND_UNAVAILABLE", "there is no database to work on", json!({})))
        }
        (Tool::SessionLifecycle { verb }, Some(context)) => session::lifecycle(verb, context).await,
        (Tool::ExecutionEnvironment { verb }, Some(context)) => environment::run(verb, context).await,
        (Tool::EnvironmentAccess { verb }, Some(context)) => session::authorize(verb, context).await,
        (Tool::SessionStatus { verb }, Some(context)) => session::status(verb, context).await,
        (Tool::CleanupTtl { verb }, Some(context)) => cleanup::run(verb, context).await,
        (Tool::Exam { verb }, Some(context)) => session::start(verb, context).await,
    };
    done.unwrap_or_else(|failed| *failed)
}

/// One of the three names, or the contract's answer to what is none.
fn identity<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, Failed> {
    text.parse().map_err(|_| invalid_identity(&[], &[field]))
}

fn invalid_identity(missing: &[&str], invalid: &[&str]) -> Failed {
    let mut details = serde_json::Map::new();
    for (name, fields) in [("missing_fields", missing), ("invalid_fields", invalid)] {
        if !fields.is_empty() {
            details.insert(name.to_owned(), json!(fields));
        }
    }
    let message =
        "user_id, session_id and environment_id are UUIDs of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
    failed(Exit::ValidationFailed, "INVALID_IDENTITY", message, Value::Object(details))
}

/// The three names together.
#[derive(Debug, Serialize)]
struct Identity {
    user_id: UserId,
    exam_session_id: SessionId,
    environment_id: Option<EnvironmentId>,
}

fn value(body: impl Serialize) -> Value {
    serde_json::to_value(body).unwrap_or_default()
}

#[cfg(test)]
#[path = "cli/tests.rs"]
mod tests;
