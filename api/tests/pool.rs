//! Environments kept ready before their session, with real ones of this machine and both databases.
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

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use carrel_api::{
    environment::{Environment as _, Observation, Phase},
    exam::Exam,
    identity::EnvironmentId,
    reason::ReasonCode,
    session::State,
    store::{Actor, WarmState},
};
use futures_util::future::join_all;
use world::{PATIENCE, Replica, World, exam_with};

fn warm_exam(warm: u32, environment: serde_json::Value) -> Exam {
    Exam { warm, ..exam_with(environment) }
}

/// Waits until the pool's rows are so many in these states, and returns their names.
async fn rows(server: &Replica, wanted: &[(WarmState, usize)]) -> BTreeSet<EnvironmentId> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let rows = server.store.warm_environments().await.unwrap();
        let mut counts = BTreeMap::new();
        for row in &rows {
            *counts.entry(row.state.as_str()).or_insert(0_usize) += 1;
        }
        if counts == wanted.iter().map(|(state, count)| (state.as_str(), *count)).collect() {
            return rows.into_iter().map(|row| row.id).collect();
        }
        assert!(tokio::time::Instant::now() < deadline, "wanted {wanted:?}, there are {rows:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The pool is emptied before the sessions end, as an operator would.
async fn close(world: World, server: Replica, exam: &Exam) {
    server.store.put_exam(&Exam { warm: 0, ..exam.clone() }).await.unwrap();
    rows(&server, &[]).await;
    server.clear().await;
    world.close().await;
}

async fn claimed_and_refilled(world: World) {
    let exam = warm_exam(2, serde_json::json!({ "setup": "echo prepared > ~/sign" }));
    let server = world.server().await;
    server.store.put_exam(&exam).await.unwrap();
    let pool = rows(&server, &[(WarmState::Ready, 2)]).await;
    let session = server.create(&exam).await;
    let ready = server.in_state(session.id, State::Ready).await;
    let id = ready.environment_id.unwrap();
    assert!(pool.contains(&id), "{id} was not kept warm");
    assert_eq!(ready.step, 4, "all steps are done");
    let link = server.links.get(id).await.unwrap();
    let spec = carrel_agent::wire::ProcessSpec::default();
    let mut process = link.start(Some(b"cat sign"), &spec).await.unwrap();
    assert_eq!(process.stdout.read().await.unwrap().unwrap(), "prepared\n");
    // The backend learns whose it is, and the place in the pool is filled again.
    let owned = |look: &Arc<Observation>| {
        look.environments.get(&id).is_some_and(|seen| seen.owner == Some(session.id))
    };
    let mut observation = server.environment.observe();
    tokio::time::timeout(PATIENCE, observation.wait_for(owned)).await.expect("it is adopted").unwrap();
    assert!(!rows(&server, &[(WarmState::Ready, 2)]).await.contains(&id));
    close(world, server, &exam).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_takes_a_warm_one_and_the_pool_refills_on_sqlite() {
    claimed_and_refilled(World::sqlite().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_takes_a_warm_one_and_the_pool_refills_on_postgres() {
    if let Some(world) = World::postgres().await {
        claimed_and_refilled(world).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_follows_a_changed_exam_and_no_session_gets_what_was_before() {
    let world = World::sqlite().await;
    let before = warm_exam(2, serde_json::json!({ "env": { "V": "1" } }));
    let server = world.server().await;
    server.store.put_exam(&before).await.unwrap();
    let old = rows(&server, &[(WarmState::Ready, 2)]).await;
    let after = warm_exam(1, serde_json::json!({ "env": { "V": "2" } }));
    server.store.put_exam(&after).await.unwrap();
    let session = server.create(&after).await;
    let given = server.in_state(session.id, State::Ready).await.environment_id.unwrap();
    assert!(!old.contains(&given));
    let new = rows(&server, &[(WarmState::Ready, 1)]).await;
    assert!(new.is_disjoint(&old));
    let gone = |look: &Arc<Observation>| old.iter().all(|id| !look.environments.contains_key(id));
    let mut observation = server.environment.observe();
    tokio::time::timeout(PATIENCE, observation.wait_for(gone)).await.expect("the old ones are gone").unwrap();
    // Another title makes no other environment.
    server.store.put_exam(&Exam { title: "Another".to_owned(), ..after.clone() }).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(rows(&server, &[(WarmState::Ready, 1)]).await, new);
    close(world, server, &after).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_dies_is_replaced_and_a_crashed_server_finds_its_pool_again() {
    let world = World::sqlite().await;
    let exam = warm_exam(2, serde_json::json!({}));
    let server = world.server().await;
    server.store.put_exam(&exam).await.unwrap();
    let pool = rows(&server, &[(WarmState::Ready, 2)]).await;
    server.crash().await;
    let server = world.server().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(rows(&server, &[(WarmState::Ready, 2)]).await, pool);
    let victim = *pool.first().unwrap();
    server.environment.destroy(victim).await.unwrap();
    let replaced = async {
        while rows(&server, &[(WarmState::Ready, 2)]).await.contains(&victim) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, replaced).await.expect("it is replaced");
    close(world, server, &exam).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_goes_while_it_is_prepared_leaves_the_pool() {
    let world = World::sqlite().await;
    let exam = warm_exam(1, serde_json::json!({ "setup": "sleep 600" }));
    let server = world.server().await;
    server.store.put_exam(&exam).await.unwrap();
    let victim = *rows(&server, &[(WarmState::Making, 1)]).await.first().unwrap();
    let mut observation = server.environment.observe();
    let up =
        |look: &Arc<Observation>| look.environments.get(&victim).is_some_and(|seen| seen.phase == Phase::Up);
    tokio::time::timeout(PATIENCE, observation.wait_for(up)).await.expect("it is up").unwrap();
    server.environment.destroy(victim).await.unwrap();
    // Long before its start would be overdue. Its exam's next one comes after a pause of 5 s.
    let began = Instant::now();
    rows(&server, &[]).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    close(world, server, &exam).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exam_whose_environments_fail_is_tried_again_ever_more_slowly_and_at_once_when_it_is_changed() {
    let world = World::sqlite().await;
    let broken = warm_exam(3, serde_json::json!({ "setup": "sleep 0.3; exit 7" }));
    let server = world.server().await;
    server.store.put_exam(&broken).await.unwrap();
    rows(&server, &[(WarmState::Making, 3)]).await;
    rows(&server, &[]).await;
    // The first pause is 5 s, a quarter more or less.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(server.store.warm_environments().await.unwrap(), []);
    // A session of it is not kept from failing by itself, with the reason.
    let session = server.create(&broken).await;
    assert_eq!(server.ended(session.id).await, (State::Failed, ReasonCode::SetupFailed));
    let mended = warm_exam(1, serde_json::json!({ "setup": "exit 0" }));
    server.store.put_exam(&mended).await.unwrap();
    rows(&server, &[(WarmState::Ready, 1)]).await;
    close(world, server, &mended).await;
}

/// 50 sessions at once on two servers: nobody shares.
async fn fifty_claims(world: World) {
    let exam = warm_exam(10, serde_json::json!({}));
    let servers = [world.server().await, world.server().await];
    servers[0].store.put_exam(&exam).await.unwrap();
    let pool = rows(&servers[0], &[(WarmState::Ready, 10)]).await;
    // From here on nothing refills: only what is there can be had.
    servers[0].store.put_exam(&Exam { warm: 1, ..exam.clone() }).await.unwrap();
    let sessions = join_all((0..50).map(|number| servers[number % 2].create(&exam))).await;
    let given: Vec<_> = join_all(sessions.iter().enumerate().map(async |(number, session)| {
        let ready = servers[number % 2].in_state(session.id, State::Ready).await;
        ready.environment_id.unwrap()
    }))
    .await;
    let distinct: BTreeSet<_> = given.iter().copied().collect();
    assert_eq!(distinct.len(), 50, "no environment is given twice");
    assert!(distinct.intersection(&pool).count() >= 1, "none of the warm ones was claimed");
    let rows_left = servers[0].store.warm_environments().await.unwrap();
    assert!(rows_left.iter().all(|row| !distinct.contains(&row.id)), "one is in the pool and in a session");
    for session in &sessions {
        servers[0].lifecycle.end(session.id, ReasonCode::EndedByStaff, &Actor::System).await.unwrap();
    }
    let [server, other] = servers;
    for session in &sessions {
        server.released(session.id).await;
    }
    other.stop().await;
    close(world, server, &exam).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_claims_on_two_servers_no_two_get_the_same_on_postgres() {
    if let Some(world) = World::postgres().await {
        fifty_claims(world).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_claims_on_two_servers_no_two_get_the_same_on_sqlite() {
    fifty_claims(World::sqlite().await).await;
}
