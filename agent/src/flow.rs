//! Buffers between HTTP/2 streams and their users, the same at both ends of an environment's byte stream.
//!
//! HTTP/2 shares one connection between many streams, and h2 ends that connection when one of them misbehaves: when small
//! frames lie unread ([ENHANCE_YOUR_CALM](h2::Reason::ENHANCE_YOUR_CALM)), when unread bytes use up the connection's window,
//! when empty frames or resets come too often. So [`Inbound`] takes every frame out of h2 as it arrives and gives window back
//! only for bytes that were handed on; [`Outbound`] joins small writes while h2 is behind, and sends no empty frame but the
//! last; [`client`] and [`server`] set all limits.
//!
//! This module does not know what the bytes mean.
use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use h2::{FlowControl, Reason, RecvStream, SendStream};
use http::HeaderMap;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
    task::AbortHandle,
};

use crate::wire::limits;

mod silence;
#[cfg(test)]
mod tests;

pub use silence::{Listened, Pulse, silence};

/// Bytes of one stream that h2 may hold unsent.
const SEND_BUFFER: usize = 128 * 1024;
/// A write shorter than this waits until h2 holds less than this much of its stream unsent: the number of frames in h2's
/// memory, each of which costs more than a few bytes, is bounded by it. A receiver that has read everything always leaves at
/// least half of [`limits::STREAM_WINDOW`] open, so the wait ends.
const SMALL: usize = 4 * 1024;
/// Most that one [`Inbound::read`] returns, and the size of a block of its buffer.
const BLOCK: usize = 64 * 1024;
/// First block of an empty buffer: keystrokes and short lines fit.
const FIRST_BLOCK: usize = 512;

/// The stream is no more: it was reset, or its connection was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream was closed: {}", .reason.as_ref().map_or("its connection was lost", Reason::description))]
pub struct Closed {
    /// The peer's reason; `None` when the connection was lost.
    pub reason: Option<Reason>,
}

impl From<h2::Error> for Closed {
    fn from(error: h2::Error) -> Self {
        Self { reason: error.reason() }
    }
}

/// HTTP/2 as the client (the gateway's end). The connection must be polled, in a task of its own, for anything to happen.
///
/// # Errors
/// When the preface cannot be written.
pub async fn client<T>(
    io: T,
) -> Result<(h2::client::SendRequest<Bytes>, h2::client::Connection<T, Bytes>), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    h2::client::Builder::new()
        .initial_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_frame_size(limits::FRAME)
        .max_header_list_size(limits::HEADER_LIST)
        .max_concurrent_streams(0)
        .initial_max_send_streams(limits::STREAMS as usize)
        .max_concurrent_reset_streams(limits::RESETS)
        .max_pending_accept_reset_streams(limits::RESETS)
        .max_local_error_reset_streams(Some(limits::RESETS))
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false)
        .handshake(io)
        .await
}

/// HTTP/2 as the server (the agent's end). The connection makes progress while its `accept` is polled.
///
/// # Errors
/// When the peer does not speak HTTP/2 or the connection is lost.
pub async fn server<T>(io: T) -> Result<h2::server::Connection<T, Bytes>, h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    // The size of frames stays HTTP/2's own: h2 counts the frames of a request's headers by it, and a client that has not heard of
    // another one yet sends long commands in frames of that size.
    h2::server::Builder::new()
        .initial_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_header_list_size(limits::HEADER_LIST)
        .max_concurrent_streams(limits::STREAMS)
        .max_concurrent_reset_streams(limits::RESETS)
        .max_pending_accept_reset_streams(limits::RESETS)
        .max_local_error_reset_streams(Some(limits::RESETS))
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(io)
        .await
}

/// The sending half of a stream. Dropped before it is finished, it resets the stream (CANCEL).
#[derive(Debug)]
pub struct Outbound {
    stream: SendStream<Bytes>,
    finished: bool,
}

impl Outbound {
    /// Takes the sending half over.
    #[must_use]
    pub const fn new(stream: SendStream<Bytes>) -> Self {
        Self { stream, finished: false }
    }

    /// Sends all of `bytes`, waiting for the peer to make room. Dropped while it waits, a part may have been sent.
    ///
    /// # Errors
    /// As soon as the peer has reset the stream or the connection is lost, also while waiting; and after [`Self::finish`].
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<(), Closed> {
        while !bytes.is_empty() {
            let room = self.room(bytes.len()).await?;
            let chunk = bytes.split_to(room.min(bytes.len()));
            if let Err(error) = self.stream.send_data(chunk, false) {
                return Err(self.why(error.into()));
            }
        }
        Ok(())
    }

