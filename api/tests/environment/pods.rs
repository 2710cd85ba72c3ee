//! A namespace of a real cluster for one test, with a server's rights in it and no more, and ways to break things.
use std::{fs, io::Write as _, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use async_trait::async_trait;
use carrel_api::{
    environment::{
        Agent, Environment,
        kubernetes::{KubernetesEnvironment, KubernetesOptions},
    },
    identity::EnvironmentId,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::watch,
    task::{AbortHandle, JoinSet},
};
use uuid::Uuid;

use crate::{conformance::Backend, program::agent};

/// One namespace; everything in it goes with the test.
pub struct Pods {
    environment: Option<Arc<KubernetesEnvironment>>,
    pub options: KubernetesOptions,
    pub namespace: String,
    admin: PathBuf,
    pub way: Way,
    _directory: TempDir,
}

/// Says why a test does not run; a failure where all must.
pub fn skip(why: &str) {
    assert_ne!(std::env::var("CARREL_TEST_REQUIRE_ALL").as_deref(), Ok("1"), "not run: {why}");
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    // Past the test runner, which would keep it to itself.
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
}

pub fn variable(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

impl Pods {
    pub async fn open() -> Option<Self> {
        Self::with(&fs::read_to_string("../charts/rbac.yaml").unwrap()).await
    }

    /// A namespace in which the server has the rights of a Role.
    pub async fn with(role: &str) -> Option<Self> {
        let Ok(admin) = std::env::var("CARREL_TEST_KUBECONFIG") else {
            skip(
                "CARREL_TEST_KUBECONFIG names no cluster: `make cluster-up`, then its administrator's kubeconfig",
            );
            return None;
        };
        let admin = PathBuf::from(admin);
        let namespace = format!("carrel-test-{}", &Uuid::new_v4().simple().to_string()[..12]);
        let directory = tempfile::tempdir().unwrap();
        let objects = json!({ "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "v1", "kind": "Namespace", "metadata": {
                "name": namespace,
                "labels": { "carrel.test/namespace": "true", "pod-security.kubernetes.io/enforce": "restricted" } } },
            { "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "server", "namespace": namespace } },
            { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
              "metadata": { "name": "server", "namespace": namespace },
              "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "carrel-server" },
              "subjects": [{ "kind": "ServiceAccount", "name": "server", "namespace": namespace }] },
        ] });
        let way = Way::new(&server(&admin).await).await;
        let mut pods = Self {
            environment: None,
            options: KubernetesOptions {
                namespace: namespace.clone(),
                kubeconfig: Some(directory.path().join("kubeconfig")),
                default_image: Some(variable("CARREL_CLUSTER_SESSION_IMAGE", "carrel.test/session:dev")),
                // Many small exams on a small machine: what is reserved must not be what is tested.
                cpu_request_percent: 1,
                memory_request_percent: 25,
                ..KubernetesOptions::default()
            },
            namespace: namespace.clone(),
            admin,
            way,
            _directory: directory,
        };
        pods.apply(&objects.to_string()).await;
        pods.apply(role).await;
        let token = pods.kubectl(&["create", "token", "server", "--duration=1h"]).await;
        pods.write_kubeconfig(&token).await;
        pods.restart().await;
        Some(pods)
    }

    /// The server's kubeconfig: the service account's token, through [`Way`].
    async fn write_kubeconfig(&self, token: &str) {
        let mut config: Value =
            serde_json::from_str(&self.kubectl(&["config", "view", "--raw", "--minify", "-o", "json"]).await)
                .unwrap();
        config["clusters"][0]["cluster"]["server"] = json!(format!("https://127.0.0.1:{}", self.way.port));
        config["users"][0]["user"] = json!({ "token": token });
        fs::write(self.options.kubeconfig.as_ref().unwrap(), config.to_string()).unwrap();
    }

    pub fn kubernetes(&self) -> Arc<KubernetesEnvironment> {
        self.environment.clone().unwrap()
    }

    /// A second server with the same options.
    pub async fn another(&self) -> Arc<KubernetesEnvironment> {
        KubernetesEnvironment::connect(self.options.clone(), Agent::File(agent())).await.unwrap()
    }

    pub async fn reopen(&mut self, change: impl FnOnce(&mut KubernetesOptions)) {
        change(&mut self.options);
        self.restart().await;
    }

    /// As the administrator, in this namespace; must succeed.
    pub async fn kubectl(&self, arguments: &[&str]) -> String {
        self.kubectl_with(arguments, "").await
    }

    pub async fn apply(&self, manifest: &str) {
        self.kubectl_with(&["apply", "-f", "-"], manifest).await;
    }

    async fn kubectl_with(&self, arguments: &[&str], input: &str) -> String {
        let mut child = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(&self.admin)
            .args(["--namespace", &self.namespace])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
        let output = child.wait_with_output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {}: {said}", arguments.join(" "));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub async fn pod(&self, id: EnvironmentId) -> Value {
        serde_json::from_str(&self.kubectl(&["get", "pod", &format!("carrel-{id}"), "-o", "json"]).await)
            .unwrap()
    }

    /// Ends the test: what it made goes, and that is checked.
    pub async fn close(mut self) {
        let environment = self.kubernetes();
        // What was made just now may not have been observed yet.
        let there = self.kubectl(&["get", "pods", "-o", "jsonpath={.items[*].metadata.name}"]).await;
        let mut ending = JoinSet::new();
        for name in there.split_whitespace() {
            let id: EnvironmentId = name.strip_prefix("carrel-").unwrap().parse().unwrap();
            let environment = Arc::clone(&environment);
            ending.spawn(async move { environment.destroy(id).await });
        }
        while let Some(ended) = ending.join_next().await {
            ended.unwrap().unwrap();
        }
        let left = self.kubectl(&["get", "pods,networkpolicies", "-o", "name"]).await;
        assert!(left.lines().all(|name| name == "networkpolicy.networking.k8s.io/carrel-closed"), "{left}");
        self.environment = None;
    }
}

