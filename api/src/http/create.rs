//! Making a session: who may, for whom, in which exam, and with which password.
use std::time::Duration;

use super::{Public, body::CreatedBody};
use crate::{
    access::{Auth, LoginError},
    credential::{Password, PublicKey},
    exam::Exam,
    identity::UserId,
    session::Session,
    store::{Actor, NewSession, Store, StoreError},
};

/// Hashing a new password waits its turn for this long: an exam that begins is a burst of them, while the processors have other work. A
/// request is answered within 9.5 s.
const HASH_WITHIN: Duration = Duration::from_secs(8);

/// Why no session was made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// No such exam.
    #[error("there is no exam of this id")]
    InvalidExamId,
    /// They have one that has not ended.
    #[error("the user has an active session already")]
    ActiveSessionExists,
    /// Too many passwords wait to be hashed.
    #[error("too many requests at this moment")]
    Overloaded,
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes a session in `created` with a new password.
pub async fn create(
    store: &Store,
    auth: &Auth,
    user_id: UserId,
    exam_id: &str,
    key: Option<PublicKey>,
    actor: &Actor,
) -> Result<(Session, Password), CreateError> {
    let exam: Exam = store.exam(exam_id).await?.ok_or(CreateError::InvalidExamId)?;
    // Seen before the hash is paid for; the database decides.
    if store.active_session(user_id).await?.is_some() {
        return Err(CreateError::ActiveSessionExists);
    }
    let password = Password::new();
    let hash =
        tokio::time::timeout(HASH_WITHIN, auth.hash(&password)).await.unwrap_or(Err(LoginError::Overloaded));
    let new = NewSession {
        user_id,
        exam: &exam,
        password_hash: Some(hash.map_err(|_| CreateError::Overloaded)?),
        public_keys: key.iter().map(|key| key.as_str().to_owned()).collect(),
    };
    let session = store.create_session(&new, actor).await.map_err(|error| match error {
        StoreError::ActiveSessionExists(_) => CreateError::ActiveSessionExists,
        other => CreateError::Store(other),
    })?;
    tracing::info!(session_id = %session.id, %user_id, exam_id, %actor, "session created");
    Ok((session, password))
}

/// Makes a session as `POST /v1/sessions` does, and gives its answer's body, for callers in the same process.
///
/// # Errors
/// [`CreateError`].
pub async fn start(
    (store, auth, public): (&Store, &Auth, &Public),
    user_id: UserId,
    exam_id: &str,
    actor: &Actor,
) -> Result<(Session, serde_json::Value), CreateError> {
    let (session, password) = create(store, auth, user_id, exam_id, None, actor).await?;
    let body = serde_json::to_value(CreatedBody::new(&session, &password, public)).unwrap_or_default();
    Ok((session, body))
}
