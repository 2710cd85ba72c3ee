//! The pod of an environment, as it is asked for. Does not know what becomes of it.
use carrel_agent::wire::ENV_PREFIX;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{KubernetesOptions, delivery, options::Arrival};
use crate::{
    environment::Create,
    exam::{EnvironmentSpec, Network},
    identity::{EnvironmentId, SessionId, UserId},
};

/// Label and value of everything that Carrel makes.
pub(super) const MANAGED: (&str, &str) = ("app.kubernetes.io/managed-by", "carrel");
/// Label: the environment's id.
pub(super) const ENVIRONMENT: &str = "carrel.dev/environment";
/// Label: `true` on environments that no session has yet.
const WARM: &str = "carrel.dev/warm";
/// Label: whose it is.
const USER_ID: &str = "carrel.dev/user";
/// Label: which session's it is.
pub(super) const SESSION_ID: &str = "carrel.dev/session";
/// The container that candidates work in.
pub(super) const SESSION: &str = "session";
/// The container that brings the agent.
pub(super) const AGENT: &str = "agent";
/// Where the agent finds its callers: no file, and in the pod's own network namespace.
const SOCKET: &str = "@carrel";

/// Thousandths of a core when the exam says nothing.
const DEFAULT_CPU: u64 = 1000;
/// Bytes of memory when the exam says nothing.
const DEFAULT_MEMORY: u64 = 512 << 20;
/// Bytes of writable storage when the exam says nothing.
const DEFAULT_STORAGE: u64 = 1 << 30;
/// Where the agent's image has the agent.
const AGENT_IN_IMAGE: &str = "/carrel-agent";
/// Where the session container has the agent that was copied.
const AGENT_COPIED: &str = "/carrel/agent";
/// User of the container that brings the agent: another one than a candidate's, who then owns nothing of it.
const AGENT_USER: u32 = 65532;
/// What root inside a container may be given without a privilege on the node: the additions that Pod Security "baseline" allows
/// and that installing software and switching users need.
const ROOT_CAPABILITIES: [&str; 8] =
    ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID"];

/// Name of an environment's pod, and of its network policy.
pub(super) fn name(id: EnvironmentId) -> String {
    format!("carrel-{id}")
}

/// Which environment's a pod of this name is.
pub(super) fn environment_id(name: &str) -> Option<EnvironmentId> {
    name.strip_prefix("carrel-")?.parse().ok()
}

/// Variables by which kubelet tells every container where the API server is, links or not; what is set here is left alone.
const API_SERVER: [&str; 7] = [
    "KUBERNETES_SERVICE_HOST",
    "KUBERNETES_SERVICE_PORT",
    "KUBERNETES_SERVICE_PORT_HTTPS",
    "KUBERNETES_PORT",
    "KUBERNETES_PORT_443_TCP",
    "KUBERNETES_PORT_443_TCP_ADDR",
    "KUBERNETES_PORT_443_TCP_PORT",
];

/// A shell script with its arguments, as a container's command.
fn script<'a>(text: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
    [&["/bin/sh", "-c", text, "carrel"], arguments].concat()
}

/// The agent's file in a session's container; `None`: [`delivery`] finds a place for it.
fn program(arrival: Arrival<'_>) -> Option<&str> {
    match arrival {
        Arrival::Stream => None,
        Arrival::Image(_) => Some(AGENT_COPIED),
        Arrival::Path(path) => Some(path),
    }
}

/// The session container's first process, without the options of `agent serve`.
fn first_process(arrival: Arrival<'_>) -> Vec<&str> {
    let socket = ["--socket", SOCKET];
    match program(arrival) {
        None => script(delivery::WAIT, &socket),
        Some(program) => [&[program, "serve"], &socket[..]].concat(),
    }
}

/// What an exec runs to be connected to the agent, which has `size` bytes if it is sent.
pub(super) fn connect(arrival: Arrival<'_>, size: usize) -> Vec<String> {
    let (size, socket) = (size.to_string(), ["--socket", SOCKET]);
    let command = match program(arrival) {
        None => script(delivery::CONNECT, &[&[size.as_str()], &socket[..]].concat()),
        Some(program) => [&[program, "connect"], &socket[..]].concat(),
    };
    command.into_iter().map(str::to_owned).collect()
}

