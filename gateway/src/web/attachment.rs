//! One WebSocket of somebody with access, from the wait for the environment to the close. Knows nothing of HTTP and logins.
//!
//! | what is full | what happens |
//! | --- | --- |
//! | output not acknowledged ([`OUTPUT_WINDOW`]; binary only) | the terminal is not read until some is; [`SLOW`] without any: 4008 |
//! | the connection | the same: frames wait, at most [`FRAMES`] of them; [`SLOW`] for one frame: 4008 |
//! | input not taken by the terminal | the connection is not read: a client that keeps within its window never gets there |
use std::{
    convert::Infallible,
    pin::pin,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::Duration,
};

use axum::extract::ws::{Message, WebSocket};
use bytes::{Bytes, BytesMut};
use carrel_agent::wire::{Join, ProcessSpec, Pty};
use carrel_api::environment::link::Exit;
use futures_util::{
    FutureExt, SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, SimplexStream, WriteHalf},
    sync::{Notify, mpsc, watch},
    time::{MissedTickBehavior, interval, interval_at, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    close::{End, LAST_WORDS, refuse, refused},
    frame::{Attached, Dialect, FRAME_BYTES, INPUT_WINDOW, Malformed, Said, Say, Status},
    utf8::Utf8Tail,
};
use crate::bridge::{
    Bridge, Progress, Refusal, Visit,
    terminal::{Input, LOST, News, Output, PLAIN, Sizes, Terminal, resizes},
};

/// Output that may be under way without an acknowledgement, bytes.
const OUTPUT_WINDOW: usize = 512 << 10;
/// A client that takes nothing for so long is closed.
const SLOW: Duration = Duration::from_secs(60);
/// A ping this often, and a status: a browser cannot see pings, and takes silence for a dead connection.
const PING: Duration = Duration::from_secs(15);
/// So many pings without any sign of life, and the connection is dead.
const PINGS: u32 = 3;
/// Frames that wait for the connection, each of at most [`FRAME_BYTES`].
const FRAMES: usize = 4;
/// How long a client may take to say its size once the environment is ready.
const SIZE_WITHIN: Duration = Duration::from_secs(2);
/// The size of a terminal whose client says none.
const SIZE: (u16, u16) = (80, 24);
/// A watcher whose candidate has no terminal yet looks again this often.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Most that is written to the terminal at once, bytes.
const INPUT_PIECE: usize = 16 << 10;

/// Counts between the halves of one socket.
#[derive(Default)]
struct Flow {
    /// Bytes of output sent and not acknowledged.
    unacknowledged: AtomicUsize,
    /// Some were acknowledged.
    acknowledged: Notify,
    /// Pings sent since the last sign of life.
    pings: AtomicU32,
}

impl Flow {
    /// Waits until output may be sent; false when the client has acknowledged nothing for [`SLOW`].
    async fn room(&self, dialect: Dialect) -> bool {
        if dialect == Dialect::Json {
            return true;
        }
        loop {
            let acknowledged = self.acknowledged.notified();
            if self.unacknowledged.load(Ordering::Relaxed) < OUTPUT_WINDOW {
                return true;
            }
            if timeout(SLOW, acknowledged).await.is_err() {
                return false;
            }
        }
    }

    /// Nothing is under way: the client counts from here.
    fn begin(&self) {
        self.unacknowledged.store(0, Ordering::Relaxed);
    }

    fn sent(&self, count: usize) {
        self.unacknowledged.fetch_add(count, Ordering::Relaxed);
    }

    /// More than was sent counts as all of it: the client only deceives itself.
    fn ack(&self, count: usize) {
        let less = |sent: usize| Some(sent.saturating_sub(count));
        let _ = self.unacknowledged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        self.acknowledged.notify_one();
    }
}

/// Frames on their way to one client.
struct Line {
    dialect: Dialect,
    frames: mpsc::Sender<Message>,
}

impl Line {
    async fn say(&self, say: Say) {
        if let Some(message) = self.dialect.write(&say) {
            // Its reader ends this connection by itself when it is gone.
            let _ = self.frames.send(message).await;
        }
    }
}

