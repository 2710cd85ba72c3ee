//! Environments on a real cluster: the conformance tests, and what can go wrong only there. `CARREL_TEST_KUBECONFIG` names
//! the cluster's administrator, who makes a namespace and a service account with the Role of `charts/rbac.yaml` for each
//! test; the server under test is that service account.
//!
//! Not among them: that a system is read-only and storage ends with "no space left" (a container's is writable, and kubelet
//! evicts), and the number of processes (kubelet's, for all pods alike).
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]
#[path = "environment/conformance.rs"]
#[allow(dead_code, reason = "not everything there is for pods")]
mod conformance;
#[path = "environment/pods.rs"]
mod pods;
#[path = "environment/agent.rs"]
mod program;

use std::{sync::Arc, time::Duration};

use carrel_agent::wire::ProcessSpec;
use carrel_api::{
    environment::{
        Create, Environment, EnvironmentError, Observation, Phase,
        link::{Exit, Links, exit},
    },
    exam::{EnvironmentSpec, Network},
    identity::EnvironmentId,
    reason::{Reason, ReasonCode},
};
use conformance::{Backend, READY, Room, create_request, has_failed, seen, seen_up, seen_within};
use pods::{LIMIT, MuteRegistry, Pods, Weather, skip, variable};
use serde_json::json;
use tokio::time::{Instant, timeout};

on_backend! { Pods::open();
    creating_twice_is_one_environment,
    many_can_be_made_at_once,
    one_without_an_owner_is_given_one,
    every_exit_status_comes_back_exactly,
    bytes_come_back_unchanged_and_apart,
    variables_and_the_home_directory_are_as_promised,
    two_environments_share_nothing,
    no_privilege_can_be_had,
    memory_has_its_limit,
    nothing_of_the_server_is_visible,
    a_restarted_server_finds_it_again,
    destroying_leaves_nothing,
    a_killed_environment_is_seen_as_failed,
    the_setup_script_runs_once,
}

async fn observed(backend: &Pods, limit: Duration, wanted: impl Fn(&Observation) -> bool) -> Duration {
    let begun = Instant::now();
    let mut observation = backend.environment().observe();
    let result =
        timeout(limit, observation.wait_for(|now| wanted(now))).await.map(|seen| drop(seen.unwrap()));
    result.unwrap_or_else(|_| {
        panic!("not seen after {limit:?}: {:?}", backend.environment().observe().borrow())
    });
    begun.elapsed()
}

/// Makes an environment that must fail, and says why it did and when.
async fn failure(backend: &Pods, spec: EnvironmentSpec) -> (EnvironmentId, Reason) {
    let request = create_request(spec);
    backend.environment().create(&request).await.unwrap();
    (request.environment_id, reason(backend, request.environment_id).await)
}

async fn reason(backend: &Pods, id: EnvironmentId) -> Reason {
    match seen(backend, id, has_failed).await.unwrap().phase {
        Phase::Failed(reason) => reason,
        other => panic!("{other:?}"),
    }
}

