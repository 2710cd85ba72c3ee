//! One watch for all pods. It decides what has stood long enough to be a failure; what to do about it is decided above.
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{ListParams, WatchParams};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    cluster::{Cluster, Fault, backoff, plain},
    listing::{Change, End, page, together},
    phase::{self, Doubt},
    pod::{self, ENVIRONMENT, MANAGED, SESSION},
};
use crate::{
    environment::{Observation, Observed, Phase},
    identity::EnvironmentId,
    reason::{Reason, ReasonCode},
};

/// A watch is opened anew after this, seconds; the API server sends a bookmark about every minute.
const WATCH: u32 = 240;
/// A watch that brings not even a bookmark for this long has lost the API server, whatever its connection says.
const SILENCE: Duration = Duration::from_secs(100);
/// A watch that ends sooner than this without a word is no watch.
const SHORT: Duration = Duration::from_secs(1);
/// How often the API server is asked whether it is there: a watch that is silent says nothing.
const PROBE: Duration = Duration::from_secs(3);
/// How often doubts are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Events that are kept for pods that are not known yet, the latest.
const UNMATCHED: usize = 256;
/// A pod that has not started after this, and whose last event is a warning, will not start in an exam's minute.
const WARNED: Duration = Duration::from_secs(45);

/// What is remembered of a pod.
struct Seen {
    pod: Pod,
    since: Instant,
    doubt: Option<(ReasonCode, Instant)>,
    /// From its events: the session's image is there.
    fetched: bool,
    /// Its last event if that was a warning, or the one that says who took it away.
    warning: Option<(String, String)>,
    /// When its last event was: seconds, because that is all that kubelet says.
    heard: Option<i64>,
}