/// Labels of what is made for an environment.
pub(super) fn labels(request: &Create) -> Value {
    let mut labels = json!({
        MANAGED.0: MANAGED.1,
        ENVIRONMENT: request.environment_id.to_string(),
        "carrel.dev/exam": label_value(&request.exam_id),
        WARM: request.owner.is_none().to_string(),
    });
    if let (Some((user, session)), Some(labels)) = (request.owner, labels.as_object_mut()) {
        labels.insert(USER_ID.to_owned(), user.to_string().into());
        labels.insert(SESSION_ID.to_owned(), session.to_string().into());
    }
    labels
}

/// What makes an environment that was kept warm a session's.
pub(super) fn adoption((user, session): (UserId, SessionId)) -> Value {
    let labels = json!({ WARM: "false", USER_ID: user.to_string(), SESSION_ID: session.to_string() });
    json!({ "metadata": { "labels": labels } })
}

/// What of a text a label's value can hold: 63 characters that end with a letter or digit.
fn label_value(text: &str) -> String {
    let kept: String =
        text.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(63).collect();
    kept.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// The pod that is asked for. The error says what is missing, for staff.
pub(super) fn pod(request: &Create, options: &KubernetesOptions) -> Result<Pod, String> {
    serde_json::from_value(manifest(request, options)?)
        .map_err(|error| format!("the pod cannot be written: {error}"))
}

fn manifest(request: &Create, options: &KubernetesOptions) -> Result<Value, String> {
    let spec = &request.spec;
    let image = spec.image.as_ref().or(options.default_image.as_ref()).ok_or(
        "the exam names no image: give it `environment.image`, or the server --kubernetes-default-image",
    )?;
    let (mut containers, mut volumes) = (Vec::new(), Vec::new());
    if let Arrival::Image(agent_image) = options.arrival() {
        volumes.push(json!({ "name": AGENT, "emptyDir": { "medium": "Memory", "sizeLimit": "16Mi" } }));
        containers.push(agent_container(agent_image));
    }
    containers.push(session_container(spec, image, options));

    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name(request.environment_id),
            "namespace": options.namespace,
            "labels": labels(request),
            "annotations": { "carrel.dev/exam": request.exam_id },
        },
        "spec": {
            "activeDeadlineSeconds": request.lifetime_seconds.clamp(1, i64::MAX.unsigned_abs()),
            "automountServiceAccountToken": false,
            "containers": containers,
            "enableServiceLinks": false,
            "hostname": "exam",
            "restartPolicy": "Never",
            "securityContext": security(spec),
            // Nothing that runs has anything to save: the first process takes no notice of SIGTERM, and all are killed after this.
            "terminationGracePeriodSeconds": 1,
            // A node that is away for a moment must not cost exams: whoever waits decides, not the cluster.
            "tolerations": [
                { "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute" },
                { "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute" },
            ],
            "volumes": volumes,
        },
    });
    let Some(wanted) = pod.get_mut("spec").and_then(Value::as_object_mut) else {
        return Err("the pod cannot be written".to_owned());
    };
    if let Some(class) = spec.runtime_class.as_ref().or(options.runtime_class.as_ref()) {
        wanted.insert("runtimeClassName".to_owned(), json!(class));
    }
    if !options.image_pull_secret.is_empty() {
        let secrets: Vec<_> = options.image_pull_secret.iter().map(|name| json!({ "name": name })).collect();
        wanted.insert("imagePullSecrets".to_owned(), secrets.into());
    }
    if !options.node_selector.is_empty() {
        let labels: serde_json::Map<_, _> =
            options.node_selector.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        wanted.insert("nodeSelector".to_owned(), labels.into());
    }
    if spec.network != Network::Internet {
        // Nothing would answer: then the answer is to come at once.
        wanted.insert("dnsPolicy".to_owned(), json!("None"));
        wanted.insert("dnsConfig".to_owned(), json!({ "nameservers": ["127.0.0.1"] }));
    }
    Ok(pod)
}