/// Everything from the first wait to the close.
pub async fn run(
    socket: WebSocket,
    dialect: Dialect,
    visit: Result<Visit, Refusal>,
    bridge: &Bridge,
    shutdown: &CancellationToken,
) {
    let visit = match visit {
        Ok(visit) => visit,
        Err(refusal) => return refuse(socket, refused(&refusal), &refusal.to_string()).await,
    };
    let flow = Flow::default();
    let (sink, mut stream) = socket.split();
    let (frames, waiting) = mpsc::channel(FRAMES);
    let line = Line { dialect, frames };
    let (sizes, size) = watch::channel(None);
    // Room for a client's whole window and one frame more: acknowledgements behind it are always reached.
    let (typed, keys) = tokio::io::simplex(INPUT_WINDOW + FRAME_BYTES);
    let mut writer = pin!(write(sink, waiting, &flow));
    let (end, sink) = match visit.over().now_or_never() {
        Some(over) => (End::AlreadyOver(over), None),
        None => tokio::select! {
            biased;
            // Before what follows from it.
            over = visit.over() => (End::Over(over), None),
            () = shutdown.cancelled() => (End::Shutdown, None),
            (end, sink) = writer.as_mut() => (end, Some(sink)),
            end = read(&mut stream, dialect, keys, &sizes, &flow) => (end, None),
            end = serve(&visit, &line, size, typed, &flow) => (end, None),
            never = statuses(&visit, &line, bridge) => match never {},
            never = visit.active() => match never {},
        },
    };
    let Some(close) = end.close() else { return };
    tracing::info!(close = ?close, "a terminal's connection is closed");
    let is_exit = matches!(end, End::Exited);
    let words = async {
        drop(line.frames);
        let mut sink = match sink {
            Some(sink) => sink,
            None => writer.await.1,
        };
        if let End::AlreadyOver(over) | End::Over(over) = end
            && let Some(last) = dialect.write(&Say::Termination(over))
        {
            sink.send(last).await?;
        }
        sink.send(close).await?;
        // Closed with bytes unread, the kernel would take the last words back from a client that has not read them.
        while let Some(message) = stream.next().await {
            message?;
        }
        Ok::<_, axum::Error>(())
    };
    // A client that takes nothing more, or does not close, is left. What a shell said last has time, but not beyond its session.
    let mut words = pin!(words);
    if is_exit {
        tokio::select! {
            _ = timeout(SLOW, words.as_mut()) => return,
            _ = visit.over() => {}
            () = shutdown.cancelled() => {}
        }
    }
    let _ = timeout(LAST_WORDS, words).await;
}

/// Frames and pings to the client, until there are no more frames or it is gone or slow. Gives the sink back for the last words.
async fn write(
    mut sink: SplitSink<WebSocket, Message>,
    mut frames: mpsc::Receiver<Message>,
    flow: &Flow,
) -> (End, SplitSink<WebSocket, Message>) {
    let mut pings = interval_at(tokio::time::Instant::now() + PING, PING);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            message = frames.recv() => match message {
                Some(message) => message,
                None => return (End::Gone, sink),
            },
            _ = pings.tick() => {
                // Only pings that went out count: behind a full connection none does, and the client is slow, not dead.
                if flow.pings.fetch_add(1, Ordering::Relaxed) >= PINGS {
                    return (End::Gone, sink);
                }
                Message::Ping(Bytes::from_static(b"carrel"))
            }
        };
        match timeout(SLOW, sink.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return (End::Gone, sink),
            Err(_) => return (End::Slow, sink),
        }
    }
}

/// What the client says, until it goes or says what it must not.
async fn read(
    stream: &mut SplitStream<WebSocket>,
    dialect: Dialect,
    mut keys: WriteHalf<SimplexStream>,
    sizes: &watch::Sender<Option<(u16, u16)>>,
    flow: &Flow,
) -> End {
    while let Some(message) = stream.next().await {
        flow.pings.store(0, Ordering::Relaxed);
        let message = match message {
            Ok(Message::Ping(_) | Message::Pong(_)) => continue,
            Ok(Message::Close(_)) => return End::Gone,
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "a WebSocket broke");
                return End::Broken;
            }
        };
        match dialect.read(&message) {
            Ok(Said::Input(input)) => {
                if keys.write_all(&input).await.is_err() {
                    return End::Gone;
                }
            }
            Ok(Said::Resize(cols, rows)) => {
                sizes.send_replace(Some((cols, rows)));
            }
            Ok(Said::Ack(count)) => flow.ack(count),
            Ok(Said::Auth(_)) => return End::Malformed(Malformed("a ticket is for the first frame only")),
            Err(malformed) => return End::Malformed(malformed),
        }
    }
    End::Gone
}

/// Waits for the environment, takes a terminal, and carries its bytes until it ends.
async fn serve(
    visit: &Visit,
    line: &Line,
    mut sizes: Sizes,
    typed: ReadHalf<SimplexStream>,
    flow: &Flow,
) -> End {
    if let Err(refusal) = visit.ready(|_| ()).await {
        return refusal.into();
    }
    let terminal = match open(visit, line.dialect, &mut sizes).await {
        Ok(terminal) => terminal,
        Err(refusal) => return refusal.into(),
    };
    let watching = visit.access.only_watches();
    let Terminal { resumed, output, input, control } = terminal;
    line.say(Say::Attached(Attached { resumed, watching })).await;
    tokio::select! {
        end = show(visit, line, output, flow) => end,
        never = keys(line, typed, input, watching) => match never {},
        never = resizes(control, sizes), if !watching => match never {},
    }
}

