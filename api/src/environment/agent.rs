//! The agent's program, as a backend gets it. Does not know how it comes into an environment.
use std::{fs, io, path::PathBuf};

use bytes::Bytes;

/// The agent's program, at most, bytes.
const LARGEST: u64 = 64 << 20;

/// The agent's program: a static one, of the same build as this server.
#[derive(Debug, Clone)]
pub enum Agent {
    /// A file, read once at the start.
    File(PathBuf),
    /// The program itself.
    Bytes(&'static [u8]),
}

impl Agent {
    /// Its bytes.
    ///
    /// # Errors
    /// When the file cannot be read or is too large for an agent; the message names it.
    pub(super) fn read(self) -> io::Result<Bytes> {
        let path = match self {
            Self::Bytes(bytes) => return Ok(Bytes::from_static(bytes)),
            Self::File(path) => path,
        };
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        if fs::metadata(&path).map_err(named)?.len() > LARGEST {
            return Err(named(io::Error::other("too large for the agent")));
        }
        Ok(fs::read(&path).map_err(named)?.into())
    }
}
