//! One watch for all pods. It decides what has stood long enough to be a failure; what to do about it is decided above.
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt, StreamExt, TryStreamExt,
    future::{Fuse, FusedFuture},
};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{ListParams, WatchEvent, WatchParams};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    cluster::{Cluster, Fault, backoff, plain},
    phase::{self, Doubt},
    pod::{ENVIRONMENT, MANAGED, SESSION},
};
use crate::{
    environment::{Observation, Observed, Phase},
    identity::EnvironmentId,
    reason::{Reason, ReasonCode},
};

/// Objects in one answer.
const PAGE: u32 = 500;
/// A watch is opened anew after this, seconds; the API server sends a bookmark about every minute.
const WATCH: u32 = 240;
/// How often the API server is asked whether it is there: a watch that is silent says nothing.
const PROBE: Duration = Duration::from_secs(3);
/// How often doubts are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// From what age on a pod is slow to start, and how often the events of one are read.
const SLOW: Duration = Duration::from_secs(2);
/// Pods whose events are read in one go.
const ASKED: usize = 8;
/// A pod that has not started after this, and whose last event is a warning, will not start in an exam's minute.
const WARNED: Duration = Duration::from_secs(45);

/// What is remembered of a pod.
struct Seen {
    pod: Pod,
    since: Instant,
    doubt: Option<(ReasonCode, Instant)>,
    /// From its events: the session's image is there.
    fetched: bool,
    warning: Option<(String, String)>,
    /// When its events were read.
    asked: Option<Instant>,
}

/// All pods of one namespace.
pub(super) struct Observer {
    cluster: Arc<Cluster>,
    unschedulable: Duration,
    out: watch::Sender<Arc<Observation>>,
    pods: BTreeMap<EnvironmentId, Seen>,
    complete: bool,
    unavailable: Option<String>,
}

/// Why watching stopped.
enum Stop {
    /// Its time was over: from the version that was seen last on.
    Over(String),
    /// A list is needed first.
    Lost(Option<String>),
}

/// Selects what [`Observer`] looks at.
pub(super) fn selector() -> String {
    format!("{}={},{ENVIRONMENT}", MANAGED.0, MANAGED.1)
}

impl Observer {
    pub(super) fn new(
        cluster: Arc<Cluster>,
        unschedulable: Duration,
        out: watch::Sender<Arc<Observation>>,
    ) -> Self {
        Self { cluster, unschedulable, out, pods: BTreeMap::new(), complete: false, unavailable: None }
    }

    /// Lists, watches, and lists again, for ever.
    pub(super) async fn run(mut self) {
        let mut failures = 0;
        loop {
            let mut version = match self.list().await {
                Ok(version) => version,
                Err(fault) => {
                    failures += 1;
                    self.away(fault.to_string());
                    tokio::time::sleep(backoff(failures)).await;
                    continue;
                }
            };
            failures = 0;
            loop {
                match self.watch(&version).await {
                    Stop::Over(next) => version = next,
                    Stop::Lost(why) => {
                        tracing::info!(
                            why = why.as_deref().unwrap_or("the version is too old"),
                            "listing pods anew"
                        );
                        break;
                    }
                }
            }
        }
    }

    fn away(&mut self, why: String) {
        if self.unavailable.is_none() {
            tracing::warn!(%why, "the cluster cannot be seen");
        }
        self.unavailable = Some(why);
        self.publish();
    }

    /// Everything there is, and the version to watch from.
    async fn list(&mut self) -> Result<String, Fault> {
        let mut found = BTreeSet::new();
        let mut parameters =
            ListParams { label_selector: Some(selector()), limit: Some(PAGE), ..ListParams::default() };
        let version = loop {
            let page = self.cluster.once(self.cluster.pods.list(&parameters)).await?;
            for pod in page.items {
                found.extend(phase::environment_id(&pod));
                self.put(pod);
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters.continue_token = Some(token),
                None => break page.metadata.resource_version.unwrap_or_default(),
            }
        };
        self.pods.retain(|id, _| found.contains(id));
        if self.unavailable.take().is_some() {
            tracing::info!("the cluster can be seen again");
        }
        self.complete = true;
        self.publish();
        Ok(version)
    }

