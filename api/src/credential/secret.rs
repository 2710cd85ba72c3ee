//! Secrets of our own making: `prefix_id_secret`, with 256 random bits and a checksum.
use std::fmt;

use rand::Rng as _;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// What a secret is for; its prefix lets scanners of source code and logs find one that leaked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretKind {
    /// An API key, `ck_…`.
    ApiKey,
    /// A single-use ticket for a browser, `ct_…`.
    Ticket,
}

impl SecretKind {
    const fn prefix(self) -> &'static str {
        match self {
            Self::ApiKey => "ck",
            Self::Ticket => "ct",
        }
    }
}

/// Characters of a public id: 80 bits, so that two never meet.
const ID: usize = 16;
/// Characters of 256 bits in base32.
const RANDOM: usize = 52;
/// Characters of the checksum: 40 bits.
const CHECKSUM: usize = 8;

/// One secret, in parts.
///
/// What is stored is its id and [`Secret::hash`], the SHA-256 of the random part. A slow or keyed hash would add nothing: the
/// part has 256 bits of a cryptographic generator, so there is no dictionary to try, and a hash alone opens nothing. The
/// comparison takes the same time wherever the difference is.
pub struct Secret {
    id: String,
    text: Zeroizing<String>,
}

impl Secret {
    /// A new one. `mark` is the first character of its id, for what its holder must not be able to change.
    #[must_use]
    pub fn new(kind: SecretKind, mark: Option<char>) -> Self {
        let mut random = Zeroizing::new([0_u8; 42]);
        rand::rng().fill_bytes(random.as_mut_slice());
        let (id, random) = random.split_at(10);
        let mut id = base32(id);
        if let Some(mark) = mark {
            id.replace_range(..1, mark.encode_utf8(&mut [0; 4]));
        }
        let body = Zeroizing::new(format!("{}_{id}_{}", kind.prefix(), *Zeroizing::new(base32(random))));
        let text = Zeroizing::new(format!("{}{}", *body, checksum(&body)));
        Self { id, text }
    }

    /// Takes one apart; `None` for what cannot be one, seen without asking anybody.
    #[must_use]
    pub fn parse(kind: SecretKind, text: &str) -> Option<Self> {
        let (prefix, rest) = text.split_once('_')?;
        let (id, rest) = rest.split_once('_')?;
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if prefix != kind.prefix() || id.len() != ID || rest.len() != RANDOM + CHECKSUM {
            return None;
        }
        if !plain(id) || !plain(rest) {
            return None;
        }
        let (body, given) = text.split_at_checked(text.len() - CHECKSUM)?;
        let right = bool::from(checksum(body).as_bytes().ct_eq(given.as_bytes()));
        right.then(|| Self { id: id.to_owned(), text: Zeroizing::new(text.to_owned()) })
    }

    /// The public part.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The whole, to be shown once to whom it is for.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// What is stored: SHA-256 in hexadecimal. The whole is hashed, so that no hash is of use under another id.
    #[must_use]
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.text.as_bytes()))
    }

    /// Is `hash` of this secret?
    #[must_use]
    pub fn matches(&self, hash: &str) -> bool {
        self.hash().as_bytes().ct_eq(hash.as_bytes()).into()
    }
}

impl fmt::Debug for Secret {
    /// The id only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("id", &self.id).finish_non_exhaustive()
    }
}

fn checksum(body: &str) -> String {
    let mut text = base32(&Sha256::digest(body.as_bytes()));
    text.truncate(CHECKSUM);
    text
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        text.push_str(&format!("{byte:02x}"));
        text
    })
}

/// RFC 4648 in lower case without padding: selected whole by a double click, and the same in any case-blind tool.
fn base32(bytes: &[u8]) -> String {
    const ALPHABET: [char; 32] = [
        'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', 'k', 'l', 'm', 'n', 'o', 'p', 'q', 'r', 's', 't',
        'u', 'v', 'w', 'x', 'y', 'z', '2', '3', '4', '5', '6', '7',
    ];
    let digit = |bits: u32| ALPHABET.get((bits & 31) as usize).copied().unwrap_or('a');
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut held, mut count) = (0_u32, 0_u32);
    for byte in bytes {
        held = (held << 8) | u32::from(*byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(digit(held >> count));
        }
        held &= (1 << count) - 1;
    }
    if count > 0 {
        text.push(digit(held << (5 - count)));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn base32_is_that_of_rfc_4648() {
        for (bytes, text) in [(&b""[..], ""), (b"f", "my"), (b"foob", "mzxw6yq"), (b"foobar", "mzxw6ytboi")] {
            assert_eq!(base32(bytes), text);
        }
    }

    #[test]
    fn a_secret_is_read_back_and_only_its_own_hash_matches() {
        let secret = Secret::new(SecretKind::ApiKey, None);
        let other = Secret::new(SecretKind::ApiKey, None);
        let read = Secret::parse(SecretKind::ApiKey, secret.expose()).unwrap();
        assert_eq!(read.id(), secret.id());
        assert!(read.matches(&secret.hash()));
        assert!(!read.matches(&other.hash()));
        assert!(!read.matches(""));
        assert!(secret.expose().starts_with("ck_"));
        assert_eq!(secret.expose().len(), 3 + ID + 1 + RANDOM + CHECKSUM);
    }

    #[test]
    fn what_is_altered_anywhere_or_of_another_kind_is_not_even_looked_up() {
        let secret = Secret::new(SecretKind::Ticket, Some('w'));
        assert!(secret.id().starts_with('w'));
        let text = secret.expose();
        assert!(Secret::parse(SecretKind::ApiKey, text).is_none());
        for at in 0..text.len() {
            let mut altered = text.to_owned();
            let put = if text.as_bytes()[at] == b'a' { "b" } else { "a" };
            altered.replace_range(at..=at, put);
            assert!(Secret::parse(SecretKind::Ticket, &altered).is_none(), "{at}");
        }
        for text in ["", "ct", "ct_", "ct__", &text[1..], &text[..text.len() - 1], "ct_ä_ö"] {
            assert!(Secret::parse(SecretKind::Ticket, text).is_none());
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let secret = Secret::new(SecretKind::ApiKey, None);
        let shown = format!("{secret:?}");
        assert!(!shown.contains(secret.expose().rsplit('_').next().unwrap()));
    }
}
