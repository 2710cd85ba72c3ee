use super::*;
use crate::identity::{SessionId, UserId};

fn options() -> KubernetesOptions {
    KubernetesOptions { default_image: Some("registry/session:1".into()), ..KubernetesOptions::default() }
}

/// The agent is brought by a container of its own.
fn with_image() -> KubernetesOptions {
    KubernetesOptions { agent_image: Some("registry/agent:1".into()), ..options() }
}

fn request(spec: EnvironmentSpec) -> Create {
    Create {
        environment_id: EnvironmentId::new(),
        owner: Some((UserId::new(), SessionId::new())),
        exam_id: "shell-basics".into(),
        spec,
        lifetime_seconds: 7200,
    }
}

fn session(pod: &Value) -> &Value {
    pod["spec"]["containers"].as_array().unwrap().last().unwrap()
}

/// Every field that is asked for is one that the API knows under that name.
#[test]
fn nothing_of_the_manifest_is_lost_on_the_way_to_the_api() {
    let options = KubernetesOptions {
        image_pull_secret: vec!["registry".into()],
        node_selector: vec![("pool".into(), "exams".into())],
        runtime_class: Some("gvisor".into()),
        ..options()
    };
    let spec = EnvironmentSpec {
        env: [("A".to_owned(), "b".to_owned())].into(),
        shell: Some("/bin/zsh".into()),
        user: Some("1001".into()),
        ..EnvironmentSpec::default()
    };
    let request = request(spec);
    let written = manifest(&request, &options).unwrap();
    assert_eq!(serde_json::to_value(pod(&request, &options).unwrap()).unwrap(), written);
}

#[test]
fn a_candidate_gets_no_token_no_privilege_and_no_root() {
    for options in [options(), with_image()] {
        gets_no_token_no_privilege_and_no_root(&options);
    }
}

fn gets_no_token_no_privilege_and_no_root(options: &KubernetesOptions) {
    let pod = manifest(&request(EnvironmentSpec::default()), options).unwrap();
    let spec = &pod["spec"];
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert_eq!(spec["enableServiceLinks"], false);
    assert_eq!(spec["restartPolicy"], "Never");
    assert_eq!(spec["activeDeadlineSeconds"], 7200);
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    for host in ["hostNetwork", "hostPID", "hostIPC", "serviceAccountName"] {
        assert!(spec.get(host).is_none(), "{host}");
    }
    for container in spec["containers"].as_array().unwrap() {
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        assert_eq!(container["securityContext"]["capabilities"], json!({ "drop": ["ALL"] }));
        for kind in ["requests", "limits"] {
            for resource in ["cpu", "memory", "ephemeral-storage"] {
                assert!(container["resources"][kind][resource].is_string(), "{kind} {resource}");
            }
        }
    }
}

#[test]
fn root_inside_has_no_privilege_on_the_node() {
    let spec = EnvironmentSpec { user: Some("root".into()), ..EnvironmentSpec::default() };
    let pod = manifest(&request(spec), &options()).unwrap();
    assert_eq!(pod["spec"]["securityContext"]["runAsUser"], 0);
    let added = session(&pod)["securityContext"]["capabilities"]["add"].as_array().unwrap().clone();
    for capability in ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "NET_RAW", "MKNOD"] {
        assert!(!added.contains(&json!(capability)), "{capability}");
    }
    assert_eq!(session(&pod)["securityContext"]["allowPrivilegeEscalation"], false);
}

#[test]
fn an_agent_that_is_sent_or_in_the_image_needs_no_second_container_and_no_volume() {
    let path = KubernetesOptions { agent_path: Some("/opt/agent".into()), ..options() };
    for (options, first) in [(options(), "/bin/sh"), (path, "/opt/agent")] {
        let pod = manifest(&request(EnvironmentSpec::default()), &options).unwrap();
        assert_eq!(pod["spec"]["containers"].as_array().unwrap().len(), 1);
        assert_eq!(pod["spec"]["volumes"], json!([]));
        assert_eq!(session(&pod)["volumeMounts"], json!([]));
        assert_eq!(session(&pod)["command"][0], first);
    }
}