    async fn watch(&mut self, version: &str) -> Stop {
        let parameters =
            WatchParams { label_selector: Some(selector()), ..WatchParams::default() }.timeout(WATCH);
        let cluster = Arc::clone(&self.cluster);
        let mut version = version.to_owned();
        let stream = match cluster.once(cluster.pods.watch(&parameters, &version)).await {
            Ok(stream) => stream,
            Err(fault) => return Stop::Lost(Some(fault.to_string())),
        };
        let mut stream = std::pin::pin!(stream.map_err(|error| cluster.fault(error).0.to_string()).fuse());
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probe = std::pin::pin!(probe(&cluster).fuse());
        let mut asking = Box::pin(Fuse::terminated());
        loop {
            tokio::select! {
                event = stream.next() => {
                    let mut next = event;
                    // What has come together is shown together.
                    loop {
                        match next {
                            None => {
                                self.publish();
                                return Stop::Over(version);
                            }
                            Some(Err(why)) => return Stop::Lost(Some(why)),
                            Some(Ok(WatchEvent::Error(status))) if status.code == 410 => return Stop::Lost(None),
                            Some(Ok(WatchEvent::Error(status))) => return Stop::Lost(Some(plain(&status.message))),
                            Some(Ok(WatchEvent::Bookmark(bookmark))) => version = bookmark.metadata.resource_version,
                            Some(Ok(WatchEvent::Added(pod) | WatchEvent::Modified(pod))) => {
                                version = pod.metadata.resource_version.clone().unwrap_or(version);
                                self.put(pod);
                            }
                            Some(Ok(WatchEvent::Deleted(pod))) => {
                                version = pod.metadata.resource_version.clone().unwrap_or(version);
                                self.remove(&pod);
                            }
                        }
                        match stream.next().now_or_never() {
                            Some(more) => next = more,
                            None => break,
                        }
                    }
                    self.publish();
                }
                _ = ticks.tick() => {
                    if self.pods.values().any(|seen| seen.doubt.is_some()) {
                        self.publish();
                    }
                    if asking.is_terminated() {
                        let unclear = self.unclear();
                        if !unclear.is_empty() {
                            asking.set(events(&cluster, unclear).fuse());
                        }
                    }
                }
                why = &mut probe => {
                    self.away(why.clone());
                    return Stop::Lost(Some(why));
                }
                found = &mut asking => self.hear(&found),
            }
        }
    }

    fn put(&mut self, mut pod: Pod) {
        let Some(id) = phase::environment_id(&pod) else {
            tracing::warn!(
                pod = pod.metadata.name,
                "a pod with our label and no environment's id is left alone"
            );
            return;
        };
        pod.metadata.managed_fields = None;
        match self.pods.get_mut(&id) {
            Some(seen) if seen.pod.metadata.uid == pod.metadata.uid => seen.pod = pod,
            _ => {
                let seen = Seen {
                    pod,
                    since: Instant::now(),
                    doubt: None,
                    fetched: false,
                    warning: None,
                    asked: None,
                };
                self.pods.insert(id, seen);
            }
        }
    }

    fn remove(&mut self, pod: &Pod) {
        let Some(id) = phase::environment_id(pod) else { return };
        if self.pods.get(&id).is_some_and(|seen| seen.pod.metadata.uid == pod.metadata.uid) {
            self.pods.remove(&id);
        }
    }

    fn publish(&mut self) {
        let unschedulable = self.unschedulable;
        let environments: BTreeMap<_, _> =
            self.pods.iter_mut().map(|(id, seen)| (*id, seen.observed(unschedulable))).collect();
        let (complete, unavailable) = (self.complete, self.unavailable.clone());
        self.out.send_if_modified(|shown| {
            let now = Observation { complete, unavailable, environments };
            let changed = **shown != now;
            if changed {
                *shown = Arc::new(now);
            }
            changed
        });
    }

    /// Pods whose events are needed: those that take longer to start than most, and those that ended and do not say why.
    fn unclear(&mut self) -> Vec<(EnvironmentId, String)> {
        let now = Instant::now();
        let shown = self.out.borrow();
        let starting = |id: &EnvironmentId| {
            shown
                .environments
                .get(id)
                .is_some_and(|one| matches!(one.phase, Phase::Starting { reachable: true, .. }))
        };
        let mut unclear = Vec::new();
        for (id, seen) in &mut self.pods {
            let ended = seen.doubt.is_some_and(|(code, _)| code == ReasonCode::EnvironmentCrashed);
            let slow = starting(id) && now.duration_since(seen.since) > SLOW;
            let due = seen.asked.is_none_or(|asked| now.duration_since(asked) > SLOW);
            if (ended || slow) && due && unclear.len() < ASKED {
                seen.asked = Some(now);
                unclear.extend(seen.pod.metadata.uid.clone().map(|uid| (*id, uid)));
            }
        }
        unclear
    }

