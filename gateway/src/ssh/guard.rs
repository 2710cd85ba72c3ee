//! The TCP stream of one SSH connection, with the four things that russh's loop cannot do by itself: be ended from
//! outside at any point, read slowly while too much waits, acknowledge at once, and give up on a peer that takes nothing.
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::inbox::Load;

/// Between two reads of the socket, of 64 KiB at most, while too much waits: what a client may still send under its window
/// comes in at 13 MB/s, and the drip of a closed window costs 200 reads a second.
const PACE: Duration = Duration::from_millis(5);
/// Bytes of one read of the socket.
const READ: usize = 64 << 10;
/// A write that the peer's kernel has not taken for this long ends the connection. russh waits for its writes without
/// a limit, and neither reads nor counts keepalives meanwhile.
const WRITE_STALL: Duration = Duration::from_secs(60);

/// See the module's documentation.
pub struct Guarded {
    stream: TcpStream,
    load: Arc<Load>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Read from the socket and not yet by russh, which reads in pieces of a packet. Nothing is kept for an idle connection.
    buffer: BytesMut,
    pace: Pin<Box<Sleep>>,
    pacing: bool,
    stall: Pin<Box<Sleep>>,
    stalling: bool,
}

impl Guarded {
    /// Ends with an error once `end` is cancelled.
    pub fn new(stream: TcpStream, load: Arc<Load>, end: CancellationToken) -> Self {
        Self {
            stream,
            load,
            ended: Box::pin(end.cancelled_owned()),
            buffer: BytesMut::new(),
            pace: Box::pin(sleep(Duration::ZERO)),
            pacing: false,
            stall: Box::pin(sleep(Duration::ZERO)),
            stalling: false,
        }
    }

    fn check_ended(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.ended.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "ended by the server")),
            Poll::Pending => Ok(()),
        }
    }

    /// One read of the socket; at its end the buffer stays empty.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            self.buffer.reserve(READ);
            match self.stream.try_read_buf(&mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.buffer = BytesMut::new(),
                Ok(length) => {
                    if length < READ {
                        // An ssh client without a terminal leaves Nagle's algorithm on: what it writes next waits until this has been
                        // acknowledged, which the kernel puts off by 40 ms where nothing is answered. The option holds for a while only.
                        let _ = self.stream.set_quickack(true);
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn watch_write<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalling = false;
            return written;
        }
        if !self.stalling {
            self.stalling = true;
            self.stall.as_mut().reset(Instant::now() + WRITE_STALL);
        }
        match self.stall.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no data")))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_ended(cx)?;
        if self.buffer.is_empty() {
            if self.pacing {
                ready!(self.pace.as_mut().poll(cx));
                self.pacing = false;
            }
            ready!(self.fill(cx))?;
            if self.load.paced() {
                self.pacing = true;
                self.pace.as_mut().reset(Instant::now() + PACE);
            }
        }
        let length = self.buffer.len().min(buffer.remaining());
        buffer.put_slice(&self.buffer.split_to(length));
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.check_ended(cx)?;
        let written = Pin::new(&mut self.stream).poll_write(cx, data);
        self.watch_write(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