impl Drop for Pods {
    /// The namespace goes in the background; the cluster takes its time with that.
    fn drop(&mut self) {
        let _ = std::process::Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(&self.admin)
            .args(["delete", "namespace", &self.namespace, "--wait=false", "--ignore-not-found"])
            .stdout(Stdio::null())
            .status();
    }
}

#[async_trait]
impl Backend for Pods {
    fn environment(&self) -> Arc<dyn Environment> {
        self.kubernetes()
    }

    async fn restart(&mut self) {
        self.environment = None;
        self.environment = Some(self.another().await);
    }

    async fn kill(&self, id: EnvironmentId) {
        let uid = self.pod(id).await["metadata"]["uid"].as_str().unwrap().to_owned();
        let first = processes_of(&uid)
            .into_iter()
            .find(|process| process.line.starts_with("/tmp/.carrel/agent serve"))
            .unwrap();
        rustix::process::kill_process(first.pid, rustix::process::Signal::KILL).unwrap();
    }

    async fn remains(&self, id: EnvironmentId) -> Vec<String> {
        let label = format!("--selector=carrel.dev/environment={id}");
        let found = self.kubectl(&["get", "pods,networkpolicies", &label, "-o", "name"]).await;
        found.lines().map(str::to_owned).collect()
    }

    fn secrets(&self) -> Vec<PathBuf> {
        vec![
            self.admin.clone(),
            self.options.kubeconfig.clone().unwrap(),
            "/var/run/secrets/kubernetes.io".into(),
            "/run/secrets".into(),
        ]
    }
}

struct Process {
    pid: rustix::process::Pid,
    line: String,
}

/// The processes of a pod, seen from the node: which is this machine.
fn processes_of(uid: &str) -> Vec<Process> {
    let read = |entry: fs::DirEntry| {
        let pid = rustix::process::Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let groups = fs::read_to_string(entry.path().join("cgroup")).ok()?;
        let line = fs::read_to_string(entry.path().join("cmdline")).ok()?.replace('\0', " ");
        (groups.contains(uid) || groups.contains(&uid.replace('-', "_"))).then_some(Process { pid, line })
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| read(entry.ok()?)).collect()
}

async fn server(kubeconfig: &PathBuf) -> String {
    let view = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .args(["config", "view", "--minify", "-o", "json"])
        .output();
    let view: Value = serde_json::from_slice(&view.await.unwrap().stdout).unwrap();
    let server = view["clusters"][0]["cluster"]["server"].as_str().unwrap();
    server.trim_start_matches("https://").trim_end_matches('/').to_owned()
}

/// What the network between a server and the API server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Bytes pass.
    Fine,
    /// Connections are cut and refused.
    Cut,
    /// Bytes no longer pass, and nobody is told.
    Silent,
}

/// The way to the API server, which can be made to fail for one test alone.
pub struct Way {
    pub port: u16,
    weather: watch::Sender<Weather>,
    accepting: AbortHandle,
}

impl Way {
    async fn new(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (weather, seen) = watch::channel(Weather::Fine);
        let server = server.to_owned();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                near.set_nodelay(true).unwrap();
                connections.spawn(pass(near, server.clone(), seen.clone()));
                while connections.try_join_next().is_some() {}
            }
        })
        .abort_handle();
        Self { port, weather, accepting }
    }

    pub fn set(&self, weather: Weather) {
        self.weather.send(weather).unwrap();
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn pass(mut near: TcpStream, server: String, mut weather: watch::Receiver<Weather>) {
    let mut now = *weather.borrow_and_update();
    if now == Weather::Cut {
        return;
    }
    let mut far = TcpStream::connect(&server).await.unwrap();
    far.set_nodelay(true).unwrap();
    loop {
        tokio::select! {
            _ = copy_bidirectional(&mut near, &mut far), if now == Weather::Fine => return,
            changed = weather.changed() => {
                if changed.is_err() {
                    return;
                }
                now = *weather.borrow_and_update();
                if now == Weather::Cut {
                    return;
                }
            }
        }
    }
}

/// A registry that takes connections and never says a word.
pub struct MuteRegistry {
    pub port: u16,
    pub called: watch::Receiver<usize>,
    accepting: AbortHandle,
}

impl MuteRegistry {
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (count, called) = watch::channel(0);
        let accepting = tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                held.push(listener.accept().await.unwrap());
                count.send_replace(held.len());
            }
        })
        .abort_handle();
        Self { port, called, accepting }
    }
}

impl Drop for MuteRegistry {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// How long a test waits for what must come.
pub const LIMIT: Duration = Duration::from_secs(30);
