//! The events of pods, followed as they come: what a pod's status does not say. Listing them by pod would have the API server read all
//! of them each time. Does not know what they mean.
use std::sync::Arc;

use futures_util::{FutureExt, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Event;
use kube::api::{ListParams, WatchEvent, WatchParams};
use tokio::sync::{mpsc, watch};

use super::cluster::{Cluster, Fault, backoff, plain};
use crate::environment::Observation;

/// Objects in one answer, and in one message to who hears them.
const PAGE: u32 = 500;
/// Messages that wait for who hears them; then nothing more is read.
pub(super) const WAITING: usize = 8;
/// A watch is opened anew after this, seconds.
const WATCH: u32 = 240;
/// Events of other objects are not asked for.
const OF_PODS: &str = "involvedObject.kind=Pod";

/// From where on events are to be heard.
enum From {
    /// All that there are, which may be some that were missed.
    All,
    /// None was missed; the API server has forgotten the last version.
    Now,
    Version(String),
}

/// Tells events to `out` until nobody hears them: each at least once, but for what comes while a watch on which nothing came for long
/// is opened anew. Begins, and begins again, after the pods have been listed, so that the hearer knows whose they are.
pub(super) async fn follow(
    cluster: Arc<Cluster>,
    mut observation: watch::Receiver<Arc<Observation>>,
    out: mpsc::Sender<Vec<Event>>,
) {
    let mut from = From::All;
    let mut failures = 0;
    while !out.is_closed()
        && observation.wait_for(|shown| shown.complete && shown.unavailable.is_none()).await.is_ok()
    {
        match listen(&cluster, from, &out).await {
            Ok(next) => {
                failures = 0;
                from = next;
            }
            Err(fault) => {
                failures += 1;
                tracing::info!(%fault, "the events of pods are listed anew");
                from = From::All;
            }
        }
        tokio::time::sleep(backoff(failures)).await;
    }
}

/// One watch; returns from where to go on.
async fn listen(cluster: &Cluster, from: From, out: &mpsc::Sender<Vec<Event>>) -> Result<From, Fault> {
    let mut version = match from {
        From::All => list(cluster, PAGE, Some(out)).await?,
        From::Now => list(cluster, 1, None).await?,
        From::Version(version) => version,
    };
    let parameters =
        WatchParams { field_selector: Some(OF_PODS.to_owned()), ..WatchParams::default() }.timeout(WATCH);
    let stream = match cluster.once(cluster.events.watch(&parameters, &version)).await {
        Ok(stream) => stream,
        Err(Fault::Answer(status)) if status.code == 410 => return Ok(From::Now),
        Err(fault) => return Err(fault),
    };
    let mut stream = std::pin::pin!(stream.map_err(|error| cluster.fault(error).0).fuse());
    loop {
        let mut batch = Vec::new();
        let mut next = stream.next().await;
        // What has come together is told together.
        let end = loop {
            match next {
                None => break Some(Ok(From::Version(version.clone()))),
                Some(Err(fault)) => break Some(Err(fault)),
                Some(Ok(WatchEvent::Error(status))) if status.code == 410 => break Some(Ok(From::Now)),
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

/// The version to watch from; with somebody to tell, of all events that there are.
async fn list(cluster: &Cluster, page: u32, out: Option<&mpsc::Sender<Vec<Event>>>) -> Result<String, Fault> {
    let mut parameters =
        ListParams { field_selector: Some(OF_PODS.to_owned()), limit: Some(page), ..ListParams::default() };
    loop {
        let found = cluster.once(cluster.events.list(&parameters)).await?;
        let more = found.metadata.continue_.filter(|token| !token.is_empty());
        if let Some(out) = out {
            tell(out, found.items).await?;
        }
        match more.filter(|_| out.is_some()) {
            Some(token) => parameters.continue_token = Some(token),
            None => return Ok(found.metadata.resource_version.unwrap_or_default()),
        }
    }
}

async fn tell(out: &mpsc::Sender<Vec<Event>>, events: Vec<Event>) -> Result<(), Fault> {
    if events.is_empty() {
        return Ok(());
    }
    out.send(events).await.map_err(|_| Fault::Unavailable("nobody hears them any more".to_owned()))
}
