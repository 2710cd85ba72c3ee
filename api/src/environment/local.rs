//! Environments on this machine: one sandbox of Linux namespaces each, made by bubblewrap.
//!
//! An environment outlives the server: its directory under `DATA/environments` holds the socket that its agent listens on and
//! what is known about it, and whether it runs is read from `/proc`. So a server that was restarted, or killed at any
//! point, finds what there is by looking, and takes no older knowledge for true.
//!
//! A unit file for the server wants `KillMode=process`, or systemd ends the environments with it.
mod directory;
mod observer;
mod processes;
mod sandbox;

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

pub use sandbox::{DEFAULT_MEMORY, DEFAULT_PROCESSES, DEFAULT_STORAGE, DEFAULT_USER, SHM, TMP};

use self::{
    directory::{Locked, Record, Stage, Wait},
    processes::Instance,
    sandbox::Sandbox,
};
use super::{Agent, ByteStream, Create, Environment, EnvironmentError, Observation, Observed};
use crate::{
    exam::{EnvironmentSpec, Network},
    identity::{EnvironmentId, SessionId, UserId},
    reason::{Reason, ReasonCode},
};

/// How long one call may take. What was begun goes on; calling again waits for it.
const LIMIT: Duration = Duration::from_secs(20);

/// Settings of the local environments.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// The server's data directory; made if it is not there. Environments are in `environments` in it.
    pub data_dir: PathBuf,
    /// What runs as the first process of each environment.
    pub agent: Agent,
    /// Absolute paths besides the system's own that candidates can read: tool chains outside of `/usr`.
    pub shared: Vec<PathBuf>,
}

/// The local environments of one data directory.
pub struct LocalEnvironment {
    inner: Arc<Inner>,
    observation: watch::Receiver<Arc<Observation>>,
}

/// What the calls and the observer share.
struct Inner {
    root: PathBuf,
    data_dir: PathBuf,
    instance: Instance,
    boot_id: String,
    /// `None`: bubblewrap or timeout is not installed; the text says so.
    sandbox: Result<Sandbox, String>,
    /// Something may have changed: look again.
    changed: Notify,
    /// Last words of environments that this server started and that have ended, until they are destroyed.
    last_words: Mutex<HashMap<EnvironmentId, String>>,
}

impl LocalEnvironment {
    /// Prepares the data directory and begins to observe it, until this value is dropped. Environments of an earlier server on the
    /// same data directory are there again. Whether sandboxes can be made is said by [`Environment::check`].
    ///
    /// # Errors
    /// When the data directory cannot be made or the agent cannot be read.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(options: LocalOptions) -> io::Result<Self> {
        directory::make(&options.data_dir)?;
        let data_dir = options.data_dir.canonicalize()?;
        let root = data_dir.join("environments");
        directory::make(&root)?;
        // Also when it was there before.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700))?;
        let agent = options.agent.read()?;
        let sandbox = match (program("bwrap"), program("timeout")) {
            (Some(bubblewrap), Some(guard)) => Ok(Sandbox::new(bubblewrap, guard, &agent, options.shared)?),
            (None, _) => Err("bubblewrap is not installed: run `apt install bubblewrap`".to_owned()),
            (_, None) => Err("the program timeout is not installed: run `apt install coreutils`".to_owned()),
        };
        let inner = Arc::new(Inner {
            instance: instance(&root)?,
            root,
            data_dir,
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            sandbox,
            changed: Notify::new(),
            last_words: Mutex::default(),
        });
        Ok(Self { observation: observer::start(&inner), inner })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Inner>) -> Result<T, EnvironmentError> + Send + 'static,
    ) -> Result<T, EnvironmentError> {
        let inner = Arc::clone(&self.inner);
        let task = tokio::task::spawn_blocking(move || work(&inner));
        match tokio::time::timeout(LIMIT, task).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(EnvironmentError::Unavailable(error.to_string())),
            Err(_) => Err(EnvironmentError::Unavailable("the machine is too slow".into())),
        }
    }
}

#[async_trait]
impl Environment for LocalEnvironment {
    fn place(&self) -> String {
        format!("local environments of {}", self.inner.data_dir.display())
    }

