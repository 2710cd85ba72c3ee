//! Argon2id in memory that its caller keeps: taken anew for each hash, it would stay in the heap of each thread that ever hashed.
use argon2::{
    Algorithm, Argon2, Block, Params, PasswordHash, Version,
    password_hash::phc::{Output, ParamsString, Salt},
};

/// The memory that one hash at a time works in, 19 MiB once it was used.
#[derive(Default)]
pub(super) struct Scratch(Vec<Block>);

impl Scratch {
    /// Argon2id, 19 MiB, two passes, one lane: the first choice of OWASP's password storage recommendations. A PHC string.
    pub fn hash(&mut self, password: &str) -> Option<String> {
        let (algorithm, version) = (Algorithm::Argon2id, Version::V0x13);
        let params = Params::new(19 * 1024, 2, 1, None).ok()?;
        let salt = Salt::generate();
        let hash = PasswordHash {
            algorithm: algorithm.ident(),
            version: Some(version.into()),
            params: ParamsString::try_from(&params).ok()?,
            hash: Some(self.output(Argon2::new(algorithm, version, params), password, &salt)?),
            salt: Some(salt),
        };
        Some(hash.to_string())
    }

    /// Is it the password of this PHC string? Of what [`hash`](Self::hash) has not made the answer is no.
    pub fn verify(&mut self, stored: &str, password: &str) -> bool {
        self.matches(stored, password).unwrap_or(false)
    }

    fn matches(&mut self, stored: &str, password: &str) -> Option<bool> {
        let stored = PasswordHash::new(stored).ok()?;
        let argon2 = Argon2::new(
            Algorithm::try_from(stored.algorithm.as_str()).ok()?,
            Version::try_from(stored.version?).ok()?,
            Params::try_from(&stored).ok()?,
        );
        // Equality of outputs takes constant time.
        Some(self.output(argon2, password, stored.salt.as_ref()?)? == stored.hash?)
    }

    fn output(&mut self, argon2: Argon2<'_>, password: &str, salt: &[u8]) -> Option<Output> {
        let blocks = argon2.params().block_count();
        if self.0.len() < blocks {
            self.0.resize(blocks, Block::new());
        }
        let mut output = [0; Params::DEFAULT_OUTPUT_LEN];
        argon2.hash_password_into_with_memory(password.as_bytes(), salt, &mut output, &mut self.0).ok()?;
        Output::new(&output).ok()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Made by the reference program: `echo -n k3m9-x7qp | argon2 saltsaltsaltsalt -id -t 2 -k 19456 -p 1 -e`.
    const REFERENCE: &str =
        "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0c2FsdA$3hdzTpgQQYrCzeRcBtTw0sUUtFOPhKkIt1Cw8iDV6JU";

    #[test]
    fn hashes_are_those_of_the_reference_program() {
        let mut scratch = Scratch::default();
        assert!(scratch.verify(REFERENCE, "k3m9-x7qp"));
        assert!(!scratch.verify(REFERENCE, "k3m9-x7qq"));
    }

    #[test]
    fn what_the_memory_was_used_for_before_makes_no_difference() {
        let mut scratch = Scratch::default();
        let (one, other) = (scratch.hash("one").unwrap(), scratch.hash("other").unwrap());
        assert!(scratch.verify(&one, "one") && scratch.verify(&other, "other"));
        assert!(!scratch.verify(&one, "other") && !scratch.verify(&other, "one"));
        assert_ne!(one, scratch.hash("one").unwrap(), "each has a salt of its own");
    }

    #[test]
    fn what_is_no_hash_of_ours_opens_nothing() {
        let mut scratch = Scratch::default();
        for stored in
            ["", "not a hash", "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ", "$2b$12$abcdefghijklmnopqrstuv"]
        {
            assert!(!scratch.verify(stored, ""), "{stored}");
        }
    }
}
