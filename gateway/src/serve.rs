//! Puts a server together from its options and runs it until it is told to end.
use std::{
    io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use carrel_api::{
    access::{Auth, AuthError},
    credential::{KeyError, ServerKey},
    environment::{
        Agent, Environment, EnvironmentError,
        kubernetes::{KubernetesEnvironment, KubernetesOptions},
        link::Links,
        local::{LocalEnvironment, LocalOptions},
    },
    exam::{self, ExamError},
    http::{self as api_http, ApiState, Public},
    lifecycle::Lifecycle,
    store::{Store, StoreError},
};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    AGENT,
    bridge::Bridge,
    http,
    options::{Database, EnvironmentKind, HostPort, MalformedHostPort, Serve},
    ssh::{
        Ssh,
        hostkey::{self, HostKeyError, PrivateKey},
    },
    web::{self, WebState},
};

/// Why a server does not start. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory.
    #[error(
        "the data directory {0} cannot be used: {1}; make it writable, or choose another with --data-dir"
    )]
    DataDir(PathBuf, io::Error),
    /// The file with the database's URL.
    #[error("the database URL cannot be read from {0}: {1}")]
    DatabaseUrl(PathBuf, io::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The exam files.
    #[error(transparent)]
    Exam(#[from] ExamError),
    /// The place where sessions run.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// The host key.
    #[error(transparent)]
    HostKey(#[from] HostKeyError),
    /// The bearer tokens' settings.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The key that signs the pages' cookies.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An address.
    #[error("{0} cannot be listened on: {1}; end what uses it, or choose another address with {2}")]
    Listen(SocketAddr, io::Error, &'static str),
    /// The public address.
    #[error("--public-ssh {0}: {1}")]
    PublicSsh(String, MalformedHostPort),
    /// The build.
    #[error("this carrel was built without its agent; build it with: make build")]
    NoAgent,
}

/// A server whose listeners are bound and whose parts run.
pub struct Server {
    /// Shared by all parts.
    pub store: Store,
    /// Where sessions run.
    pub environment: Arc<dyn Environment>,
    /// When they end.
    pub lifecycle: Arc<Lifecycle>,
    /// Who may.
    pub auth: Arc<Auth>,
    /// What the API tells of it.
    pub public: Public,
    /// Its directory, absolute.
    pub data_dir: PathBuf,
    links: Arc<Links>,
    parts: TaskTracker,
    shutdown: CancellationToken,
}

impl Server {
    /// Starts everything. Nothing is left running when it fails.
    pub async fn start(options: &Serve) -> Result<Self, StartError> {
        let data_dir = data_dir(&options.database.data_dir)?;
        let exams = options.exams.as_deref().map(exam::load_dir).transpose()?.unwrap_or_default();
        let http_listener = listen(options.http_listen, "--http-listen").await?;
        let ssh_listener = listen(options.ssh_listen, "--ssh-listen").await?;
        let bound = |listener: &TcpListener| listener.local_addr();
        let http_bound =
            bound(&http_listener).map_err(|e| StartError::Listen(options.http_listen, e, "--http-listen"))?;
        let ssh_bound =
            bound(&ssh_listener).map_err(|e| StartError::Listen(options.ssh_listen, e, "--ssh-listen"))?;

        let ssh_public = options.public_ssh.clone().unwrap_or_else(|| HostPort::from(ssh_bound));
        let url = options
            .public_url
            .clone()
            .unwrap_or_else(|| format!("http://{}", HostPort::from(http_bound).authority()));
        let (public, host_key) = public(&url, ssh_public, options.ssh_host_key_file.as_deref(), &data_dir)?;

        let environment = environment(&Places {
            kind: options.environment,
            data_dir: &data_dir,
            local_share: &options.local_share,
            kubernetes: &options.kubernetes,
        })
        .await?;
        environment.check().await?;
        let store = Store::open_exclusive(&database_url(&options.database, &data_dir)?).await?;
        store.work_at(&environment.place(), Some(&environment.makes())).await?;
        for exam in &exams {
            store.put_exam(exam).await?;
        }
        let links = Links::new(Arc::clone(&environment));
        let lifecycle = Lifecycle::new(store.clone(), Arc::clone(&environment), Arc::clone(&links));
        let key_file = options.secret_key_file.clone().unwrap_or_else(|| data_dir.join("secret_key"));
        let auth = Auth::new(store.clone(), &options.jwt)?.with_key(ServerKey::load_or_create(&key_file)?);
        let auth = Arc::new(auth);
        let bridge = Arc::new(Bridge::new(store.clone(), Arc::clone(&lifecycle), Arc::clone(&links)));

        let shutdown = CancellationToken::new();
        let parts = TaskTracker::new();
        let api = ApiState::new(store.clone(), Arc::clone(&lifecycle), Arc::clone(&auth), public.clone())
            .with_environment(Arc::clone(&environment))
            .with_allowed_origins(&options.allowed_origins)
            .with_shutdown(shutdown.clone());
        let web = WebState::new(
            Arc::clone(&auth),
            Arc::clone(&bridge),
            &public,
            &options.allowed_origins,
            shutdown.clone(),
        );
        let router = api_http::router(api).merge(web::router(web.clone()));
        parts.spawn(web.ended());
        let ssh = Arc::new(Ssh::new(Arc::clone(&auth), bridge, host_key, options.ssh_penalty_exempt.clone()));
        parts.spawn(Arc::clone(&lifecycle).run(shutdown.clone()));
        parts.spawn(http::serve(http_listener, router, shutdown.clone()));
        parts.spawn(ssh.serve(ssh_listener, shutdown.clone()));
        parts.close();
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            http = %http_bound,
            ssh = %ssh_bound,
            url = public.url,
            fingerprint = public.host_key_fingerprint,
            environment = environment.place(),
            exams = exams.len(),
            "carrel serves"
        );
        Ok(Self { store, environment, lifecycle, auth, public, data_dir, links, parts, shutdown })
    }

    /// Ends it in order: no new connections, last words to the open ones, then the rest. Environments stay.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.parts.wait().await;
        self.links.shutdown().await;
        tracing::info!("carrel has ended");
    }
}

/// SIGINT and SIGTERM, noticed from the moment this is made.
pub struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl EndSignals {
    /// From now on they do not end the process by themselves.
    pub fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Resolves when one has come.
    pub async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The URL that the options name.
pub fn database_url(database: &Database, data_dir: &Path) -> Result<String, StartError> {
    match (&database.database_url, &database.database_url_file) {
        (Some(url), _) => Ok(url.clone()),
        (None, Some(file)) => std::fs::read_to_string(file)
            .map(|url| url.trim().to_owned())
            .map_err(|error| StartError::DatabaseUrl(file.clone(), error)),
        (None, None) => Ok(format!("sqlite:{}", data_dir.join("carrel.db").display())),
    }
}

/// The directory, made if need be, for its owner only, and proven to be writable.
pub fn data_dir(path: &Path) -> Result<PathBuf, StartError> {
    let make = || {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let path = path.canonicalize()?;
        tempfile::tempfile_in(&path)?;
        Ok(path)
    };
    make().map_err(|error| StartError::DataDir(path.to_owned(), error))
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| StartError::Listen(address, error, flag))
}

/// Where sessions run, as the options say it.
pub struct Places<'a> {
    /// Which kind.
    pub kind: EnvironmentKind,
    /// The server's directory.
    pub data_dir: &'a Path,
    /// See `--local-share`.
    pub local_share: &'a [PathBuf],
    /// The cluster.
    pub kubernetes: &'a KubernetesOptions,
}

