//! Environments as pods of a Kubernetes cluster.
//!
//! A pod is named after its environment, so that making it twice makes it once; what there is is read from the API server, and
//! nothing that only this process knows is needed to go on after a restart. One namespace belongs to one Carrel: what
//! carries its label there and belongs to no session is removed.
//!
//! Bytes go through one exec of `agent connect` in each pod ([`Environment::connect`]). Not bounded by a pod: the number of its
//! processes, which is kubelet's to limit (`podPidsLimit`).
mod check;
mod cluster;
mod delivery;
mod events;
mod exec;
mod listing;
mod observer;
mod options;
mod phase;
mod pod;
mod policy;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use carrel_agent::packed::Packed;
use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kube::{
    Resource as _,
    api::{AttachParams, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, Request},
};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{OnceCell, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tracing::Instrument;

pub use options::KubernetesOptions;

use self::{
    cluster::{Cluster, backoff},
    exec::ExecStream,
    observer::{Observer, selector},
    options::Arrival,
};
use super::{Agent, ByteStream, Create, Environment, EnvironmentError, Observation, Observed, Phase};
use crate::{
    exam::EnvironmentSpec,
    identity::{EnvironmentId, SessionId, UserId},
    reason::{Reason, ReasonCode},
};

/// Opening an exec, all attempts together.
const EXEC: Duration = Duration::from_secs(9);
/// Attempts at opening an exec when there is no answer.
const EXEC_ATTEMPTS: u32 = 3;
/// How long [`Environment::destroy`] waits for a pod to be gone; calling again waits on.
const DESTROY: Duration = Duration::from_secs(15);
/// A pod that is still there so long after it was first destroyed is on a node that does not answer: its entry is removed.
const FORCE: Duration = Duration::from_secs(30);
/// How often a pod that is being destroyed is looked for, past the watch.
const LOOK: Duration = Duration::from_secs(1);
/// How often network policies are looked through.
const SWEEP: Duration = Duration::from_secs(15);
/// One that belongs to no pod for so long is removed: longer than all attempts at making its pod.
const ALONE: Duration = Duration::from_secs(45);

/// The environments of one namespace.
pub struct KubernetesEnvironment {
    inner: Arc<Inner>,
    observation: watch::Receiver<Arc<Observation>>,
    tasks: TaskTracker,
    _end: DropGuard,
}

struct Inner {
    cluster: Arc<Cluster>,
    options: KubernetesOptions,
    /// The agent's program; used only if the server sends it.
    agent: Bytes,
    /// When a pod was first destroyed by this process, while it is still there.
    ending: Mutex<BTreeMap<EnvironmentId, Instant>>,
    /// The namespace has been found closed by this process; looked at again by the sweep.
    closed: OnceCell<()>,
}

impl KubernetesEnvironment {
    /// Reads where the cluster is and begins to observe it, until this value is dropped. A cluster that does not answer is
    /// no error here: [`Environment::check`] and the observation say so.
    ///
    /// # Errors
    /// When no usable configuration of a cluster is found, or the agent cannot be read.
    pub async fn connect(options: KubernetesOptions, agent: Agent) -> Result<Arc<Self>, EnvironmentError> {
        let agent = agent.read().map_err(|error| EnvironmentError::Unavailable(error.to_string()))?;
        let cluster = Arc::new(Cluster::new(&options).await?);
        let (out, observation) = watch::channel(Arc::default());
        let unschedulable = Duration::from_secs(options.unschedulable_seconds);
        let (told, heard) = mpsc::channel(events::WAITING);
        let events = events::follow(Arc::clone(&cluster), observation.clone(), told);
        let observer = Observer::new(Arc::clone(&cluster), unschedulable, out, heard);
        let inner =
            Arc::new(Inner { cluster, options, agent, ending: Mutex::default(), closed: OnceCell::new() });
        let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
        let span = tracing::info_span!("kubernetes", namespace = inner.cluster.namespace);
        tasks.spawn(end.clone().run_until_cancelled_owned(observer.run()).instrument(span.clone()));
        tasks.spawn(end.clone().run_until_cancelled_owned(events).instrument(span.clone()));
        let sweep = sweep(Arc::clone(&inner), observation.clone());
        tasks.spawn(end.clone().run_until_cancelled_owned(sweep).instrument(span));
        Ok(Arc::new(Self { inner, observation, tasks, _end: end.drop_guard() }))
    }
}

#[async_trait]
impl Environment for KubernetesEnvironment {
    fn place(&self) -> String {
        format!("the Kubernetes namespace {}", self.inner.cluster.namespace)
    }

    fn makes(&self) -> String {
        let options = &self.inner.options;
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "agent": match options.arrival() {
                Arrival::Stream => json!({ "sha256": BASE64.encode(Sha256::digest(&self.inner.agent)) }),
                Arrival::Image(image) => json!({ "image": image }),
                Arrival::Path(path) => json!({ "path": path }),
            },
            "default_image": options.default_image,
            "node_selector": options.node_selector,
            "runtime_class": options.runtime_class,
            "closed_cidr": options.closed_cidr,
        })
        .to_string()
    }

    async fn check(&self) -> Result<(), EnvironmentError> {
        let options = &self.inner.options;
        let request = Create {
            environment_id: EnvironmentId::new(),
            owner: None,
            exam_id: "check".to_owned(),
            // The image need not exist: nothing is made.
            spec: EnvironmentSpec {
                image: options.default_image.clone().or_else(|| Some("carrel.invalid/check".to_owned())),
                ..EnvironmentSpec::default()
            },
            lifetime_seconds: 60,
        };
        let like = pod::pod(&request, options).map_err(EnvironmentError::Unavailable)?;
        check::check(&self.inner.cluster, &like).await?;
        self.inner.closed.get_or_try_init(|| self.inner.close_namespace()).await.map(|_| ())
    }

    async fn create(&self, request: &Create) -> Result<(), EnvironmentError> {
        let shown = self.observation.borrow().environments.contains_key(&request.environment_id);
        self.inner.create(request, shown).await
    }

    fn observe(&self) -> watch::Receiver<Arc<Observation>> {
        self.observation.clone()
    }

    async fn inspect(&self, id: EnvironmentId) -> Result<Option<Observed>, EnvironmentError> {
        let found = self.inner.find(id).await?;
        Ok(found.map(|pod| {
            let phase = phase::read(&pod, Duration::MAX, false).phase;
            // What has stood too long is known to the observer only.
            let shown = self.observation.borrow();
            let phase = match (phase, shown.environments.get(&id).map(|seen| &seen.phase)) {
                (Phase::Starting { .. } | Phase::Up, Some(Phase::Failed(reason))) => {
                    Phase::Failed(reason.clone())
                }
                (phase, _) => phase,
            };
            phase::observed(&pod, phase)
        }))
    }

    async fn connect(&self, id: EnvironmentId) -> Result<Box<dyn ByteStream>, EnvironmentError> {
        let end = gone(self.observation.clone(), id);
        let stream = timeout(EXEC, self.inner.exec(id, end, &self.tasks)).await;
        stream.unwrap_or_else(|_| {
            let why =
                format!("exec: {} gave no answer within {} s", self.inner.cluster.server, EXEC.as_secs());
            Err(EnvironmentError::Unavailable(why))
        })
    }

    async fn adopt(&self, id: EnvironmentId, owner: (UserId, SessionId)) -> Result<(), EnvironmentError> {
        let (name, labels) = (pod::name(id), pod::adoption(owner));
        let (patch, labels) = (PatchParams::default(), Patch::Merge(&labels));
        let cluster = &self.inner.cluster;
        match cluster.call(|| cluster.pods.patch_metadata(&name, &patch, &labels)).await {
            Ok(_) => Ok(()),
            Err(fault) if fault.is_not_found() => Err(EnvironmentError::NotFound),
            Err(fault) => Err(fault.into_error("pod")),
        }
    }

    async fn destroy(&self, id: EnvironmentId) -> Result<(), EnvironmentError> {
        self.inner.destroy(id, self.observation.clone()).await
    }
}

