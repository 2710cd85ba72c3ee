//! One SSH connection: russh's callbacks, folded into the inputs of one task per channel.
//!
//! Every request is answered here and at once. Data goes into the channel's own [`Inbox`], never into russh's queue,
//! whose receiving half is dropped: a full queue would stop the whole connection.
use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Instant};

use carrel_agent::wire::Pty;
use carrel_api::{
    access::{Access, LoginError, user_name},
    store::{Channel as By, Outcome},
};
use russh::{
    Channel, ChannelId, ChannelOpenFailure, Disconnect, Sig,
    keys::PublicKey,
    server::{Auth, ChannelOpenHandle, Handle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    CHANNELS_PER_CONNECTION, PASSWORD_ATTEMPTS, Ssh,
    channel::{self, Inputs, Start, What},
    inbox::{Inbox, Load},
    methods,
    throttle::Place,
};
use crate::bridge::{Refusal, Visit};

/// Signals waiting on one channel; more are dropped, the process has not taken the first ones.
const SIGNALS: usize = 16;
/// `env` requests taken on one channel.
const ENV_REQUESTS: usize = 64;
/// Bytes of one variable's name and value.
const ENV_BYTES: usize = 4096;

/// How a connection ended other than by its client's wish.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The protocol's fault, or the network's.
    #[error(transparent)]
    Protocol(#[from] russh::Error),
    /// More data than the windows allow.
    #[error("the client ignores its windows")]
    Flood,
}

/// An accepted login: the visit, or why there is none although the credential was right.
pub type Entry = Result<Arc<Visit>, Arc<Refusal>>;

/// The other end of [`Connection::new`]: tells when its login is accepted.
pub struct Login {
    accepted: oneshot::Receiver<Entry>,
    handle: Option<oneshot::Sender<Handle>>,
}

impl Login {
    /// Waits for the login, which may be accepted without a visit: then its channels say why.
    pub async fn accepted(&mut self, handle: &Handle) -> Entry {
        if let Some(sender) = self.handle.take() {
            let _ = sender.send(handle.clone());
        }
        match (&mut self.accepted).await {
            Ok(entry) => entry,
            // The connection is gone; its own future says so.
            Err(_) => std::future::pending().await,
        }
    }
}

/// A channel as the callbacks see it.
struct Door {
    inbox: Arc<Inbox>,
    pty: Option<Pty>,
    env: Vec<(String, String)>,
    env_requests: usize,
    start: Option<oneshot::Sender<Start>>,
    size: watch::Sender<Option<(u16, u16)>>,
    signals: mpsc::Sender<&'static str>,
    gone: CancellationToken,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.gone.cancel();
        self.inbox.close();
    }
}

/// See the module's documentation.
pub struct Connection {
    ssh: Arc<Ssh>,
    peer: SocketAddr,
    local: SocketAddr,
    load: Arc<Load>,
    /// Ends the connection.
    end: CancellationToken,
    shutdown: CancellationToken,
    /// Held until the login is accepted.
    place: Option<Place>,
    accepted: Option<oneshot::Sender<Entry>>,
    handle: Option<oneshot::Receiver<Handle>>,
    failures: u32,
    /// A key that was offered and would do; nothing follows from it until its signature has been verified.
    offered: Option<(String, PublicKey, Access)>,
    entry: Option<Entry>,
    doors: HashMap<ChannelId, Door>,
}

impl Connection {
    pub fn new(
        ssh: Arc<Ssh>,
        (peer, local): (SocketAddr, SocketAddr),
        load: Arc<Load>,
        end: CancellationToken,
        shutdown: CancellationToken,
        place: Place,
    ) -> (Self, Login) {
        let (accepted_sender, accepted) = oneshot::channel();
        let (handle_sender, handle) = oneshot::channel();
        let connection = Self {
            ssh,
            peer,
            local,
            load,
            end,
            shutdown,
            place: Some(place),
            accepted: Some(accepted_sender),
            handle: Some(handle),
            failures: 0,
            offered: None,
            entry: None,
            doors: HashMap::new(),
        };
        (connection, Login { accepted, handle: Some(handle_sender) })
    }

