//! Where sessions run. [`Environment`] is the one seam between Carrel and whatever isolates candidates.
//!
//! Nothing above this module knows whether an environment is a pod or a sandbox, and nothing above
//! [`Environment::connect`] knows what carries the byte stream.
mod agent;
pub mod kubernetes;
pub mod link;
pub mod local;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};

pub use self::agent::Agent;
use crate::{
    exam::EnvironmentSpec,
    identity::{EnvironmentId, SessionId, UserId},
    reason::{Reason, ReasonCode},
};

/// A duplex byte stream to the agent of one environment; HTTP/2 is spoken over it.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for T {}

/// What [`Environment::create`] is given. Creating the same id twice is one environment.
#[derive(Debug, Clone)]
pub struct Create {
    /// Its name.
    pub environment_id: EnvironmentId,
    /// Whose it is; `None` for one kept warm.
    pub owner: Option<(UserId, SessionId)>,
    /// The exam it is for.
    pub exam_id: String,
    /// What the exam asks for.
    pub spec: EnvironmentSpec,
    /// After this many seconds it ends by itself whatever happens to the server: the second net under the deadline.
    pub lifetime_seconds: u64,
}

/// How far an environment is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Being made; the step is one of [`crate::session::STEPS`].
    Starting {
        /// Index into the steps.
        step: usize,
        /// [`Environment::connect`] is worth trying.
        reachable: bool,
    },
    /// Its processes run.
    Up,
    /// Being destroyed.
    Ending,
    /// It cannot become or stay usable. Its remains still want [`Environment::destroy`].
    Failed(Reason),
}

impl Phase {
    /// Why an environment that has been there is not to be used any more, if so; `None` for a phase is one that is gone.
    #[must_use]
    pub fn loss(phase: Option<&Self>) -> Option<Reason> {
        let why = match phase {
            Some(Self::Starting { .. } | Self::Up) => return None,
            Some(Self::Failed(reason)) => return Some(reason.clone()),
            Some(Self::Ending) => "The environment is being destroyed.",
            None => "The environment is no longer there.",
        };
        Some(Reason::new(ReasonCode::EnvironmentLost, why))
    }
}

/// One environment as seen last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// How far it is.
    pub phase: Phase,
    /// The backend's own name for it: a pod's name, a sandbox's directory name.
    pub name: String,
    /// The backend's place for it: a Kubernetes namespace, or `local`.
    pub namespace: String,
    /// Milliseconds since 1970 when it was made.
    pub created_at: i64,
    /// The backend says that its machine is away: nobody reaches it, and nobody knows whether it will come back.
    pub cut_off: bool,
    /// Whose the backend's own record says it is; `None` for one kept warm.
    pub owner: Option<SessionId>,
}

/// All environments of this backend, as seen last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observation {
    /// Has the first complete look been had? Until then nothing follows from an absence.
    pub complete: bool,
    /// Why the backend cannot be seen now, for people; `None` when it can.
    pub unavailable: Option<String>,
    /// Everything there is, also what no session knows.
    pub environments: BTreeMap<EnvironmentId, Observed>,
}

impl Observation {
    /// Does something follow from an absence?
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.complete && self.unavailable.is_none()
    }
}

/// Why an environment did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum EnvironmentError {
    /// The backend does not answer: worth another try.
    #[error("the environment backend does not answer: {0}")]
    Unavailable(String),
    /// The backend has answered, and another try gives the same answer.
    #[error("{}", .0.technical_details)]
    Refused(Reason),
    /// No environment of this name.
    #[error("there is no such environment")]
    NotFound,
}

/// A place for environments. Every call may be repeated, is keyed by the environment's id, and has its own time limit.
#[async_trait]
pub trait Environment: Send + Sync + 'static {
    /// Where its environments are, for people: what is made at one place cannot be seen from another.
    fn place(&self) -> String;
    /// What it makes environments from besides what the exam says: those made of something else are no substitutes.
    fn makes(&self) -> String;
    /// Is everything here that is needed? Said at start; the error is one sentence with the command that helps.
    async fn check(&self) -> Result<(), EnvironmentError>;
    /// Starts making one; does not wait for it.
    async fn create(&self, request: &Create) -> Result<(), EnvironmentError>;
    /// List and watch in one: the latest complete look, and a wake-up on each change.
    fn observe(&self) -> watch::Receiver<Arc<Observation>>;
    /// One environment asked for directly, past any cache: what is about to be declared lost is looked at again.
    async fn inspect(&self, id: EnvironmentId) -> Result<Option<Observed>, EnvironmentError>;
    /// A new byte stream to its agent. Callers share one per environment through [`link::Links`].
    async fn connect(&self, id: EnvironmentId) -> Result<Box<dyn ByteStream>, EnvironmentError>;
    /// Writes down, with the backend's own means, whose an environment without an owner is now. Nothing else about it changes.
    async fn adopt(&self, id: EnvironmentId, owner: (UserId, SessionId)) -> Result<(), EnvironmentError>;
    /// Ends it and everything made with it. Ok also when there is none.
    async fn destroy(&self, id: EnvironmentId) -> Result<(), EnvironmentError>;
}