/// Holds the agent's image. kubelet runs its hook to the end before it starts the next container, and does so about a second
/// sooner than it would with an init container.
fn agent_container(image: &str) -> Value {
    json!({
        "name": AGENT,
        "image": image,
        // Must live for the hook to run in it, and costs nothing while it waits.
        "command": [AGENT_IN_IMAGE, "idle"],
        "lifecycle": { "postStart": { "exec": { "command": [AGENT_IN_IMAGE, "install", AGENT_COPIED] } } },
        "resources": {
            "requests": { "cpu": "1m", "memory": "16Mi", "ephemeral-storage": "1Mi" },
            "limits": { "cpu": "500m", "memory": "32Mi", "ephemeral-storage": "16Mi" },
        },
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": AGENT_USER,
            "runAsGroup": AGENT_USER,
        },
        "volumeMounts": [{ "name": AGENT, "mountPath": "/carrel" }],
    })
}

fn session_container(spec: &EnvironmentSpec, image: &str, options: &KubernetesOptions) -> Value {
    let mut command = first_process(options.arrival());
    if let Some(shell) = &spec.shell {
        command.extend(["--shell", shell]);
    }
    // Kubernetes replaces $(NAME) in a value, and $$ by a plain $.
    let own = spec.env.iter().map(
        |(name, value)| json!({ "name": format!("{ENV_PREFIX}{name}"), "value": value.replace('$', "$$") }),
    );
    let env: Vec<_> = API_SERVER.iter().map(|name| json!({ "name": name, "value": "" })).chain(own).collect();
    let mounts = match options.arrival() {
        Arrival::Image(_) => vec![json!({ "name": AGENT, "mountPath": "/carrel", "readOnly": true })],
        Arrival::Stream | Arrival::Path(_) => Vec::new(),
    };
    let capabilities = if is_root(spec) {
        json!({ "drop": ["ALL"], "add": ROOT_CAPABILITIES })
    } else {
        json!({ "drop": ["ALL"] })
    };
    json!({
        "name": SESSION,
        "image": image,
        "command": command,
        "env": env,
        "resources": resources(spec, options),
        "securityContext": { "allowPrivilegeEscalation": false, "capabilities": capabilities },
        // What the first process says when it cannot begin is told to staff.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    })
}

fn resources(spec: &EnvironmentSpec, options: &KubernetesOptions) -> Value {
    let cpu = spec.cpu.unwrap_or(DEFAULT_CPU);
    let memory = spec.memory.unwrap_or(DEFAULT_MEMORY);
    let storage = spec.storage.unwrap_or(DEFAULT_STORAGE).to_string();
    let part = |whole: u64, percent: u64| (whole / 100).saturating_mul(percent).max(1);
    json!({
        "requests": {
            "cpu": format!("{}m", (cpu.saturating_mul(options.cpu_request_percent) / 100).max(1)),
            "memory": if options.memory_request_percent < 100 { part(memory, options.memory_request_percent) } else { memory }.to_string(),
            "ephemeral-storage": storage,
        },
        "limits": { "cpu": format!("{cpu}m"), "memory": memory.to_string(), "ephemeral-storage": storage },
    })
}

fn is_root(spec: &EnvironmentSpec) -> bool {
    matches!(spec.user.as_deref(), Some("root" | "0"))
}

fn security(spec: &EnvironmentSpec) -> Value {
    let mut security = json!({
        "runAsNonRoot": !is_root(spec),
        "seccompProfile": { "type": "RuntimeDefault" },
    });
    // A name has no number here: the image's own user is taken, and kubelet refuses it if it is root.
    let number =
        if is_root(spec) { Some(0) } else { spec.user.as_deref().and_then(|user| user.parse::<u32>().ok()) };
    if let (Some(number), Some(security)) = (number, security.as_object_mut()) {
        security.insert("runAsUser".to_owned(), number.into());
        security.insert("runAsGroup".to_owned(), number.into());
    }
    security
}

#[cfg(test)]
#[path = "pod/tests.rs"]
mod tests;
