//! `connect` hands its stdin and stdout to the agent over a unix socket (SCM_RIGHTS) and waits: nothing is copied in between.
use std::{
    io::{self, IoSlice, IoSliceMut, Read as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            fs::PermissionsExt as _,
            net::{SocketAddr, UnixListener as StdListener, UnixStream as StdStream},
        },
    },
    path::Path,
    pin::Pin,
    task::{Context, Poll, ready},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::OFlags,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf, unix::AsyncFd},
    net::UnixStream,
    time::timeout,
};

use crate::spawn;

/// A peer that hands nothing over after this long is let go.
const PATIENCE: Duration = Duration::from_secs(10);
/// An agent that is not there yet is waited for: it may be starting.
const STARTING: Duration = Duration::from_secs(2);
/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(5);
/// Bytes that a pipe holds.
const PIPE: usize = 256 << 10;
/// What the agent says when it is done with the descriptors.
const DONE: u8 = b'.';

/// A socket's address: a path, or `@` and a name in the network namespace.
fn address(socket: &Path) -> io::Result<SocketAddr> {
    match socket.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(socket),
    }
}

/// Listens for who hands over. A file that is there already is replaced.
///
/// # Errors
/// When the name is taken, or the directory cannot be written.
pub fn bind(socket: &Path) -> io::Result<StdListener> {
    let address = address(socket)?;
    let path = address.as_pathname();
    if let Some(path) = path {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let listener = StdListener::bind_addr(&address)?;
    if let Some(path) = path {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Hands this process's stdin and stdout over and waits until the agent is done with them.
///
/// # Errors
/// When there is no agent, it does not take them, or it is gone before it was done.
pub fn connect(socket: &Path) -> io::Result<()> {
    let mut stream = reach(&address(socket)?)?;
    let descriptors = [rustix::stdio::stdin(), rustix::stdio::stdout()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(&stream, &[IoSlice::new(&[DONE])], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut answer = [0];
    stream.read_exact(&mut answer).map_err(|_| io::Error::other("the agent did not finish the connection"))
}

fn reach(address: &SocketAddr) -> io::Result<StdStream> {
    let begun = Instant::now();
    loop {
        match StdStream::connect_addr(address) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
                    && begun.elapsed() < STARTING =>
            {
                thread::sleep(LOOK);
            }
            reached => return reached,
        }
    }
}

/// Takes what a peer hands over and lets `use_it` use it, until that is done or the peer is gone. One of another user is let go: a
/// socket without a file has no permissions.
pub async fn serve<F>(mut peer: UnixStream, use_it: impl FnOnce(Handed) -> F)
where
    F: Future<Output = ()>,
{
    let own = rustix::process::geteuid().as_raw();
    if !peer.peer_cred().is_ok_and(|peer| [own, 0].contains(&peer.uid())) {
        return;
    }
    let Ok(Ok(handed)) = timeout(PATIENCE, take(&peer)).await else { return };
    let used = use_it(handed);
    let mut byte = [0];
    tokio::select! {
        () = used => {
            // The peer may be gone.
            let _ = peer.write_all(&[DONE]).await;
        }
        // It says nothing more: this is its end.
        _ = peer.read(&mut byte) => {}
    }
}

async fn take(peer: &UnixStream) -> io::Result<Handed> {
    peer.async_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(peer, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut descriptors = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let mut descriptors = descriptors.next().into_iter().flatten();
        match (descriptors.next(), descriptors.next()) {
            (Some(input), Some(output)) => Ok((input, output)),
            _ => Err(io::Error::other("two descriptors are expected")),
        }
    })
    .await
    .and_then(|(input, output)| {
        // Both may be of one open file: its flags are read before either is changed.
        let (of_input, of_output) = (rustix::fs::fcntl_getfl(&input)?, rustix::fs::fcntl_getfl(&output)?);
        Ok(Handed { input: Half::new(input, of_input)?, output: Half::new(output, of_output)? })
    })
}

/// A byte stream of two descriptors: pipes, sockets or a terminal.
#[derive(Debug)]
pub struct Handed {
    input: Half,
    output: Half,
}

/// One descriptor, not blocking while it is here.
#[derive(Debug)]
struct Half {
    descriptor: AsyncFd<OwnedFd>,
    flags: OFlags,
}

impl Half {
    /// `flags` are the descriptor's, and are set again at the end.
    fn new(descriptor: OwnedFd, flags: OFlags) -> io::Result<Self> {
        rustix::fs::fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        // Fewer wake-ups of both ends; as it is where it is no pipe, or the user may have no larger ones.
        let _ = rustix::pipe::fcntl_setpipe_size(&descriptor, PIPE);
        // A file cannot be waited for, and is refused here.
        Ok(Self { descriptor: spawn::watch(descriptor)?, flags })
    }

    fn poll_write_with(
        &self,
        context: &mut Context<'_>,
        mut write: impl FnMut(BorrowedFd<'_>) -> rustix::io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.descriptor.poll_write_ready(context))?;
            if let Ok(result) = ready.try_io(|descriptor| Ok(write(descriptor.as_fd())?)) {
                return Poll::Ready(result);
            }
        }
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // Others may hold the same open file, a terminal for example.
        let _ = rustix::fs::fcntl_setfl(self.descriptor.as_fd(), self.flags);
    }
}

impl AsyncRead for Handed {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.input.descriptor.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            if let Ok(result) = ready.try_io(|descriptor| Ok(rustix::io::read(descriptor, &mut *unfilled)?)) {
                return Poll::Ready(result.map(|length| buffer.advance(length)));
            }
        }
    }
}

impl AsyncWrite for Handed {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.output.poll_write_with(context, |descriptor| rustix::io::write(descriptor, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.output.poll_write_with(context, |descriptor| rustix::io::writev(descriptor, parts))
    }

    /// Else h2 copies the head of each frame apart and writes it twice.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Closing is dropping.
        Poll::Ready(Ok(()))
    }
}