    async fn enter(&mut self, access: Access) {
        let span = tracing::Span::current();
        span.record("user_id", tracing::field::display(access.user_id()));
        span.record("session_id", tracing::field::display(access.session_id()));
        tracing::info!(method = access.how().as_str(), "logged in");
        let entry = self.ssh.bridge.enter(access).await;
        let outcome = match &entry {
            Ok(visit) if visit.feed.borrow().state.is_terminal() => Outcome::Ended,
            Ok(_) => Outcome::Granted,
            Err(_) => Outcome::Limited,
        };
        self.ssh.auth.record(
            By::Ssh,
            self.peer.ip(),
            (Some(access.session_id()), Some(access.user_id())),
            outcome,
        );
        self.entry = Some(entry.map(Arc::new).map_err(Arc::new));
    }

    fn failed(&self, user: &str) {
        self.ssh.throttle.failed(self.peer.ip(), Instant::now());
        let session_id = user_name(user).map(|(_, session_id)| session_id);
        self.ssh.auth.record(By::Ssh, self.peer.ip(), (session_id, None), Outcome::Denied);
    }

    /// Another try with the same methods.
    fn retry() -> Auth {
        Auth::Reject { proceed_with_methods: Some(methods()), partial_success: false }
    }

    /// No further try on this connection: the client is told why, and disconnected.
    async fn hang_up(&mut self, reason: Disconnect, sentence: &'static str) -> Auth {
        if let Some(handle) = self.handle.take()
            && let Ok(handle) = handle.await
        {
            let _ = handle.disconnect(reason, sentence.to_owned(), "en".to_owned()).await;
        }
        Self::retry()
    }

    async fn login_error(&mut self, error: &LoginError) -> Auth {
        match error {
            LoginError::Denied => Self::retry(),
            LoginError::Overloaded => {
                self.hang_up(
                    Disconnect::ServiceNotAvailable,
                    "too many logins at this moment; try again in a few seconds",
                )
                .await
            }
            LoginError::Unavailable => {
                self.hang_up(
                    Disconnect::ServiceNotAvailable,
                    "the exam server cannot reach its database; try again in a moment",
                )
                .await
            }
        }
    }

    fn door(&mut self, channel: ChannelId) -> Option<&mut Door> {
        self.doors.get_mut(&channel)
    }

    /// Answers a request for a shell, a command or a subsystem, and starts it. One for each channel.
    fn start(&mut self, channel: ChannelId, what: What, session: &mut Session) -> Result<(), russh::Error> {
        let connection =
            format!("{} {} {} {}", self.peer.ip(), self.peer.port(), self.local.ip(), self.local.port());
        let client = format!("{} {} {}", self.peer.ip(), self.peer.port(), self.local.port());
        let Some(door) = self.door(channel) else { return Ok(()) };
        let Some(start) = door.start.take() else { return session.channel_failure(channel) };
        let mut env = std::mem::take(&mut door.env);
        env.push(("SSH_CONNECTION".to_owned(), connection));
        env.push(("SSH_CLIENT".to_owned(), client));
        let pty = door.pty.take();
        session.channel_success(channel)?;
        let _ = start.send(Start { what, pty, env });
        Ok(())
    }

