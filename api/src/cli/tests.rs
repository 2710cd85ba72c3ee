#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use clap::Parser;

use super::*;
use crate::{
    exam::Exam,
    session::State,
    store::{Actor, Transition},
};

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    tool: Tool,
}

struct World {
    _directory: tempfile::TempDir,
    context: Context,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite:{}", directory.path().join("db").display())).await.unwrap();
        store.put_exam(&Exam::from_yaml("id: e\ntitle: E\nduration_minutes: 2\n").unwrap()).await.unwrap();
        let public = Public {
            url: "http://127.0.0.1:1".into(),
            ssh_host: "127.0.0.1".into(),
            ssh_port: 22,
            host_key_fingerprint: "SHA256:x".into(),
            known_hosts: "[127.0.0.1]:22 ssh-ed25519 AAAA".into(),
        };
        let context = Context { store, environment: None, public: Some(public) };
        Self { _directory: directory, context }
    }

    async fn run(&self, words: &str) -> Output {
        let words = std::iter::once("carrel").chain(words.split(' '));
        match Line::try_parse_from(words) {
            Ok(line) => run(&line.tool, line.tool.needs_store().then_some(&self.context)).await,
            Err(error) => Output::bad_arguments(&error),
        }
    }

    async fn ok(&self, words: &str) -> Value {
        let output = self.run(words).await;
        assert_eq!(output.exit, Exit::Ok, "{words}: {}", output.json);
        output.json
    }

    /// Exit, code and details of an error in the contract's form.
    async fn error(&self, words: &str) -> (Exit, String, Value) {
        let Output { exit, json } = self.run(words).await;
        assert_ne!(exit, Exit::Ok, "{words}: {json}");
        assert_eq!(fields(&json), ["code", "details", "error", "message"], "{json}");
        assert_eq!(json["error"], true);
        (exit, json["code"].as_str().unwrap().to_owned(), json["details"].clone())
    }

    async fn session(&self) -> Session {
        let user = UserId::new();
        let made = self.ok(&format!("exam start --exam-id e --user-id {user}")).await;
        self.context
            .store
            .session(made["session_id"].as_str().unwrap().parse().unwrap())
            .await
            .unwrap()
            .unwrap()
    }
}

