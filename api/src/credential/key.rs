//! The server's own key, by which it knows its cookies again.
use std::{
    fmt,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::Rng as _;
use sha2::Sha256;
use zeroize::Zeroizing;

use super::secret::hex;

/// 256 random bits in a file that replicas share. Whoever has it can make cookies for any session.
#[derive(Clone)]
pub struct ServerKey(Zeroizing<[u8; 32]>);

/// Why the key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read or made.
    #[error("the key file {} cannot be used: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not 32 bytes.
    #[error("the key file {} does not have the 32 random bytes of a key: remove it to get a new one", .0.display())]
    Malformed(PathBuf),
    /// Others can read it.
    #[error("the key file {} can be read by others: chmod 600 it, or remove it to get a new one", .0.display())]
    Exposed(PathBuf),
}

impl ServerKey {
    /// A new one, known to this process only.
    #[must_use]
    pub fn random() -> Self {
        let mut key = Zeroizing::new([0_u8; 32]);
        rand::rng().fill_bytes(key.as_mut_slice());
        Self(key)
    }

    /// Reads the file, or makes it with mode 600 and a new key.
    ///
    /// # Errors
    /// [`KeyError`], with what to do.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::File { path: path.to_owned(), source };
        match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                let key = Self::random();
                file.write_all(key.0.as_slice()).and_then(|()| file.sync_all()).map_err(failed)?;
                Ok(key)
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let mode = std::fs::metadata(path).map_err(failed)?.permissions().mode();
                // Group read is what a mounted Secret has.
                if mode & 0o037 != 0 {
                    return Err(KeyError::Exposed(path.to_owned()));
                }
                let bytes = Zeroizing::new(std::fs::read(path).map_err(failed)?);
                let key = <[u8; 32]>::try_from(bytes.as_slice());
                key.map(|key| Self(Zeroizing::new(key))).map_err(|_| KeyError::Malformed(path.to_owned()))
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        // HMAC takes a key of any length; `new` takes one of a block, which this pads to.
        let mut block = Zeroizing::new([0_u8; 64]);
        for (to, from) in block.iter_mut().zip(self.0.iter()) {
            *to = *from;
        }
        let mut mac = Hmac::<Sha256>::new((&*block).into());
        for part in parts {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac
    }

    /// A tag over `parts`, each with its length, in hexadecimal.
    pub(crate) fn tag(&self, parts: &[&[u8]]) -> String {
        hex(&self.mac(parts).finalize().into_bytes())
    }

    /// As [`ServerKey::tag`], as bytes.
    pub(crate) fn digest(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.mac(parts).finalize().into_bytes().into()
    }
}

impl fmt::Debug for ServerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerKey(..)")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_key_file_is_made_once_for_its_owner_only_and_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let first = ServerKey::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let again = ServerKey::load_or_create(&path).unwrap();
        assert_eq!(first.tag(&[b"a"]), again.tag(&[b"a"]));
        assert_ne!(first.tag(&[b"a"]), ServerKey::random().tag(&[b"a"]));
        assert_ne!(first.tag(&[b"a", b"b"]), first.tag(&[b"ab", b""]));
    }

    #[test]
    fn a_key_file_that_others_can_read_or_that_is_cut_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, [1; 32]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(ServerKey::load_or_create(&path), Err(KeyError::Exposed(_))));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, [1; 31]).unwrap();
        assert!(matches!(ServerKey::load_or_create(&path), Err(KeyError::Malformed(_))));
        assert!(matches!(
            ServerKey::load_or_create(&directory.path().join("no/key")),
            Err(KeyError::File { .. })
        ));
    }

    #[test]
    fn a_tag_is_hmac_sha256_of_rfc_4231() {
        // The key of test case 2 is shorter than 32 bytes, so its zero padding is the same key.
        let mut key = [0; 32];
        key[..4].copy_from_slice(b"Jefe");
        let mut mac = ServerKey(Zeroizing::new(key)).mac(&[]);
        mac.update(b"what do ya want for nothing?");
        let tag = hex(&mac.finalize().into_bytes());
        assert_eq!(tag, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