impl Inner {
    async fn find(&self, id: EnvironmentId) -> Result<Option<Pod>, EnvironmentError> {
        let name = pod::name(id);
        match self.cluster.call(|| self.cluster.pods.get(&name)).await {
            Ok(pod) => Ok(Some(pod)),
            Err(fault) if fault.is_not_found() => Ok(None),
            Err(fault) => Err(fault.into_error("pod")),
        }
    }

    /// Denies all traffic in the namespace, if nobody has yet, or somebody has weakened what did.
    async fn close_namespace(&self) -> Result<(), EnvironmentError> {
        let closed = policy::closed(&self.cluster.namespace).map_err(internal)?;
        match self.cluster.call(|| self.cluster.policies.get(policy::CLOSED)).await {
            Ok(found) if policy::closes(&found, &closed) => return Ok(()),
            Ok(found) => {
                tracing::warn!(
                    policy = policy::CLOSED,
                    "somebody has changed what denies all traffic: it is made anew"
                );
                self.remove_policy(policy::CLOSED, found.metadata.uid).await?;
            }
            Err(fault) if fault.is_not_found() => {}
            Err(fault) => return Err(fault.into_error("network policy")),
        }
        self.create_policy(&closed).await
    }

    async fn create_policy(&self, policy: &NetworkPolicy) -> Result<(), EnvironmentError> {
        let post = PostParams::default();
        match self.cluster.call(|| self.cluster.policies.create(&post, policy)).await {
            Ok(_) => Ok(()),
            Err(fault) if fault.is_already_there() => Ok(()),
            Err(fault) => Err(fault.into_error("network policy")),
        }
    }

