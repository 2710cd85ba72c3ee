//! What a client has sent and its process has not taken yet, and the window that follows from it.
//!
//! russh grants window when data arrives, not when it is consumed, and one target window serves all channels of a
//! connection. [`Load`] turns the bytes that wait on a connection into that target and into a pace for reading its
//! socket: the window never closes for good, because only data arriving on a channel makes russh look at it again.
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use carrel_agent::flow::Blocks;
use tokio::sync::Notify;

/// The window of an unhurried channel, bytes.
pub const FULL_WINDOW: u32 = 4 << 20;
/// From here on a connection's channels are granted [`TRICKLE_WINDOW`].
const HIGH_MARK: usize = 1 << 20;
/// Keeps russh asking: data still arrives, two packets a round trip. Less would cut the packets of every transfer that the process takes
/// more slowly than the client sends.
const TRICKLE_WINDOW: u32 = 64 << 10;
/// From here on, a full window later, reads of the socket are paced and the window is [`DRIP_WINDOW`].
const STALL_MARK: usize = HIGH_MARK + FULL_WINDOW as usize;
/// With paced reads at most 400 bytes a second still arrive for a process that reads nothing.
const DRIP_WINDOW: u32 = 2;
/// What a connection may make us hold: the first window of each of its channels, and as much again as one stalled channel takes. A client that sends more ignores its window.
pub const CONNECTION_LIMIT: usize = FULL_WINDOW as usize * super::CHANNELS_PER_CONNECTION + 2 * STALL_MARK;

/// Bytes waiting on all channels of one connection.
#[derive(Debug, Default)]
pub struct Load(AtomicUsize);

impl Load {
    /// The window to grant next.
    pub fn target(&self) -> u32 {
        match self.0.load(Ordering::Relaxed) {
            0..HIGH_MARK => FULL_WINDOW,
            HIGH_MARK..STALL_MARK => TRICKLE_WINDOW,
            _ => DRIP_WINDOW,
        }
    }

    /// Should reads of the socket be paced?
    pub fn paced(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= STALL_MARK
    }

    /// More than a client that keeps to its windows can have sent?
    pub fn exceeded(&self) -> bool {
        self.0.load(Ordering::Relaxed) > CONNECTION_LIMIT
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    fn take(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct State {
    bytes: Blocks,
    eof: bool,
    closed: bool,
}

/// One channel's queue. Its length is bounded by the windows granted ([`Load`]); small packets are joined into blocks, each of
/// which is freed as soon as it has been read.
#[derive(Debug)]
pub struct Inbox {
    state: Mutex<State>,
    arrived: Notify,
    load: Arc<Load>,
}

impl Inbox {
    /// An empty one that counts towards `load`.
    pub fn new(load: Arc<Load>) -> Self {
        Self { state: Mutex::default(), arrived: Notify::new(), load }
    }

    /// Takes what arrived. After [`Inbox::close`] it is dropped: nobody reads any more.
    pub fn push(&self, data: &[u8]) {
        let mut state = self.lock();
        if state.closed || state.eof {
            return;
        }
        state.bytes.push(data);
        drop(state);
        self.load.add(data.len());
        self.arrived.notify_one();
    }

    /// The client sends no more.
    pub fn finish(&self) {
        self.lock().eof = true;
        self.arrived.notify_one();
    }

    /// Nobody reads any more: what waits is given up.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        self.load.take(state.bytes.len());
        state.bytes.clear();
        drop(state);
        self.arrived.notify_one();
    }

    /// The next bytes, at most 64 KiB; `None` after the client's EOF, and never after [`Inbox::close`]: a client that is gone has not
    /// said that it sends no more. Loses nothing when dropped while waiting.
    pub async fn read(&self) -> Option<Bytes> {
        loop {
            let arrived = self.arrived.notified();
            {
                let mut state = self.lock();
                if let Some(chunk) = state.bytes.pop() {
                    self.load.take(chunk.len());
                    return Some(chunk);
                }
                if state.eof && !state.closed {
                    return None;
                }
            }
            arrived.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn the_window_shrinks_as_bytes_wait_and_never_closes() {
        let load = Arc::new(Load::default());
        let inbox = Inbox::new(Arc::clone(&load));
        assert_eq!(load.target(), FULL_WINDOW);
        inbox.push(&vec![0; HIGH_MARK]);
        assert_eq!(load.target(), TRICKLE_WINDOW);
        assert!(!load.paced());
        inbox.push(&vec![0; FULL_WINDOW as usize]);
        assert_eq!(load.target(), DRIP_WINDOW);
        assert!(load.paced());
        inbox.close();
        assert_eq!(load.target(), FULL_WINDOW);
    }

    #[tokio::test]
    async fn bytes_come_out_in_order_and_eof_comes_last() {
        let inbox = Inbox::new(Arc::default());
        inbox.push(b"one ");
        inbox.push(b"two");
        inbox.finish();
        assert_eq!(inbox.read().await.as_deref(), Some(&b"one two"[..]));
        assert_eq!(inbox.read().await, None);
    }

    #[tokio::test]
    async fn a_closed_inbox_gives_its_bytes_back_to_the_connection() {
        let load = Arc::new(Load::default());
        let inbox = Inbox::new(Arc::clone(&load));
        inbox.push(&[0; 100]);
        inbox.close();
        inbox.push(&[0; 100]);
        assert_eq!(load.0.load(Ordering::Relaxed), 0);
        inbox.finish();
        assert_eq!(inbox.read().now_or_never(), None, "the end of a client is not its EOF");
    }
}
