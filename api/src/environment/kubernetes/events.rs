//! The events of pods, followed as they come: what a pod's status does not say. Listing them by pod would have the API server read all
//! of them each time. Does not know what they mean.
use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Event;
use kube::api::{ListParams, WatchEvent, WatchParams};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::cluster::{Cluster, Fault, backoff, plain};
use crate::environment::Observation;

/// Objects in one answer, and in one message to who hears them.
const PAGE: u32 = 500;
/// Messages that wait for who hears them; then nothing more is read.
pub(super) const WAITING: usize = 8;
/// A watch is opened anew after this; the API server ends it, or this side a little later.
const WATCH: Duration = Duration::from_secs(240);
const GRACE: Duration = Duration::from_secs(10);
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
    while !out.is_closed() && observation.wait_for(|shown| can_be_seen(shown)).await.is_ok() {
        // A stream that is silent says nothing; whether the API server answers is found out by who watches the pods.
        let away = observation.wait_for(|shown| !can_be_seen(shown));
        let heard = tokio::select! {
            heard = timeout(WATCH + GRACE, listen(&cluster, version.take(), &out)) => heard.unwrap_or(Ok(None)),
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

fn can_be_seen(shown: &Observation) -> bool {
    shown.complete && shown.unavailable.is_none()
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
    let parameters = WatchParams { field_selector: Some(OF_PODS.to_owned()), ..WatchParams::default() }
        .timeout(u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX));
    let stream = match cluster.once(cluster.events.watch(&parameters, &version)).await {
        Ok(stream) => stream,
        Err(Fault::Answer(status)) if status.code == 410 => return Ok(None),
        Err(fault) => return Err(fault),
    };
    let mut stream = std::pin::pin!(stream.map_err(|error| cluster.fault(error).0).fuse());
    loop {
        let mut batch = Vec::new();
        let mut next = stream.next().await;
        // What has come together is told together.
        let end = loop {
            match next {
                None => break Some(Ok(Some(version.clone()))),
                Some(Err(fault)) => break Some(Err(fault)),
                Some(Ok(WatchEvent::Error(status))) if status.code == 410 => break Some(Ok(None)),
                Some(Ok(WatchEvent::Error(status))) => {
                    break Some(Err(Fault::Unavailable(plain(&status.message))));
                }
                Some(Ok(WatchEvent::Bookmark(bookmark))) => version = bookmark.metadata.resource_version,
                Some(Ok(WatchEvent::Deleted(event))) => {
                    version = event.metadata.resource_version.unwrap_or(version);
                }
                Some(Ok(WatchEvent::Added(event) | WatchEvent::Modified(event))) => {
                    version = event.metadata.resource_version.clone().unwrap_or(version);
                    batch.push(event);
                }
            }
            if batch.len() >= PAGE as usize {
                break None;
            }
            match stream.next().now_or_never() {
                Some(more) => next = more,
                None => break None,
            }
        };
        tell(out, batch).await?;
        if let Some(end) = end {
            return end;
        }
    }
}

/// Tells all events that there are; returns the version to watch from.
async fn list(cluster: &Cluster, out: &mpsc::Sender<Vec<Event>>) -> Result<String, Fault> {
    let mut parameters =
        ListParams { field_selector: Some(OF_PODS.to_owned()), limit: Some(PAGE), ..ListParams::default() };
    loop {
        let page = cluster.once(cluster.events.list(&parameters)).await?;
        tell(out, page.items).await?;
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters.continue_token = Some(token),
            None => return Ok(page.metadata.resource_version.unwrap_or_default()),
        }
    }
}

async fn tell(out: &mpsc::Sender<Vec<Event>>, events: Vec<Event>) -> Result<(), Fault> {
    if events.is_empty() {
        return Ok(());
    }
    out.send(events).await.map_err(|_| Fault::Unavailable("nobody hears them any more".to_owned()))
}