    /// A quota counts what is asked for before anybody looks whether it is there: so what is `shown` is not asked for again, and
    /// a refusal is believed only when the pod is not there.
    async fn create(&self, request: &Create, shown: bool) -> Result<(), EnvironmentError> {
        let id = request.environment_id;
        if shown && let Some(pod) = self.find(id).await? {
            return usable(&pod);
        }
        let pod = pod::pod(request, &self.options).map_err(internal)?;
        let opened = policy::opened(request, &self.options).map_err(internal)?;
        // Both before the pod: it is never without them.
        self.closed.get_or_try_init(|| self.close_namespace()).await?;
        if let Some(opened) = &opened {
            self.create_policy(opened).await?;
        }
        let post = PostParams::default();
        let fault = match self.cluster.call(|| self.cluster.pods.create(&post, &pod)).await {
            Ok(_) => return Ok(()),
            Err(fault) => fault,
        };
        let is_there = fault.is_already_there();
        let error = fault.into_error("pod");
        if !matches!(error, EnvironmentError::Refused(_)) {
            return Err(error);
        }
        // Perhaps it is ours, from a call whose answer was lost, or from before.
        if let Some(pod) = self.find(id).await? {
            return usable(&pod);
        }
        if is_there {
            return Err(EnvironmentError::Unavailable("the pod has just gone".to_owned()));
        }
        if opened.is_some() {
            self.delete_policy(id).await?;
        }
        Err(error)
    }

