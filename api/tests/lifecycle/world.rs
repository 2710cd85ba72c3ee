//! A database, a data directory and any number of servers' lifecycles on them, in one process.
#![allow(dead_code, reason = "each test program uses its part")]
use std::{sync::Arc, time::Duration};

use carrel_api::{
    environment::{
        Agent, Environment as _,
        link::Links,
        local::{LocalEnvironment, LocalOptions},
    },
    exam::Exam,
    identity::{EnvironmentId, SessionId, UserId},
    lifecycle::{EndError, Lifecycle},
    reason::ReasonCode,
    session::{Session, State},
    store::{Actor, NewSession, Store},
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{
    database::{Database, raw},
    program::agent,
};

/// Longer than anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A database, a data directory, and any number of servers' lifecycles on them.
pub struct World {
    pub database: Option<Database>,
    pub data: TempDir,
}

/// What one server has of the lifecycle.
pub struct Replica {
    pub store: Store,
    pub environment: Arc<LocalEnvironment>,
    pub links: Arc<Links>,
    pub lifecycle: Arc<Lifecycle>,
    pub shutdown: CancellationToken,
    pub running: JoinHandle<()>,
}

impl World {
    pub async fn sqlite() -> Self {
        Self { database: Some(Database::sqlite().await), data: tempfile::tempdir().unwrap() }
    }

    pub async fn postgres() -> Option<Self> {
        Some(Self { database: Some(Database::postgres().await?), data: tempfile::tempdir().unwrap() })
    }

    pub fn environment(&self) -> Arc<LocalEnvironment> {
        let data_dir = self.data.path().join("data");
        let options = LocalOptions { data_dir, agent: Agent::File(agent()), shared: Vec::new() };
        Arc::new(LocalEnvironment::new(options).unwrap())
    }

    pub async fn server(&self) -> Replica {
        let store = Store::open(&self.database().url).await.unwrap();
        let environment = self.environment();
        let links = Links::new(environment.clone());
        let lifecycle = Lifecycle::new(store.clone(), environment.clone(), Arc::clone(&links));
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(Arc::clone(&lifecycle).run(shutdown.clone()));
        Replica { store, environment, links, lifecycle, shutdown, running }
    }

    /// The database's clock goes ahead by this much from now on.
    pub async fn shift(&self, ms: i64) {
        let mut connection = self.database().connect().await;
        let now = if self.database().is_postgres() {
            "(extract(epoch from statement_timestamp()) * 1000)::bigint"
        } else {
            "cast(unixepoch('now', 'subsec') * 1000 as integer)"
        };
        raw(&mut connection, "drop view clock").await.unwrap();
        raw(&mut connection, &format!("create view clock (now_ms) as select {now} + {ms}")).await.unwrap();
    }

    pub fn directories(&self) -> Vec<EnvironmentId> {
        let Ok(entries) = std::fs::read_dir(self.data.path().join("data/environments")) else {
            return Vec::new();
        };
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
    }

    /// Nothing may be left of any environment, nor of the database.
    pub async fn close(mut self) {
        assert_eq!(self.directories(), [], "environments are left");
        if let Some(database) = self.database.take() {
            database.drop().await;
        }
    }

    pub fn database(&self) -> &Database {
        self.database.as_ref().unwrap()
    }
}

impl Drop for World {
    /// After a failed test: no process of it stays.
    fn drop(&mut self) {
        let ids = self.directories();
        if ids.is_empty() {
            return;
        }
        let data_dir = self.data.path().join("data");
        let tidy = move || {
            tokio::runtime::Runtime::new().unwrap().block_on(async {
                let options = LocalOptions { data_dir, agent: Agent::File(agent()), shared: Vec::new() };
                let environment = LocalEnvironment::new(options).unwrap();
                for id in ids {
                    let _ = environment.destroy(id).await;
                }
            });
        };
        let _ = std::thread::spawn(tidy).join();
    }
}

impl Replica {
    pub async fn create(&self, exam: &Exam) -> Session {
        let new = NewSession { user_id: UserId::new(), exam, password_hash: None, public_keys: Vec::new() };
        let session = self.store.create_session(&new, &Actor::Platform).await.unwrap();
        self.lifecycle.wake();
        session
    }

    /// The first row of the feed that is as wanted.
    pub async fn until(&self, id: SessionId, wanted: impl Fn(&Session) -> bool) -> Session {
        let mut feed = self.lifecycle.watch(id).await.unwrap();
        let waited = tokio::time::timeout(PATIENCE, feed.wait_for(|session| wanted(session))).await;
        match waited {
            Ok(found) => found.unwrap().as_ref().clone(),
            Err(_) => panic!("it stays as {:?}", self.store.session(id).await),
        }
    }

    pub async fn in_state(&self, id: SessionId, state: State) -> Session {
        let session = self.until(id, |session| session.state == state || session.state.is_terminal()).await;
        assert_eq!(session.state, state, "{:?}", session.reason);
        session
    }

    pub async fn ended(&self, id: SessionId) -> (State, ReasonCode) {
        let session = self.until(id, |session| session.state.is_terminal()).await;
        (session.state, session.reason.unwrap().code)
    }

    pub async fn released(&self, id: SessionId) -> Session {
        self.until(id, |session| session.released_at.is_some()).await
    }

    pub async fn running(&self, exam: &Exam) -> Session {
        let session = self.create(exam).await;
        self.in_state(session.id, State::Ready).await;
        self.lifecycle.connected(session.id).await.unwrap()
    }

    /// Ends in order.
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.running).await.unwrap().unwrap();
        self.links.shutdown().await;
        self.store.close().await;
    }

    /// Is gone from one moment to the next, as far as that is possible within a process.
    pub async fn crash(self) {
        self.running.abort();
        self.shutdown.cancel();
        self.links.shutdown().await;
        self.store.close().await;
    }

    /// Ends all sessions and waits until nothing is left of them.
    pub async fn clear(self) {
        for session in self.store.unreleased_sessions().await.unwrap() {
            match self.lifecycle.end(session.id, ReasonCode::EndedByStaff, &Actor::System).await {
                Ok(_) | Err(EndError::AlreadyTerminated(_)) => {}
                Err(error) => panic!("{error}"),
            }
            self.released(session.id).await;
        }
        self.stop().await;
    }
}

pub fn exam() -> Exam {
    exam_with(serde_json::json!({}))
}

pub fn exam_with(environment: serde_json::Value) -> Exam {
    serde_json::from_value(serde_json::json!({
        "id": "e", "title": "E", "duration_minutes": 1, "start_within_seconds": 30, "environment": environment
    }))
    .unwrap()
}