fn fields(json: &Value) -> Vec<&str> {
    let mut names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

#[test]
fn the_names_are_those_of_the_commands() {
    use clap::CommandFactory as _;
    let command = Line::command();
    let mut names: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
    names.sort_unstable();
    let mut listed = NAMES;
    listed.sort_unstable();
    assert_eq!(names, listed);
    Line::command().debug_assert();
}

#[tokio::test]
async fn an_identity_is_valid_or_says_which_names_are_missing_or_malformed() {
    let world = World::new().await;
    let (user, session, environment) = (UserId::new(), SessionId::new(), EnvironmentId::new());
    let words = format!("session-identity validate --user-id {user} --session-id {session}");
    let valid = world.ok(&words).await;
    let identity = json!({"user_id": user, "exam_session_id": session, "environment_id": null});
    assert_eq!(valid, json!({"valid": true, "identity": identity}));
    let valid = world.ok(&format!("{words} --environment-id {environment}")).await;
    assert_eq!(valid["identity"]["environment_id"], json!(environment));
    let missing = world.error("session-identity validate").await;
    let details = json!({"missing_fields": ["user_id", "session_id"]});
    assert_eq!(missing, (Exit::ValidationFailed, "INVALID_IDENTITY".into(), details));
    let words = format!("session-identity validate --user-id x --session-id {session} --environment-id y");
    let details = json!({"invalid_fields": ["user_id", "environment_id"]});
    assert_eq!(world.error(&words).await, (Exit::ValidationFailed, "INVALID_IDENTITY".into(), details));
}

#[tokio::test]
async fn a_transition_is_made_or_refused_with_what_is_allowed() {
    let world = World::new().await;
    let id = world.session().await.id;
    let to = |state: &str| format!("session-lifecycle transition --session-id {id} --to {state}");
    let made = world.ok(&to("initializing")).await;
    let names = ["current_state", "previous", "previous_state", "session_id", "state", "transitioned_at"];
    assert_eq!(fields(&made), names);
    assert_eq!(
        (&made["previous_state"], &made["current_state"]),
        (&json!("created"), &json!("initializing"))
    );
    assert_eq!((&made["previous"], &made["state"]), (&json!("created"), &json!("initializing")));
    let refused = world.error(&to("running")).await;
    let details = json!({"current_state": "initializing", "requested_state": "running", "allowed_transitions": ["ready", "failed"]});
    assert_eq!(refused, (Exit::TransitionRefused, "INVALID_TRANSITION".into(), details));
    let (exit, code, _) = world.error(&to("failed")).await;
    assert_eq!((exit, code.as_str()), (Exit::ValidationFailed, "REASON_REQUIRED"));
    world.ok(&format!("{} --reason image_pull_failed", to("failed"))).await;
    let status = world.ok(&format!("session-lifecycle status --session-id {id}")).await;
    assert_eq!(fields(&status), ["last_transition_at", "reason", "session_id", "started_at", "state"]);
    assert_eq!((&status["state"], &status["reason"]), (&json!("failed"), &json!("image_pull_failed")));
    let (exit, _, details) = world.error(&to("terminated")).await;
    assert_eq!((exit, &details["allowed_transitions"]), (Exit::TransitionRefused, &json!([])));
    let (exit, code, _) = world.error(&to("paused")).await;
    assert_eq!((exit, code.as_str()), (Exit::BadArguments, "INVALID_ARGUMENTS"));
}

#[tokio::test]
async fn what_is_unknown_or_malformed_or_incomplete_has_its_own_exit() {
    let world = World::new().await;
    let unknown = SessionId::new();
    for verb in [
        "session-lifecycle status",
        "session-status get",
        "cleanup-ttl check",
        "execution-environment status",
    ] {
        let (exit, code, _) = world.error(&format!("{verb} --session-id {unknown}")).await;
        assert_eq!((exit, code.as_str()), (Exit::NotFound, "SESSION_NOT_FOUND"), "{verb}");
        let (exit, code, details) = world.error(&format!("{verb} --session-id x")).await;
        assert_eq!((exit, code.as_str()), (Exit::ValidationFailed, "INVALID_IDENTITY"), "{verb}");
        assert_eq!(details, json!({"invalid_fields": ["session_id"]}));
        assert_eq!(world.error(verb).await.0, Exit::BadArguments, "{verb}");
    }
    assert_eq!(world.error("session-lifecycle dance").await.0, Exit::BadArguments);
    let id = world.session().await.id;
    let (exit, code, _) = world.error(&format!("execution-environment status --session-id {id}")).await;
    assert_eq!((exit, code.as_str()), (Exit::NotFound, "ENVIRONMENT_NOT_FOUND"));
}

#[tokio::test]
async fn access_is_authorized_for_the_owner_and_denied_alike_to_everybody_else() {
    let world = World::new().await;
    let session = world.session().await;
    let ask = |id: SessionId, user: UserId| {
        format!("environment-access authorize --session-id {id} --user-id {user}")
    };
    let granted = world.ok(&ask(session.id, session.user_id)).await;
    assert_eq!(granted, json!({"authorized": true, "session_id": session.id, "user_id": session.user_id}));
    let foreign = world.run(&ask(session.id, UserId::new())).await;
    let unknown = world.run(&ask(SessionId::new(), session.user_id)).await;
    assert_eq!(foreign, unknown);
    assert_eq!((foreign.exit, &foreign.json["details"]), (Exit::AccessDenied, &json!({})));
    world
        .ok(&format!(
            "session-lifecycle transition --session-id {} --to failed --reason internal",
            session.id
        ))
        .await;
    assert_eq!(world.run(&ask(session.id, session.user_id)).await, foreign);
}

#[tokio::test]
async fn a_session_is_started_and_its_status_shown_as_the_api_does() {
    let world = World::new().await;
    let user = UserId::new();
    let start = format!("exam start --exam-id e --user-id {user}");
    let made = world.ok(&start).await;
    assert_eq!(made["user_id"], json!(user));
    assert_eq!(fields(&made["ssh"]).len(), 7);
    let (exit, code, details) = world.error(&start).await;
    assert_eq!((exit, code.as_str()), (Exit::General, "ACTIVE_SESSION_EXISTS"));
    assert_eq!(details["session_id"], made["session_id"]);
    let (exit, code, _) = world.error(&format!("exam start --exam-id none --user-id {user}")).await;
    assert_eq!((exit, code.as_str()), (Exit::NotFound, "INVALID_EXAM_ID"));
    let status =
        world.ok(&format!("session-status get --session-id {}", made["session_id"].as_str().unwrap())).await;
    assert_eq!(status["display_state"], "creating");
    assert_eq!(fields(&status).len(), 9);
}

#[tokio::test]
async fn a_failure_is_classified_by_its_code() {
    let world = World::new().await;
    let context = r#"{"technical_details":"no-such-image"}"#;
    let told = world
        .ok(&format!("failure-classification classify --type image_pull_failed --context {context}"))
        .await;
    let names = [
        "message",
        "recoverable",
        "recovery_action",
        "severity",
        "technical_details",
        "type",
        "user_message",
    ];
    assert_eq!(fields(&told), names);
    assert_eq!((&told["type"], &told["technical_details"]), (&json!("init"), &json!("no-such-image")));
    let by_kind = r#"failure-classification classify --type init --context {"reason":"image_pull_failed","technical_details":"no-such-image"}"#;
    assert_eq!(world.ok(by_kind).await, told);
    for words in [
        "--type nothing --context {}",
        "--type runtime --context {\"reason\":\"image_pull_failed\"}",
        "--type internal --context x",
    ] {
        let (exit, code, _) = world.error(&format!("failure-classification classify {words}")).await;
        assert_eq!((exit, code.as_str()), (Exit::ValidationFailed, "VALIDATION_FAILED"), "{words}");
    }
}

#[tokio::test]
async fn the_time_left_is_told_and_a_dry_sweep_changes_nothing() {
    let world = World::new().await;
    let session = world.session().await;
    let check = format!("cleanup-ttl check --session-id {}", session.id);
    let told = world.ok(&check).await;
    assert_eq!(fields(&told), ["reason", "session_id", "should_cleanup", "ttl_remaining_seconds"]);
    assert_eq!((&told["should_cleanup"], &told["reason"]), (&json!(false), &json!("start_timeout")));
    let left = told["ttl_remaining_seconds"].as_i64().unwrap();
    assert!((0..60).contains(&left), "{left}");

    let reason = crate::reason::Reason::from(crate::reason::ReasonCode::Internal);
    world
        .context
        .store
        .transition(&session, Transition::end(State::Failed, reason), &Actor::System)
        .await
        .unwrap();
    assert_eq!(world.ok(&check).await["should_cleanup"], true);
    let swept = world.ok("cleanup-ttl sweep --dry-run").await;
    let names = [
        "cleaned_session_ids",
        "dry_run",
        "sessions_checked",
        "sessions_cleaned",
        "sweep_completed_at",
        "sweep_started_at",
    ];
    assert_eq!(fields(&swept), names);
    assert_eq!((&swept["cleaned_session_ids"], &swept["dry_run"]), (&json!([session.id]), &json!(true)));
    assert_eq!(world.context.store.unreleased_sessions().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_database_that_is_away_is_a_general_error() {
    let world = World::new().await;
    let id = world.session().await.id;
    world.context.store.close().await;
    let (exit, code, _) = world.error(&format!("session-status get --session-id {id}")).await;
    assert_eq!((exit, code.as_str()), (Exit::General, "BACKEND_UNAVAILABLE"));
}
