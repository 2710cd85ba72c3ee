//! One client at a terminal: its bounded output queue, and the two tasks that pass bytes.
//!
//! This module does not know what a terminal is.
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use carrel_agent::flow::{Blocks, Closed, Inbound, Outbound};
use http::HeaderMap;
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
};

/// Bytes that wait for a client when others are attached too. One that has more is stale: it gets a redraw when it has caught up.
pub const LIMIT: usize = 1 << 20;
/// Bytes that wait for a client that is alone, before the process has to.
pub const BUSY: usize = 256 * 1024;

/// What a client sends.
#[derive(Debug)]
pub enum Input {
    /// Keys.
    Bytes(Bytes),
    /// It will send no more.
    End,
}

/// How a client has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// It has ended its stream.
    Left,
    /// The connection was lost; it may come back.
    Lost,
}

/// The terminal's side of a client.
#[derive(Debug)]
pub struct Attachment {
    shared: Arc<Shared>,
    reading: AbortHandle,
    sending: AbortHandle,
    /// The client's name, if it has one: see [`carrel_agent::wire::ProcessSpec::attachment`].
    pub name: Option<String>,
    /// Looks only: it does not keep the terminal, and what it sends is dropped.
    pub watches: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
    /// The client has gone.
    gone: OnceLock<Gone>,
    /// Wakes the terminal.
    progress: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Blocks,
    stale: bool,
    end: Option<HeaderMap>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attachment {
    /// Starts passing bytes: the client's to `keys`, unless it only watches; and what is pushed to the client. `progress` is
    /// notified when there is room again or the client has gone; `seat` is dropped at once when it has.
    pub fn new(
        (input, output): (Inbound, Outbound),
        name: Option<String>,
        keys: mpsc::Sender<Input>,
        progress: Arc<Notify>,
        watches: bool,
        seat: impl Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Notify::new(),
            gone: OnceLock::new(),
            progress,
        });
        let queue = Arc::clone(&shared);
        let sending = tokio::spawn(async move {
            send(output, queue).await;
            drop(seat);
        })
        .abort_handle();
        let reading = tokio::spawn(receive(input, keys, watches)).abort_handle();
        Self { shared, reading, sending, name, watches }
    }

    /// Lets go of the client at once, with what waits for it: its stream is reset and its seat is free.
    pub fn abandon(self) {
        self.sending.abort();
    }

    /// Has the client gone, and how?
    pub fn gone(&self) -> Option<Gone> {
        self.shared.gone.get().copied()
    }

    /// Should the process wait for this client, if it is the only one?
    pub fn is_busy(&self) -> bool {
        self.shared.lock().bytes.len() >= BUSY
    }

    /// Appends. With `shared`, a client that does not keep up loses what waits for it and becomes stale.
    pub fn push(&self, bytes: &[u8], shared: bool) {
        let mut queue = self.shared.lock();
        if queue.stale {
            return;
        }
        if shared && queue.bytes.len().saturating_add(bytes.len()) > LIMIT {
            queue.bytes.clear();
            queue.stale = true;
        } else {
            queue.bytes.push(bytes);
        }
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Is it stale, and has it taken everything that was left?
    pub fn wants_redraw(&self) -> bool {
        let queue = self.shared.lock();
        queue.stale && queue.bytes.is_empty()
    }

    /// Is it stale?
    pub fn is_stale(&self) -> bool {
        self.shared.lock().stale
    }

    /// Gives a stale client a new start.
    pub fn redraw(&self, bytes: &[u8]) {
        self.shared.lock().stale = false;
        self.push(bytes, false);
    }

    /// Ends it, after everything that was pushed.
    pub fn finish(&self, trailers: HeaderMap) {
        self.shared.lock().end = Some(trailers);
        self.shared.changed.notify_one();
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

async fn receive(mut input: Inbound, keys: mpsc::Sender<Input>, watches: bool) {
    loop {
        let input = match input.read().await {
            Ok(Some(bytes)) => Input::Bytes(bytes),
            Ok(None) => Input::End,
            // A client that was lost is noticed by the other task. It has not ended the input.
            Err(_) => return,
        };
        let ended = matches!(input, Input::End);
        if !watches && keys.send(input).await.is_err() || ended {
            return;
        }
    }
}

async fn send(mut output: Outbound, shared: Arc<Shared>) {
    enum Next {
        Bytes(Bytes, bool),
        End(HeaderMap),
        Wait,
    }
    loop {
        let next = {
            let mut queue = shared.lock();
            let waited_for = queue.stale || queue.bytes.len() >= BUSY;
            match queue.bytes.pop() {
                Some(bytes) => Next::Bytes(bytes, waited_for),
                None => queue.end.take().map_or(Next::Wait, Next::End),
            }
        };
        let closed = match next {
            Next::Bytes(bytes, waited_for) => {
                let sent = output.write(bytes).await;
                if waited_for {
                    shared.progress.notify_one();
                }
                sent.err()
            }
            Next::End(trailers) => return output.finish_with(trailers),
            Next::Wait => {
                // A stale client has taken what was left.
                if shared.lock().stale {
                    shared.progress.notify_one();
                }
                tokio::select! {
                    () = shared.changed.notified() => None,
                    closed = output.closed() => Some(closed),
                }
            }
        };
        if let Some(Closed { reason }) = closed {
            // Set once: this is the only place.
            let _ = shared.gone.set(if reason.is_some() { Gone::Left } else { Gone::Lost });
            return shared.progress.notify_one();
        }
    }
}
