//! The store and the schema's rules, on SQLite and on a real PostgreSQL alike.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says why it was skipped"
)]
#[path = "store/database.rs"]
mod database;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use carrel_api::{
    exam::{Exam, Recipe},
    identity::{EnvironmentId, SessionId, UserId},
    reason::{Reason, ReasonCode},
    session::{Session, State},
    store::{
        AccessRecord, Actor, ApiKeyRow, Channel, NewSession, Outcome, Store, StoreError, TicketKind,
        TicketRow, Transition, WarmState,
    },
};
use database::{Database, raw, rows};
use sqlx::Connection as _;

/// Each test once on each database.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let database = super::Database::sqlite().await;
                super::$name(&database, super::Store::open(&database.url).await.unwrap()).await;
                database.drop().await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let Some(database) = super::Database::postgres().await else { return };
                super::$name(&database, super::Store::open(&database.url).await.unwrap()).await;
                database.drop().await;
            })*
        }
    };
}

on_both! {
    a_session_lives_from_created_to_released,
    no_change_outside_the_table_is_made,
    the_table_in_the_schema_is_the_one_in_the_code,
    every_reason_can_be_stored,
    the_schema_refuses_a_state_without_its_record,
    the_schema_refuses_an_illegal_record,
    the_schema_refuses_to_replace_an_identity,
    the_schema_refuses_to_alter_a_record,
    of_many_simultaneous_sessions_of_one_user_one_is_made,
    of_many_changes_from_the_same_reading_one_is_made,
    a_step_moves_forward_only,
    a_session_keeps_its_exam_when_the_exam_changes,
    exams_are_put_and_listed,
    credentials_are_kept_apart_and_removed_after_the_end,
    a_ticket_is_taken_once,
    an_expired_ticket_opens_nothing,
    api_keys_are_listed_and_revoked,
    every_attempt_is_recorded,
    every_change_leaves_an_audit_entry,
    many_replicas_open_a_new_database_at_once,
    a_database_of_a_newer_version_is_refused,
    no_error_shows_a_value,
    long_details_are_cut_at_a_character,
    of_fifty_claims_at_once_no_two_get_the_same,
    sessions_are_not_looked_for_where_they_never_were,
    a_claim_takes_what_is_ready_and_of_its_recipe_only,
    a_claim_that_comes_to_nothing_gives_back_what_it_took,
    replicas_that_plan_at_once_name_no_more_than_the_exam_wants,
}

fn exam() -> Exam {
    serde_json::from_value(serde_json::json!({
        "id": "linux-1", "title": "Linux", "duration_minutes": 90, "start_within_seconds": 600,
        "environment": { "network": "internet", "setup": "echo 'ready' > /tmp/x", "cpu": "500m" }
    }))
    .unwrap()
}

async fn created(store: &Store) -> Session {
    created_for(store, UserId::new()).await.unwrap()
}

async fn created_for(store: &Store, user_id: UserId) -> Result<Session, StoreError> {
    let exam = exam();
    let new = NewSession { user_id, exam: &exam, password_hash: None, public_keys: Vec::new() };
    store.create_session(&new, &Actor::Candidate(user_id)).await
}

fn change(to: State) -> Transition {
    match to {
        State::Terminated => Transition::end(to, ReasonCode::Submitted.into()),
        State::Failed => Transition::end(to, ReasonCode::Internal.into()),
        State::Initializing => {
            Transition { environment_id: Some(EnvironmentId::new()), ..Transition::to(State::Initializing) }
        }
        _ => Transition::to(to),
    }
}

async fn go(store: &Store, session: &Session, to: State) -> Session {
    store.transition(session, change(to), &Actor::System).await.unwrap()
}

/// A new session, led to this state.
async fn in_state(store: &Store, state: State) -> Session {
    let mut session = created(store).await;
    let path: &[State] = match state {
        State::Created => &[],
        State::Initializing => &[State::Initializing],
        State::Ready => &[State::Initializing, State::Ready],
        State::Running => &[State::Initializing, State::Ready, State::Running],
        State::Terminated => &[State::Initializing, State::Ready, State::Terminated],
        State::Failed => &[State::Failed],
    };
    for state in path {
        session = go(store, &session, *state).await;
    }
    session
}