/// All pods of one namespace.
pub(super) struct Observer {
    cluster: Arc<Cluster>,
    unschedulable: Duration,
    out: watch::Sender<Arc<Observation>>,
    /// Of pods, from [`super::events`].
    events: mpsc::Receiver<Vec<Event>>,
    /// Of pods that the watch has not shown yet: the two come on ways of their own.
    unmatched: VecDeque<Event>,
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
        events: mpsc::Receiver<Vec<Event>>,
    ) -> Self {
        Self {
            cluster,
            unschedulable,
            out,
            events,
            unmatched: VecDeque::new(),
            pods: BTreeMap::new(),
            complete: false,
            unavailable: None,
        }
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
            loop {
                let begun = Instant::now();
                let stop = self.watch(&version).await;
                if begun.elapsed() >= SHORT {
                    failures = 0;
                } else {
                    // The list is answered and the watch is not: neither is to be asked for without a pause.
                    failures += 1;
                    tokio::time::sleep(backoff(failures)).await;
                }
                match stop {
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
        self.unavailable = Some(why.clone());
        // The rest as it was seen last: what stood then has not stood on while nobody could see it.
        self.out.send_if_modified(|shown| {
            let changed = shown.unavailable.as_ref() != Some(&why);
            if changed {
                Arc::make_mut(shown).unavailable = Some(why);
            }
            changed
        });
    }

    /// Everything there is, and the version to watch from.
    async fn list(&mut self) -> Result<String, Fault> {
        let mut found = BTreeSet::new();
        let mut parameters = ListParams::default().labels(&selector());
        let version = loop {
            let (pods, version, next) = page(&self.cluster, &self.cluster.pods, parameters).await?;
            for pod in pods {
                found.extend(phase::environment_id(&pod));
                self.put(pod);
            }
            match next {
                Some(next) => parameters = next,
                None => break version,
            }
        };
        self.pods.retain(|id, _| found.contains(id));
        if self.unavailable.take().is_some() {
            tracing::info!("the cluster can be seen again");
            for (_, since) in self.pods.values_mut().filter_map(|seen| seen.doubt.as_mut()) {
                *since = Instant::now();
            }
        }
        self.complete = true;
        self.publish();
        Ok(version)
    }

    async fn watch(&mut self, version: &str) -> Stop {
        let parameters = WatchParams::default().labels(&selector()).timeout(WATCH);
        let cluster = Arc::clone(&self.cluster);
        let mut version = version.to_owned();
        let stream = match cluster.once(cluster.pods.watch(&parameters, &version)).await {
            Ok(stream) => stream,
            Err(fault) => return Stop::Lost(Some(fault.to_string())),
        };
        let mut stream = std::pin::pin!(stream.map_err(|error| cluster.fault(error).0));
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probe = std::pin::pin!(probe(&cluster).fuse());
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                (changes, end) = together(&mut stream, &mut version) => {
                    heard = Instant::now();
                    for change in changes {
                        match change {
                            Change::Put(pod) => self.put(pod),
                            Change::Gone(pod) => self.remove(&pod),
                        }
                    }
                    match end {
                        None => self.publish(),
                        Some(End::Over) => {
                            self.publish();
                            return Stop::Over(version);
                        }
                        Some(End::Forgotten) => return Stop::Lost(None),
                        Some(End::Broken(fault)) => return Stop::Lost(Some(fault.to_string())),
                    }
                }
                _ = ticks.tick() => {
                    if self.pods.values().any(|seen| seen.doubt.is_some()) {
                        self.publish();
                    }
                }
                () = tokio::time::sleep_until(heard + SILENCE) => {
                    return Stop::Lost(Some(format!("the watch was silent for {} s", SILENCE.as_secs())));
                }
                why = &mut probe => {
                    self.away(why.clone());
                    return Stop::Lost(Some(why));
                }
                Some(events) = self.events.recv() => {
                    let mut news = false;
                    for event in events {
                        news |= self.hear(event);
                    }
                    if news {
                        self.publish();
                    }
                }
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
                let mut seen = Seen::new(pod);
                for event in &self.unmatched {
                    if event.involved_object.uid == seen.pod.metadata.uid {
                        seen.hear(event);
                    }
                }
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

    /// Whether it says something new of a pod that is there.
    fn hear(&mut self, event: Event) -> bool {
        let about = &event.involved_object;
        let Some(id) = about.name.as_deref().and_then(pod::environment_id) else { return false };
        if let Some(seen) = self.pods.get_mut(&id).filter(|seen| seen.pod.metadata.uid == about.uid) {
            return seen.hear(&event);
        }
        if self.unmatched.len() >= UNMATCHED {
            self.unmatched.pop_front();
        }
        self.unmatched.push_back(event);
        false
    }
}

impl Seen {
    fn new(pod: Pod) -> Self {
        Self { pod, since: Instant::now(), doubt: None, fetched: false, warning: None, heard: None }
    }

    /// Whether the event changes what is known.
    fn hear(&mut self, event: &Event) -> bool {
        let reason = event.reason.as_deref().unwrap_or_default();
        let of_session = event.involved_object.field_path.as_ref().is_some_and(|path| *path == of(SESSION));
        let fetched = of_session && matches!(reason, "Pulled" | "Created" | "Started") && !self.fetched;
        self.fetched |= fetched;
        let last = event.last_timestamp.as_ref().map(|time| time.0.as_second());
        let when = last.or(event.event_time.as_ref().map(|time| time.0.as_second()));
        let taking_away = is_taking_away(reason);
        let known = self.warning.as_ref().is_some_and(|(reason, _)| is_taking_away(reason));
        // Who took a pod away stays the reason, whatever comes after it.
        if !taking_away && (known || when < self.heard) {
            return fetched;
        }
        self.heard = when;
        let warning = (taking_away || event.type_.as_deref() == Some("Warning"))
            .then(|| (reason.to_owned(), plain(event.message.as_deref().unwrap_or_default())));
        let changed = warning != self.warning;
        self.warning = warning;
        fetched || changed
    }

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

    /// What the status of a pod that has a node does not say: its network, its volumes, the hook that brings the agent.
    fn doubtful_events(&self) -> Option<Doubt> {
        let (reason, message) = self.warning.as_ref().filter(|(reason, _)| reason != "FailedScheduling")?;
        let (code, patience) = match reason.as_str() {
            "FailedPostStartHook" => (ReasonCode::EnvironmentCrashed, Duration::ZERO),
            _ if self.since.elapsed() >= WARNED => (ReasonCode::StartTimeout, Duration::ZERO),
            _ => (ReasonCode::StartTimeout, Duration::MAX),
        };
        let details = format!("the pod does not start: {reason}: {message}");
        Some(Doubt { reason: Reason::new(code, details), patience })
    }
}

/// What an event's field path says of a container.
fn of(container: &str) -> String {
    format!("spec.containers{{{container}}}")
}

/// Reasons of events that say who ended a pod.
fn is_taking_away(reason: &str) -> bool {
    matches!(reason, "Evicted" | "Preempted" | "Preempting" | "NodeShutdown")
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(second: u32, kind: &str, reason: &str) -> Event {
        serde_json::from_value(json!({
            "metadata": {},
            "involvedObject": { "fieldPath": of(SESSION) },
            "type": kind,
            "reason": reason,
            "message": "m",
            "lastTimestamp": format!("2026-01-01T00:00:{second:02}Z"),
        }))
        .unwrap()
    }

    fn heard(events: &[(u32, &str, &str)]) -> (bool, Option<String>) {
        let mut seen = Seen::new(Pod::default());
        for (second, kind, reason) in events {
            seen.hear(&event(*second, kind, reason));
        }
        (seen.fetched, seen.warning.map(|(reason, _)| reason))
    }

    #[test]
    fn a_warning_stands_until_something_newer_happens() {
        assert_eq!(heard(&[(1, "Warning", "FailedMount")]), (false, Some("FailedMount".into())));
        assert_eq!(heard(&[(1, "Warning", "FailedMount"), (2, "Normal", "Pulled")]), (true, None));
        assert_eq!(heard(&[(2, "Normal", "Pulled"), (1, "Warning", "FailedMount")]), (true, None));
    }

    #[test]
    fn who_took_a_pod_away_stays_its_reason() {
        for kind in ["Warning", "Normal"] {
            let events = [(3, "Normal", "Started"), (2, kind, "Evicted"), (9, "Warning", "FailedKillPod")];
            assert_eq!(heard(&events), (true, Some("Evicted".into())));
        }
    }

    #[test]
    fn what_is_said_again_is_no_news() {
        let mut seen = Seen::new(Pod::default());
        assert!(seen.hear(&event(1, "Warning", "FailedMount")));
        assert!(!seen.hear(&event(2, "Warning", "FailedMount")));
        assert!(seen.hear(&event(2, "Normal", "Pulled")));
        assert!(!seen.hear(&event(3, "Normal", "Created")));
    }
}
