//! The SSH server: accepts connections under limits, lets in whoever owns a session, and runs one task per channel.
//!
//! The only module that knows russh. What a channel does is in `channel`, one function read from top to bottom;
//! `connection` folds the protocol's callbacks into its inputs.
use std::{net::SocketAddr, sync::Arc, time::Duration};

use carrel_api::access::Auth;
use rand::RngExt as _;
use russh::{
    Disconnect, MethodKind, MethodSet, Preferred, SshId, cipher, kex,
    keys::PrivateKey,
    server::{self, Config},
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use crate::{
    bridge::Bridge,
    ssh::{
        connection::{Connection, Entry},
        guard::Guarded,
        inbox::Load,
        throttle::Throttle,
    },
};

mod channel;
mod connection;
mod guard;
pub mod hostkey;
mod inbox;
pub mod throttle;

/// From accept to an accepted login.
const LOGIN_DEADLINE: Duration = Duration::from_secs(30);
/// Wrong passwords of one connection.
const PASSWORD_ATTEMPTS: u32 = 3;
/// Rejections of one connection in all: the first `none`, keys that an agent offers, and the passwords.
const REJECTIONS: usize = 16;
/// A rejected login is answered after this, so that the answer's time tells nothing.
const REJECTION_TIME: Duration = Duration::from_millis(100);
/// Channels of one connection at once.
pub const CHANNELS_PER_CONNECTION: usize = 8;
/// Logged-in connections of the whole server; more are told to come back.
const CONNECTIONS: usize = 20_000;
/// Silence before a keepalive is sent; three without an answer end the connection.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// After its session's end, or the server's, a connection has this long to tell its client why.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Who has logged in and is not let in hears why on a channel, and is disconnected after this.
const REFUSED: Duration = Duration::from_secs(10);
/// After an error of `accept` (no file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all connections share.
pub struct Ssh {
    auth: Arc<Auth>,
    bridge: Arc<Bridge>,
    throttle: Throttle,
    config: Arc<Config>,
}

impl Ssh {
    /// One server with one host key.
    pub fn new(
        auth: Arc<Auth>,
        bridge: Arc<Bridge>,
        host_key: PrivateKey,
        exempt: Vec<throttle::Cidr>,
    ) -> Self {
        let config = Config {
            server_id: SshId::Standard(concat!("SSH-2.0-Carrel_", env!("CARGO_PKG_VERSION")).into()),
            methods: methods(),
            auth_rejection_time: REJECTION_TIME,
            auth_rejection_time_initial: Some(Duration::ZERO),
            keys: vec![host_key],
            window_size: inbox::FULL_WINDOW,
            maximum_packet_size: 32 << 10,
            // Nothing reads russh's own queue per channel: see `connection`.
            channel_buffer_size: 1,
            event_buffer_size: 16,
            preferred: preferred(),
            max_auth_attempts: REJECTIONS,
            inactivity_timeout: None,
            keepalive_interval: Some(KEEPALIVE),
            keepalive_max: 3,
            ..Config::default()
        };
        Self { auth, bridge, throttle: Throttle::new(exempt), config: Arc::new(config) }
    }

    /// Serves `listener` until `shutdown`, then gives the open connections a few seconds for last words.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, shutdown: CancellationToken) {
        let connections = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    if connections.len() >= CONNECTIONS {
                        continue;
                    }
                    let span = tracing::info_span!("ssh", %peer, user_id = tracing::field::Empty, session_id = tracing::field::Empty);
                    connections
                        .spawn(Arc::clone(&self).connection(stream, peer, shutdown.clone()).instrument(span));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        connections.close();
        if timeout(LAST_WORDS * 2, connections.wait()).await.is_err() {
            tracing::warn!(left = connections.len(), "some SSH connections did not end in time");
        }
    }

    async fn connection(
        self: Arc<Self>,
        mut stream: TcpStream,
        peer: SocketAddr,
        shutdown: CancellationToken,
    ) {
        let dice = rand::rng().random();
        let place = match self.throttle.admit(peer.ip(), std::time::Instant::now(), dice) {
            Ok(place) => place,
            Err(refused) => {
                tracing::info!(?refused, "a connection was refused before its login");
                let line = match refused {
                    throttle::Refused::Busy => {
                        "Too many people are logging in; try again in a few seconds\r\n".to_owned()
                    }
                    throttle::Refused::Penalty(wait) => format!(
                        "Too many failed logins from your address; try again in {} s\r\n",
                        wait.as_secs()
                    ),
                };
                // A line before the version exchange, as RFC 4253, 4.2 allows.
                let _ = timeout(Duration::from_secs(1), stream.write_all(line.as_bytes())).await;
                return;
            }
        };
        let _counted = self.auth.metrics().ssh_connection();
        let Ok(local) = stream.local_addr() else { return };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let load = Arc::new(Load::default());
        let end = CancellationToken::new();
        let _end_on_drop = end.clone().drop_guard();
        let guarded = Guarded::new(stream, Arc::clone(&load), end.clone());
        let (connection, mut login) =
            Connection::new(Arc::clone(&self), (peer, local), load, end.clone(), shutdown.clone(), place);
        let login_deadline = sleep(LOGIN_DEADLINE);
        tokio::pin!(login_deadline);

        let started = tokio::select! {
            started = server::run_stream(Arc::clone(&self.config), guarded, connection) => started,
            () = &mut login_deadline => return,
            () = shutdown.cancelled() => return,
        };
        let running = match started {
            Ok(running) => running,
            Err(error) => {
                tracing::debug!(%error, "a connection ended before its key exchange");
                return;
            }
        };
        let handle = running.handle();
        tokio::pin!(running);

        let entry = tokio::select! {
            result = &mut running => return ended(result),
            entry = login.accepted(&handle) => entry,
            () = &mut login_deadline => {
                tracing::info!("no login within the deadline");
                let said = "no login within 30 s; connect again when you have your password at hand";
                return last_words(&handle, said, running).await;
            }
            () = shutdown.cancelled() => return,
        };
        let said = tokio::select! {
            result = &mut running => return ended(result),
            over = over(&entry) => over,
            () = shutdown.cancelled() => "the exam server restarts; connect again, your shell goes on".to_owned(),
        };
        // The channels tell their clients first; whoever leaves them open is disconnected with the same sentence.
        tokio::select! {
            result = &mut running => return ended(result),
            () = sleep(LAST_WORDS) => {}
        }
        last_words(&handle, &said, running).await;
    }
}