async fn a_session_lives_from_created_to_released(database: &Database, store: Store) {
    let before = store.now().await.unwrap();
    let user_id = UserId::new();
    let session = created_for(&store, user_id).await.unwrap();
    assert_eq!((session.state, session.version, session.step), (State::Created, 1, 0));
    assert_eq!(
        (session.duration_ms, session.start_within_ms, session.reconnect_window_ms),
        (5_400_000, 600_000, 300_000)
    );
    assert!(session.created_at >= before && session.created_at <= store.now().await.unwrap());
    assert_eq!(store.session(session.id).await.unwrap(), Some(session.clone()));
    assert_eq!(store.active_session(user_id).await.unwrap(), Some(session.clone()));

    let environment_id = EnvironmentId::new();
    let to = Transition {
        environment_id: Some(environment_id),
        step: Some(1),
        ..Transition::to(State::Initializing)
    };
    let initializing = store.transition(&session, to, &Actor::System).await.unwrap();
    assert_eq!((initializing.environment_id, initializing.step), (Some(environment_id), 1));
    assert!(initializing.initializing_at >= Some(session.created_at));
    let ready = go(&store, &initializing, State::Ready).await;
    assert_eq!((ready.environment_id, ready.step, ready.started_at), (Some(environment_id), 1, None));
    let running = go(&store, &ready, State::Running).await;
    assert!(running.started_at.is_some() && running.ready_at == ready.ready_at && running.ready_at.is_some());
    store.touch(session.id).await.unwrap();
    assert!(store.session(session.id).await.unwrap().unwrap().active_at >= running.active_at);
    assert_eq!(store.mark_released(session.id).await, Err(StoreError::Conflict));

    let reason = Reason::new(ReasonCode::EndedByStaff, "the proctor saw a phone");
    let end = Transition::end(State::Terminated, reason.clone());
    let ended = store.transition(&running, end, &Actor::Key("k1".into())).await.unwrap();
    assert_eq!((ended.reason.as_ref(), ended.version), (Some(&reason), 5));
    assert!(ended.ended_at.is_some() && ended.started_at == running.started_at);
    assert_eq!(store.active_session(user_id).await.unwrap(), None);
    assert_eq!(store.unreleased_sessions().await.unwrap(), std::slice::from_ref(&ended));
    let released = store.mark_released(session.id).await.unwrap();
    assert!(released.released_at.is_some());
    assert_eq!(store.mark_released(session.id).await, Ok(released.clone()));
    assert_eq!(store.unreleased_sessions().await.unwrap(), []);
    assert_eq!(store.session(session.id).await.unwrap(), Some(released));
    assert_eq!(store.mark_released(SessionId::new()).await, Err(StoreError::NotFound));

    let records = rows(
        &mut database.connect().await,
        "select number, from_state, to_state, reason_code, actor_kind, actor_id from session_transition order by number",
    )
    .await;
    let user = user_id.to_string();
    let wanted = [
        ["0", "null", "created", "null", "candidate", &user],
        ["1", "created", "initializing", "null", "system", "null"],
        ["2", "initializing", "ready", "null", "system", "null"],
        ["3", "ready", "running", "null", "system", "null"],
        ["4", "running", "terminated", "ended_by_staff", "key", "k1"],
    ];
    assert_eq!(records, wanted.map(|row| row.map(str::to_owned).to_vec()));
}

async fn no_change_outside_the_table_is_made(_: &Database, store: Store) {
    for from in State::ALL {
        for to in State::ALL {
            let session = in_state(&store, from).await;
            let result = store.transition(&session, change(to), &Actor::System).await;
            if from.next().contains(&to) {
                assert_eq!(result.unwrap().state, to);
            } else {
                let refused =
                    StoreError::IllegalTransition { current: from, requested: to, allowed: from.next() };
                assert_eq!(result, Err(refused));
                assert_eq!(store.session(session.id).await.unwrap(), Some(session));
            }
        }
    }
    let session = in_state(&store, State::Ready).await;
    let without = Transition::to(State::Failed);
    assert_eq!(store.transition(&session, without, &Actor::System).await, Err(StoreError::ReasonRequired));
}

async fn the_table_in_the_schema_is_the_one_in_the_code(database: &Database, _: Store) {
    let mut connection = database.connect().await;
    let mut schema = rows(&mut connection, "select from_state, to_state from legal_transition").await;
    let mut code: Vec<_> = State::ALL
        .into_iter()
        .flat_map(|from| from.next().iter().map(move |to| vec![from.to_string(), to.to_string()]))
        .collect();
    schema.sort();
    code.sort();
    assert_eq!(schema, code);
    for row in rows(&mut connection, "select name, is_final from session_state").await {
        let state: State = row[0].parse().unwrap();
        assert_eq!(row[1] == "1", state.is_terminal(), "{state}");
    }
}

async fn every_reason_can_be_stored(_: &Database, store: Store) {
    for code in ReasonCode::ALL {
        let session = created(&store).await;
        let end = Transition::end(State::Failed, code.into());
        let failed = store.transition(&session, end, &Actor::System).await.unwrap();
        assert_eq!(store.session(session.id).await.unwrap().unwrap().reason, Some(code.into()));
        assert_eq!(failed.reason.unwrap().code, code);
    }
}

/// The statement must be refused by the schema and leave the row as it was.
async fn refused(database: &Database, store: &Store, session: &Session, text: &str) {
    let mut connection = database.connect().await;
    let result = raw(&mut connection, text).await;
    assert!(result.is_err(), "not refused: {text}");
    connection.close().await.unwrap();
    assert_eq!(store.session(session.id).await.unwrap().as_ref(), Some(session), "{text}");
}

