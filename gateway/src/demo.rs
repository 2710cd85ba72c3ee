//! `carrel demo`: a complete server in a fresh directory, with one exam and one session, gone when it ends.
use std::{fs::Permissions, io::Write, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use carrel_api::{
    access::{JwtOptions, LoginError},
    environment::{EnvironmentError, kubernetes::KubernetesOptions},
    exam::Exam,
    http::{CreateError, start},
    identity::UserId,
    session::{Session, State},
    store::{Actor, StoreError},
};
use serde_json::{Value, json};

use crate::{
    keys::{self, KeysError},
    options::{Database, Demo, EnvironmentKind, Serve},
    serve::{EndSignals, Server, StartError},
};

/// The demo's exam.
const EXAM: &str =
    "id: demo\ntitle: A look around\nduration_minutes: 120\nenvironment:\n  allow_port_forward: true\n";
/// Provisioning ends within 60 s, one way or the other.
const READY_WITHIN: Duration = Duration::from_secs(75);

/// Why there is no demo.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The server did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Its database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The session.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The browser's ticket.
    #[error(transparent)]
    Login(#[from] LoginError),
    /// The API key.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The environment's end.
    #[error("an environment could not be ended: {0}")]
    Environment(#[from] EnvironmentError),
    /// The session failed.
    #[error("the environment did not become ready: {0}")]
    NotReady(String),
    /// The directory, or what was to be printed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

enum Shown {
    Ready,
    Interrupted,
}

/// Runs it until it is told to end; then nothing of it is left.
pub async fn run(options: &Demo) -> Result<(), DemoError> {
    let mut told_to_end = EndSignals::new()?;
    let folder = tempfile::Builder::new()
        .prefix("carrel-demo-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir()?;
    let server = Server::start(&Serve {
        database: Database {
            database_url: None,
            database_url_file: None,
            data_dir: folder.path().to_owned(),
        },
        http_listen: options.http_listen,
        ssh_listen: options.ssh_listen,
        public_url: None,
        public_ssh: None,
        environment: EnvironmentKind::Local,
        exams: None,
        kubernetes: KubernetesOptions::default(),
        ssh_host_key_file: None,
        secret_key_file: None,
        local_share: Vec::new(),
        ssh_penalty_exempt: Vec::new(),
        allowed_origins: Vec::new(),
        jwt: JwtOptions::default(),
        log_format: options.log_format,
    })
    .await?;
    let shown = tokio::select! {
        shown = show(&server, options.json) => shown,
        () = told_to_end.wait() => Ok(Shown::Interrupted),
    };
    if let Ok(Shown::Ready) = shown {
        told_to_end.wait().await;
    }
    end(server).await?;
    folder.close()?;
    shown.map(|_| ())
}

async fn show(server: &Server, as_json: bool) -> Result<Shown, DemoError> {
    let exam = Exam::from_yaml(EXAM).map_err(StartError::Exam)?;
    server.store.put_exam(&exam).await?;
    let scopes = ["platform", "operator"].map(str::to_owned);
    let (_, key) = keys::create(&server.store, "demo", &scopes).await?;
    let parts = (&server.store, &*server.auth, &server.public);
    let (session, body) = start(parts, UserId::new(), &exam.id, &Actor::Platform).await?;
    server.lifecycle.wake();
    let session = ready(server, &session).await?;
    let ticket = server.auth.page_ticket(&session).await?;
    let url = &server.public.url;
    let browser_url = format!("{url}/session/{}#ticket={}", session.id, ticket.expose());
    let ssh = body.get("ssh").cloned().unwrap_or_default();
    let text = if as_json {
        let told = json!({
            "session_id": session.id,
            "user_id": session.user_id,
            "exam_id": session.exam_id,
            "environment_id": session.environment_id,
            "data_dir": server.data_dir,
            "ssh": ssh,
            "browser_url": browser_url,
            "api": {"url": url, "key": key},
        });
        told.to_string()
    } else {
        for_people(&ssh, &browser_url, url, &key)
    };
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{text}")?;
    stdout.flush()?;
    Ok(Shown::Ready)
}

fn for_people(ssh: &Value, browser_url: &str, url: &str, key: &str) -> String {
    let of = |name: &str| ssh.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    format!(
        "\nYour shell is ready.\n\n\
         \x20 ssh        {}\n\
         \x20 password   {}\n\
         \x20 host key   {}\n\n\
         \x20 browser    {browser_url}\n\
         \x20            (this address works once)\n\n\
         \x20 API        {url}/v1/sessions   documented at {url}/openapi.json\n\
         \x20 API key    {key}\n\n\
         Both lead into the same shell. Ctrl-C ends the demo and leaves nothing behind.\n",
        of("command"),
        of("password"),
        of("host_key_fingerprint"),
    )
}

async fn ready(server: &Server, session: &Session) -> Result<Arc<Session>, DemoError> {
    let mut feed = server.lifecycle.watch(session.id).await?;
    let ready = feed.wait_for(|session| session.state >= State::Ready);
    let session = match tokio::time::timeout(READY_WITHIN, ready).await {
        Ok(Ok(session)) => Arc::clone(&session),
        Ok(Err(_)) | Err(_) => return Err(DemoError::NotReady("it took too long".to_owned())),
    };
    match &session.reason {
        None => Ok(session),
        Some(reason) => Err(DemoError::NotReady(reason.technical_details.clone())),
    }
}

/// The server first, so that nobody makes an environment behind our back; then every environment that there is.
async fn end(server: Server) -> Result<(), DemoError> {
    let environment = Arc::clone(&server.environment);
    server.stop().await;
    let ids: Vec<_> = environment.observe().borrow().environments.keys().copied().collect();
    for id in ids {
        environment.destroy(id).await?;
    }
    Ok(())
}
