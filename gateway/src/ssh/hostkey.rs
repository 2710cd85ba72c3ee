//! The server's Ed25519 host key: read from a file, made on first use.
use std::{
    fs::OpenOptions,
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

pub use russh::keys::PrivateKey;
use russh::keys::{Algorithm, HashAlg, ssh_key::LineEnding};

/// Why there is no host key.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    /// The file cannot be read or written.
    #[error("the SSH host key file {0} cannot be used: {1}")]
    File(PathBuf, std::io::Error),
    /// The file holds something else.
    #[error(
        "{0} holds no unencrypted OpenSSH private key ({1}); make one with: ssh-keygen -t ed25519 -N '' -f {0}"
    )]
    Malformed(PathBuf, russh::keys::ssh_key::Error),
    /// No key could be made.
    #[error("no SSH host key could be made: {0}")]
    Generate(russh::keys::ssh_key::Error),
}

/// The key at `path`; made there, readable by its owner only, when there is no file.
pub fn load_or_create(path: &Path) -> Result<PrivateKey, HostKeyError> {
    let file_error = |error| HostKeyError::File(path.to_owned(), error);
    match std::fs::read(path) {
        Ok(pem) => {
            PrivateKey::from_openssh(&pem).map_err(|error| HostKeyError::Malformed(path.to_owned(), error))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let key =
                PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).map_err(HostKeyError::Generate)?;
            let pem = key.to_openssh(LineEnding::LF).map_err(HostKeyError::Generate)?;
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(file_error)?;
            file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).map_err(file_error)?;
            Ok(key)
        }
        Err(error) => Err(file_error(error)),
    }
}

/// `SHA256:…`, as `ssh` shows it.
pub fn fingerprint(key: &PrivateKey) -> String {
    key.public_key().fingerprint(HashAlg::Sha256).to_string()
}

/// A line for a `known_hosts` file.
pub fn known_hosts(key: &PrivateKey, host: &str, port: u16) -> Result<String, HostKeyError> {
    let public = key.public_key().to_openssh().map_err(HostKeyError::Generate)?;
    let public = public.trim_end();
    Ok(if port == 22 { format!("{host} {public}") } else { format!("[{host}]:{port} {public}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let made = load_or_create(&path).unwrap();
        let read = load_or_create(&path).unwrap();
        assert_eq!(fingerprint(&made), fingerprint(&read));
        assert!(known_hosts(&read, "127.0.0.1", 2222).unwrap().starts_with("[127.0.0.1]:2222 ssh-ed25519 "));
    }

    #[test]
    fn something_else_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "hello").unwrap();
        assert!(load_or_create(&path).unwrap_err().to_string().contains("ssh-keygen"));
    }
}
