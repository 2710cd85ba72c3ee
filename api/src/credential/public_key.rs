//! SSH public keys as text: one line of an `authorized_keys` file without options.
//!
//! Whether somebody holds the private key is the SSH server's to verify; here a key is a name to compare.
use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};

/// Longest line, bytes: an RSA key of 16384 bits takes 2.8 kB.
const LONGEST: usize = 8 * 1024;
/// Smallest RSA modulus taken, bits.
const RSA_BITS: usize = 2048;
/// Largest, bits: what OpenSSH takes.
const RSA_BITS_MAX: usize = 16_384;

/// A public key, without its comment.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey(String);

/// Why a line is no public key that gets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublicKeyError {
    /// Not `algorithm base64 [comment]`.
    #[error("a public key is one line: algorithm, base64 and perhaps a comment, as in id_ed25519.pub")]
    Form,
    /// Something else than a public key of these algorithms.
    #[error(
        "the key's algorithm must be ssh-ed25519, ecdsa-sha2-nistp256, -nistp384 or -nistp521, sk-ssh-ed25519@openssh.com, \
         sk-ecdsa-sha2-nistp256@openssh.com or ssh-rsa"
    )]
    Algorithm,
    /// The base64 part is not a key of the algorithm in front of it.
    #[error("the key is damaged: its base64 part is not a key of the algorithm in front of it")]
    Damaged,
    /// An RSA key that is too short or too long.
    #[error("an RSA key must have 2048 to 16384 bits")]
    RsaBits,
}

impl PublicKey {
    /// Reads one line.
    ///
    /// # Errors
    /// [`PublicKeyError`], with what is allowed.
    pub fn parse(line: &str) -> Result<Self, PublicKeyError> {
        let line = line.trim();
        if line.len() > LONGEST || line.chars().any(|c| c.is_control() && c != '\t') {
            return Err(PublicKeyError::Form);
        }
        let mut words = line.split_ascii_whitespace();
        let (Some(algorithm), Some(text)) = (words.next(), words.next()) else {
            return Err(PublicKeyError::Form);
        };
        let kind = Kind::named(algorithm).ok_or(PublicKeyError::Algorithm)?;
        let blob = STANDARD.decode(text).map_err(|_| PublicKeyError::Damaged)?;
        let mut rest = blob.as_slice();
        if field(&mut rest)? != algorithm.as_bytes() {
            return Err(PublicKeyError::Damaged);
        }
        kind.check(&mut rest)?;
        if !rest.is_empty() {
            return Err(PublicKeyError::Damaged);
        }
        // Encoded again, so that two spellings of one key are one text.
        Ok(Self(format!("{algorithm} {}", STANDARD.encode(&blob))))
    }

    /// `algorithm base64`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

enum Kind {
    Ed25519 { on_token: bool },
    Ecdsa { curve: &'static str, point: usize, on_token: bool },
    Rsa,
}

impl Kind {
    fn named(algorithm: &str) -> Option<Self> {
        Some(match algorithm {
            "ssh-ed25519" => Self::Ed25519 { on_token: false },
            "sk-ssh-ed25519@openssh.com" => Self::Ed25519 { on_token: true },
            "ecdsa-sha2-nistp256" => Self::Ecdsa { curve: "nistp256", point: 65, on_token: false },
            "ecdsa-sha2-nistp384" => Self::Ecdsa { curve: "nistp384", point: 97, on_token: false },
            "ecdsa-sha2-nistp521" => Self::Ecdsa { curve: "nistp521", point: 133, on_token: false },
            "sk-ecdsa-sha2-nistp256@openssh.com" => {
                Self::Ecdsa { curve: "nistp256", point: 65, on_token: true }
            }
            "ssh-rsa" => Self::Rsa,
            _ => return None,
        })
    }

    fn check(&self, rest: &mut &[u8]) -> Result<(), PublicKeyError> {
        let sound = match self {
            Self::Ed25519 { on_token } => field(rest)?.len() == 32 && application(rest, *on_token)?,
            Self::Ecdsa { curve, point, on_token } => {
                let named = field(rest)? == curve.as_bytes();
                let key = field(rest)?;
                named && key.len() == *point && key.first() == Some(&4) && application(rest, *on_token)?
            }
            Self::Rsa => {
                let exponent = field(rest)?;
                let modulus = field(rest)?;
                let bits = bits(modulus).ok_or(PublicKeyError::Damaged)?;
                if !(RSA_BITS..=RSA_BITS_MAX).contains(&bits) {
                    return Err(PublicKeyError::RsaBits);
                }
                self::bits(exponent).is_some_and(|bits| (2..=64).contains(&bits))
            }
        };
        if sound { Ok(()) } else { Err(PublicKeyError::Damaged) }
    }
}

fn application(rest: &mut &[u8], on_token: bool) -> Result<bool, PublicKeyError> {
    Ok(!on_token || field(rest)?.len() <= 255)
}

/// One length-prefixed string of RFC 4251, 5.
fn field<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], PublicKeyError> {
    let (length, after) = rest.split_first_chunk::<4>().ok_or(PublicKeyError::Damaged)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| PublicKeyError::Damaged)?;
    let (value, after) = after.split_at_checked(length).ok_or(PublicKeyError::Damaged)?;
    *rest = after;
    Ok(value)
}