    fn hear(&mut self, found: &[(EnvironmentId, Vec<Event>)]) {
        for (id, events) in found {
            let Some(seen) = self.pods.get_mut(id) else { continue };
            let of_session = format!("spec.containers{{{SESSION}}}");
            seen.fetched |= events.iter().any(|event| {
                event.involved_object.field_path.as_deref() == Some(&of_session)
                    && matches!(event.reason.as_deref(), Some("Pulled" | "Created" | "Started"))
            });
            let when = |event: &&Event| {
                let last = event.last_timestamp.as_ref().map(|time| time.0);
                last.or(event.event_time.as_ref().map(|time| time.0))
            };
            let taken = events.iter().find(|event| event.reason.as_deref().is_some_and(is_taking_away));
            let last = taken.or_else(|| events.iter().max_by_key(when));
            seen.warning = last.filter(|event| event.type_.as_deref() == Some("Warning")).map(|event| {
                let message = plain(event.message.as_deref().unwrap_or_default());
                (event.reason.clone().unwrap_or_default(), message)
            });
        }
        self.publish();
    }
}

impl Seen {
    fn observed(&mut self, unschedulable: Duration) -> Observed {
        let reading = phase::read(&self.pod, unschedulable, self.fetched);
        let doubt = match (&reading.doubt, &reading.phase) {
            (Some(doubt), _) if doubt.reason.code == ReasonCode::EnvironmentCrashed => {
                self.taken_away().or(reading.doubt)
            }
            (None, Phase::Starting { .. }) => self.doubtful_events(),
            _ => reading.doubt,
        };
        let since = match (&doubt, self.doubt) {
            (Some(doubt), Some((code, since))) if code == doubt.reason.code => since,
            _ => Instant::now(),
        };
        self.doubt = doubt.as_ref().map(|doubt| (doubt.reason.code, since));
        let phase = match doubt {
            Some(doubt) if since.elapsed() >= doubt.patience => Phase::Failed(doubt.reason),
            _ => reading.phase,
        };
        phase::observed(&self.pod, phase)
    }

    /// A pod that kubelet evicts, and whose processes then end as they are told to, looks as if it had ended by itself.
    fn taken_away(&self) -> Option<Doubt> {
        let (reason, message) = self.warning.as_ref().filter(|(reason, _)| is_taking_away(reason))?;
        let details = format!("the pod was taken away: {reason}: {message}");
        Some(Doubt { reason: Reason::new(ReasonCode::EnvironmentLost, details), patience: Duration::ZERO })
    }

    /// What the pod's status does not say: its network, its volumes, the hook that brings the agent.
    fn doubtful_events(&self) -> Option<Doubt> {
        let (reason, message) = self.warning.as_ref()?;
        let (code, patience) = match reason.as_str() {
            "FailedPostStartHook" => (ReasonCode::EnvironmentCrashed, Duration::ZERO),
            _ => (ReasonCode::StartTimeout, WARNED.saturating_sub(self.since.elapsed())),
        };
        Some(Doubt {
            reason: Reason::new(code, format!("the pod does not start: {reason}: {message}")),
            patience,
        })
    }
}

/// Reasons of events that say who ended a pod.
fn is_taking_away(reason: &str) -> bool {
    matches!(reason, "Evicted" | "Preempted" | "Preempting" | "NodeShutdown" | "TaintManagerEviction")
}

/// Resolves when the API server does not answer.
async fn probe(cluster: &Cluster) -> String {
    // From the API server's memory; nothing of it is used.
    let parameters = ListParams { label_selector: Some(selector()), limit: Some(1), ..ListParams::default() };
    loop {
        tokio::time::sleep(PROBE).await;
        let parameters = parameters.clone().match_any();
        if let Err(fault) = cluster.once(cluster.pods.list_metadata(&parameters)).await {
            return fault.to_string();
        }
    }
}

/// The events of some pods.
async fn events(cluster: &Cluster, pods: Vec<(EnvironmentId, String)>) -> Vec<(EnvironmentId, Vec<Event>)> {
    let mut found = Vec::new();
    for (id, uid) in pods {
        let parameters = ListParams {
            field_selector: Some(format!("involvedObject.uid={uid}")),
            limit: Some(50),
            ..ListParams::default()
        };
        match cluster.once(cluster.events.list(&parameters)).await {
            Ok(events) => found.push((id, events.items)),
            Err(fault) => tracing::debug!(%fault, environment_id = %id, "no events"),
        }
    }
    found
}
