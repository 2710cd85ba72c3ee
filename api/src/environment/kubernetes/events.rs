//! The events of pods, followed as they come: what a pod's status does not say. Listing them by pod would have the API server read all
//! of them each time. Does not know what they mean.
use std::{sync::Arc, time::Duration};

use futures_util::TryStreamExt;
use k8s_openapi::api::core::v1::Event;
use kube::api::{ListParams, WatchParams};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    cluster::{Cluster, Fault, backoff},
    listing::{Change, End, page, together},
};
use crate::environment::Observation;

/// Messages that wait for who hears them; then nothing more is read.
pub(super) const WAITING: usize = 8;
/// A watch is opened anew after this, seconds: the API server ends it, or this side a little later.
const WATCH: u32 = 240;
const LONGEST: Duration = Duration::from_secs(WATCH as u64 + 10);
/// Events of other objects are not asked for.
const OF_PODS: &str = "involvedObject.kind=Pod";

/// Tells events to `out` until nobody hears them: each at least once, all of them again after a gap. Begins, and begins again, after the
/// pods have been listed, so that the hearer knows whose they are.
pub(super) async fn follow(
    cluster: Arc<Cluster>,
    mut observation: watch::Receiver<Arc<Observation>>,
    out: mpsc::Sender<Vec<Event>>,
) {
    let mut version = None;
    let mut failures = 0;
    while !out.is_closed() && observation.wait_for(|shown| shown.is_current()).await.is_ok() {
        // A stream that is silent says nothing; whether the API server answers is found out by who watches the pods.
        let away = observation.wait_for(|shown| !shown.is_current());
        let heard = tokio::select! {
            heard = timeout(LONGEST, listen(&cluster, version.take(), &out)) => heard.unwrap_or(Ok(None)),
            _ = away => Ok(None),
        };
        match heard {
            Ok(next) => {
                failures = 0;
                version = next;
            }
            Err(fault) => {
                failures += 1;
                tracing::info!(%fault, "the events of pods are listed anew");
            }
        }
        tokio::time::sleep(backoff(failures)).await;
    }
}

/// Lists all events if there is no version to go on from, and watches; returns the version to go on from, unless it is forgotten.
async fn listen(
    cluster: &Cluster,
    version: Option<String>,
    out: &mpsc::Sender<Vec<Event>>,
) -> Result<Option<String>, Fault> {
    let mut version = match version {
        Some(version) => version,
        None => list(cluster, out).await?,
    };
    let parameters = WatchParams::default().fields(OF_PODS).timeout(WATCH);
    let stream = match cluster.once(cluster.events.watch(&parameters, &version)).await {
        Ok(stream) => stream,
        Err(Fault::Answer(status)) if status.code == 410 => return Ok(None),
        Err(fault) => return Err(fault),
    };
    let mut stream = std::pin::pin!(stream.map_err(|error| cluster.fault(error).0));
    loop {
        let (changes, end) = together(&mut stream, &mut version).await;
        let events = changes.into_iter().filter_map(|change| match change {
            Change::Put(event) => Some(event),
            Change::Gone(_) => None,
        });
        tell(out, events.collect()).await?;
        match end {
            None => {}
            Some(End::Over) => return Ok(Some(version)),
            Some(End::Forgotten) => return Ok(None),
            Some(End::Broken(fault)) => return Err(fault),
        }
    }
}

/// Tells all events that there are; returns the version to watch from.
async fn list(cluster: &Cluster, out: &mpsc::Sender<Vec<Event>>) -> Result<String, Fault> {
    let mut parameters = ListParams::default().fields(OF_PODS);
    loop {
        let (events, version, next) = page(cluster, &cluster.events, parameters).await?;
        tell(out, events).await?;
        match next {
            Some(next) => parameters = next,
            None => return Ok(version),
        }
    }
}

async fn tell(out: &mpsc::Sender<Vec<Event>>, events: Vec<Event>) -> Result<(), Fault> {
    if events.is_empty() {
        return Ok(());
    }
    out.send(events).await.map_err(|_| Fault::Unavailable("nobody hears them any more".to_owned()))
}