    /// Room for one more channel, and its two ends.
    fn open(&mut self, channel: ChannelId) -> Option<(Inputs, oneshot::Receiver<Start>, Entry)> {
        let entry = self.entry.clone()?;
        self.doors.retain(|_, door| !door.gone.is_cancelled());
        if self.doors.len() >= CHANNELS_PER_CONNECTION {
            return None;
        }
        let (start, started) = oneshot::channel();
        let (size, sizes) = watch::channel(None);
        let (signals, signal_queue) = mpsc::channel(SIGNALS);
        let inbox = Arc::new(Inbox::new(Arc::clone(&self.load)));
        if entry.is_err() {
            // Nothing will read it.
            inbox.close();
        }
        let gone = self.end.child_token();
        let inputs = Inputs {
            inbox: Arc::clone(&inbox),
            sizes,
            signals: signal_queue,
            gone: gone.clone(),
            shutdown: self.shutdown.clone(),
        };
        let door = Door {
            inbox,
            pty: None,
            env: Vec::new(),
            env_requests: 0,
            start: Some(start),
            size,
            signals,
            gone,
        };
        self.doors.insert(channel, door);
        Some((inputs, started, entry))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

impl Handler for Connection {
    type Error = ConnectionError;

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, ConnectionError> {
        match self.ssh.auth.ssh_password(user, password).await {
            Ok(access) => {
                self.enter(access).await;
                Ok(Auth::Accept)
            }
            Err(LoginError::Denied) => {
                self.failed(user);
                self.failures += 1;
                tracing::info!(failures = self.failures, "password refused");
                if self.failures < PASSWORD_ATTEMPTS {
                    return Ok(Self::retry());
                }
                Ok(self
                    .hang_up(
                        Disconnect::NoMoreAuthMethodsAvailable,
                        "too many failed logins; connect again with the right password",
                    )
                    .await)
            }
            Err(error) => Ok(self.login_error(&error).await),
        }
    }

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, ConnectionError> {
        self.offered = None;
        let Ok(line) = offer.public_key.to_openssh() else { return Ok(Self::retry()) };
        match self.ssh.auth.ssh_public_key(user, &line).await {
            Ok(access) => {
                self.offered = Some((user.to_owned(), offer.public_key.clone(), access));
                Ok(Auth::Accept)
            }
            Err(error) => Ok(self.login_error(&error).await),
        }
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, ConnectionError> {
        match self.offered.take() {
            Some((offered_by, offered, access))
                if offered_by == user && offered.key_data() == key.public_key.key_data() =>
            {
                self.enter(access).await;
                Ok(Auth::Accept)
            }
            _ => {
                self.failed(user);
                Ok(Self::retry())
            }
        }
    }

    async fn auth_succeeded(&mut self, _session: &mut Session) -> Result<(), ConnectionError> {
        self.place = None;
        if let (Some(accepted), Some(entry)) = (self.accepted.take(), self.entry.clone()) {
            let _ = accepted.send(entry);
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), ConnectionError> {
        let id = channel.id();
        let Some((inputs, started, entry)) = self.open(id) else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        let (_, write) = channel.split();
        reply.accept().await;
        tokio::spawn(channel::session(write, inputs, started, entry).in_current_span());
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _originator: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), ConnectionError> {
        let port = u16::try_from(port).ok().filter(|_| matches!(host, "localhost" | "127.0.0.1" | "::1"));
        let allowed = |entry: &Entry| {
            entry
                .as_ref()
                .is_ok_and(|visit| visit.exam.environment.allow_port_forward && !visit.access.only_watches())
        };
        let (Some(port), true) = (port, self.entry.as_ref().is_some_and(allowed)) else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        let Some((inputs, _, Ok(visit))) = self.open(channel.id()) else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        let (_, write) = channel.split();
        tokio::spawn(channel::tcp(write, inputs, visit, port, reply).in_current_span());
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _session: &mut Session,
    ) -> Result<(), ConnectionError> {
        self.doors.remove(&channel);
        Ok(())
    }

    async fn channel_eof(
        &mut self,
        channel: ChannelId,
        _session: &mut Session,
    ) -> Result<(), ConnectionError> {
        if let Some(door) = self.door(channel) {
            door.inbox.finish();
        }
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        _session: &mut Session,
    ) -> Result<(), ConnectionError> {
        if let Some(door) = self.door(channel) {
            door.inbox.push(data);
        }
        if self.load.exceeded() {
            tracing::warn!("a client ignores its windows; its connection is ended");
            return Err(ConnectionError::Flood);
        }
        Ok(())
    }

    fn adjust_window(&mut self, _channel: ChannelId, _current: u32) -> u32 {
        self.load.target()
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        cols: u32,
        rows: u32,
        _width: u32,
        _height: u32,
        modes: &[(russh::Pty, u32)],
        session: &mut Session,
    ) -> Result<(), ConnectionError> {
        let Some(door) = self.door(channel) else { return Ok(()) };
        if door.start.is_none()
            || door.pty.is_some()
            || term.len() > 64
            || !term.bytes().all(|b| b.is_ascii_graphic())
        {
            return Ok(session.channel_failure(channel)?);
        }
        let (cols, rows) = size(cols, rows);
        let modes = modes.iter().map(|&(opcode, value)| (opcode as u8, value)).collect();
        door.pty = Some(Pty { term: term.to_owned(), cols, rows, modes });
        Ok(session.channel_success(channel)?)
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _single_connection: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        session: &mut Session,
    ) -> Result<(), ConnectionError> {
        Ok(session.channel_failure(channel)?)
    }

    async fn agent_request(
        &mut self,
        _channel: ChannelId,
        _session: &mut Session,
    ) -> Result<bool, ConnectionError> {
        Ok(false)
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), ConnectionError> {
        let Some(door) = self.door(channel) else { return Ok(()) };
        door.env_requests += 1;
        let fits = name.len() + value.len() <= ENV_BYTES && !value.contains('\0');
        if door.start.is_none() || door.env_requests > ENV_REQUESTS || !fits || !accepted_variable(name) {
            return Ok(session.channel_failure(channel)?);
        }
        door.env.push((name.to_owned(), value.to_owned()));
        Ok(session.channel_success(channel)?)
    }

    async fn shell_request(
        &mut self,
        channel: ChannelId,
        session: &mut Session,
    ) -> Result<(), ConnectionError> {
        Ok(self.start(channel, What::Shell, session)?)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        command: &[u8],
        session: &mut Session,
    ) -> Result<(), ConnectionError> {
        Ok(self.start(channel, What::Command(command.to_vec()), session)?)
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), ConnectionError> {
        if name == "sftp" {
            Ok(self.start(channel, What::Sftp, session)?)
        } else {
            Ok(session.channel_failure(channel)?)
        }
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        cols: u32,
        rows: u32,
        _width: u32,
        _height: u32,
        session: &mut Session,
    ) -> Result<(), ConnectionError> {
        let Some(door) = self.door(channel) else { return Ok(()) };
        let (cols, rows) = size(cols, rows);
        match &mut door.pty {
            // Not started yet: the first size changes.
            Some(pty) => (pty.cols, pty.rows) = (cols, rows),
            None => {
                let _ = door.size.send(Some((cols, rows)));
            }
        }
        Ok(session.channel_success(channel)?)
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        signal: Sig,
        _session: &mut Session,
    ) -> Result<(), ConnectionError> {
        if let (Some(name), Some(door)) = (signal_name(&signal), self.door(channel)) {
            let _ = door.signals.try_send(name);
        }
        Ok(())
    }
}

/// A client without a terminal of its own asks for 0 x 0.
fn size(cols: u32, rows: u32) -> (u16, u16) {
    let within = |value: u32, default: u16, most: u16| match value {
        0 => default,
        value => u16::try_from(value).unwrap_or(most).min(most),
    };
    (within(cols, 80, 500), within(rows, 24, 300))
}

fn accepted_variable(name: &str) -> bool {
    let suffix = name.strip_prefix("LC_");
    matches!(name, "LANG" | "TERM")
        || suffix.is_some_and(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'))
}

fn signal_name(signal: &Sig) -> Option<&'static str> {
    Some(match signal {
        Sig::ABRT => "ABRT",
        Sig::ALRM => "ALRM",
        Sig::FPE => "FPE",
        Sig::HUP => "HUP",
        Sig::ILL => "ILL",
        Sig::INT => "INT",
        Sig::KILL => "KILL",
        Sig::PIPE => "PIPE",
        Sig::QUIT => "QUIT",
        Sig::SEGV => "SEGV",
        Sig::TERM => "TERM",
        Sig::USR1 => "USR1",
        Sig::Custom(name) if name == "USR2" => "USR2",
        Sig::Custom(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_clamped_and_nothing_means_the_classic_terminal() {
        assert_eq!(size(0, 0), (80, 24));
        assert_eq!(size(120, 40), (120, 40));
        assert_eq!(size(100_000, 301), (500, 300));
    }

    #[test]
    fn only_locale_and_terminal_variables_pass() {
        for name in ["LANG", "TERM", "LC_ALL", "LC_CTYPE"] {
            assert!(accepted_variable(name), "{name}");
        }
        for name in ["PATH", "LD_PRELOAD", "LC_", "LC_X=Y", "lang", ""] {
            assert!(!accepted_variable(name), "{name}");
        }
    }
}