#[test]
fn an_agent_of_an_image_of_its_own_is_copied_where_nobody_can_write() {
    let pod = manifest(&request(EnvironmentSpec::default()), &with_image()).unwrap();
    assert_eq!(session(&pod)["command"][0], "/carrel/agent");
    let mount = &session(&pod)["volumeMounts"][0];
    assert_eq!((mount["mountPath"].as_str(), mount["readOnly"].as_bool()), (Some("/carrel"), Some(true)));
    let volumes = pod["spec"]["volumes"].as_array().unwrap();
    assert!(volumes.iter().all(|volume| volume["emptyDir"]["sizeLimit"].is_string()), "{volumes:?}");
}

#[test]
fn the_shell_of_an_exam_reaches_the_agent_however_it_comes() {
    let path = KubernetesOptions { agent_path: Some("/opt/agent".into()), ..options() };
    for options in [options(), with_image(), path] {
        let spec = EnvironmentSpec { shell: Some("/bin/zsh".into()), ..EnvironmentSpec::default() };
        let pod = manifest(&request(spec), &options).unwrap();
        let command = session(&pod)["command"].as_array().unwrap();
        assert_eq!(command[command.len() - 4..], ["--socket", "@carrel", "--shell", "/bin/zsh"]);
    }
}

#[test]
fn a_missing_image_is_said_before_anything_is_made() {
    let none = KubernetesOptions { default_image: None, ..options() };
    assert!(pod(&request(EnvironmentSpec::default()), &none).unwrap_err().contains("environment.image"));
}

#[test]
fn labels_say_whose_it_is_and_are_valid_for_any_exam() {
    let mut request = request(EnvironmentSpec::default());
    request.exam_id = format!("{}.-", "e".repeat(62));
    let labels = labels(&request);
    let exam = labels["carrel.dev/exam"].as_str().unwrap();
    assert_eq!(exam, "e".repeat(62));
    assert_eq!(labels[WARM], "false");
    assert_eq!(labels["carrel.dev/user"], request.owner.unwrap().0.to_string());
    request.owner = None;
    let labels = super::labels(&request);
    assert_eq!(labels[WARM], "true");
    assert!(labels.get("carrel.dev/user").is_none());
}

#[test]
fn variables_are_not_expanded_by_kubernetes() {
    let spec = EnvironmentSpec {
        env: [("A".to_owned(), "$(PATH) a$$b $$(X) 5$".to_owned())].into(),
        ..EnvironmentSpec::default()
    };
    let pod = manifest(&request(spec), &options()).unwrap();
    let env = session(&pod)["env"].as_array().unwrap().clone();
    let (last, others) = env.split_last().unwrap();
    assert_eq!(last, &json!({ "name": "CARREL_ENV_A", "value": "$$(PATH) a$$$$b $$$$(X) 5$$" }));
    // Where the API server is stays out of reach.
    assert!(
        others
            .iter()
            .all(|one| one["value"] == "" && one["name"].as_str().unwrap().starts_with("KUBERNETES_"))
    );
}

#[test]
fn what_is_reserved_is_a_part_of_the_limit() {
    let spec = EnvironmentSpec {
        cpu: Some(500),
        memory: Some(1000),
        storage: Some(77),
        ..EnvironmentSpec::default()
    };
    let options = KubernetesOptions { memory_request_percent: 50, ..options() };
    let pod = manifest(&request(spec), &options).unwrap();
    let resources = &session(&pod)["resources"];
    assert_eq!(resources["requests"], json!({ "cpu": "50m", "memory": "500", "ephemeral-storage": "77" }));
    assert_eq!(resources["limits"], json!({ "cpu": "500m", "memory": "1000", "ephemeral-storage": "77" }));
}
