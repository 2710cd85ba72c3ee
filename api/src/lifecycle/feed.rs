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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{identity::UserId, session::State};

    fn session(version: i64) -> Session {
        Session {
            id: SessionId::from(uuid::Uuid::nil()),
            user_id: UserId::from(uuid::Uuid::nil()),
            exam_id: "e".into(),
            environment_id: None,
            state: State::Created,
            version,
            reason: None,
            step: 0,
            duration_ms: 1,
            start_within_ms: 1,
            reconnect_window_ms: 1,
            created_at: 0,
            initializing_at: None,
            ready_at: None,
            started_at: None,
            ended_at: None,
            released_at: None,
            active_at: 0,
            updated_at: 0,
        }
    }

    #[test]
    fn an_older_row_never_replaces_a_newer_one() {
        let feed = Feed::default();
        let mut receiver = feed.subscribe(session(3));
        feed.publish(&session(2));
        feed.publish(&session(3));
        assert!(!receiver.has_changed().unwrap());
        assert_eq!(feed.subscribe(session(2)).borrow().version, 3);
        feed.publish(&session(4));
        assert!(receiver.has_changed().unwrap());
        assert_eq!(receiver.borrow_and_update().version, 4);
    }

    #[test]
    fn what_nobody_watches_is_forgotten_and_what_was_released_is_not_asked_for() {
        let feed = Feed::default();
        let id = session(1).id;
        let (one, two) = (feed.subscribe(session(1)), feed.existing(id).unwrap());
        drop(one);
        assert_eq!(feed.watched(), [id]);
        feed.publish(&Session { released_at: Some(1), ..session(2) });
        assert_eq!(feed.watched(), []);
        assert_eq!(feed.existing(id).unwrap().borrow().version, 2);
        drop(two);
        assert!(feed.existing(id).is_none(), "a row that nobody kept fresh is not handed out");
        feed.watched();
        assert!(feed.entries().is_empty());
    }
}
