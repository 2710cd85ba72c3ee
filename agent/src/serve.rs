//! Being an environment's agent: limits, listeners, connections, and the orderly end.
use std::{
    ffi::OsString,
    io,
    os::unix::net::UnixListener as StdListener,
    path::Path,
    process::{Child, Command},
    sync::{Arc, Mutex},
    time::Duration,
};

use carrel_agent::{flow, packed::Packed, wire::ENV_PREFIX};
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{
    account::Account,
    handoff,
    memory::Memory,
    options::Serve,
    reap::{Ending, Reaper},
    registry::Registry,
    request,
    seats::Terminals,
    session, setup, spawn,
};

/// Connections at once. Further ones are closed.
const CONNECTIONS: usize = 64;
/// A peer that has not said that it speaks HTTP/2 after this long is let go.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A peer that was silent for this long is asked whether it is there, and is gone when it is silent for as long again.
const SILENCE: Duration = Duration::from_secs(15);
/// What runs is given this long to end when the agent has to.
const FAREWELL: Duration = Duration::from_secs(1);

/// What all requests share.
#[derive(Debug)]
pub struct Agent {
    /// Whose processes these are.
    pub account: Account,
    /// What runs.
    pub registry: Registry,
    /// What of it can be joined.
    pub terminals: Terminals,
    /// Collects statuses.
    pub reaper: Arc<Reaper>,
    /// Tells what the kernel killed.
    pub memory: Memory,
    /// The one run of the setup script.
    pub setup: Mutex<Option<setup::Outcome>>,
    env: Vec<(String, String)>,
    files: Rlimit,
}

impl Agent {
    /// Gives a command its directory and its variables: the account's, the request's, the agent's; later ones win.
    pub fn surround(&self, command: &mut Command, env: &[(String, String)]) {
        command.env_clear().envs(self.account.variables());
        for (name, value) in env.iter().chain(&self.env) {
            command.env(name, value);
        }
        let home = Path::new(&self.account.home);
        command.current_dir(if home.is_dir() { home } else { Path::new("/") });
    }

    /// Starts a command in a session of its own. Its status is told to the returned value and to nobody else.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &mut Command, terminal: bool) -> io::Result<(Child, Ending)> {
        let child = spawn::spawn(command, terminal, self.files)?;
        let ending = self.reaper.expect(Pid::from_child(&child));
        Ok((child, ending))
    }
}

/// Serves until it is told to end.
///
/// # Errors
/// When it cannot start as asked.
pub fn run(options: Serve) -> io::Result<()> {
    // Other processes of the same user shall not read this one's memory.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let files = limit(&options)?;
    let direct = options.listen_fd.map(inherited_listener).transpose()?;
    let handed = options.socket.as_deref().map(handoff::bind).transpose()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let agent = Arc::new(Agent {
            account: Account::of_this_process(&options),
            registry: Registry::default(),
            terminals: Terminals::default(),
            reaper: Reaper::start()?,
            memory: Memory::new(),
            setup: Mutex::default(),
            env: variables(std::env::vars_os()),
            files,
        });
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        if let Some(listener) = direct {
            let agent = Arc::clone(&agent);
            let serve = move |stream| connection(Arc::clone(&agent), stream);
            tokio::spawn(accept(UnixListener::from_std(listener)?, Arc::clone(&slots), serve));
        }
        if let Some(listener) = handed {
            let agent = Arc::clone(&agent);
            let serve = move |peer| {
                let agent = Arc::clone(&agent);
                handoff::serve(peer, |io| connection(agent, Packed::new(io)))
            };
            tokio::spawn(accept(UnixListener::from_std(listener)?, slots, serve));
        }
        told_to_end().await?;
        farewell(&agent).await;
        Ok(())
    })
}

/// What every process gets, of the agent's own variables.
fn variables(own: impl Iterator<Item = (OsString, OsString)>) -> Vec<(String, String)> {
    own.filter_map(|(name, value)| {
        let name = name.to_str()?.strip_prefix(ENV_PREFIX).filter(|name| !name.is_empty())?;
        Some((name.to_owned(), value.into_string().ok()?))
    })
    .collect()
}

/// SIGTERM or SIGINT. Process 1 of an environment takes neither, as the kernel has it for a process 1 without handlers: a candidate's
/// `kill 1` is a slip. Whoever ends an environment from outside kills it.
async fn told_to_end() -> io::Result<()> {
    if std::process::id() == 1 {
        std::future::pending::<()>().await;
    }
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Sets this process's limits, which its children inherit; returns the limit of open files that children get back.
fn limit(options: &Serve) -> io::Result<Rlimit> {
    let limits = [
        (Resource::Nproc, options.limit_processes),
        (Resource::Fsize, options.limit_file_size),
        (Resource::Data, options.limit_memory),
    ];
    for (resource, wanted) in limits {
        let Some(wanted) = wanted else { continue };
        let highest = rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let limit = Some(wanted.min(highest));
        rustix::process::setrlimit(resource, Rlimit { current: limit, maximum: limit })?;
    }
    let files = rustix::process::getrlimit(Resource::Nofile);
    // Each process costs the agent up to four descriptors.
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum })?;
    Ok(files)
}

fn inherited_listener(descriptor: i32) -> io::Result<StdListener> {
    let listener = StdListener::from(spawn::inherited(descriptor)?);
    if descriptor <= 2 {
        // The standard descriptors stay open, on nothing: no file of ours may get their numbers.
        let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
        let listener_elsewhere = listener.try_clone()?;
        drop(listener);
        match descriptor {
            0 => rustix::stdio::dup2_stdin(&null)?,
            1 => rustix::stdio::dup2_stdout(&null)?,
            _ => rustix::stdio::dup2_stderr(&null)?,
        }
        listener_elsewhere.set_nonblocking(true)?;
        return Ok(listener_elsewhere);
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves each connection in a task of its own, as many at once as there are slots; further ones are closed.
async fn accept<F>(listener: UnixListener, slots: Arc<Semaphore>, serve: impl Fn(UnixStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: some will be closed.
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
            let served = serve(stream);
            tokio::spawn(async move {
                served.await;
                drop(slot);
            });
        }
    }
}

/// One HTTP/2 connection, until it is lost. Its requests live on in tasks, which see their streams closed.
async fn connection(agent: Arc<Agent>, io: impl AsyncRead + AsyncWrite + Unpin) {
    let (io, pulse) = flow::Listened::new(io);
    let Ok(Ok(mut connection)) = timeout(HANDSHAKE, flow::server(io)).await else { return };
    let gone = flow::silence(connection.ping_pong(), &pulse, SILENCE);
    tokio::pin!(gone);
    loop {
        tokio::select! {
            request = connection.accept() => match request {
                Some(Ok((request, respond))) => {
                    tokio::spawn(request::handle(Arc::clone(&agent), request, respond));
                }
                Some(Err(_)) | None => return,
            },
            _ = &mut gone => return,
        }
    }
}

/// HUP to everything, KILL to what stays.
async fn farewell(agent: &Agent) {
    for leader in agent.registry.leaders() {
        session::hang_up(leader);
    }
    let _ = timeout(FAREWELL, async {
        while agent.registry.len() > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    for leader in agent.registry.leaders() {
        session::kill(leader);
    }
}