async fn the_schema_refuses_a_state_without_its_record(database: &Database, store: Store) {
    let session = in_state(&store, State::Ready).await;
    let id = session.id;
    for set in [
        "state = 'running'",
        "state = 'running', started_at = 1, version = version + 1",
        "state = 'running', started_at = 1, version = version + 1, transition_number = transition_number + 1",
        "state = 'initializing', version = version + 1, transition_number = transition_number - 1",
        "state = 'terminated', reason_code = 'submitted', ended_at = 1, version = version + 1",
        "state = 'nonsense', version = version + 1",
        "released_at = 1, version = version + 1",
    ] {
        refused(database, &store, &session, &format!("update session set {set} where id = '{id}'")).await;
    }
    // A state that it had once, by its record of then.
    let running = go(&store, &session, State::Running).await;
    let back = format!(
        "update session set state = 'ready', transition_number = 2, version = version + 1 where id = '{id}'"
    );
    refused(database, &store, &running, &back).await;
}

async fn the_schema_refuses_an_illegal_record(database: &Database, store: Store) {
    let session = in_state(&store, State::Ready).await;
    let (id, user) = (session.id, session.user_id);
    let other = UserId::new();
    for values in [
        // Not in the table.
        format!("'{id}', '{user}', 3, 2, 'ready', 'created', null, 'system'"),
        // Not from where it stands.
        format!("'{id}', '{user}', 3, 2, 'running', 'terminated', 'submitted', 'system'"),
        // A gap.
        format!("'{id}', '{user}', 4, 3, 'ready', 'running', null, 'system'"),
        format!("'{id}', '{user}', 3, null, 'ready', 'running', null, 'system'"),
        // A second beginning.
        format!("'{id}', '{user}', 3, null, null, 'created', null, 'system'"),
        // Somebody else's.
        format!("'{id}', '{other}', 3, 2, 'ready', 'running', null, 'system'"),
        // An end without a reason, a reason without an end, a reason that is none.
        format!("'{id}', '{user}', 3, 2, 'ready', 'terminated', null, 'system'"),
        format!("'{id}', '{user}', 3, 2, 'ready', 'running', 'submitted', 'system'"),
        format!("'{id}', '{user}', 3, 2, 'ready', 'terminated', 'bored', 'system'"),
        // By nobody known.
        format!("'{id}', '{user}', 3, 2, 'ready', 'running', null, 'ghost'"),
    ] {
        let text = format!(
            "insert into session_transition (session_id, user_id, number, previous_number, from_state, to_state, reason_code, actor_kind, at)
             values ({values}, 1)"
        );
        refused(database, &store, &session, &text).await;
    }
}

async fn the_schema_refuses_to_replace_an_identity(database: &Database, store: Store) {
    let session = in_state(&store, State::Running).await;
    let id = session.id;
    for set in [
        format!("id = '{}'", SessionId::new()),
        format!("user_id = '{}'", UserId::new()),
        "exam_id = 'easier'".into(),
        "exam = '{}'".into(),
        format!("environment_id = '{}'", EnvironmentId::new()),
        "environment_id = null".into(),
        "created_at = 1".into(),
        "started_at = started_at + 3600000".into(),
        "version = version - 1".into(),
    ] {
        refused(database, &store, &session, &format!("update session set {set} where id = '{id}'")).await;
    }
    refused(database, &store, &session, &format!("delete from session where id = '{id}'")).await;
    // Two sessions never share an environment.
    let other = created(&store).await;
    let same = Transition { environment_id: session.environment_id, ..Transition::to(State::Initializing) };
    assert!(store.transition(&other, same, &Actor::System).await.is_err());
}

async fn the_schema_refuses_to_alter_a_record(database: &Database, store: Store) {
    let session = in_state(&store, State::Ready).await;
    store
        .record_access(AccessRecord {
            session_id: Some(session.id),
            user_id: None,
            channel: Channel::Ssh,
            source_ip: [127, 0, 0, 1].into(),
            outcome: Outcome::Denied,
        })
        .await
        .unwrap();
    for text in [
        "update session_transition set actor_kind = 'platform'",
        "delete from session_transition",
        "update access_record set outcome = 'granted'",
        "update audit_entry set action = 'nothing'",
        "delete from audit_entry",
    ] {
        refused(database, &store, &session, text).await;
    }
}

async fn of_many_simultaneous_sessions_of_one_user_one_is_made(_: &Database, store: Store) {
    let user_id = UserId::new();
    let mut attempts = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let store = store.clone();
        attempts.spawn(async move { created_for(&store, user_id).await });
    }
    let results = attempts.join_all().await;
    let made: Vec<_> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
    assert_eq!(made.len(), 1, "{results:?}");
    for result in &results {
        if let Err(error) = result {
            assert_eq!(error, &StoreError::ActiveSessionExists(made[0].id));
        }
    }
    // Another user, and the same one after the end, may.
    created(&store).await;
    go(&store, made[0], State::Failed).await;
    assert_ne!(created_for(&store, user_id).await.unwrap().id, made[0].id);
}

