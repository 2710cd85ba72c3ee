//! What nobody has any more: environments without a row, expired tickets and credentials.
use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Lifecycle, Subject, flight::Kind};
use crate::{environment::Observation, identity::EnvironmentId};

/// Between two sweeps.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// An environment that nobody has is given this long, ms by its own making, before the first sweep may end it.
const ORPHAN_GRACE_MS: i64 = 60_000;

/// The last sweep.
#[derive(Debug, Default)]
pub(super) struct Swept {
    at: Option<Instant>,
    /// Environments that nobody had then.
    orphans: HashSet<EnvironmentId>,
}

impl Lifecycle {
    /// Ends environments that are not `named` by any row, and removes what has expired, if it is time to.
    pub(super) fn sweep(
        self: &Arc<Self>,
        named: impl Iterator<Item = EnvironmentId>,
        observation: &Observation,
        last: &mut Swept,
        now: i64,
    ) {
        if last.at.is_some_and(|at| at.elapsed() < SWEEP_EVERY) || !observation.complete {
            return;
        }
        last.at = Some(Instant::now());
        let named: HashSet<_> = named.collect();
        let orphans = observation.environments.iter().filter(|(id, _)| !named.contains(id));
        let orphans: Vec<_> = orphans.map(|(id, observed)| (*id, observed.created_at)).collect();
        for (id, created_at) in &orphans {
            if created_at.saturating_add(ORPHAN_GRACE_MS) < now || last.orphans.contains(id) {
                let (this, id) = (Arc::clone(self), *id);
                let span = tracing::info_span!("orphan", environment_id = %id);
                self.take_off(Subject::Orphan(id), Kind::Destroy, span, |_| async move {
                    this.destroy_orphan(id).await
                });
            }
        }
        last.orphans = orphans.into_iter().map(|(id, _)| id).collect();
        let store = self.store.clone();
        self.tasks.spawn(async move {
            if let Err(error) = store.delete_expired().await {
                tracing::warn!(%error, "expired tickets and credentials were not removed");
            }
        });
    }
}