    async fn exec(
        &self,
        id: EnvironmentId,
        end: impl Future<Output = String> + Send + 'static,
        tasks: &TaskTracker,
    ) -> Result<Box<dyn ByteStream>, EnvironmentError> {
        let parameters = AttachParams {
            container: Some(pod::SESSION.to_owned()),
            // Always: without it older API servers cannot tell when the client has gone.
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
            ..AttachParams::default()
        };
        let arrival = self.options.arrival();
        let command = pod::connect(arrival, self.agent.len());
        let url = Pod::url_path(&(), Some(&self.cluster.namespace));
        let mut attempt = 1;
        loop {
            let request = Request::new(&url)
                .exec(&pod::name(id), &command, &parameters)
                .map_err(|error| internal(error.to_string()))?;
            match self.cluster.client.connect(request).await {
                Ok(connection) => {
                    let mut stream = ExecStream::new(connection.into_stream(), end, tasks);
                    if arrival == Arrival::Stream {
                        let delivered = delivery::deliver(&mut stream, &self.agent).await;
                        delivered.map_err(|error| EnvironmentError::Unavailable(format!("exec: {error}")))?;
                    }
                    return Ok(Box::new(Packed::new(stream)));
                }
                // An answer, while it starts mostly "not yet": the caller knows when to ask again.
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    return Err(EnvironmentError::NotFound);
                }
                Err(error @ kube::Error::Api(_)) => {
                    let (fault, _) = self.cluster.fault(error);
                    return Err(EnvironmentError::Unavailable(format!("exec: {fault}")));
                }
                Err(error) => {
                    let (fault, again) = self.cluster.fault(error);
                    if !again || attempt == EXEC_ATTEMPTS {
                        return Err(fault.into_error("exec"));
                    }
                    tokio::time::sleep(backoff(attempt)).await;
                    attempt += 1;
                }
            }
        }
    }

    async fn destroy(
        &self,
        id: EnvironmentId,
        observation: watch::Receiver<Arc<Observation>>,
    ) -> Result<(), EnvironmentError> {
        let deadline = Instant::now() + DESTROY;
        let begun = *self.ending().entry(id).or_insert_with(Instant::now);
        let ended = self.end_pod(id, begun, deadline, observation).await;
        if ended.is_ok() {
            // After the pod: it must not be left without its policy, nor the policy without anything.
            self.delete_policy(id).await?;
            self.ending().remove(&id);
        }
        ended
    }

    async fn end_pod(
        &self,
        id: EnvironmentId,
        begun: Instant,
        deadline: Instant,
        mut observation: watch::Receiver<Arc<Observation>>,
    ) -> Result<(), EnvironmentError> {
        let name = pod::name(id);
        let gently = DeleteParams { grace_period_seconds: Some(1), ..DeleteParams::default() };
        match self.cluster.call(|| self.cluster.pods.delete(&name, &gently)).await {
            Ok(_) => {}
            Err(fault) if fault.is_not_found() => return Ok(()),
            Err(fault) => return Err(fault.into_error("pod")),
        }
        let mut forced = false;
        loop {
            let look = (Instant::now() + LOOK).min(deadline);
            let absent = async {
                let missing =
                    |shown: &Arc<Observation>| shown.is_current() && !shown.environments.contains_key(&id);
                // The observer lives as long as its value; without it only looking is left.
                if observation.wait_for(missing).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            // A pod that the watch has not shown yet is absent there, too: the API server has the last word.
            let seen_absent = timeout_at(look, absent).await.is_ok();
            let Some(pod) = self.find(id).await? else { return Ok(()) };
            if Instant::now() >= deadline {
                return Err(EnvironmentError::Unavailable(format!("the pod {name} is still being ended")));
            }
            if !forced && begun.elapsed() >= FORCE {
                self.force(&name, &pod).await?;
                forced = true;
            } else if seen_absent {
                tokio::time::sleep_until(look).await;
            }
        }
    }

    /// Removes the API's entry of a pod whose node does not confirm its end.
    async fn force(&self, name: &str, pod: &Pod) -> Result<(), EnvironmentError> {
        tracing::warn!(pod = name, "the node does not confirm the end of the pod: its entry is removed");
        let forced = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() }),
            ..DeleteParams::default()
        };
        match self.cluster.call(|| self.cluster.pods.delete(name, &forced)).await {
            Ok(_) => Ok(()),
            Err(fault) if fault.is_not_found() => Ok(()),
            Err(fault) => Err(fault.into_error("pod")),
        }
    }

    async fn delete_policy(&self, id: EnvironmentId) -> Result<(), EnvironmentError> {
        self.remove_policy(&pod::name(id), None).await
    }

    /// With a `uid` only the one that has it.
    async fn remove_policy(&self, name: &str, uid: Option<String>) -> Result<(), EnvironmentError> {
        let preconditions = uid.map(|uid| Preconditions { uid: Some(uid), ..Preconditions::default() });
        let at_once = DeleteParams { preconditions, ..DeleteParams::default() };
        match self.cluster.call(|| self.cluster.policies.delete(name, &at_once)).await {
            Ok(_) => Ok(()),
            // Another server was first.
            Err(fault) if fault.is_not_found() || fault.is_conflict() => Ok(()),
            Err(fault) => Err(fault.into_error("network policy")),
        }
    }

    fn ending(&self) -> std::sync::MutexGuard<'_, BTreeMap<EnvironmentId, Instant>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An environment that has ended is not made anew under its name.