/// The main terminal, or a new one in the client's size. A watcher waits until there is one.
async fn open(visit: &Visit, dialect: Dialect, sizes: &mut Sizes) -> Result<Terminal, Refusal> {
    if dialect == Dialect::Binary {
        // One that says none gets the usual size.
        let _ = timeout(SIZE_WITHIN, sizes.wait_for(Option::is_some)).await;
    }
    let watching = visit.access.only_watches();
    // Browsers speak UTF-8: a shell without a locale would take the bytes of a character for several. The exam has the last word.
    let exam = &visit.exam.environment.env;
    let named = ["LANG", "LC_ALL", "LC_CTYPE"].iter().any(|name| exam.contains_key(*name));
    let env = if named { Vec::new() } else { vec![("LANG".to_owned(), "C.UTF-8".to_owned())] };
    loop {
        let (cols, rows) = sizes.borrow_and_update().unwrap_or(SIZE);
        let spec = ProcessSpec {
            env: env.clone(),
            pty: Some(Pty { term: "xterm-256color".to_owned(), cols, rows, modes: Vec::new() }),
            join: if watching { Join::Watch } else { Join::Browser },
            ..ProcessSpec::default()
        };
        match visit.terminal(spec, sizes.clone()).await {
            Err(Refusal::Refused(_)) if watching => sleep(LOOK_AGAIN).await,
            other => return other,
        }
    }
}

/// The terminal to the client, also over a lost link.
async fn show(visit: &Visit, line: &Line, mut terminal: Output, flow: &Flow) -> End {
    let watching = visit.access.only_watches();
    let mut tail = Utf8Tail::default();
    let send = async |piece: Bytes| {
        if !piece.is_empty() {
            flow.sent(piece.len());
            line.say(Say::Output(piece)).await;
        }
    };
    loop {
        if !flow.room(line.dialect).await {
            return End::Slow;
        }
        match terminal.next().await {
            Ok(News::Bytes(piece)) => send(tail.push(piece)).await,
            Ok(News::Lost) => {
                send(tail.finish()).await;
                send(format!("{PLAIN}\r\ncarrel: {LOST}\r\n").into()).await;
            }
            Ok(News::Back) => {
                // What was drawn since the last acknowledgement is not reported any more by a client that begins anew.
                flow.begin();
                line.say(Say::Attached(Attached { resumed: true, watching })).await;
            }
            Ok(News::Ended(Exit::Lost(reason))) => {
                tracing::warn!(reason, "how a shell ended was lost");
                return visit.lost().await.into();
            }
            Ok(News::Ended(exit)) => {
                send(tail.finish()).await;
                line.say(Say::Exit(exit)).await;
                return End::Exited;
            }
            Err(error) => return visit.refusal(error).await.into(),
        }
    }
}

/// The client's keys to the terminal.
async fn keys(
    line: &Line,
    mut typed: ReadHalf<SimplexStream>,
    mut terminal: Input,
    watching: bool,
) -> Infallible {
    loop {
        let mut piece = BytesMut::with_capacity(INPUT_PIECE);
        match typed.read_buf(&mut piece).await {
            Ok(0) | Err(_) => return std::future::pending().await,
            Ok(_) => {}
        }
        let count = piece.len();
        if !watching {
            terminal.write(piece.freeze()).await;
        }
        line.say(Say::Taken(count)).await;
    }
}

/// How the session stands: at once, on every change, and every [`PING`].
async fn statuses(visit: &Visit, line: &Line, bridge: &Bridge) -> Infallible {
    let mut feed = visit.feed.clone();
    let mut beat = interval(PING);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        let beaten = tokio::select! {
            _ = beat.tick() => true,
            Ok(()) = feed.changed() => false,
            else => return std::future::pending().await,
        };
        let session = std::sync::Arc::clone(&feed.borrow_and_update());
        if session.state.is_terminal() {
            // The termination frame says it better.
            continue;
        }
        let ready = session.ready_at.is_some();
        let status = Status {
            state: session.state.as_str(),
            remaining_seconds: session.remaining_seconds(bridge.now_ms()),
            session_id: session.id,
            exam_id: session.exam_id.clone(),
            progress: (!ready).then(|| Progress::of(&session).into()),
        };
        // A row also changes where no client looks.
        let news = (status.state, status.progress.clone());
        if beaten || told.as_ref() != Some(&news) {
            told = Some(news);
            line.say(Say::Status(status)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_waits_for_acknowledgements_where_there_are_any() {
        let flow = Flow::default();
        flow.sent(OUTPUT_WINDOW);
        assert_eq!(flow.room(Dialect::Json).now_or_never(), Some(true));
        {
            let mut room = pin!(flow.room(Dialect::Binary));
            assert_eq!(room.as_mut().now_or_never(), None);
            flow.ack(1);
            assert!(room.await);
        }
        flow.ack(usize::MAX);
        assert_eq!(flow.unacknowledged.load(Ordering::Relaxed), 0);
    }
}
