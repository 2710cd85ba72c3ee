//! One exec of `agent connect` as a byte stream. Does not know what is said on it.
//!
//! A reader and a writer of their own, each with a queue of limited length: when the queue is full, the side that fills it
//! waits, in one direction without stopping the other.
mod outgoing;

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use futures_util::{
    Sink, SinkExt, Stream, StreamExt,
    stream::{SplitSink, SplitStream},
};
use kube::core::{Status, response::StatusSummary};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use self::outgoing::{Outgoing, Sender};
use super::cluster::plain;

/// First byte of a frame, as `remotecommand` numbers its streams.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;

/// Frames that wait to be read. kubelet's have 32 KiB at most.
const INCOMING: usize = 16;
/// A frame of more bytes than this is not of this protocol.
const LARGEST: usize = 256 * 1024;
/// What is kept of stderr, for the message when the exec fails.
const SAID: usize = 512;

/// The other side's stdin and stdout. Dropping it ends the exec's connection.
pub(super) struct ExecStream {
    incoming: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
    ended: bool,
    outgoing: Arc<Outgoing>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl ExecStream {
    /// Takes over an open WebSocket. `end` resolves with the reason when the environment is no more: the connection alone may stay
    /// open, and frozen, for as long as it likes.
    pub(super) fn new<S>(
        socket: S,
        end: impl Future<Output = String> + Send + 'static,
        tasks: &TaskTracker,
    ) -> Self
    where
        S: Stream<Item = Result<Message, WebSocketError>>
            + Sink<Message, Error = WebSocketError>
            + Send
            + 'static,
    {
        let (sink, source) = socket.split();
        let (arrived, incoming) = mpsc::channel(INCOMING);
        let outgoing = Arc::new(Outgoing::default());
        let reader = tasks.spawn(receive(source, arrived, end));
        let writer = tasks.spawn(send(sink, Sender(Arc::clone(&outgoing))));
        Self {
            incoming,
            current: Bytes::new(),
            ended: false,
            outgoing,
            _tasks: [reader, writer].map(AbortOnDropHandle::new),
        }
    }
}

impl AsyncRead for ExecStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if !self.current.is_empty() {
                let length = self.current.len().min(buffer.remaining());
                buffer.put_slice(&self.current.split_to(length));
                return Poll::Ready(Ok(()));
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.incoming.poll_recv(context)) {
                Some(Ok(bytes)) => self.current = bytes,
                Some(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(Err(error));
                }
                None => self.ended = true,
            }
        }
    }
}

impl AsyncWrite for ExecStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.outgoing.poll_write(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.outgoing.poll_write(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// The writer flushes whenever it has nothing more to send.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outgoing.finish();
        Poll::Ready(Ok(()))
    }
}

async fn send<S>(mut sink: SplitSink<S, Message>, leaving: Sender)
where
    S: Sink<Message, Error = WebSocketError>,
{
    while let Some(frame) = leaving.0.next().await {
        if sink.feed(Message::Binary(frame)).await.is_err() {
            return;
        }
        while let Some(frame) = leaving.0.try_next() {
            if sink.feed(Message::Binary(frame)).await.is_err() {
                return;
            }
        }
        // The reader tells why a connection is gone.
        if sink.flush().await.is_err() {
            return;
        }
    }
    let _ = sink.send(Message::Close(None)).await;
}

async fn receive<S>(
    source: SplitStream<S>,
    arrived: mpsc::Sender<io::Result<Bytes>>,
    end: impl Future<Output = String>,
) where
    S: Stream<Item = Result<Message, WebSocketError>>,
{
    let ended = tokio::select! {
        biased;
        why = end => Err(io::Error::new(io::ErrorKind::ConnectionAborted, why)),
        result = pump(source, &arrived) => result,
    };
    if let Err(error) = ended {
        // Waits for its turn behind what has arrived; nobody may be reading any more.
        let _ = arrived.send(Err(error)).await;
    }
}

/// Ends with Ok only when the other side has said that all went well.
async fn pump<S>(mut source: SplitStream<S>, arrived: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()>
where
    S: Stream<Item = Result<Message, WebSocketError>>,
{
    let mut said = Vec::new();
    loop {
        let mut frame = match source.next().await {
            Some(Ok(Message::Binary(frame))) => frame,
            Some(Ok(Message::Close(_))) | None => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    failed("the exec stream has ended without a status", &said),
                ));
            }
            Some(Ok(_)) => continue,
            Some(Err(error)) => {
                return Err(io::Error::new(io::ErrorKind::ConnectionReset, plain(&error.to_string())));
            }
        };
        if frame.len() > LARGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame too large for an exec stream"));
        }
        let Ok(channel) = frame.try_get_u8() else { continue };
        match channel {
            #[expect(clippy::collapsible_match, reason = "a guard cannot give the frame away")]
            STDOUT => {
                if !frame.is_empty() && arrived.send(Ok(frame)).await.is_err() {
                    return Ok(());
                }
            }
            STDERR => said.extend(frame.iter().take(SAID.saturating_sub(said.len()))),
            ERROR => return outcome(&frame, &said),
            _ => {}
        }
    }
}

/// The status that ends an exec. One that cannot be read is a failure: the unknown is never success.
fn outcome(status: &[u8], said: &[u8]) -> io::Result<()> {
    match serde_json::from_slice::<Status>(status) {
        Ok(status) if status.status == Some(StatusSummary::Success) => Ok(()),
        Ok(status) => Err(io::Error::other(failed(&status.message, said))),
        Err(_) => Err(io::Error::other(failed("the exec has ended with a status that cannot be read", said))),
    }
}

fn failed(message: &str, said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let text = if said.trim().is_empty() { message.to_owned() } else { format!("{message}: {said}") };
    plain(&text)
}

#[cfg(test)]
#[path = "exec/tests.rs"]
mod tests;