async fn of_many_changes_from_the_same_reading_one_is_made(database: &Database, store: Store) {
    let session = in_state(&store, State::Ready).await;
    let mut attempts = tokio::task::JoinSet::new();
    for number in 0..20 {
        let (store, session) = (store.clone(), session.clone());
        let to = if number % 2 == 0 { State::Running } else { State::Terminated };
        attempts.spawn(async move { store.transition(&session, change(to), &Actor::System).await });
    }
    let results = attempts.join_all().await;
    let made: Vec<_> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
    assert_eq!(made.len(), 1, "{results:?}");
    assert!(
        results.iter().filter_map(|result| result.as_ref().err()).all(|error| *error == StoreError::Conflict)
    );
    assert_eq!(store.session(session.id).await.unwrap().as_ref(), Some(made[0]));
    let text = "select number from session_transition order by number";
    assert_eq!(rows(&mut database.connect().await, text).await.concat(), ["0", "1", "2", "3"]);
}

async fn a_step_moves_forward_only(_: &Database, store: Store) {
    let session = in_state(&store, State::Initializing).await;
    let second = store.set_step(&session, 2).await.unwrap();
    assert_eq!((second.step, second.version), (2, session.version + 1));
    assert_eq!(store.set_step(&second, 1).await, Ok(second.clone()));
    assert_eq!(store.set_step(&session, 3).await, Err(StoreError::Conflict));
    assert_eq!(store.set_step(&second, 99).await.unwrap().step, 4);
}

async fn a_session_keeps_its_exam_when_the_exam_changes(_: &Database, store: Store) {
    let session = created(&store).await;
    let mut harder = exam();
    harder.duration_minutes = 10;
    store.put_exam(&harder).await.unwrap();
    assert_eq!(store.environment_exam(&session).await.unwrap(), exam());
}

async fn exams_are_put_and_listed(database: &Database, store: Store) {
    assert_eq!(store.exam("linux-1").await.unwrap(), None);
    let mut second = exam();
    second.id = "a-first".into();
    store.put_exam(&exam()).await.unwrap();
    store.put_exam(&second).await.unwrap();
    store.put_exam(&exam()).await.unwrap();
    assert_eq!(store.exam("linux-1").await.unwrap(), Some(exam()));
    assert_eq!(store.exams().await.unwrap(), [second.clone(), exam()]);
    second.title = "Other".into();
    store.put_exam(&second).await.unwrap();
    assert_eq!(store.exam("a-first").await.unwrap().unwrap().title, "Other");
    let audited = rows(
        &mut database.connect().await,
        "select subject from audit_entry where action = 'exam.put' order by id",
    )
    .await;
    assert_eq!(
        audited.concat(),
        ["linux-1", "a-first", "a-first"],
        "one entry for each change, none without one"
    );
}

async fn credentials_are_kept_apart_and_removed_after_the_end(database: &Database, store: Store) {
    let exam = exam();
    let new = NewSession {
        user_id: UserId::new(),
        exam: &exam,
        password_hash: Some("$argon2id$hash".into()),
        public_keys: vec!["ssh-ed25519 B".into(), "ssh-ed25519 A".into()],
    };
    let session = store.create_session(&new, &Actor::Platform).await.unwrap();
    let credential = store.session_credential(session.id).await.unwrap().unwrap();
    assert_eq!(credential.password_hash.as_deref(), Some("$argon2id$hash"));
    assert_eq!(credential.public_keys, new.public_keys);
    assert_eq!((credential.user_id, credential.state), (new.user_id, State::Created));
    assert!(!format!("{credential:?}").contains("argon2id"));
    assert_eq!(store.session_credential(SessionId::new()).await.unwrap(), None);

    let running = created(&store).await;
    let ended = go(&store, &session, State::Failed).await;
    assert_eq!(store.delete_expired().await.unwrap(), 0, "a late login is still told why");
    // Five minutes pass: the clock is a view, so a test can set it.
    let mut connection = database.connect().await;
    raw(&mut connection, "drop view clock").await.unwrap();
    let later = ended.ended_at.unwrap() + 300_000;
    raw(&mut connection, &format!("create view clock (now_ms) as select cast({later} as bigint)"))
        .await
        .unwrap();
    assert_eq!(store.delete_expired().await.unwrap(), 3);
    let credential = store.session_credential(session.id).await.unwrap().unwrap();
    assert_eq!(
        (credential.password_hash, credential.public_keys, credential.state),
        (None, vec![], State::Failed)
    );
    let kept = rows(&mut connection, "select session_id from session_credential").await;
    assert_eq!(kept.concat(), [running.id.to_string()]);
}

async fn ticket(store: &Store, expires_in: i64) -> TicketRow {
    let session = created(store).await;
    let ticket = TicketRow {
        id: format!("t-{}", session.id),
        secret_hash: "hash".into(),
        session_id: session.id,
        user_id: session.user_id,
        expires_at: store.now().await.unwrap() + expires_in,
        kind: TicketKind::Page,
    };
    store.insert_ticket(&ticket).await.unwrap();
    ticket
}

