//! The lifecycle with real environments of this machine and both databases: what it makes of a session, of faults, and of
//! being stopped anywhere.
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
#[path = "environment/agent.rs"]
mod program;
#[path = "lifecycle/world.rs"]
mod world;

use std::time::{Duration, Instant};

use carrel_api::{
    environment::{Create, Environment as _, Observation},
    identity::{EnvironmentId, SessionId, UserId},
    lifecycle::EndError,
    reason::ReasonCode,
    session::State,
    store::{Actor, NewSession, Store, StoreError, Transition},
};
use database::raw;
use world::{PATIENCE, World, exam, exam_with};

async fn whole_life(world: World) {
    let server = world.server().await;
    let session = server.create(&exam()).await;
    assert!(matches!(server.lifecycle.watch(SessionId::new()).await, Err(StoreError::NotFound)));
    let ready = server.in_state(session.id, State::Ready).await;
    assert_eq!(ready.step, 4);
    assert_eq!(world.directories(), [ready.environment_id.unwrap()]);
    assert!(ready.ready_at.unwrap() - session.created_at < 10_000);

    let running = server.lifecycle.connected(session.id).await.unwrap();
    assert_eq!(running.state, State::Running);
    let again = server.lifecycle.connected(session.id).await.unwrap();
    assert_eq!(again.started_at, running.started_at, "the clock starts once");
    assert!(running.ends_at().unwrap() > server.lifecycle.now_ms());
    assert!(running.started_at.unwrap() <= server.lifecycle.now_ms() + 50);

    let began = Instant::now();
    let ended =
        server.lifecycle.end(session.id, ReasonCode::EndedByStaff, &Actor::Key("k".into())).await.unwrap();
    assert_eq!((ended.state, ended.reason.unwrap().code), (State::Terminated, ReasonCode::EndedByStaff));
    let twice = server.lifecycle.end(session.id, ReasonCode::Submitted, &Actor::System).await;
    assert!(matches!(twice, Err(EndError::AlreadyTerminated(_))));
    let unknown = server.lifecycle.end(SessionId::new(), ReasonCode::Submitted, &Actor::System).await;
    assert_eq!(unknown, Err(EndError::NotFound));
    server.released(session.id).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(world.directories(), []);
    let late = server.lifecycle.connected(session.id).await.unwrap();
    assert_eq!(late.state, State::Terminated);
    server.stop().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_made_ready_run_ended_and_released_on_sqlite() {
    whole_life(World::sqlite().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_made_ready_run_ended_and_released_on_postgres() {
    if let Some(world) = World::postgres().await {
        whole_life(world).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_exam_is_prepared_before_it_is_ready() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let good = server
        .create(&exam_with(serde_json::json!({ "setup": "sleep 0.3; echo done > \"$HOME/prepared\"" })))
        .await;
    let bad = server
        .create(&exam_with(serde_json::json!({ "setup": "echo begins; echo no such package >&2; exit 7" })))
        .await;
    let preparing = server.until(good.id, |session| session.step >= 3).await;
    assert_eq!(preparing.state, State::Initializing, "the step is told while the script runs");
    server.in_state(good.id, State::Ready).await;
    let failed = server.until(bad.id, |session| session.state.is_terminal()).await;
    let reason = failed.reason.unwrap();
    assert_eq!((failed.state, reason.code), (State::Failed, ReasonCode::SetupFailed));
    assert!(reason.technical_details.contains("ended with 7"), "{}", reason.technical_details);
    assert!(reason.technical_details.contains("no such package"), "{}", reason.technical_details);
    server.clear().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ended_before_it_is_ready_is_cancelled_and_leaves_nothing() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let slow = exam_with(serde_json::json!({ "setup": "sleep 600" }));
    let early = server.create(&slow).await;
    let cancelled = server
        .lifecycle
        .end(early.id, ReasonCode::EndedByCandidate, &Actor::Candidate(early.user_id))
        .await
        .unwrap();
    assert_eq!((cancelled.state, cancelled.reason.unwrap().code), (State::Failed, ReasonCode::Cancelled));
    let late = server.create(&slow).await;
    server.until(late.id, |session| session.step >= 3).await;
    server.lifecycle.end(late.id, ReasonCode::EndedByStaff, &Actor::Platform).await.unwrap();
    assert_eq!(server.ended(late.id).await, (State::Failed, ReasonCode::Cancelled));
    for session in [early, late] {
        server.released(session.id).await;
    }
    server.stop().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_ready_in_time_has_failed() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let session = server.create(&exam_with(serde_json::json!({ "setup": "sleep 600" }))).await;
    server.until(session.id, |session| session.step >= 3).await;
    server.crash().await;
    world.shift(58_000).await;
    let server = world.server().await;
    assert_eq!(server.ended(session.id).await, (State::Failed, ReasonCode::StartTimeout));
    let failed = server.released(session.id).await;
    let late = failed.ended_at.unwrap() - session.created_at - 60_000;
    assert!((0..1000).contains(&late), "{late} ms");
    server.stop().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exam_ends_by_itself_to_the_second() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let session = server.running(&exam()).await;
    let unused = server.create(&exam()).await;
    let unused = server.in_state(unused.id, State::Ready).await;
    server.stop().await;
    world.shift(27_000).await;
    let server = world.server().await;
    assert_eq!(server.ended(unused.id).await, (State::Terminated, ReasonCode::NeverStarted));
    let unused = server.released(unused.id).await;
    let late = unused.ended_at.unwrap() - unused.ready_at.unwrap() - 30_000;
    assert!((0..1000).contains(&late), "{late} ms");
    server.stop().await;
    world.shift(56_000).await;
    let server = world.server().await;
    assert_eq!(server.store.session(session.id).await.unwrap().unwrap().state, State::Running);
    assert_eq!(server.ended(session.id).await, (State::Terminated, ReasonCode::TimeExpired));
    let ended = server.released(session.id).await;
    let late = ended.ended_at.unwrap() - ended.ends_at().unwrap();
    assert!((0..1000).contains(&late), "{late} ms");
    server.stop().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_environment_that_goes_takes_its_session_with_it_within_ten_seconds() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let lost = server.running(&exam()).await;
    let kept = server.running(&exam()).await;
    let began = Instant::now();
    // Behind the lifecycle's back.
    server.environment.destroy(lost.environment_id.unwrap()).await.unwrap();
    assert_eq!(server.ended(lost.id).await, (State::Failed, ReasonCode::EnvironmentLost));
    let crashed = server.running(&exam()).await;
    let name = crashed.environment_id.unwrap().to_string();
    kill_agent(&name);
    let (state, code) = server.ended(crashed.id).await;
    assert_eq!((state, code), (State::Failed, ReasonCode::EnvironmentCrashed));
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(server.store.session(kept.id).await.unwrap().unwrap().state, State::Running);
    server.clear().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_environment_that_goes_while_its_exam_is_prepared_takes_its_session_with_it() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let session = server.create(&exam_with(serde_json::json!({ "setup": "sleep 600" }))).await;
    let preparing = server.until(session.id, |session| session.step >= 3).await;
    let began = Instant::now();
    server.environment.destroy(preparing.environment_id.unwrap()).await.unwrap();
    assert_eq!(server.ended(session.id).await, (State::Failed, ReasonCode::EnvironmentLost));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    server.released(session.id).await;
    server.stop().await;
    world.close().await;
}

/// Ends an environment's first process: the one whose command names the environment's own agent.
fn kill_agent(name: &str) {
    let prefix = format!("/run/carrel/{name}");
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.starts_with(prefix.as_bytes()) {
            let pid = entry.file_name().to_str().unwrap().parse().unwrap();
            rustix::process::kill_process(
                rustix::process::Pid::from_raw(pid).unwrap(),
                rustix::process::Signal::KILL,
            )
            .unwrap();
            return;
        }
    }
    panic!("{name} has no process");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_gone_in_any_state_leaves_nothing_undone() {
    let world = World::sqlite().await;
    let setup = exam_with(serde_json::json!({ "setup": "sleep 2" }));
    let server = world.server().await;
    // Ended, and not yet destroyed: the row alone says so.
    let ended = server.running(&exam()).await;
    let ready = server.create(&exam()).await;
    let ready = server.in_state(ready.id, State::Ready).await;
    let running = server.running(&exam()).await;
    let initializing = server.create(&setup).await;
    server.until(initializing.id, |session| session.step >= 3).await;
    server.crash().await;

    let store = Store::open(&world.database().url).await.unwrap();
    store
        .transition(&ended, Transition::end(State::Terminated, ReasonCode::Submitted.into()), &Actor::System)
        .await
        .unwrap();
    // Committed, and nothing else.
    let exam = exam();
    let new = NewSession { user_id: UserId::new(), exam: &exam, password_hash: None, public_keys: vec![] };
    let created = store.create_session(&new, &Actor::Platform).await.unwrap();
    // Named, and not yet made.
    let new = NewSession { user_id: UserId::new(), ..new };
    let named = store.create_session(&new, &Actor::Platform).await.unwrap();
    let name =
        Transition { environment_id: Some(EnvironmentId::new()), ..Transition::to(State::Initializing) };
    let named = store.transition(&named, name, &Actor::System).await.unwrap();
    // Ended before it ever had an environment.
    let new = NewSession { user_id: UserId::new(), ..new };
    let never = store.create_session(&new, &Actor::Platform).await.unwrap();
    store
        .transition(&never, Transition::end(State::Failed, ReasonCode::Cancelled.into()), &Actor::System)
        .await
        .unwrap();
    store.close().await;

    let server = world.server().await;
    for session in [&created, &named, &initializing] {
        server.in_state(session.id, State::Ready).await;
    }
    assert_eq!(server.store.session(named.id).await.unwrap().unwrap().environment_id, named.environment_id);
    for session in [&ended, &never] {
        server.released(session.id).await;
    }
    for session in [&ready, &running] {
        let now = server.store.session(session.id).await.unwrap().unwrap();
        assert_eq!((now.state, now.environment_id), (session.state, session.environment_id));
        let link = server.links.get(session.environment_id.unwrap()).await.unwrap();
        link.health().await.unwrap();
    }
    server.clear().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_environment_without_a_session_is_destroyed_and_no_other() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let mut long = exam();
    long.duration_minutes = 10;
    let session = server.running(&long).await;
    let request = |owner| Create {
        environment_id: EnvironmentId::new(),
        owner,
        exam_id: "e".into(),
        spec: exam().environment,
        lifetime_seconds: 600,
    };
    let orphans = [request(Some((UserId::new(), SessionId::new()))), request(None)];
    for orphan in &orphans {
        server.environment.create(orphan).await.unwrap();
    }
    server.stop().await;
    // Old enough for the first sweep.
    world.shift(70_000).await;
    let server = world.server().await;
    let gone = async {
        let mut observation = server.environment.observe();
        let left = |look: &Observation| {
            orphans.iter().any(|orphan| look.environments.contains_key(&orphan.environment_id))
        };
        observation.wait_for(|look| look.complete && !left(look)).await.unwrap();
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the orphans are gone");
    assert_eq!(server.in_state(session.id, State::Running).await.environment_id, session.environment_id);
    assert!(world.directories().contains(&session.environment_id.unwrap()));
    server.clear().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_cannot_make_environments_fails_the_session_after_three_attempts() {
    let world = World::sqlite().await;
    let server = world.server().await;
    server.in_state(server.create(&exam()).await.id, State::Ready).await;
    let place = world.data.path().join("data/environments");
    let aside = world.data.path().join("aside");
    std::fs::rename(&place, &aside).unwrap();
    // Nothing can be made below a file, not by root either.
    std::fs::write(&place, "").unwrap();
    let session = server.create(&exam()).await;
    let ended = server.ended(session.id).await;
    std::fs::remove_file(&place).unwrap();
    std::fs::rename(&aside, &place).unwrap();
    assert_eq!(ended, (State::Failed, ReasonCode::ClusterUnavailable));
    server.clear().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_share_the_work_and_see_each_others_changes() {
    let Some(world) = World::postgres().await else { return };
    let (one, two) = (world.server().await, world.server().await);
    let mut sessions = Vec::new();
    for number in 0..10 {
        let server = if number % 2 == 0 { &one } else { &two };
        sessions.push(server.create(&exam()).await);
    }
    for session in &sessions {
        one.in_state(session.id, State::Ready).await;
        two.in_state(session.id, State::Ready).await;
    }
    assert_eq!(world.directories().len(), 10, "one environment each");
    let session = &sessions[0];
    let mut feed = two.lifecycle.watch(session.id).await.unwrap();
    assert_eq!(feed.borrow_and_update().state, State::Ready);
    one.lifecycle.connected(session.id).await.unwrap();
    let began = Instant::now();
    tokio::time::timeout(PATIENCE, feed.wait_for(|session| session.state == State::Running))
        .await
        .unwrap()
        .unwrap();
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    // Who starts the clock first: one of them.
    let (first, second) =
        tokio::join!(one.lifecycle.connected(sessions[1].id), two.lifecycle.connected(sessions[1].id));
    assert_eq!(first.unwrap().started_at, second.unwrap().started_at);
    two.stop().await;
    one.clear().await;
    world.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_goes_away_delays_the_lifecycle_and_does_not_end_it() {
    let world = World::sqlite().await;
    let server = world.server().await;
    let session = server.running(&exam()).await;
    let mut other = world.database().connect().await;
    raw(&mut other, "alter table session rename to session_away").await.unwrap();
    let unavailable = server.lifecycle.connected(session.id).await;
    assert!(unavailable.is_err(), "{unavailable:?}");
    raw(&mut other, "alter table session_away rename to session").await.unwrap();
    server.environment.destroy(session.environment_id.unwrap()).await.unwrap();
    assert_eq!(server.ended(session.id).await, (State::Failed, ReasonCode::EnvironmentLost));
    server.clear().await;
    world.close().await;
}