    /// Waits until some of `wanted` bytes (not 0) can be sent, and says how many. Cancel-safe. A [`Self::write`] of that many does not wait.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn room(&mut self, wanted: usize) -> Result<usize, Closed> {
        poll_fn(|context| self.poll_room(context, wanted)).await
    }

    fn poll_room(&mut self, context: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, Closed>> {
        if self.finished {
            return Poll::Ready(Err(Closed { reason: None }));
        }
        // Everything that may be buffered is reserved, so that what h2 grants tells how much it holds unsent.
        self.stream.reserve_capacity(SEND_BUFFER);
        let enough = if wanted < SMALL { SEND_BUFFER.saturating_sub(SMALL) } else { 1 };
        loop {
            if let Poll::Ready(closed) = self.poll_closed(context) {
                return Poll::Ready(Err(closed));
            }
            let room = self.stream.capacity();
            if room >= enough {
                return Poll::Ready(Ok(room));
            }
            match ready!(self.stream.poll_capacity(context)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(self.why(error.into()))),
                None => return Poll::Ready(Err(self.why(Closed { reason: None }))),
            }
        }
    }

    /// Ends the stream: END_STREAM.
    pub fn finish(&mut self) {
        if !self.finished {
            self.finished = true;
            // Only a stream that is closed already refuses, and then there is nothing to end.
            let _ = self.stream.send_data(Bytes::new(), true);
        }
    }

    /// Ends the stream with trailers.
    pub fn finish_with(&mut self, trailers: HeaderMap) {
        if !self.finished {
            self.finished = true;
            let _ = self.stream.send_trailers(trailers);
        }
    }

    /// Resets the stream (CANCEL): to the peer this end is gone.
    pub fn reset(&mut self) {
        self.finished = true;
        self.stream.send_reset(Reason::CANCEL);
    }

    /// Resolves when the peer has reset the stream or the connection is lost, also after [`Self::finish`]. Cancel-safe.
    pub async fn closed(&mut self) -> Closed {
        poll_fn(|context| self.poll_closed(context)).await
    }

    fn poll_closed(&mut self, context: &mut Context<'_>) -> Poll<Closed> {
        self.stream.poll_reset(context).map(|result| match result {
            Ok(reason) => Closed { reason: Some(reason) },
            Err(error) => error.into(),
        })
    }

    /// The reset behind a refusal of h2, if there was one.
    fn why(&mut self, otherwise: Closed) -> Closed {
        match self.poll_closed(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(closed) => closed,
            Poll::Pending => otherwise,
        }
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        if !self.finished {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}

/// The receiving half of a stream. A task of its own takes the frames out of h2 at once; what waits for [`Self::read`] is bounded
/// by [`limits::STREAM_WINDOW`], since the peer gets window back only for bytes that were read. Dropping it ends the task.
#[derive(Debug)]
pub struct Inbound {
    shared: Arc<Shared>,
    window: FlowControl,
    task: AbortHandle,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Blocks,
    /// How the stream ended, after the last byte.
    end: Option<Result<Option<HeaderMap>, Closed>>,
}

/// A queue of bytes that joins small pieces: what lies in it costs little more than its bytes. It has no limit of its own.
#[derive(Debug, Default)]
pub struct Blocks {
    blocks: VecDeque<BytesMut>,
    len: usize,
}

impl Blocks {
    /// Appends.
    pub fn push(&mut self, bytes: &[u8]) {
        self.len = self.len.saturating_add(bytes.len());
        let first = self.blocks.is_empty();
        if let Some(last) = self.blocks.back_mut()
            && last.capacity().saturating_sub(last.len()) >= bytes.len()
        {
            last.extend_from_slice(bytes);
            return;
        }
        let mut block = BytesMut::with_capacity(bytes.len().max(if first { FIRST_BLOCK } else { BLOCK }));
        block.extend_from_slice(bytes);
        self.blocks.push_back(block);
    }

    /// Takes the first block: at most 64 KiB, unless more was pushed at once.
    pub fn pop(&mut self) -> Option<Bytes> {
        let block = self.blocks.pop_front()?;
        self.len = self.len.saturating_sub(block.len());
        Some(block.freeze())
    }

    /// Bytes in it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Nothing in it?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.len = 0;
    }
}

impl Shared {
    /// A panic cannot leave the queue half changed in a way that matters: its bytes stay bytes.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fill(&self, mut stream: RecvStream) {
        let end = loop {
            match stream.data().await {
                Some(Ok(frame)) if frame.is_empty() => {}
                Some(Ok(frame)) => {
                    self.lock().bytes.push(&frame);
                    self.changed.notify_one();
                }
                Some(Err(error)) => break Self::end(error),
                None => break stream.trailers().await.or_else(Self::end),
            }
        };
        self.lock().end = Some(end);
        self.changed.notify_one();
    }

    /// RFC 9113, 8.1: a server that has answered in full may reset with NO_ERROR to stop the rest of the request. That is an end.
    fn end(error: h2::Error) -> Result<Option<HeaderMap>, Closed> {
        if error.reason() == Some(Reason::NO_ERROR) && error.is_reset() {
            Ok(None)
        } else {
            Err(error.into())
        }
    }
}

impl Inbound {
    /// Takes the receiving half over.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn new(mut stream: RecvStream) -> Self {
        let shared = Arc::new(Shared::default());
        let window = stream.flow_control().clone();
        let filler = Arc::clone(&shared);
        let task = tokio::spawn(async move { filler.fill(stream).await }).abort_handle();
        Self { shared, window, task }
    }

    /// The next bytes, up to 64 KiB joined; `None` at the end of the stream. Cancel-safe: bytes are taken only when they are returned.
    ///
    /// # Errors
    /// When the stream was reset or its connection was lost; what had arrived before is returned first.
    pub async fn read(&mut self) -> Result<Option<Bytes>, Closed> {
        loop {
            {
                let mut queue = self.shared.lock();
                if let Some(block) = queue.bytes.pop() {
                    drop(queue);
                    // Refused only when the stream has gone meanwhile, and its window with it.
                    let _ = self.window.release_capacity(block.len());
                    return Ok(Some(block));
                }
                match &queue.end {
                    Some(Ok(_)) => return Ok(None),
                    Some(Err(closed)) => return Err(*closed),
                    None => {}
                }
            }
            self.shared.changed.notified().await;
        }
    }

    /// Waits for the end of the stream and takes its trailers. Ask after [`Self::read`] has returned `None`: the end of a stream
    /// whose bytes nobody reads may never come.
    pub async fn trailers(&mut self) -> Option<HeaderMap> {
        loop {
            if let Some(end) = &mut self.shared.lock().end {
                return end.as_mut().ok().and_then(Option::take);
            }
            self.shared.changed.notified().await;
        }
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        self.task.abort();
    }
}