/// Waits for the session's end, which it returns in words; until then somebody is here. Who is not let in has a moment to
/// hear why on a channel.
async fn over(entry: &Entry) -> String {
    let visit = match entry {
        Ok(visit) => visit,
        Err(refusal) => {
            sleep(REFUSED).await;
            return refusal.to_string();
        }
    };
    tokio::select! {
        biased;
        over = visit.over() => over.message,
        never = visit.active() => match never {},
    }
}

async fn last_words<F: Future>(handle: &server::Handle, said: &str, running: std::pin::Pin<&mut F>) {
    let farewell = async {
        let _ = handle.disconnect(Disconnect::ByApplication, said.to_owned(), "en".to_owned()).await;
        running.await;
    };
    // Dropping the caller's guard ends a connection that does not take its leave.
    let _ = timeout(Duration::from_secs(1), farewell).await;
}

fn ended(result: Result<(), connection::ConnectionError>) {
    match result {
        Ok(()) => tracing::debug!("connection closed"),
        Err(error) => tracing::debug!(%error, "connection ended"),
    }
}

fn methods() -> MethodSet {
    MethodSet::from(&[MethodKind::PublicKey, MethodKind::Password][..])
}

/// Elliptic curves only: a finite-field exchange costs 87 to 713 ms of server time before any login, and three of them a
/// second stop everybody (CVE-2002-20001). AES-GCM first: it is the fastest here and needs no MAC; ChaCha20 is left out for CVE-2023-48795's sake even where strict key exchange is spoken.
fn preferred() -> Preferred {
    const CIPHERS: &[cipher::Name] = &[
        cipher::AES_128_GCM,
        cipher::AES_256_GCM,
        cipher::AES_256_CTR,
        cipher::AES_192_CTR,
        cipher::AES_128_CTR,
    ];
    const KEX: &[kex::Name] = &[
        kex::MLKEM768X25519_SHA256,
        kex::CURVE25519,
        kex::CURVE25519_PRE_RFC_8731,
        kex::EXTENSION_SUPPORT_AS_SERVER,
        kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
    ];
    Preferred {
        kex: KEX.into(),
        cipher: CIPHERS.into(),
        compression: (&[russh::compression::NONE][..]).into(),
        ..Preferred::DEFAULT
    }
}