/// Bits of a positive mpint; `None` for a negative or needlessly long one.
fn bits(mpint: &[u8]) -> Option<usize> {
    let digits = match mpint {
        [0, rest @ ..] if rest.first().is_some_and(|byte| byte & 0x80 != 0) => rest,
        [0 | 0x80..=0xff, ..] => return None,
        other => other,
    };
    let first = digits.first()?;
    Some(digits.len() * 8 - first.leading_zeros() as usize)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn line(algorithm: &str, fields: &[&[u8]]) -> String {
        let mut blob = Vec::new();
        for field in std::iter::once(&algorithm.as_bytes()).chain(fields) {
            blob.extend((field.len() as u32).to_be_bytes());
            blob.extend(*field);
        }
        format!("{algorithm} {}", STANDARD.encode(blob))
    }

    fn point(length: usize) -> Vec<u8> {
        let mut point = vec![7; length];
        point[0] = 4;
        point
    }

    fn modulus(bytes: usize) -> Vec<u8> {
        let mut modulus = vec![0xc3; bytes];
        modulus.insert(0, 0);
        modulus
    }

    #[test]
    fn each_algorithm_is_taken_with_or_without_a_comment() {
        let app: &[u8] = b"ssh:";
        for line in [
            line("ssh-ed25519", &[&[1; 32]]),
            line("sk-ssh-ed25519@openssh.com", &[&[1; 32], app]),
            line("ecdsa-sha2-nistp256", &[b"nistp256", &point(65)]),
            line("ecdsa-sha2-nistp384", &[b"nistp384", &point(97)]),
            line("ecdsa-sha2-nistp521", &[b"nistp521", &point(133)]),
            line("sk-ecdsa-sha2-nistp256@openssh.com", &[b"nistp256", &point(65), app]),
            line("ssh-rsa", &[&[1, 0, 1], &modulus(256)]),
        ] {
            let key = PublicKey::parse(&line).unwrap();
            assert_eq!(key.as_str(), line);
            assert_eq!(PublicKey::parse(&format!("{line} somebody at a place\n")).unwrap(), key);
        }
    }

    #[test]
    fn a_key_made_by_ssh_keygen_is_taken() {
        let made = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKhfMLv3Dj9G0mKpVGZkSHHIEDFQXPFTH/3TXAaQtrHs a@b";
        assert!(PublicKey::parse(made).is_ok());
    }

    #[test]
    fn what_is_no_key_or_a_weak_one_is_refused_by_its_fault() {
        let good = line("ssh-ed25519", &[&[1; 32]]);
        for (text, error) in [
            (String::new(), PublicKeyError::Form),
            ("ssh-ed25519".into(), PublicKeyError::Form),
            (format!("{good}\n{good}"), PublicKeyError::Form),
            (format!("{good} {}", "x".repeat(9000)), PublicKeyError::Form),
            (format!("restrict {good}"), PublicKeyError::Algorithm),
            (line("ssh-dss", &[&[1; 32]]), PublicKeyError::Algorithm),
            (line("ssh-ed25519-cert-v01@openssh.com", &[&[1; 32]]), PublicKeyError::Algorithm),
            ("ssh-ed25519 !!!!".into(), PublicKeyError::Damaged),
            (good.replacen("ssh-ed25519", "ssh-rsa", 1), PublicKeyError::Damaged),
            (line("ssh-ed25519", &[&[1; 31]]), PublicKeyError::Damaged),
            (line("ssh-ed25519", &[&[1; 32], &[1]]), PublicKeyError::Damaged),
            (line("ecdsa-sha2-nistp256", &[b"nistp384", &point(65)]), PublicKeyError::Damaged),
            (line("ssh-rsa", &[&[1, 0, 1], &modulus(128)]), PublicKeyError::RsaBits),
            (line("ssh-rsa", &[&[1, 0, 1], &modulus(2049)]), PublicKeyError::RsaBits),
            (line("ssh-rsa", &[&[1, 0, 1], &[0x80; 256]]), PublicKeyError::Damaged),
        ] {
            assert_eq!(PublicKey::parse(&text), Err(error), "{text:.60}");
        }
    }
}