async fn a_ticket_is_taken_once(_: &Database, store: Store) {
    let ticket = ticket(&store, 30_000).await;
    let mut attempts = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (store, id) = (store.clone(), ticket.id.clone());
        attempts.spawn(async move { store.take_ticket(&id).await.unwrap() });
    }
    let taken: Vec<_> = attempts.join_all().await.into_iter().flatten().collect();
    assert_eq!(taken, [ticket]);
}

async fn an_expired_ticket_opens_nothing(_: &Database, store: Store) {
    let expired = ticket(&store, 0).await;
    let good = ticket(&store, 60_000).await;
    assert_eq!(store.take_ticket(&expired.id).await.unwrap(), None);
    assert_eq!(store.delete_expired().await.unwrap(), 1);
    assert_eq!(store.take_ticket("t-none").await.unwrap(), None);
    assert_eq!(store.take_ticket(&good.id).await.unwrap(), Some(good.clone()));
    let orphan = TicketRow { session_id: SessionId::new(), ..good };
    assert!(matches!(store.insert_ticket(&orphan).await, Err(StoreError::Refused(_))));
}

async fn api_keys_are_listed_and_revoked(_: &Database, store: Store) {
    let row = |id: &str, scopes: &[&str]| ApiKeyRow {
        id: id.into(),
        name: "Platform".into(),
        scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
        secret_hash: "hash".into(),
    };
    let (platform, operator) = (row("k1", &["sessions:write", "sessions:read"]), row("k2", &[]));
    store.insert_api_key(&platform).await.unwrap();
    store.insert_api_key(&operator).await.unwrap();
    assert_eq!(store.insert_api_key(&platform).await, Err(StoreError::Conflict));
    let key = store.api_key("k1").await.unwrap().unwrap();
    assert_eq!((&key.row, key.revoked_at), (&platform, None));
    store.revoke_api_key("k1").await.unwrap();
    let revoked = store.api_key("k1").await.unwrap().unwrap();
    assert!(revoked.revoked_at >= Some(revoked.created_at));
    store.revoke_api_key("k1").await.unwrap();
    assert_eq!(store.api_key("k1").await.unwrap(), Some(revoked.clone()));
    assert_eq!(store.revoke_api_key("k3").await, Err(StoreError::NotFound));
    assert_eq!(store.api_key("k3").await.unwrap(), None);
    let all = store.api_keys().await.unwrap();
    assert_eq!(all.iter().map(|key| &key.row).collect::<Vec<_>>(), [&platform, &operator]);
}

async fn every_attempt_is_recorded(database: &Database, store: Store) {
    let session_id = SessionId::new();
    let record = |outcome, source_ip| AccessRecord {
        session_id: Some(session_id),
        user_id: None,
        channel: Channel::Browser,
        source_ip,
        outcome,
    };
    let mapped = std::net::IpAddr::V6(std::net::Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped());
    for outcome in [Outcome::Granted, Outcome::Denied, Outcome::NotReady, Outcome::Ended, Outcome::Limited] {
        store.record_access(record(outcome, mapped)).await.unwrap();
    }
    let text = "select outcome, channel, source_ip, session_id from access_record order by id";
    let recorded = rows(&mut database.connect().await, text).await;
    let wanted = ["granted", "denied", "not_ready", "ended", "limited"].map(|outcome| {
        vec![outcome.to_owned(), "browser".into(), "192.0.2.7".into(), session_id.to_string()]
    });
    assert_eq!(recorded, wanted);
}

async fn every_change_leaves_an_audit_entry(database: &Database, store: Store) {
    let ended = in_state(&store, State::Terminated).await;
    store.mark_released(ended.id).await.unwrap();
    // A change that is not made leaves none.
    store.transition(&ended, change(State::Ready), &Actor::System).await.unwrap_err();
    created_for(&store, ended.user_id).await.unwrap();
    created_for(&store, ended.user_id).await.unwrap_err();
    let text = "select action, detail, user_id from audit_entry order by id";
    let user = ended.user_id.to_string();
    let wanted = [
        ["session.create", "linux-1"],
        ["session.transition", "created -> initializing"],
        ["session.transition", "initializing -> ready"],
        ["session.transition", "ready -> terminated: submitted"],
        ["session.release", "null"],
        ["session.create", "linux-1"],
    ]
    .map(|[action, detail]| vec![action.to_owned(), detail.to_owned(), user.clone()]);
    assert_eq!(rows(&mut database.connect().await, text).await, wanted);
}

