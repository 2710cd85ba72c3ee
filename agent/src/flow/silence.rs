//! Is the other end still there? Asked only when nothing comes from it.
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{sleep, timeout},
};

/// Looks at the stream within the limit of [`silence`].
const LOOKS: u32 = 5;

/// Counts the reads of a [`Listened`] that brought something.
#[derive(Debug, Clone, Default)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A byte stream, and whether something comes from it.
#[derive(Debug)]
pub struct Listened<T> {
    io: T,
    pulse: Pulse,
}

impl<T> Listened<T> {
    /// Listens to this one.
    pub fn new(io: T) -> (Self, Pulse) {
        let pulse = Pulse::default();
        (Self { io, pulse: pulse.clone() }, pulse)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Listened<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.pulse.0.fetch_add(1, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Listened<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Waits until nothing has come for `limit`, asks with a ping, and returns, with the reason, when that is not answered within `limit`.
///
/// While bytes come there is no ping: h2 reads nothing as long as it has a ping or its answer to write and cannot, so that two ends
/// which both ask on a full stream would wait for each other.
pub async fn silence(pings: Option<PingPong>, pulse: &Pulse, limit: Duration) -> String {
    let Some(mut pings) = pings else { return "no pings".to_owned() };
    let (mut heard, mut quiet) = (pulse.count(), 0);
    loop {
        // Looks are counted, not the time: a process that was itself held up has heard nothing and knows nothing.
        sleep(limit / LOOKS).await;
        let now = pulse.count();
        quiet = if now == heard { quiet + 1 } else { 0 };
        heard = now;
        if quiet >= LOOKS {
            quiet = 0;
            match timeout(limit, pings.ping(Ping::opaque())).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return "it does not answer".to_owned(),
            }
        }
    }
}