fn usable(pod: &Pod) -> Result<(), EnvironmentError> {
    match phase::read(pod, Duration::MAX, false).settled() {
        Phase::Starting { .. } | Phase::Up => Ok(()),
        Phase::Failed(reason) => Err(EnvironmentError::Refused(reason)),
        Phase::Ending => {
            let reason = Reason::new(ReasonCode::EnvironmentLost, "the pod of this name is being ended");
            Err(EnvironmentError::Refused(reason))
        }
    }
}

/// Removes network policies that a server which ended in the middle has left, and closes a namespace that somebody has opened.
async fn sweep(inner: Arc<Inner>, observation: watch::Receiver<Arc<Observation>>) {
    let mut ticks = interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut suspects = BTreeMap::new();
    loop {
        ticks.tick().await;
        {
            let shown = observation.borrow();
            if !shown.is_current() {
                continue;
            }
            // Those are told apart by the pods that exist: an id without a pod needs no clock.
            inner.ending().retain(|id, _| shown.environments.contains_key(id));
        }
        if let Err(fault) = look_through(&inner, &observation, &mut suspects).await {
            tracing::warn!(%fault, "network policies could not be looked through");
        }
    }
}

/// Removes what has been alone for long; keeps since when the others are.
async fn look_through(
    inner: &Inner,
    observation: &watch::Receiver<Arc<Observation>>,
    suspects: &mut BTreeMap<EnvironmentId, Instant>,
) -> Result<(), EnvironmentError> {
    inner.close_namespace().await?;
    let parameters = ListParams::default().labels(&selector());
    let found = inner.cluster.call(|| inner.cluster.policies.list_metadata(&parameters)).await;
    let found = found.map_err(|fault| fault.into_error("network policies"))?;
    let named = found.items.iter().filter_map(|policy| pod::environment_id(policy.metadata.name.as_deref()?));
    let alone: BTreeSet<_> = {
        let shown = observation.borrow();
        named.filter(|id| !shown.environments.contains_key(id)).collect()
    };
    suspects.retain(|id, _| alone.contains(id));
    for id in alone {
        let since = *suspects.entry(id).or_insert_with(Instant::now);
        if since.elapsed() >= ALONE && inner.find(id).await?.is_none() {
            tracing::info!(environment_id = %id, "removing a network policy without a pod");
            inner.delete_policy(id).await?;
        }
    }
    Ok(())
}

/// Resolves with the reason when an environment that was there is not, or is ending.
async fn gone(mut observation: watch::Receiver<Arc<Observation>>, id: EnvironmentId) -> String {
    let mut seen = false;
    loop {
        {
            let shown = observation.borrow_and_update();
            match shown.environments.get(&id).map(|environment| &environment.phase) {
                Some(Phase::Ending) => return "the environment is being ended".to_owned(),
                Some(Phase::Failed(reason)) => {
                    return format!("the environment has ended: {}", reason.technical_details);
                }
                Some(_) => seen = true,
                None if seen && shown.complete => return "the environment is no more".to_owned(),
                None => {}
            }
        }
        if observation.changed().await.is_err() {
            return "the server ends".to_owned();
        }
    }
}

fn internal(details: String) -> EnvironmentError {
    EnvironmentError::Refused(Reason::new(ReasonCode::Internal, details))
}