async fn many_replicas_open_a_new_database_at_once(_: &Database, store: Store) {
    // The database that the frame opened is made already: a fresh one.
    store.close().await;
    assert!(matches!(store.ping().await, Err(StoreError::Unavailable(_))));
    let fresh = if std::env::var(database::POSTGRES_URL).is_ok() {
        [Some(Database::sqlite().await), Database::postgres().await]
    } else {
        [Some(Database::sqlite().await), None]
    };
    for database in fresh.into_iter().flatten() {
        let mut opening = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let url = database.url.clone();
            opening.spawn(async move { created(&Store::open(&url).await.unwrap()).await });
        }
        assert_eq!(opening.join_all().await.len(), 8);
        let store = Store::open(&database.url).await.unwrap();
        assert_eq!(store.unreleased_sessions().await.unwrap().len(), 8);
        store.close().await;
        database.drop().await;
    }
}

async fn a_database_of_a_newer_version_is_refused(database: &Database, store: Store) {
    store.close().await;
    let mut connection = database.connect().await;
    raw(&mut connection, "update _sqlx_migrations set version = 9999 where version = 4").await.unwrap();
    assert!(matches!(Store::open(&database.url).await, Err(StoreError::Newer)));
    raw(&mut connection, "update _sqlx_migrations set version = 4 where version = 9999").await.unwrap();
    Store::open(&database.url).await.unwrap().close().await;
    raw(&mut connection, "update _sqlx_migrations set checksum = checksum || checksum where version = 2")
        .await
        .unwrap();
    assert_eq!(Store::open(&database.url).await.map(drop), Err(StoreError::Altered(2)));
}

async fn no_error_shows_a_value(_: &Database, store: Store) {
    let secret = "hunter2-hunter2";
    let row =
        ApiKeyRow { id: secret.into(), name: secret.into(), scopes: vec![], secret_hash: secret.into() };
    store.insert_api_key(&row).await.unwrap();
    let twice = store.insert_api_key(&row).await.unwrap_err();
    let orphan = TicketRow {
        id: secret.into(),
        secret_hash: secret.into(),
        session_id: SessionId::new(),
        user_id: UserId::new(),
        expires_at: 0,
        kind: TicketKind::Terminal,
    };
    let orphaned = store.insert_ticket(&orphan).await.unwrap_err();
    for error in [twice, orphaned] {
        assert!(!format!("{error} {error:?}").contains(secret), "{error:?}");
    }
}

async fn long_details_are_cut_at_a_character(_: &Database, store: Store) {
    let session = created(&store).await;
    let reason = Reason::new(ReasonCode::SetupFailed, format!("a\0{}", "ü".repeat(100_000)));
    let failed =
        store.transition(&session, Transition::end(State::Failed, reason), &Actor::System).await.unwrap();
    let details = failed.reason.unwrap().technical_details;
    assert!(details.starts_with("a\u{fffd}ü") && details.len() <= 9000 && details.len() > 8000);
}

#[tokio::test]
async fn a_second_server_on_a_sqlite_file_is_told_who_has_it() {
    let database = Database::sqlite().await;
    let server = Store::open_exclusive(&database.url).await.unwrap();
    let second = Store::open_exclusive(&database.url).await.unwrap_err();
    assert!(matches!(second, StoreError::InUse(_)), "{second:?}");
    assert!(second.to_string().contains("carrel.db") && second.to_string().contains("--database-url"));
    // The command line works beside a server, and its end does not end the server's hold.
    let cli = Store::open(&database.url).await.unwrap();
    created(&cli).await;
    cli.close().await;
    drop(cli);
    assert_eq!(server.unreleased_sessions().await.unwrap().len(), 1);
    assert!(matches!(Store::open_exclusive(&database.url).await, Err(StoreError::InUse(_))));
    server.close().await;
    drop(server);
    Store::open_exclusive(&database.url).await.unwrap();
}

#[tokio::test]
async fn a_url_that_cannot_be_used_is_refused_with_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let garbage = directory.path().join("garbage");
    std::fs::write(&garbage, "no database ".repeat(1000)).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for (url, wanted) in [
        ("carrel.db".to_owned(), "sqlite:"),
        ("mysql://root@localhost/x".into(), "postgres://"),
        ("sqlite:".into(), "path of a file"),
        ("sqlite::memory:".into(), "path of a file"),
        ("sqlite:/nowhere/at/all/carrel.db".into(), "/nowhere/at/all/carrel.db"),
        (format!("sqlite:{}", directory.path().display()), "directory"),
        (format!("sqlite:{}", garbage.display()), "no SQLite database"),
        (format!("postgres://nobody:pw-secret@127.0.0.1:{port}/x"), "does not answer"),
        ("postgres://[bad".into(), "database URL"),
    ] {
        let start = Instant::now();
        let error = Store::open(&url).await.unwrap_err();
        assert!(error.to_string().contains(wanted), "{url}: {error}");
        assert!(!error.to_string().contains("pw-secret"));
        assert!(start.elapsed() < Duration::from_secs(10), "{url}");
    }
}

#[tokio::test]
async fn a_sqlite_file_may_have_any_name_and_is_its_owners_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("exam data 100% #1 ü.db");
    let store = Store::open(&format!("sqlite:{}", path.display())).await.unwrap();
    created(&store).await;
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.file_name());
    }
    assert!(path.exists());
    store.close().await;
}