impl Places<'_> {
    /// Whether environments are given the agent that is in this program.
    fn need_agent(&self) -> bool {
        self.kind == EnvironmentKind::Local || self.kubernetes.sends_agent()
    }
}

/// Makes the backend that the options name; whether it works is said by its own check.
pub async fn environment(places: &Places<'_>) -> Result<Arc<dyn Environment>, StartError> {
    match places.kind {
        _ if AGENT.is_empty() && places.need_agent() => Err(StartError::NoAgent),
        EnvironmentKind::Local => {
            let local = LocalOptions {
                data_dir: places.data_dir.to_owned(),
                agent: Agent::Bytes(AGENT),
                shared: places.local_share.to_vec(),
            };
            let made = LocalEnvironment::new(local);
            Ok(Arc::new(made.map_err(|error| StartError::DataDir(places.data_dir.to_owned(), error))?))
        }
        EnvironmentKind::Kubernetes => {
            Ok(KubernetesEnvironment::connect(places.kubernetes.clone(), Agent::Bytes(AGENT)).await?)
        }
    }
}

/// What the API tells of a server, and its host key, made if there is none yet.
pub fn public(
    url: &str,
    ssh: HostPort,
    host_key_file: Option<&Path>,
    data_dir: &Path,
) -> Result<(Public, PrivateKey), StartError> {
    let default = data_dir.join("ssh_host_ed25519_key");
    let host_key = hostkey::load_or_create(host_key_file.unwrap_or(&default))?;
    let public = Public {
        url: url.trim_end_matches('/').to_owned(),
        host_key_fingerprint: hostkey::fingerprint(&host_key),
        known_hosts: hostkey::known_hosts(&host_key, &ssh.host, ssh.port)?,
        ssh_host: ssh.host,
        ssh_port: ssh.port,
    };
    Ok((public, host_key))
}
