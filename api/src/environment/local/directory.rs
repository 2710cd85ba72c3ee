//! One environment's directory: its record, its socket, and the lock that says that somebody is at work on it.
//!
//! The lock is the kernel's (`flock` on the directory), so it ends with whoever held it: an unfinished directory that is
//! not locked is the work of a server that was killed.
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::identity::{EnvironmentId, SessionId, UserId};

const RECORD: &str = "environment.json";
const NEW_RECORD: &str = "environment.json.new";
const SOCKET: &str = "agent.sock";
/// A record is far shorter.
const RECORD_BYTES: u64 = 64 * 1024;

/// How far the work on a directory has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// Its processes may have been started.
    Making,
    /// Its processes were started.
    Started,
    /// It is being destroyed.
    Ending,
}

/// What is written about an environment. Whether it runs is not: that is looked up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub environment_id: EnvironmentId,
    pub owner: Option<(UserId, SessionId)>,
    pub exam_id: String,
    pub stage: Stage,
    /// Milliseconds since 1970.
    pub created_at: i64,
    /// Milliseconds since 1970 when its guard ends it.
    pub expires_at: i64,
    /// The boot of the machine that it was started in.
    pub boot_id: String,
}

/// A directory that this thread alone works on, until it is dropped.
pub(super) struct Locked {
    path: PathBuf,
    handle: File,
}

/// Makes a directory that nobody else may enter, and those above it.
pub(super) fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// How to come by the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Wait for whoever works on it; bounded by that one's own limits.
    Yes,
    /// Only if nobody does.
    No,
}

impl Locked {
    /// Takes an environment's directory; `None` when there is none, or [`Wait::No`] and it is locked.
    pub(super) fn open(path: &Path, wait: Wait) -> io::Result<Option<Self>> {
        let operation = match wait {
            Wait::Yes => FlockOperation::LockExclusive,
            Wait::No => FlockOperation::NonBlockingLockExclusive,
        };
        loop {
            let handle = match File::open(path) {
                Ok(handle) => handle,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            match flock(&handle, operation) {
                Ok(()) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::WOULDBLOCK) if wait == Wait::No => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // Removed, and perhaps made anew, while the lock was waited for: then this is the lock of nothing.
            let held = handle.metadata()?;
            match fs::metadata(path) {
                Ok(now) if (now.dev(), now.ino()) == (held.dev(), held.ino()) => {
                    return Ok(Some(Self { path: path.to_owned(), handle }));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes an environment's directory and makes it first if there is none.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        loop {
            make(path)?;
            if let Some(locked) = Self::open(path, Wait::Yes)? {
                return Ok(locked);
            }
        }
    }

    /// What is written; `None` when nothing legible is.
    pub(super) fn record(&self) -> Option<Record> {
        record(&self.path)
    }

    /// Writes the record as a whole, or not at all.
    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        let new = self.path.join(NEW_RECORD);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        fs::rename(new, self.path.join(RECORD))
    }

    /// The listening socket, made anew.
    pub(super) fn listen(&self) -> io::Result<UnixListener> {
        let _ = fs::remove_file(self.path.join(SOCKET));
        UnixListener::bind(short_path(&self.handle))
    }

    /// Removes it with all that is in it.
    pub(super) fn remove(self) -> io::Result<()> {
        fs::remove_dir_all(&self.path)
    }
}

/// What is written about an environment, without its lock: records are replaced as a whole.
pub(super) fn record(path: &Path) -> Option<Record> {
    let mut text = Vec::new();
    File::open(path.join(RECORD)).ok()?.take(RECORD_BYTES).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Connects to the socket in an environment's directory.
pub(super) async fn connect(path: &Path) -> io::Result<tokio::net::UnixStream> {
    let directory = File::open(path)?;
    tokio::net::UnixStream::connect(short_path(&directory)).await
}

/// The socket's path by way of the open directory: a data directory may be deeper than the 107 bytes that a socket's
/// address holds.
fn short_path(directory: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))
}