    fn makes(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    async fn check(&self) -> Result<(), EnvironmentError> {
        self.blocking(|inner| inner.check()).await
    }

    async fn create(&self, request: &Create) -> Result<(), EnvironmentError> {
        let request = request.clone();
        self.blocking(move |inner| inner.create(&request)).await
    }

    fn observe(&self) -> watch::Receiver<Arc<Observation>> {
        self.observation.clone()
    }

    async fn inspect(&self, id: EnvironmentId) -> Result<Option<Observed>, EnvironmentError> {
        self.blocking(move |inner| {
            inner.look().map(|mut look| look.environments.remove(&id)).map_err(unavailable)
        })
        .await
    }

    async fn connect(&self, id: EnvironmentId) -> Result<Box<dyn ByteStream>, EnvironmentError> {
        match directory::connect(&self.inner.path(id)).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(EnvironmentError::NotFound),
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn adopt(&self, id: EnvironmentId, owner: (UserId, SessionId)) -> Result<(), EnvironmentError> {
        self.blocking(move |inner| inner.adopt(id, owner)).await
    }

    async fn destroy(&self, id: EnvironmentId) -> Result<(), EnvironmentError> {
        self.blocking(move |inner| inner.destroy(id)).await
    }
}

impl Inner {
    fn path(&self, id: EnvironmentId) -> PathBuf {
        self.root.join(id.to_string())
    }

    fn check(&self) -> Result<(), EnvironmentError> {
        let sandbox = self.sandbox()?;
        if let Some(path) = sandbox.visible().find(|path| self.data_dir.starts_with(path)) {
            return Err(refused(
                ReasonCode::Internal,
                format!(
                    "the data directory {} is below {}, which candidates can read: choose another",
                    self.data_dir.display(),
                    path.display()
                ),
            ));
        }
        match sandbox.try_out().map_err(unavailable)? {
            Ok(()) => Ok(()),
            Err(said) => Err(refused(ReasonCode::Internal, remedy(&said))),
        }
    }

    fn sandbox(&self) -> Result<&Sandbox, EnvironmentError> {
        self.sandbox.as_ref().map_err(|missing| refused(ReasonCode::Internal, missing.clone()))
    }

    fn create(self: &Arc<Self>, request: &Create) -> Result<(), EnvironmentError> {
        let id = request.environment_id;
        let sandbox = self.sandbox()?;
        acceptable(&request.spec)?;
        let directory = Locked::create(&self.path(id)).map_err(unavailable)?;
        let running = processes::all(self.instance).map_err(unavailable)?.contains_key(&id);
        match directory.record() {
            Some(record) if record.stage == Stage::Ending => {
                return Err(refused(
                    ReasonCode::EnvironmentLost,
                    "the environment is being destroyed".into(),
                ));
            }
            Some(_) if running => return Ok(()),
            Some(record) if record.stage == Stage::Started => {
                return Err(EnvironmentError::Refused(self.why_ended(id, &record)));
            }
            // Nothing, or what a server left that was killed before the processes ran.
            _ => {}
        }
        let now = now();
        let lifetime = i64::try_from(request.lifetime_seconds).unwrap_or(i64::MAX).saturating_mul(1000);
        let mut record = Record {
            environment_id: id,
            owner: request.owner,
            exam_id: request.exam_id.clone(),
            stage: Stage::Making,
            created_at: now,
            expires_at: now.saturating_add(lifetime),
            boot_id: self.boot_id.clone(),
        };
        directory.write(&record).map_err(unavailable)?;
        let socket = directory.listen().map_err(unavailable)?;
        let child = sandbox.start(self.instance, request, socket).map_err(unavailable)?;
        observer::watch_child(self, id, child);
        record.stage = Stage::Started;
        directory.write(&record).map_err(unavailable)?;
        drop(directory);
        self.changed.notify_one();
        Ok(())
    }

    fn adopt(&self, id: EnvironmentId, owner: (UserId, SessionId)) -> Result<(), EnvironmentError> {
        let directory = Locked::open(&self.path(id), Wait::Yes).map_err(unavailable)?;
        let directory = directory.ok_or(EnvironmentError::NotFound)?;
        let record = directory.record().ok_or(EnvironmentError::NotFound)?;
        if record.owner.is_none() {
            directory.write(&Record { owner: Some(owner), ..record }).map_err(unavailable)?;
            self.changed.notify_one();
        }
        Ok(())
    }

    fn destroy(&self, id: EnvironmentId) -> Result<(), EnvironmentError> {
        let Some(directory) = Locked::open(&self.path(id), Wait::Yes).map_err(unavailable)? else {
            // Processes without a directory are looked for too: somebody may have removed it.
            return processes::kill_all(self.instance, id).map_err(EnvironmentError::Unavailable);
        };
        self.end(id, directory)
    }

    /// Destroys what this thread has locked.
    fn end(&self, id: EnvironmentId, directory: Locked) -> Result<(), EnvironmentError> {
        // So that others see it as ending, and finish it if this server is killed. A full disk is no reason not to go on.
        if let Some(record) = directory.record()
            && let Err(error) = directory.write(&Record { stage: Stage::Ending, ..record })
        {
            tracing::warn!(environment_id = %id, %error, "the end of an environment cannot be recorded");
        }
        processes::kill_all(self.instance, id).map_err(EnvironmentError::Unavailable)?;
        directory.remove().map_err(unavailable)?;
        self.last_words().remove(&id);
        self.changed.notify_one();
        Ok(())
    }

    /// Why an environment that was started no longer runs.
    fn why_ended(&self, id: EnvironmentId, record: &Record) -> Reason {
        let (code, technical_details) = if record.boot_id != self.boot_id {
            (ReasonCode::EnvironmentLost, "the machine was started anew".to_owned())
        } else if record.expires_at <= now() {
            (ReasonCode::EnvironmentLost, "its lifetime is over".to_owned())
        } else {
            let said = self.last_words().get(&id).cloned().unwrap_or_default();
            (
                ReasonCode::EnvironmentCrashed,
                format!("its first process has ended. {said}").trim_end().to_owned(),
            )
        };
        Reason { code, technical_details }
    }

    fn last_words(&self) -> std::sync::MutexGuard<'_, HashMap<EnvironmentId, String>> {
        self.last_words.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Can this machine give what the exam asks for?
fn acceptable(spec: &EnvironmentSpec) -> Result<(), EnvironmentError> {
    if spec.network != Network::None {
        let text = "local environments have no network but their own loopback: set `network: none`, or use Kubernetes";
        return Err(refused(ReasonCode::Unschedulable, text.into()));
    }
    if let Some(user) = spec.user.as_deref().filter(|user| !sandbox::is_user_name(user)) {
        return Err(refused(ReasonCode::Internal, format!("{user:?} cannot be the name of a user")));
    }
    Ok(())
}

/// The data directory's own name, chosen when it is first used.
fn instance(root: &Path) -> io::Result<Instance> {
    let path = root.join("instance");
    let read =
        || fs::read_to_string(&path).ok().and_then(|text| Uuid::try_parse(text.trim()).ok()).map(Instance);
    if let Some(instance) = read() {
        return Ok(instance);
    }
    // Whole under another name first: two servers that start at once agree on the one that was linked first.
    let new = root.join(format!("instance.{}", Uuid::new_v4()));
    fs::write(&new, Uuid::new_v4().to_string())?;
    let linked = fs::hard_link(&new, &path);
    fs::remove_file(&new)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => read().ok_or_else(|| io::Error::other(format!("{} is not legible: remove it", path.display()))),
    }
}

/// Looks a program up in `PATH`, and where systems keep theirs if that says nothing.
fn program(name: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths)
        .chain(["/usr/bin".into(), "/bin".into()])
        .filter(|directory: &PathBuf| directory.is_absolute())
        .map(|directory| directory.join(name))
        .find(|path| fs::metadata(path).is_ok_and(|file| file.is_file() && file.mode() & 0o111 != 0))
}

/// The one command that helps when bubblewrap cannot make a sandbox.
fn remedy(said: &str) -> String {
    let is = |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let why = "this machine lets nobody make user namespaces";
    if said.contains("nknown option") {
        "bubblewrap 0.8 or newer is needed: run `apt install bubblewrap` on a newer system".to_owned()
    } else if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        format!("{why}: run `sysctl -w kernel.unprivileged_userns_clone=1` as root")
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        format!("{why}: run `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` as root")
    } else if is("/proc/sys/user/max_user_namespaces", "0") {
        format!("{why}: run `sysctl -w user.max_user_namespaces=10000` as root")
    } else {
        let said: String = said.chars().filter(|character| !character.is_control()).take(300).collect();
        format!("bubblewrap cannot make a sandbox here ({said}): in a container, run it with `--privileged`")
    }
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn unavailable(error: io::Error) -> EnvironmentError {
    EnvironmentError::Unavailable(error.to_string())
}

const fn refused(code: ReasonCode, technical_details: String) -> EnvironmentError {
    EnvironmentError::Refused(Reason { code, technical_details })
}
