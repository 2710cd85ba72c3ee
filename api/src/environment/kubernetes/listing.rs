//! All objects of a kind page by page, and the changes of a watch as they come together. Does not know what they are.
use std::fmt::Debug;

use futures_util::{FutureExt, Stream, StreamExt};
use kube::{
    Api, Resource,
    api::{ListParams, WatchEvent},
};
use serde::de::DeserializeOwned;

use super::cluster::{Cluster, Fault, plain};

/// Objects in one page, and changes that are taken together.
const PAGE: u32 = 500;

/// What a watch tells of an object.
pub(super) enum Change<K> {
    Put(K),
    Gone(K),
}

/// Why a watch tells no more.
pub(super) enum End {
    /// Its time is over: from the version that was seen last on.
    Over,
    /// The API server has forgotten the version: a list is needed first.
    Forgotten,
    /// It broke.
    Broken(Fault),
}

/// One page, the version it stands for, and what to ask for next if there is more.
pub(super) async fn page<K>(
    cluster: &Cluster,
    api: &Api<K>,
    mut parameters: ListParams,
) -> Result<(Vec<K>, String, Option<ListParams>), Fault>
where
    K: Clone + Debug + DeserializeOwned,
{
    parameters.limit = Some(PAGE);
    let found = cluster.once(api.list(&parameters)).await?;
    let token = found.metadata.continue_.filter(|token| !token.is_empty());
    let version = found.metadata.resource_version.unwrap_or_default();
    let next = token.map(|token| parameters.continue_token(&token));
    Ok((found.items, version, next))
}

/// Waits for a change, and takes what has come with it. Nothing is taken until this returns.
pub(super) async fn together<K: Resource>(
    mut stream: impl Stream<Item = Result<WatchEvent<K>, Fault>> + Unpin,
    version: &mut String,
) -> (Vec<Change<K>>, Option<End>) {
    let mut changes = Vec::new();
    let mut next = stream.next().await;
    loop {
        let change = match next {
            None => return (changes, Some(End::Over)),
            Some(Err(fault)) => return (changes, Some(End::Broken(fault))),
            Some(Ok(WatchEvent::Error(status))) if status.code == 410 => {
                return (changes, Some(End::Forgotten));
            }
            Some(Ok(WatchEvent::Error(status))) => {
                return (changes, Some(End::Broken(Fault::Unavailable(plain(&status.message)))));
            }
            Some(Ok(WatchEvent::Bookmark(bookmark))) => {
                *version = bookmark.metadata.resource_version;
                None
            }
            Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => Some(Change::Put(object)),
            Some(Ok(WatchEvent::Deleted(object))) => Some(Change::Gone(object)),
        };
        if let Some(change) = change {
            let (Change::Put(object) | Change::Gone(object)) = &change;
            if let Some(seen) = &object.meta().resource_version {
                version.clone_from(seen);
            }
            changes.push(change);
        }
        if changes.len() >= PAGE as usize {
            return (changes, None);
        }
        match stream.next().now_or_never() {
            Some(more) => next = more,
            None => return (changes, None),
        }
    }
}
