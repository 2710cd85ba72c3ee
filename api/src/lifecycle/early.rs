//! Attempts at agents before the backend says that their environments are up. One that starts alone is ready sooner by them; each
//! that fails costs the cluster 10 ms of a processor on which pods are being started.
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::{
    sync::{AcquireError, Semaphore, SemaphorePermit},
    time::Instant,
};

/// From when an agent may be there until the first attempt: no container is there sooner.
const HEAD_START: Duration = Duration::from_millis(300);
/// Attempts at once in the whole server, and how long each keeps its turn: 20 a second.
const TURNS: usize = 2;
pub(super) const APART: Duration = Duration::from_millis(100);
/// When more wait than this, none is tried: the turns of each would be half a second apart, where kubelet tells once a second what it has
/// started, and 20 attempts a second slow down what they wait for.
const FEW: usize = 8;

/// The attempts of one server.
pub(super) struct Early {
    turns: Semaphore,
    waiting: AtomicUsize,
}

/// One environment whose agent may be there.
pub(super) struct Waiting<'a> {
    early: &'a Early,
    first: Instant,
}

impl Early {
    pub(super) fn new() -> Self {
        Self { turns: Semaphore::new(TURNS), waiting: AtomicUsize::new(0) }
    }

    pub(super) fn join(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting { early: self, first: Instant::now() + HEAD_START }
    }
}

impl<'a> Waiting<'a> {
    pub(super) fn is_one_of_few(&self) -> bool {
        self.early.waiting.load(Ordering::Relaxed) <= FEW
    }

    /// Until an attempt may be made; the next comes when this is dropped.
    pub(super) async fn turn(&self) -> Result<SemaphorePermit<'a>, AcquireError> {
        tokio::time::sleep_until(self.first).await;
        self.early.turns.acquire().await
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.early.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_many_wait_none_is_tried() {
        let early = Early::new();
        let mut waiting: Vec<_> = (0..FEW).map(|_| early.join()).collect();
        assert!(waiting.iter().all(Waiting::is_one_of_few));
        waiting.push(early.join());
        assert!(!waiting.iter().any(Waiting::is_one_of_few));
        waiting.pop();
        assert!(waiting.iter().all(Waiting::is_one_of_few));
    }
}
