//! The latest row of each session that somebody watches.
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::{identity::SessionId, session::Session};

/// One entry for each session that is watched; no entry is a source of truth.
#[derive(Debug, Default)]
pub(super) struct Feed {
    entries: Mutex<HashMap<SessionId, watch::Sender<Arc<Session>>>>,
}

impl Feed {
    /// The feed of a session that is watched already.
    pub(super) fn existing(&self, id: SessionId) -> Option<watch::Receiver<Arc<Session>>> {
        self.entries().get(&id).filter(|entry| entry.receiver_count() > 0).map(watch::Sender::subscribe)
    }

    /// The feed of a session whose row was just read.
    pub(super) fn subscribe(&self, session: Session) -> watch::Receiver<Arc<Session>> {
        let mut entries = self.entries();
        if let Some(entry) = entries.get(&session.id) {
            update(entry, &session);
            return entry.subscribe();
        }
        let (entry, receiver) = watch::channel(Arc::new(session));
        entries.insert(receiver.borrow().id, entry);
        receiver
    }

    /// Tells whoever watches.
    pub(super) fn publish(&self, session: &Session) {
        if let Some(entry) = self.entries().get(&session.id) {
            update(entry, session);
        }
    }

    /// Forgets what nobody watches any more, and names what is watched and may still change.
    pub(super) fn watched(&self) -> Vec<SessionId> {
        let mut entries = self.entries();
        entries.retain(|_, entry| entry.receiver_count() > 0);
        entries.iter().filter(|(_, entry)| entry.borrow().released_at.is_none()).map(|(id, _)| *id).collect()
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<SessionId, watch::Sender<Arc<Session>>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows arrive out of order: only a later version counts. A touch alone wakes nobody.
fn update(entry: &watch::Sender<Arc<Session>>, session: &Session) {
    entry.send_if_modified(|latest| {
        let later = session.version > latest.version;
        if later {
            *latest = Arc::new(session.clone());
        }
        later
    });
}