#[tokio::test]
async fn a_new_sqlite_file_that_another_process_is_making_is_waited_for() {
    let made = async || {
        let database = Database::sqlite().await;
        std::fs::File::create(database.url.strip_prefix("sqlite:").unwrap()).unwrap();
        let mut other = database.connect().await;
        raw(&mut other, "begin immediate").await.unwrap();
        (database, other)
    };
    let (database, mut other) = made().await;
    let url = database.url.clone();
    let opening = tokio::spawn(async move { Store::open(&url).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!opening.is_finished(), "{:?}", opening.await);
    raw(&mut other, "rollback").await.unwrap();
    created(&opening.await.unwrap().unwrap()).await;

    let (database, _other) = made().await;
    let error = Store::open(&database.url).await.unwrap_err();
    assert!(error.to_string().contains("locked by another process"), "{error}");
}

#[tokio::test]
async fn a_sqlite_file_that_somebody_else_locks_is_unavailable_in_time() {
    let database = Database::sqlite().await;
    let store = Store::open(&database.url).await.unwrap();
    let mut other = database.connect().await;
    raw(&mut other, "begin exclusive").await.unwrap();
    let start = Instant::now();
    let error = created_for(&store, UserId::new()).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(10));
    store.ping().await.unwrap();
    raw(&mut other, "rollback").await.unwrap();
    created(&store).await;
}

/// A network that can stop carrying bytes without a word, as a pulled cable does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_swallows_packets_is_unavailable_in_time_and_heals() {
    let Some(database) = Database::postgres().await else { return };
    let (_, rest) = database.url.split_once('@').unwrap();
    let (address, name) = rest.split_once('/').unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://postgres@{}/{name}", listener.local_addr().unwrap());
    let (cut, is_cut) = tokio::sync::watch::channel(false);
    let address = address.to_owned();
    let proxy = tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let (address, mut is_cut) = (address.clone(), is_cut.clone());
            tokio::spawn(async move {
                is_cut.wait_for(|cut| !cut).await.unwrap();
                let mut far = tokio::net::TcpStream::connect(address).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    // Held open and silent until the network is back.
                    _ = async { is_cut.wait_for(|cut| *cut).await.unwrap(); } => {
                        let _ = is_cut.wait_for(|cut| !cut).await;
                    }
                }
            });
        }
    });
    let store = Store::open(&url).await.unwrap();
    let session = created(&store).await;
    cut.send(true).unwrap();
    for _ in 0..2 {
        let start = Instant::now();
        let error = store.session(session.id).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
    cut.send(false).unwrap();
    let start = Instant::now();
    while store.session(session.id).await != Ok(Some(session.clone())) {
        assert!(start.elapsed() < Duration::from_secs(10), "it does not heal");
    }
    store.close().await;
    proxy.abort();
    assert!(database.is_postgres());
    database.drop().await;
}

/// So many of this exam, ready to be claimed.
async fn keep_warm(store: &Store, exam: &Exam) {
    store.put_exam(exam).await.unwrap();
    store.plan_warm(&exam.id, 0, usize::MAX).await.unwrap();
    for row in store.warm_environments().await.unwrap() {
        store.move_warm(row.id, WarmState::Making, WarmState::Ready).await.unwrap();
    }
}

async fn of_fifty_claims_at_once_no_two_get_the_same(database: &Database, store: Store) {
    let other = Store::open(&database.url).await.unwrap();
    let exam = Exam { warm: 30, ..exam() };
    keep_warm(&store, &exam).await;
    let warm = store.warm_environments().await.unwrap();
    assert_eq!(warm.len(), 30);
    let sessions = futures_util::future::join_all((0..50).map(|_| created(&store))).await;
    let recipe = Recipe::of(&exam);
    let claim = async |number: usize, session: &Session| {
        let store = if number.is_multiple_of(2) { &store } else { &other };
        store.provision(session, &recipe, EnvironmentId::new()).await.unwrap()
    };
    let claims = sessions.iter().enumerate().map(|(number, session)| claim(number, session));
    let begun = futures_util::future::join_all(claims).await;
    let given: BTreeSet<_> = begun.iter().map(|begun| begun.session.environment_id.unwrap()).collect();
    assert_eq!(given.len(), 50);
    let from_the_pool = begun.iter().filter(|begun| begun.warm).count();
    assert_eq!(from_the_pool, 30);
    assert!(warm.iter().all(|row| given.contains(&row.id)));
    assert_eq!(store.warm_environments().await.unwrap(), []);
    other.close().await;
}

