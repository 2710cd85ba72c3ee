//! Who makes a change, as records name them.
use std::fmt;

use sqlx::{Any, Transaction};

use super::StoreError;
use crate::{
    identity::{EnvironmentId, SessionId, UserId},
    session::Session,
};

/// Who makes a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Actor {
    /// A candidate.
    Candidate(UserId),
    /// Whoever holds the API key of this public id.
    Key(String),
    /// The exam platform, by its token.
    Platform,
    /// Carrel itself: the lifecycle, and the command line of its operator.
    System,
}

impl Actor {
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Candidate(_) => "candidate",
            Self::Key(_) => "key",
            Self::Platform => "platform",
            Self::System => "system",
        }
    }

    pub(super) fn id(&self) -> Option<String> {
        match self {
            Self::Candidate(user) => Some(user.to_string()),
            Self::Key(id) => Some(id.clone()),
            Self::Platform | Self::System => None,
        }
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id() {
            Some(id) => write!(f, "{}:{id}", self.kind()),
            None => f.write_str(self.kind()),
        }
    }
}

/// What an audit entry is about.
#[derive(Debug, Default)]
pub(super) struct Subject {
    pub name: String,
    pub session_id: Option<SessionId>,
    pub user_id: Option<UserId>,
    pub environment_id: Option<EnvironmentId>,
}

impl From<&Session> for Subject {
    fn from(session: &Session) -> Self {
        Self {
            name: session.id.to_string(),
            session_id: Some(session.id),
            user_id: Some(session.user_id),
            environment_id: session.environment_id,
        }
    }
}

/// Writes down what was done, in the transaction that does it. `detail` must hold no secret.
pub(super) async fn audit(
    sql: &mut Transaction<'static, Any>,
    actor: &Actor,
    action: &'static str,
    subject: Subject,
    detail: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query(
        "insert into audit_entry
             (id, at, actor_kind, actor_id, action, subject, session_id, user_id, environment_id, detail)
         values ($1, (select now_ms from clock), $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(uuid::Uuid::now_v7().to_string())
    .bind(actor.kind())
    .bind(actor.id())
    .bind(action)
    .bind(subject.name)
    .bind(subject.session_id.map(|id| id.to_string()))
    .bind(subject.user_id.map(|id| id.to_string()))
    .bind(subject.environment_id.map(|id| id.to_string()))
    .bind(detail.map(str::to_owned))
    .execute(&mut **sql)
    .await?;
    Ok(())
}
