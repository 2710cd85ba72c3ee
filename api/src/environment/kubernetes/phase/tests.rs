//! The pods here are recordings of a real cluster (1.35), shortened.
use super::*;

const UNSCHEDULABLE: Duration = Duration::from_secs(8);

macro_rules! recorded {
    ($name:literal) => {
        serde_json::from_str::<Pod>(include_str!(concat!("recorded/", $name, ".json"))).unwrap()
    };
}

fn read(pod: &Pod) -> Reading {
    super::read(pod, UNSCHEDULABLE, false)
}

fn failed(pod: &Pod) -> (ReasonCode, String) {
    match read(pod) {
        Reading { phase: Phase::Failed(reason), doubt: None } => (reason.code, reason.technical_details),
        other => panic!("{other:?}"),
    }
}

fn doubted(pod: &Pod) -> (Phase, Doubt) {
    let Reading { phase, doubt } = read(pod);
    (phase, doubt.unwrap())
}

#[test]
fn a_start_goes_through_its_steps() {
    let mut pod = recorded!("created");
    assert_eq!(read(&pod).phase, Phase::Starting { step: IMAGE, reachable: true });
    pod.spec.as_mut().unwrap().node_name = None;
    assert_eq!(read(&pod), Reading { phase: Phase::Starting { step: PLACE, reachable: false }, doubt: None });
    let starting = recorded!("starting");
    assert_eq!(
        read(&starting),
        Reading { phase: Phase::Starting { step: IMAGE, reachable: true }, doubt: None }
    );
    let fetched = super::read(&starting, UNSCHEDULABLE, true).phase;
    assert_eq!(fetched, Phase::Starting { step: START, reachable: true });
    assert_eq!(read(&recorded!("running")), Reading { phase: Phase::Up, doubt: None });
    assert_eq!(read(&recorded!("being-deleted")), Reading { phase: Phase::Ending, doubt: None });
}

#[test]
fn an_empty_pod_is_one_that_waits_for_its_place() {
    assert_eq!(read(&Pod::default()).phase, Phase::Starting { step: PLACE, reachable: false });
}

#[test]
fn no_room_is_a_failure_once_it_has_lasted() {
    let (phase, doubt) = doubted(&recorded!("unschedulable"));
    assert_eq!(phase, Phase::Starting { step: PLACE, reachable: false });
    assert_eq!((doubt.reason.code, doubt.patience), (ReasonCode::Unschedulable, UNSCHEDULABLE));
    assert!(doubt.reason.technical_details.contains("Insufficient memory"), "{doubt:?}");
}

#[test]
fn an_image_that_cannot_be_had_is_a_failure_with_its_name() {
    for (pod, image) in
        [(recorded!("image-pull"), "carrel.invalid/no:1"), (recorded!("image-name"), "Not An Image")]
    {
        let (phase, doubt) = doubted(&pod);
        assert_eq!(phase, Phase::Starting { step: IMAGE, reachable: true });
        assert_eq!(doubt.reason.code, ReasonCode::ImagePullFailed);
        assert!(doubt.patience <= PULL_PATIENCE);
        assert!(doubt.reason.technical_details.contains(image), "{doubt:?}");
    }
}

#[test]
fn a_container_runtime_that_is_away_is_no_fault_of_the_image() {
    let mut pod = recorded!("image-pull");
    for container in pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap() {
        if let Some(waiting) = container.state.as_mut().unwrap().waiting.as_mut() {
            waiting.reason = Some("ImageInspectError".into());
            waiting.message = Some(
                "Failed to inspect image \"\": rpc error: code = Unavailable desc = connection error: desc = \"transport: \
                 Error while dialing: dial unix /run/containerd/containerd.sock: connect: no such file or directory\""
                    .into(),
            );
        }
    }
    let wanted = Phase::Starting { step: IMAGE, reachable: true };
    assert_eq!(read(&pod), Reading { phase: wanted, doubt: None });
}

#[test]
fn a_first_process_that_ends_says_how() {
    let (phase, doubt) = doubted(&recorded!("first-process-killed"));
    assert_eq!((phase, doubt.reason.code), (Phase::Up, ReasonCode::EnvironmentCrashed));
    assert!(doubt.reason.technical_details.contains("exit code 137"), "{doubt:?}");
    assert_eq!(read(&recorded!("first-process-killed")).settled(), Phase::Failed(doubt.reason));
    assert_eq!(read(&recorded!("running")).settled(), Phase::Up);
    assert_eq!(failed(&recorded!("first-process-out-of-memory")).0, ReasonCode::OutOfMemory);
    let (code, details) = failed(&recorded!("command-missing"));
    assert_eq!(code, ReasonCode::EnvironmentCrashed);
    assert!(details.contains("/no/such"), "{details}");
    let (code, details) = failed(&recorded!("agent-missing"));
    assert_eq!(code, ReasonCode::EnvironmentCrashed);
    assert!(details.contains("the agent did not arrive") && details.contains("/carrel-agent"), "{details}");
}

#[test]
fn the_pods_own_deadline_is_the_end_of_the_exams_time() {
    assert_eq!(failed(&recorded!("deadline")).0, ReasonCode::TimeExpired);
}

/// kubelet does not say "evicted" in the status of a pod whose processes ended in good order, and later than their end in others.
#[test]
fn an_end_waits_for_what_explains_it() {
    let (phase, doubt) = doubted(&recorded!("evicted"));
    assert_eq!(phase, Phase::Up);
    assert_eq!((doubt.reason.code, doubt.patience), (ReasonCode::EnvironmentCrashed, END_PATIENCE));
}

#[test]
fn what_a_status_says_of_an_eviction_or_a_lost_node_is_a_loss() {
    for word in ["Evicted", "NodeLost", "Terminated", "Preempting"] {
        let mut pod = recorded!("first-process-killed");
        let status = pod.status.as_mut().unwrap();
        (status.phase, status.reason) = (Some("Failed".into()), Some(word.into()));
        assert_eq!(failed(&pod).0, ReasonCode::EnvironmentLost, "{word}");
    }
    let mut pod = recorded!("created");
    let status = pod.status.as_mut().unwrap();
    (status.phase, status.reason) = (Some("Failed".into()), Some("OutOfcpu".into()));
    assert_eq!(failed(&pod).0, ReasonCode::Unschedulable);
}

#[test]
fn a_pod_is_shown_under_its_own_name() {
    let pod = recorded!("running");
    let shown = observed(&pod, Phase::Up);
    assert_eq!(
        (shown.name.as_str(), shown.namespace.as_str(), shown.owner),
        ("carrel-up", "carrel-sessions", None)
    );
    assert!(shown.created_at > 1_700_000_000_000);
    assert!(environment_id(&pod).is_some());
    assert_eq!(environment_id(&Pod::default()), None);
}

#[test]
fn a_node_that_is_away_is_told_from_a_container_that_is_not_ready() {
    let pod = |ready: &str, containers: &str| -> Pod {
        serde_json::from_value(serde_json::json!({ "metadata": {}, "status": { "conditions": [
            { "type": "Ready", "status": ready },
            { "type": "ContainersReady", "status": containers },
        ] } }))
        .unwrap()
    };
    assert!(is_cut_off(&pod("False", "True")));
    assert!(!is_cut_off(&pod("True", "True")));
    assert!(!is_cut_off(&pod("False", "False")));
    assert!(!is_cut_off(&Pod::default()));
}
