//! The command line tools that work on environments, with real ones of this machine and no server beside them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]
#[path = "environment/agent.rs"]
mod program;

use std::sync::Arc;

use carrel_api::{
    cli::{Context, Exit, Output, Tool, run},
    environment::{
        Agent, Environment as _,
        local::{LocalEnvironment, LocalOptions},
    },
    exam::Exam,
    http::Public,
    identity::UserId,
    session::State,
    store::Store,
};
use clap::Parser;
use program::agent;
use serde_json::{Value, json};

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    tool: Tool,
}

struct World {
    directory: tempfile::TempDir,
    environment: Arc<LocalEnvironment>,
    context: Context,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite:{}", directory.path().join("db").display())).await.unwrap();
        for text in [
            "id: e\ntitle: E\nduration_minutes: 2\n",
            "id: broken\ntitle: E\nduration_minutes: 2\nenvironment: { setup: \"exit 3\" }\n",
        ] {
            store.put_exam(&Exam::from_yaml(text).unwrap()).await.unwrap();
        }
        let data_dir = directory.path().join("data");
        let options = LocalOptions { data_dir, agent: Agent::File(agent()), shared: Vec::new() };
        let environment = Arc::new(LocalEnvironment::new(options).unwrap());
        let public = Public {
            url: "http://127.0.0.1:1".into(),
            ssh_host: "127.0.0.1".into(),
            ssh_port: 22,
            host_key_fingerprint: "SHA256:x".into(),
            known_hosts: "[127.0.0.1]:22 ssh-ed25519 AAAA".into(),
        };
        let context = Context { store, environment: Some(environment.clone()), public: Some(public) };
        Self { directory, environment, context }
    }

    async fn run(&self, words: &str) -> Output {
        let line = Line::try_parse_from(std::iter::once("carrel").chain(words.split(' '))).unwrap();
        run(&line.tool, Some(&self.context)).await
    }

    async fn ok(&self, words: &str) -> Value {
        let output = self.run(words).await;
        assert_eq!(output.exit, Exit::Ok, "{words}: {}", output.json);
        output.json
    }

    async fn start(&self, exam: &str) -> String {
        let made = self.ok(&format!("exam start --exam-id {exam} --user-id {}", UserId::new())).await;
        made["session_id"].as_str().unwrap().to_owned()
    }

    fn left(&self) -> usize {
        let entries = std::fs::read_dir(self.directory.path().join("data/environments"));
        entries.map_or(0, |entries| {
            let named = |name: std::ffi::OsString| name.to_str().is_some_and(|name| name.len() == 36);
            entries.filter(|entry| entry.as_ref().is_ok_and(|entry| named(entry.file_name()))).count()
        })
    }

    /// After a failed test, too, nothing may stay.
    async fn close(&self) {
        for id in self.environment.observe().borrow().environments.keys().copied().collect::<Vec<_>>() {
            let _ = self.environment.destroy(id).await;
        }
    }
}

fn fields(json: &Value) -> Vec<&str> {
    let mut names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_is_made_shown_and_removed() {
    let world = World::new().await;
    let id = world.start("e").await;
    let made = world.ok(&format!("execution-environment create --session-id {id} --timeout 30")).await;
    let names =
        ["created_at", "environment_id", "pod_name", "pod_namespace", "ready_at", "session_id", "status"];
    assert_eq!(fields(&made), names);
    assert_eq!((&made["status"], &made["session_id"]), (&json!("ready"), &json!(id)));
    assert!(
        made["pod_name"].is_string() && made["created_at"].is_string() && made["ready_at"].is_string(),
        "{made}"
    );
    assert_eq!(world.ok(&format!("execution-environment status --session-id {id}")).await, made);
    assert_eq!(
        world.ok(&format!("execution-environment create --session-id {id}")).await,
        made,
        "a second time"
    );
    assert_eq!(world.left(), 1);

    let gone = world.ok(&format!("execution-environment destroy --session-id {id}")).await;
    assert_eq!((&gone["status"], &gone["environment_id"]), (&json!("destroyed"), &made["environment_id"]));
    assert!(gone["destroyed_at"].is_string());
    assert_eq!(world.left(), 0);
    let session = world.context.store.session(id.parse().unwrap()).await.unwrap().unwrap();
    assert_eq!((session.state, session.released_at.is_some()), (State::Terminated, true));
    let again = world.ok(&format!("execution-environment destroy --session-id {id}")).await;
    assert_eq!((&again["status"], &again["destroyed_at"]), (&gone["status"], &gone["destroyed_at"]));
    assert_eq!(
        world.ok(&format!("execution-environment status --session-id {id}")).await["status"],
        "destroyed"
    );
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_that_cannot_be_made_says_why_and_a_sweep_leaves_nothing_of_it() {
    let world = World::new().await;
    let id = world.start("broken").await;
    let failed = world.run(&format!("execution-environment create --session-id {id}")).await;
    assert_eq!((failed.exit, &failed.json["code"]), (Exit::General, &json!("ENVIRONMENT_CREATE_FAILED")));
    assert_eq!(failed.json["details"]["reason"], "setup_failed", "{}", failed.json);
    let swept = world.ok("cleanup-ttl sweep").await;
    assert_eq!(swept["dry_run"], false);
    assert_eq!(world.context.store.unreleased_sessions().await.unwrap(), []);
    assert_eq!(world.left(), 0);
    world.close().await;
}