fn image(name: impl Into<String>) -> EnvironmentSpec {
    EnvironmentSpec { image: Some(name.into()), ..EnvironmentSpec::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_is_enough_and_less_is_said_at_start() {
    let Some(mut backend) = Pods::open().await else { return };
    backend.kubernetes().check().await.unwrap();
    backend.reopen(|options| options.namespace = "carrel-no-such-namespace".into()).await;
    let said = backend.kubernetes().check().await.unwrap_err().to_string();
    assert!(
        said.contains("kubectl --namespace carrel-no-such-namespace apply -f charts/rbac.yaml"),
        "{said}"
    );

    let less = std::fs::read_to_string("../charts/rbac.yaml")
        .unwrap()
        .replace("[create, get, list, watch, patch, delete]", "[create, get, list, patch, delete]");
    let backend = Pods::with(&less).await.unwrap();
    let said = backend.kubernetes().check().await.unwrap_err().to_string();
    assert!(said.contains(": watch pods;"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_does_not_take_our_pods_is_said_at_start() {
    let Some(backend) = Pods::open().await else { return };
    backend
        .apply(&format!(
            r#"{{"apiVersion":"v1","kind":"LimitRange","metadata":{{"name":"small","namespace":"{}"}},
            "spec":{{"limits":[{{"type":"Container","max":{{"memory":"17Mi"}}}}]}}}}"#,
            backend.namespace
        ))
        .await;
    let said = backend.kubernetes().check().await.unwrap_err().to_string();
    assert!(said.contains("does not take our pods") && said.contains("kubectl describe namespace"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_steps_of_a_start_are_shown_and_ready_comes_before_the_api_says_so() {
    let Some(backend) = Pods::open().await else { return };
    let request = create_request(EnvironmentSpec::default());
    let mut observation = backend.environment().observe();
    let watching = tokio::spawn(async move {
        let mut phases: Vec<Phase> = Vec::new();
        loop {
            let phase = observation
                .borrow_and_update()
                .environments
                .get(&request.environment_id)
                .map(|one| one.phase.clone());
            if let Some(phase) = phase
                && phases.last() != Some(&phase)
            {
                phases.push(phase);
            }
            if phases.last() == Some(&Phase::Up) {
                return phases;
            }
            observation.changed().await.unwrap();
        }
    });
    let request =
        Create { environment_id: request.environment_id, ..create_request(EnvironmentSpec::default()) };
    backend.environment().create(&request).await.unwrap();
    let phases = timeout(LIMIT, watching).await.unwrap().unwrap();
    assert!(phases.contains(&Phase::Starting { step: 1, reachable: true }), "{phases:?}");
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_quota_is_told_as_such_and_leaves_nothing() {
    let Some(backend) = Pods::open().await else { return };
    let room = Room::usual(&backend).await;
    backend.apply(&format!(
        r#"{{"apiVersion":"v1","kind":"ResourceQuota","metadata":{{"name":"few","namespace":"{}"}},"spec":{{"hard":{{"pods":"1"}}}}}}"#,
        backend.namespace
    ))
    .await;
    // The controller counts what there was before; until it has, a quota that is new may be one pod behind.
    backend.kubectl(&["wait", "--for=jsonpath={.status.used.pods}=1", "quota/few", "--timeout=30s"]).await;
    let request =
        create_request(EnvironmentSpec { network: Network::Internet, ..EnvironmentSpec::default() });
    let Err(EnvironmentError::Refused(reason)) = backend.environment().create(&request).await else {
        panic!("not refused")
    };
    assert_eq!(reason.code, ReasonCode::QuotaExceeded);
    assert!(reason.technical_details.contains("few"), "{reason:?}");
    assert_eq!(backend.remains(request.environment_id).await, Vec::<String>::new());
    // Full is no fault of the deployment.
    backend.environment().check().await.unwrap();
    backend.environment().destroy(room.id).await.unwrap();
    timeout(LIMIT, async {
        while backend.environment().create(&request).await.is_err() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await
    .unwrap();
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_be_had_is_told_within_ten_seconds() {
    let Some(backend) = Pods::open().await else { return };
    for name in ["carrel.invalid/no-such-image:1", "Not An Image"] {
        let (id, reason) = failure(&backend, image(name)).await;
        assert_eq!(reason.code, ReasonCode::ImagePullFailed, "{reason:?}");
        assert!(reason.technical_details.contains(name), "{reason:?}");
        backend.environment().destroy(id).await.unwrap();
        assert_eq!(backend.remains(id).await, Vec::<String>::new());
    }
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_never_ends_is_shown_as_such_and_can_be_ended() {
    let Some(backend) = Pods::open().await else { return };
    let mut registry = MuteRegistry::new().await;
    let request = create_request(image(format!("127.0.0.1:{}/never/ends:1", registry.port)));
    let id = request.environment_id;
    backend.environment().create(&request).await.unwrap();
    timeout(LIMIT, registry.called.wait_for(|calls| *calls > 0)).await.unwrap().unwrap();
    let fetching = Phase::Starting { step: 1, reachable: true };
    seen(&backend, id, |one| one.is_some_and(|one| one.phase == fetching)).await;
    let said = backend.environment().connect(id).await.map(drop).unwrap_err().to_string();
    assert!(said.contains("container not found"), "{said}");
    assert_eq!(backend.environment().inspect(id).await.unwrap().unwrap().phase, fetching);
    destroyed(&backend, id).await;
    backend.close().await;
}

/// kubelet may first have to give up a pull.
async fn destroyed(backend: &Pods, id: EnvironmentId) {
    let begun = Instant::now();
    while backend.environment().destroy(id).await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(60), "still there");
    }
    assert_eq!(backend.remains(id).await, Vec::<String>::new());
}

/// Has the API server tell a warning that stands in no pod's status.
async fn warn(backend: &Pods, id: EnvironmentId) {
    let pod = backend.pod(id).await;
    let name = pod["metadata"]["name"].as_str().unwrap();
    let event = json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": { "name": format!("{name}.warning"), "namespace": pod["metadata"]["namespace"] },
        "involvedObject": { "apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod["metadata"]["uid"],
            "namespace": pod["metadata"]["namespace"] },
        "type": "Warning", "reason": "FailedPostStartHook", "message": "said by an event only",
        "firstTimestamp": "2100-01-01T00:00:00Z", "lastTimestamp": "2100-01-01T00:00:00Z",
    });
    backend.apply(&event.to_string()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_an_event_says_is_heard_at_once_after_a_restart_and_after_an_outage() {
    let Some(mut backend) = Pods::open().await else { return };
    let mut registry = MuteRegistry::new().await;
    let mut begun = Vec::new();
    for _ in 0..2 {
        let request = create_request(image(format!("127.0.0.1:{}/never/ends:1", registry.port)));
        backend.environment().create(&request).await.unwrap();
        begun.push(request.environment_id);
    }
    timeout(LIMIT, registry.called.wait_for(|calls| *calls > 0)).await.unwrap().unwrap();
    let told = |id| {
        move |now: &Observation| {
            let phase = now.environments.get(&id).map(|one| &one.phase);
            matches!(phase, Some(Phase::Failed(reason)) if reason.technical_details.contains("said by an event only"))
        }
    };
    warn(&backend, begun[0]).await;
    observed(&backend, Duration::from_secs(10), told(begun[0])).await;
    backend.reopen(|_| {}).await;
    observed(&backend, Duration::from_secs(10), told(begun[0])).await;

    backend.way.set(Weather::Silent);
    warn(&backend, begun[1]).await;
    observed(&backend, Duration::from_secs(14), |now| now.unavailable.is_some()).await;
    assert!(!told(begun[1])(&backend.environment().observe().borrow()));
    backend.way.set(Weather::Fine);
    observed(&backend, Duration::from_secs(20), told(begun[1])).await;
    tokio::join!(destroyed(&backend, begun[0]), destroyed(&backend, begun[1]));
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_no_node_takes_is_told_within_ten_seconds() {
    let Some(backend) = Pods::open().await else { return };
    let (id, reason) =
        failure(&backend, EnvironmentSpec { memory: Some(4 << 40), ..EnvironmentSpec::default() }).await;
    assert_eq!(reason.code, ReasonCode::Unschedulable);
    assert!(reason.technical_details.contains("nsufficient memory"), "{reason:?}");
    let inspected = backend.environment().inspect(id).await.unwrap().unwrap();
    assert_eq!(inspected.phase, Phase::Failed(reason));
    backend.environment().destroy(id).await.unwrap();
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_user_is_root_or_that_cannot_start_is_told() {
    let Some(mut backend) = Pods::open().await else { return };
    backend.reopen(|options| options.agent_path = Some("/no/such/agent".into())).await;
    let (id, reason) = failure(&backend, EnvironmentSpec::default()).await;
    assert_eq!(reason.code, ReasonCode::EnvironmentCrashed);
    assert!(reason.technical_details.contains("/no/such/agent"), "{reason:?}");
    backend.environment().destroy(id).await.unwrap();
    let spec = EnvironmentSpec { user: Some("root".into()), ..EnvironmentSpec::default() };
    let Err(EnvironmentError::Refused(reason)) = backend.environment().create(&create_request(spec)).await
    else {
        panic!("a restricted namespace takes root")
    };
    assert!(reason.technical_details.contains("restricted"), "{reason:?}");
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_carries_the_agent_needs_no_other_container() {
    let Some(mut backend) = Pods::open().await else { return };
    let path = variable("CARREL_CLUSTER_AGENT_IN_IMAGE", "/opt/carrel/agent");
    backend.reopen(|options| options.agent_path = Some(path)).await;
    let carrying = variable("CARREL_CLUSTER_CARRYING_IMAGE", "carrel.test/session-with-agent:dev");
    let room = Room::open(&backend, image(carrying)).await;
    works(&room).await;
    assert_eq!(containers(&backend, &room).await, "session");
    backend.close().await;
}

async fn works(room: &Room) {
    assert_eq!(room.text("whoami; echo text > file; cat file").await, "candidate\ntext");
    assert_eq!(room.run("exit 3").await.exit, Exit::Code(3));
}

async fn containers(backend: &Pods, room: &Room) -> String {
    let pod = format!("carrel-{}", room.id);
    backend.kubectl(&["get", "pod", &pod, "-o", "jsonpath={.spec.containers[*].name}"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_can_come_from_an_image_of_its_own() {
    let Some(mut backend) = Pods::open().await else { return };
    let agent = variable("CARREL_CLUSTER_AGENT_IMAGE", "carrel.test/agent:dev");
    backend.reopen(|options| options.agent_image = Some(agent)).await;
    let room = Room::usual(&backend).await;
    works(&room).await;
    assert_eq!(containers(&backend, &room).await, "agent session");
    // Its container shares the pod's network: there is nothing in it that could be asked for anything.
    assert_eq!(room.text("grep -c ' 00010000 .* @carrel' /proc/net/unix").await, "1");
    backend.close().await;
}

/// Another shell, other programs, and no directory to write to but the home.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_busybox_alone_is_enough() {
    let Some(backend) = Pods::open().await else { return };
    let small = variable("CARREL_CLUSTER_SMALL_IMAGE", "carrel.test/small:dev");
    let room = Room::open(&backend, image(small)).await;
    works(&room).await;
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_that_bring_the_agent_at_once_bring_one() {
    let Some(backend) = Pods::open().await else { return };
    let request = create_request(EnvironmentSpec::default());
    let id = request.environment_id;
    backend.environment().create(&request).await.unwrap();
    let servers: [Arc<dyn Environment>; 2] = [backend.another().await, backend.another().await];
    let rooms = servers.map(|server| async move {
        let links = Links::new(server);
        let begun = Instant::now();
        loop {
            match links.get(id).await {
                Ok(link) if link.health().await.is_ok() => return (links, link),
                _ => assert!(begun.elapsed() < READY, "it does not answer"),
            }
        }
    });
    let [one, other] = rooms;
    let (one, other) = tokio::join!(one, other);
    for (_, link) in [&one, &other] {
        let mut process = link.start(Some(b"cat /proc/1/comm"), &ProcessSpec::default()).await.unwrap();
        assert_eq!(process.stdout.read().await.unwrap().unwrap().as_ref(), b"agent\n");
    }
    let room = Room::of(&backend, id);
    // Nothing half-written stays, and the shell that waited has left no child.
    assert_eq!(room.text("ls -A /tmp/.carrel; ps -e -o comm= | grep -c sleep || true").await, "agent\n0");
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_deletes_the_agents_file_is_still_reached() {
    let Some(backend) = Pods::open().await else { return };
    let room = Room::usual(&backend).await;
    let pid = room.text("setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $!; rm -rf /tmp/.carrel").await;
    let again = room.again(&backend);
    assert_eq!(
        again.text(&format!("cut -d' ' -f2 /proc/{pid}/stat; ls -A /tmp/.carrel")).await,
        "(sleep)\nagent"
    );
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_take_the_agent_is_told() {
    let Some(backend) = Pods::open().await else { return };
    let pause = variable("CARREL_CLUSTER_PAUSE_IMAGE", "carrel.test/pause:dev");
    let small = variable("CARREL_CLUSTER_SMALL_IMAGE", "carrel.test/small:dev");
    let homeless = EnvironmentSpec { user: Some("4242".into()), ..image(small) };
    for (spec, why) in [(image(pause), "/bin/sh"), (homeless, "write neither to /tmp")] {
        let (id, reason) = failure(&backend, spec).await;
        assert_eq!(reason.code, ReasonCode::EnvironmentCrashed, "{reason:?}");
        assert!(reason.technical_details.contains(why), "{reason:?}");
        backend.environment().destroy(id).await.unwrap();
    }
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_does_not_arrive_is_told() {
    let Some(mut backend) = Pods::open().await else { return };
    let pause = variable("CARREL_CLUSTER_PAUSE_IMAGE", "carrel.test/pause:dev");
    backend.reopen(|options| options.agent_image = Some(pause)).await;
    let (id, reason) = failure(&backend, EnvironmentSpec::default()).await;
    assert_eq!(reason.code, ReasonCode::EnvironmentCrashed, "{reason:?}");
    assert!(reason.technical_details.contains("agent"), "{reason:?}");
    backend.environment().destroy(id).await.unwrap();
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn its_own_deadline_ends_it_when_nobody_else_does() {
    let Some(backend) = Pods::open().await else { return };
    let request = Create { lifetime_seconds: 6, ..create_request(EnvironmentSpec::default()) };
    let id = request.environment_id;
    backend.environment().create(&request).await.unwrap();
    // Whether or not it is up by then.
    let ended = seen_within(READY, &backend, id, has_failed).await.unwrap();
    assert!(
        matches!(&ended.phase, Phase::Failed(reason) if reason.code == ReasonCode::TimeExpired),
        "{ended:?}"
    );
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_deleted_while_a_command_runs_ends_the_command_as_lost() {
    let Some(backend) = Pods::open().await else { return };
    let room = Room::usual(&backend).await;
    let mut process = room.start("echo up; exec sleep 1000").await;
    process.stdout.read().await.unwrap();
    seen(&backend, room.id, |one| one.is_some()).await;
    let begun = Instant::now();
    backend
        .kubectl(&[
            "delete",
            "pod",
            &format!("carrel-{}", room.id),
            "--force",
            "--grace-period=0",
            "--wait=false",
        ])
        .await;
    timeout(LIMIT, async { while let Ok(Some(_)) = process.stdout.read().await {} }).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let Exit::Lost(why) = exit(&mut process.stdout).await else { panic!("not lost") };
    assert!(!why.is_empty());
    seen(&backend, room.id, |one| one.is_none()).await;
    assert!(matches!(backend.environment().connect(room.id).await, Err(EnvironmentError::NotFound)));
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_much_storage_is_an_eviction_that_is_told() {
    let Some(backend) = Pods::open().await else { return };
    let room =
        Room::open(&backend, EnvironmentSpec { storage: Some(16 << 20), ..EnvironmentSpec::default() }).await;
    let _ = room.run("head -c 64M /dev/zero > ~/large; exec sleep 1").await;
    // kubelet measures a pod's files now and then.
    let failed = |now: &Observation| has_failed(now.environments.get(&room.id));
    observed(&backend, Duration::from_secs(120), failed).await;
    let reason = reason(&backend, room.id).await;
    assert_eq!(reason.code, ReasonCode::EnvironmentLost);
    assert!(
        reason.technical_details.contains("Evicted") && reason.technical_details.contains("ephemeral"),
        "{reason:?}"
    );
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_told_at_once_and_nothing_is_lost_by_it() {
    let Some(backend) = Pods::open().await else { return };
    let room = Room::usual(&backend).await;
    let pid = room.text("setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $!").await;
    seen_up(&backend, room.id).await;
    let mut process = room.start("echo up; exec sleep 1000").await;
    process.stdout.read().await.unwrap();
    backend.way.set(Weather::Cut);
    observed(&backend, Duration::from_secs(10), |now| now.unavailable.is_some()).await;
    let now = backend.environment().observe().borrow().clone();
    assert!(now.complete && now.environments.contains_key(&room.id), "{now:?}");
    let begun = Instant::now();
    assert!(matches!(backend.environment().inspect(room.id).await, Err(EnvironmentError::Unavailable(_))));
    assert!(matches!(
        backend.environment().create(&create_request(EnvironmentSpec::default())).await,
        Err(EnvironmentError::Unavailable(_))
    ));
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    timeout(LIMIT, async { while let Ok(Some(_)) = process.stdout.read().await {} }).await.unwrap();
    assert!(matches!(exit(&mut process.stdout).await, Exit::Lost(_)));
    backend.way.set(Weather::Fine);
    observed(&backend, Duration::from_secs(15), |now| now.unavailable.is_none()).await;
    room.ready().await;
    assert_eq!(room.text(&format!("cut -d' ' -f2 /proc/{pid}/stat")).await, "(sleep)");
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_told_within_ten_seconds() {
    let Some(backend) = Pods::open().await else { return };
    let room = Room::usual(&backend).await;
    backend.way.set(Weather::Silent);
    observed(&backend, Duration::from_secs(14), |now| now.unavailable.is_some()).await;
    let begun = Instant::now();
    assert!(matches!(backend.environment().connect(room.id).await, Err(EnvironmentError::Unavailable(_))));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    backend.way.set(Weather::Fine);
    observed(&backend, Duration::from_secs(15), |now| now.unavailable.is_none()).await;
    assert_eq!(room.again(&backend).text("echo well").await, "well");
    backend.close().await;
}

/// Can it be reached from inside by TCP?
async fn reaches(room: &Room, address: &str, port: u16) -> bool {
    let done = room.run(&format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/{port}'")).await;
    done.exit == Exit::Code(0)
}

async fn address(backend: &Pods, room: &Room) -> String {
    timeout(LIMIT, async {
        loop {
            if let Some(address) = backend.pod(room.id).await["status"]["podIP"].as_str() {
                return address.to_owned();
            }
        }
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_reaches_what_its_exam_opens_and_no_neighbour() {
    let Some(backend) = Pods::open().await else { return };
    let (Ok(outside), Ok(namespace)) =
        (std::env::var("CARREL_CLUSTER_OUTSIDE_IP"), std::env::var("CARREL_CLUSTER_OUTSIDE_NETNS"))
    else {
        return skip(
            "there is nothing outside the cluster to be reached: CARREL_CLUSTER_OUTSIDE_IP and _NETNS",
        );
    };
    const PORT: u16 = 8437;
    let serve = r#"use Socket; socket($t, AF_INET, SOCK_STREAM, 0); setsockopt($t, SOL_SOCKET, SO_REUSEADDR, 1);
        bind($t, pack_sockaddr_in(8437, INADDR_ANY)) && listen($t, 50) or die; $| = 1; print "here\n"; while (accept($c, $t)) { close $c }"#;
    let mut listener = tokio::process::Command::new("ip")
        .args(["netns", "exec", &namespace, "perl", "-e", serve])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut line = String::new();
    let said = listener.stdout.take().unwrap();
    timeout(LIMIT, tokio::io::AsyncBufReadExt::read_line(&mut tokio::io::BufReader::new(said), &mut line))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(line, "here\n");

    let network = |network| EnvironmentSpec { network, ..EnvironmentSpec::default() };
    let subnet = |address: &str| Network::Cidrs(vec![format!("{address}/32")]);
    let (closed, open, listed, other) = tokio::join!(
        Room::usual(&backend),
        Room::open(&backend, network(Network::Internet)),
        Room::open(&backend, network(subnet(&outside))),
        Room::open(&backend, network(subnet("203.0.113.99"))),
    );
    let mut neighbour = closed.start(&format!("exec perl -e '{}'", serve.replace("8437", "4243"))).await;
    assert_eq!(neighbour.stdout.read().await.unwrap().unwrap().as_ref(), b"here\n");
    let beside = address(&backend, &closed).await;
    assert!(reaches(&closed, "127.0.0.1", 4243).await, "its own loopback");
    // Rules come a moment after the pod; what is opened is waited for, what is closed must have been so all the time.
    for room in [&open, &listed] {
        let begun = Instant::now();
        while !reaches(room, &outside, PORT).await {
            assert!(begun.elapsed() < LIMIT, "the outside is not opened");
        }
    }
    for (room, name) in [(&closed, "closed"), (&other, "other")] {
        assert!(!reaches(room, &outside, PORT).await, "{name} reaches the outside");
    }
    let node = std::env::var("CARREL_CLUSTER_NODE_IP").unwrap_or_else(|_| "10.231.0.1".into());
    for (room, name) in [(&open, "open"), (&listed, "listed"), (&other, "other")] {
        assert!(!reaches(room, &beside, 4243).await, "{name} reaches a neighbour");
        assert!(
            !reaches(room, &node, 22).await && !reaches(room, "10.232.0.1", 443).await,
            "{name} reaches the cluster"
        );
    }
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_left_behind_between_two_calls_is_removed() {
    let Some(backend) = Pods::open().await else { return };
    let id = EnvironmentId::new();
    backend.apply(&format!(
        r#"{{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{{"name":"carrel-{id}","namespace":"{}",
            "labels":{{"app.kubernetes.io/managed-by":"carrel","carrel.dev/environment":"{id}"}}}},
            "spec":{{"podSelector":{{"matchLabels":{{"carrel.dev/environment":"{id}"}}}},"policyTypes":["Egress"]}}}}"#,
        backend.namespace
    ))
    .await;
    let spec = EnvironmentSpec { network: Network::Internet, ..EnvironmentSpec::default() };
    let room = Room::open(&backend, spec).await;
    let begun = Instant::now();
    while !backend.remains(id).await.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(80), "still there");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // The policy of one that lives is left alone.
    assert_eq!(backend.remains(room.id).await.len(), 2);
    backend.environment().destroy(room.id).await.unwrap();
    assert_eq!(backend.remains(room.id).await, Vec::<String>::new());
    backend.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_somebody_has_opened_is_closed_again() {
    let Some(backend) = Pods::open().await else { return };
    backend.environment().check().await.unwrap();
    let policy = ["networkpolicy", "carrel-closed"];
    let open =
        [&["patch"], &policy[..], &["--type", "merge", "--patch", r#"{"spec":{"egress":[{}]}}"#]].concat();
    backend.kubectl(&open).await;
    let begun = Instant::now();
    let spec =
        [&["get"], &policy[..], &["--ignore-not-found", "-o", "jsonpath={.spec.policyTypes}{.spec.egress}"]]
            .concat();
    while backend.kubectl(&spec).await != r#"["Ingress","Egress"]"# {
        assert!(begun.elapsed() < Duration::from_secs(40), "still open");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    backend.close().await;
}

/// A figure for whoever runs this with `--nocapture`; the benchmark measures in earnest.
#[tokio::test(flavor = "multi_thread")]
async fn bulk_goes_through_the_exec_stream_in_both_directions_at_once() {
    let Some(backend) = Pods::open().await else { return };
    let room = Room::usual(&backend).await;
    let begun = Instant::now();
    let mut process =
        room.link().await.start(Some(b"head -c 200M /dev/zero"), &ProcessSpec::default()).await.unwrap();
    let mut length = 0;
    while let Some(bytes) = process.stdout.read().await.unwrap() {
        length += bytes.len();
    }
    assert_eq!((length, exit(&mut process.stdout).await), (200 << 20, Exit::Code(0)));
    let down = 200.0 / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let input = bytes::Bytes::from(vec![7; 100 << 20]);
    let done = room.run_with("wc -c", input).await;
    assert_eq!(done.ok(), (100 << 20).to_string());
    let up = 100.0 / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    for _ in 0..200 {
        room.link().await.health().await.unwrap();
    }
    let round = begun.elapsed() / 200;
    println!("down {down:.0} MiB/s, up {up:.0} MiB/s, round trip {round:?}");
    backend.close().await;
}
