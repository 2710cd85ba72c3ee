//! From `created` to `ready`: name an environment or take a warm one, have it made, prepare the exam.
//!
//! Has no deadline of its own: when the session's is over, the loop ends the session and cancels this.
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{
    Lifecycle,
    flight::Done,
    make::{Making, Stop, Witness},
};
use crate::{
    environment::{Create, Phase},
    exam::Recipe,
    identity::EnvironmentId,
    session::{STEPS, Session, State},
    store::{Actor, StoreError, Transition},
};

impl Lifecycle {
    /// All of it, as far as it has not been done.
    pub(super) async fn start(self: &Arc<Self>, mut session: Session, cancel: &CancellationToken) -> Done {
        match self.try_start(&mut session, cancel).await {
            Ok(()) | Err(Stop::Yield) => Done::Yes,
            Err(Stop::Again) => Done::Again,
            Err(Stop::Fail(reason)) => match self.latest(&mut session).await {
                Ok(()) => self.finish(&session, State::Failed, reason).await,
                Err(Stop::Again) => Done::Again,
                Err(_) => Done::Yes,
            },
        }
    }

    async fn try_start(
        self: &Arc<Self>,
        session: &mut Session,
        cancel: &CancellationToken,
    ) -> Result<(), Stop> {
        let exam = self.store.environment_exam(session).await?;
        let recipe = Recipe::of(&exam);
        let (mut new, mut prepared) = (false, false);
        if session.state == State::Created {
            // The name is committed before anything has it: whatever is found later can be traced to its session.
            let begun = self.store.provision(session, &recipe, EnvironmentId::new()).await?;
            self.changed(session, &begun.session, &Actor::System);
            *session = begun.session;
            new = !begun.warm;
            prepared = begun.warm && self.is_up(session);
        }
        let Some(id) = session.environment_id else { return Err(Stop::Yield) };
        if prepared {
            // Ready by its pool's word; the first to attach finds the connection open.
            let links = Arc::clone(&self.links);
            self.tasks.spawn(async move { links.get(id).await.map(drop) });
        } else {
            let request = Create {
                environment_id: id,
                owner: Some((session.user_id, session.id)),
                exam_id: session.exam_id.clone(),
                lifetime_seconds: recipe.lifetime_seconds(),
                spec: recipe.environment,
            };
            let making = Making { lifecycle: self, request: &request, new, turns: &self.starting, cancel };
            making.run(&mut Progress { lifecycle: self, session }).await?;
        }
        loop {
            let ready = Transition { step: Some(STEPS.len() - 1), ..Transition::to(State::Ready) };
            match self.transition(session, ready, &Actor::System).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict) => self.latest(session).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn is_up(&self, session: &Session) -> bool {
        let look = self.environment.observe();
        let look = look.borrow();
        let seen = session.environment_id.and_then(|id| look.environments.get(&id));
        look.unavailable.is_none() && seen.is_some_and(|observed| observed.phase == Phase::Up)
    }

    /// Reads the row again after somebody else changed it; only a start that is still wanted goes on.
    async fn latest(&self, session: &mut Session) -> Result<(), Stop> {
        match self.store.session(session.id).await? {
            Some(latest)
                if matches!(latest.state, State::Created | State::Initializing)
                    && latest.environment_id == session.environment_id =>
            {
                *session = latest;
                Ok(())
            }
            _ => Err(Stop::Yield),
        }
    }
}

/// Records the steps in the session's row.
struct Progress<'a> {
    lifecycle: &'a Lifecycle,
    session: &'a mut Session,
}

impl Witness for Progress<'_> {
    async fn step(&mut self, step: usize) -> Result<(), Stop> {
        // Not the last one, which says ready.
        let step = step.min(STEPS.len() - 2);
        while step > self.session.step {
            match self.lifecycle.store.set_step(self.session, step).await {
                Ok(changed) => {
                    self.lifecycle.feed.publish(&changed);
                    *self.session = changed;
                }
                Err(StoreError::Conflict) => self.lifecycle.latest(self.session).await?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
