//! What is on its way out: written as it comes, sent as whole frames whenever the connection is slower than the writer.
use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::sync::Notify;

use super::STDIN;

/// Bytes of stdin in one frame, at most: what API server, kubelet and container runtime pass on in one piece. Larger ones are cut up on
/// their way, each with a small rest.
pub(super) const FRAME: usize = 32 * 1024;
/// Whole frames that wait; then the writer does.
const WAITING: usize = 8;

/// Frames between one writer and one sender.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    state: Mutex<State>,
    work: Notify,
}

#[derive(Debug, Default)]
struct State {
    whole: VecDeque<Bytes>,
    /// The next frame, with its first byte, while it is not whole; empty when there is none.
    started: BytesMut,
    writer: Option<Waker>,
    /// Nothing more is written.
    finished: bool,
    /// Nothing more is sent.
    gone: bool,
}

impl Outgoing {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes as much as there is room for; waits for room when there is none.
    pub(super) fn poll_write(
        &self,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.state();
        if state.gone || state.finished {
            let why = io::Error::new(io::ErrorKind::BrokenPipe, "the exec stream has ended");
            return Poll::Ready(Err(why));
        }
        if state.whole.len() >= WAITING {
            state.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let mut written = 0;
        'parts: for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                if state.whole.len() >= WAITING {
                    break 'parts;
                }
                if state.started.is_empty() {
                    state.started.reserve(FRAME + 1);
                    state.started.put_u8(STDIN);
                }
                let room = (FRAME + 1).saturating_sub(state.started.len());
                let (now, later) = rest.split_at(rest.len().min(room));
                state.started.put_slice(now);
                written += now.len();
                rest = later;
                if state.started.len() > FRAME {
                    let whole = state.started.split().freeze();
                    state.whole.push_back(whole);
                }
            }
        }
        drop(state);
        self.work.notify_one();
        Poll::Ready(Ok(written))
    }

    /// Nothing more is written. What was is still sent.
    pub(super) fn finish(&self) {
        self.state().finished = true;
        self.work.notify_one();
    }

    /// The next frame if there is one: whole if the writer is ahead, else what there is.
    pub(super) fn try_next(&self) -> Option<Bytes> {
        let mut state = self.state();
        let frame = state.whole.pop_front().or_else(|| {
            let started = state.started.split();
            (!started.is_empty()).then(|| started.freeze())
        })?;
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
        Some(frame)
    }

    /// Waits for the next frame; `None` when all has been sent.
    pub(super) async fn next(&self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.try_next() {
                return Some(frame);
            }
            if self.state().finished {
                return None;
            }
            self.work.notified().await;
        }
    }
}

/// Held by the sender: when it is gone, however that came, writers are told.
pub(super) struct Sender(pub Arc<Outgoing>);

impl Drop for Sender {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.gone = true;
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }
}