async fn a_claim_takes_what_is_ready_and_of_its_recipe_only(_: &Database, store: Store) {
    let exam = Exam { warm: 2, ..exam() };
    keep_warm(&store, &exam).await;
    let rows = store.warm_environments().await.unwrap();
    assert!(rows.iter().all(|row| row.wanted && row.state == WarmState::Ready));
    // The oldest goes first.
    assert!(store.move_warm(rows[0].id, WarmState::Ready, WarmState::Ending).await.unwrap());
    assert!(!store.move_warm(rows[0].id, WarmState::Ready, WarmState::Ending).await.unwrap());
    let mut changed = exam.clone();
    changed.environment.env.insert("V".to_owned(), "2".to_owned());
    let session = created(&store).await;
    let begun = store.provision(&session, &Recipe::of(&changed), EnvironmentId::new()).await.unwrap();
    assert!(!begun.warm, "of another recipe");
    let session = created(&store).await;
    let begun = store.provision(&session, &Recipe::of(&exam), EnvironmentId::new()).await.unwrap();
    assert_eq!((begun.warm, begun.session.environment_id), (true, Some(rows[1].id)));
    assert_eq!(begun.session.state, State::Initializing);
    store.put_exam(&changed).await.unwrap();
    let rows = store.warm_environments().await.unwrap();
    assert_eq!((rows.len(), rows[0].wanted), (1, false));
    store.forget_warm(rows[0].id).await.unwrap();
    store.forget_warm(rows[0].id).await.unwrap();
    assert_eq!(store.warm_environments().await.unwrap(), []);
}

async fn sessions_are_not_looked_for_where_they_never_were(database: &Database, store: Store) {
    let other = Store::open(&database.url).await.unwrap();
    // Nobody has said anything: a command is as good as any.
    other.work_at("there", None).await.unwrap();
    store.work_at("here", Some("a")).await.unwrap();
    let exam = Exam { warm: 1, ..exam() };
    keep_warm(&store, &exam).await;
    let session = created(&store).await;
    let begun = store.provision(&session, &Recipe::of(&exam), EnvironmentId::new()).await.unwrap().session;
    for makes in [None, Some("a")] {
        let refused = other.work_at("there", makes).await.unwrap_err();
        let told = refused.to_string();
        assert!(
            told.contains("1 sessions") && told.contains("in here") && told.contains("in there"),
            "{told}"
        );
    }
    // The same server again, and a command beside it, leave everything as it is.
    keep_warm(&store, &exam).await;
    store.work_at("here", Some("a")).await.unwrap();
    other.work_at("here", None).await.unwrap();
    let states = async || -> Vec<_> {
        store.warm_environments().await.unwrap().into_iter().map(|row| row.state).collect()
    };
    assert_eq!(states().await, [WarmState::Ready]);
    // Of another build, what is kept warm is of no use; the sessions go on.
    store.work_at("here", Some("b")).await.unwrap();
    assert_eq!(states().await, [WarmState::Ending]);
    go(&store, &begun, State::Failed).await;
    keep_warm(&store, &exam).await;
    other.work_at("there", None).await.unwrap();
    assert_eq!(states().await, [WarmState::Ending, WarmState::Ready], "a command changes nothing");
    other.work_at("there", Some("b")).await.unwrap();
    assert_eq!(states().await, [WarmState::Ending, WarmState::Ending]);
    other.close().await;
}

async fn a_claim_that_comes_to_nothing_gives_back_what_it_took(_: &Database, store: Store) {
    let exam = Exam { warm: 1, ..exam() };
    keep_warm(&store, &exam).await;
    let stale = created(&store).await;
    go(&store, &stale, State::Failed).await;
    let claim = store.provision(&stale, &Recipe::of(&exam), EnvironmentId::new()).await;
    assert_eq!(claim, Err(StoreError::Conflict));
    assert_eq!(store.warm_environments().await.unwrap().len(), 1);
}

async fn replicas_that_plan_at_once_name_no_more_than_the_exam_wants(database: &Database, store: Store) {
    let exam = Exam { warm: 7, ..exam() };
    store.put_exam(&exam).await.unwrap();
    let stores = futures_util::future::join_all((0..4).map(|_| Store::open(&database.url))).await;
    let stores: Vec<_> = stores.into_iter().map(Result::unwrap).collect();
    let plans = stores.iter().map(|store| store.plan_warm(&exam.id, 0, 5));
    let planned = futures_util::future::join_all(plans).await.into_iter().map(|named| named.unwrap().len());
    let planned: usize = planned.sum();
    assert_eq!(planned, 5, "no more at once");
    let named = store.plan_warm(&exam.id, 0, 100).await.unwrap();
    assert_eq!(named.len(), 2);
    let all = store.warm_environments().await.unwrap();
    assert!(named.iter().all(|row| all.contains(row)), "what is told is what is kept");
    assert_eq!(store.plan_warm(&exam.id, 0, 100).await.unwrap(), []);
    assert_eq!(store.plan_warm("no such exam", 0, 100).await.unwrap(), []);
    let exams = store.warm_exams().await.unwrap();
    assert_eq!(
        exams.iter().map(|exam| (exam.exam_id.as_str(), exam.warm)).collect::<Vec<_>>(),
        [("linux-1", 7)]
    );
    for store in stores {
        store.close().await;
    }
}
