//! The acts that end something. Each may be repeated, and gives up rather than wait for long.
use std::time::Duration;

use super::{Lifecycle, flight::Done};
use crate::{
    environment::{EnvironmentError, Phase},
    identity::{EnvironmentId, SessionId, UserId},
    reason::Reason,
    session::{Session, State},
    store::{Actor, StoreError, Transition},
};

/// After a destruction, how often and how many times is looked whether it is gone; then there is a pause.
const GONE: (Duration, usize) = (Duration::from_millis(200), 50);

impl Lifecycle {
    /// To a final state; somebody else's change in between is judged by the next pass.
    pub(super) async fn finish(&self, session: &Session, to: State, reason: Reason) -> Done {
        match self.transition(session, Transition::end(to, reason), &Actor::System).await {
            Ok(_) | Err(StoreError::Conflict | StoreError::IllegalTransition { .. }) => Done::Yes,
            Err(error) => {
                tracing::warn!(%error, "the session's end could not be recorded");
                Done::Again
            }
        }
    }

    /// Looks directly at an environment that seems lost, and fails the session only if it is.
    pub(super) async fn confirm(&self, session: Session) -> Done {
        let Some(id) = session.environment_id else { return Done::Again };
        match self.loss(id).await {
            Some(reason) => self.finish(&session, State::Failed, reason).await,
            None => Done::Again,
        }
    }

    /// Looks directly at an environment that seems lost: why it is; `None` when it is there after all, or cannot be looked at.
    pub(super) async fn loss(&self, id: EnvironmentId) -> Option<Reason> {
        let _turn = self.confirming.acquire().await.ok()?;
        match self.environment.inspect(id).await {
            Ok(observed) => Phase::loss(observed.map(|observed| observed.phase).as_ref()),
            Err(EnvironmentError::NotFound) => Phase::loss(None),
            Err(error) => {
                tracing::warn!(%error, "an environment that seems lost could not be looked at");
                None
            }
        }
    }

    /// Ends an ended session's environment, and releases the session once it is gone.
    pub(super) async fn destroy(&self, session: &Session) -> Done {
        if let Some(id) = session.environment_id
            && self.destroy_environment(id).await == Done::Again
        {
            return Done::Again;
        }
        match self.store.mark_released(session.id).await {
            Ok(released) => {
                tracing::info!("session released");
                self.feed.publish(&released);
                Done::Yes
            }
            Err(error) => {
                tracing::warn!(%error, "the release could not be recorded");
                Done::Again
            }
        }
    }

    /// Ends an environment that nobody has.
    pub(super) async fn destroy_orphan(&self, id: EnvironmentId) -> Done {
        match self.is_somebodys(id).await {
            Ok(true) => return Done::Yes,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "whose environment it is could not be asked");
                return Done::Again;
            }
        }
        tracing::warn!("an environment that nobody has is destroyed");
        self.destroy_environment(id).await
    }

    /// Asked directly: the lists that it was missing from have a limit. The pool first: it goes from there to a session.
    async fn is_somebodys(&self, id: EnvironmentId) -> Result<bool, StoreError> {
        let warm = self.store.is_warm(id).await?;
        let session = self.store.environment_session(id).await?;
        Ok(warm || session.is_some_and(|session| session.released_at.is_none()))
    }

    /// Has the backend write down whose a claimed environment is.
    pub(super) async fn adopt(&self, id: EnvironmentId, owner: (UserId, SessionId)) -> Done {
        let Ok(_turn) = self.warming.acquire().await else { return Done::Again };
        match self.environment.adopt(id, owner).await {
            Ok(()) | Err(EnvironmentError::NotFound) => Done::Yes,
            Err(error) => {
                tracing::warn!(%error, "the environment could not be given its session's name");
                Done::Again
            }
        }
    }

    pub(super) async fn destroy_environment(&self, id: EnvironmentId) -> Done {
        self.links.close(id);
        let Ok(_turn) = self.ending.acquire().await else { return Done::Again };
        if let Err(error) = self.environment.destroy(id).await
            && !matches!(error, EnvironmentError::NotFound)
        {
            tracing::warn!(%error, "the environment could not be destroyed");
            return Done::Again;
        }
        for _ in 0..GONE.1 {
            match self.environment.inspect(id).await {
                Ok(None) | Err(EnvironmentError::NotFound) => return Done::Yes,
                Ok(Some(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, "whether the environment is gone could not be seen");
                    return Done::Again;
                }
            }
            tokio::select! {
                () = self.end.cancelled() => return Done::Again,
                () = tokio::time::sleep(GONE.0) => {}
            }
        }
        Done::Again
    }
}
