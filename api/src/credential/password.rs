//! Session passwords: made, hashed, checked, and the work for it bounded.
use std::{
    collections::HashMap,
    fmt,
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rand::RngExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zeroize::Zeroizing;

use super::{argon::Scratch, key::ServerKey};
use crate::identity::SessionId;

/// Letters and digits that are not taken for each other on paper or screen.
const ALPHABET: [char; 31] = [
    'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'j', 'k', 'm', 'n', 'p', 'q', 'r', 's', 't', 'u', 'v', 'w', 'x',
    'y', 'z', '2', '3', '4', '5', '6', '7', '8', '9',
];
/// Five groups of four: 20 x log2(31) = 99 bits.
const GROUPS: usize = 5;

/// Hashes at once: half the processors, the rest is for who is in already; two at least, and at most so many. Each takes a processor
/// for 25 ms and 19 MiB, which are kept: every thread that may hash would else hold as much in a heap of its own.
const AT_ONCE: RangeInclusive<usize> = 2..=16;
/// Logins that wait for their turn; on two processors, with 50 hashes a second, the last one waits 10 s. More are answered [`Overloaded`].
const WAITING: usize = 512;
/// Longest wait for a turn, then [`Overloaded`]: the client's own login deadline is 30 s.
const TURN: Duration = Duration::from_secs(15);
/// A password that was right is remembered this long: a grader's 86 logins pay for one hash.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Passwords remembered at once; more are checked each time.
const REMEMBERED_AT_ONCE: usize = 4096;
/// Longest password that is looked at, bytes.
const LONGEST: usize = 1024;

/// Too many logins wait already. Another try in a few seconds is worth it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many logins at this moment")]
pub struct Overloaded;

/// A session's password as people read it: `k3m9-x7qp-…`.
pub struct Password(Zeroizing<String>);

impl Password {
    /// A new one of 99 bits.
    #[must_use]
    pub fn new() -> Self {
        let mut random = rand::rng();
        let mut text = Zeroizing::new(String::with_capacity(GROUPS * 5));
        for group in 0..GROUPS {
            if group > 0 {
                text.push('-');
            }
            for _ in 0..4 {
                text.push(ALPHABET.get(random.random_range(0..ALPHABET.len())).copied().unwrap_or('a'));
            }
        }
        Self(text)
    }

    /// The text, to be shown once to whom it is for.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Default for Password {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// Argon2id over session passwords, a limited number of hashes at once in a process. Clones share the limit and what is remembered.
#[derive(Clone)]
pub struct Passwords(Arc<Inner>);

struct Inner {
    turns: Arc<Semaphore>,
    /// The memory of the turns that nobody has now.
    kept: Arc<Mutex<Vec<Scratch>>>,
    waiting: AtomicUsize,
    hashes: AtomicUsize,
    /// Of this process only: what is remembered is of no use elsewhere.
    key: ServerKey,
    remembered: Mutex<HashMap<[u8; 32], Instant>>,
    /// Checked when there is nothing to check, so that an unknown session takes as long as a wrong password.
    dummy: String,
}

impl fmt::Debug for Passwords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passwords(..)")
    }
}

impl Default for Passwords {
    fn default() -> Self {
        Self::new()
    }
}

impl Passwords {
    /// With nothing remembered.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            turns: Arc::new(Semaphore::new(at_once())),
            kept: Arc::default(),
            waiting: AtomicUsize::new(0),
            hashes: AtomicUsize::new(0),
            key: ServerKey::random(),
            remembered: Mutex::new(HashMap::new()),
            dummy: Scratch::default().hash(Password::new().expose()).unwrap_or_default(),
        }))
    }

    /// The hash to be stored, a PHC string.
    ///
    /// # Errors
    /// [`Overloaded`] when too many wait.
    pub async fn hash(&self, password: &Password) -> Result<String, Overloaded> {
        let turn = self.turn().await?;
        let text = password.0.clone();
        in_turn(turn, move |scratch| scratch.hash(&text)).await.flatten().ok_or(Overloaded)
    }

    /// Is it the session's password? `stored` is `None` when there is no such session or no password opens it: the work is the same.
    ///
    /// # Errors
    /// [`Overloaded`] when too many wait.
    pub async fn verify(
        &self,
        session: SessionId,
        stored: Option<&str>,
        password: &str,
    ) -> Result<bool, Overloaded> {
        let known = stored.is_some() && password.len() <= LONGEST;
        let stored = stored.unwrap_or(&self.0.dummy);
        let mark = self.0.key.digest(&[session.uuid().as_bytes(), stored.as_bytes(), password.as_bytes()]);
        if known && self.remembers(&mark) {
            return Ok(true);
        }
        let turn = self.turn().await?;
        // Of thirty logins at once, the first ones have answered for the others by now.
        if known && self.remembers(&mark) {
            return Ok(true);
        }
        let stored = stored.to_owned();
        let text = Zeroizing::new(password.chars().take(LONGEST).collect::<String>());
        self.0.hashes.fetch_add(1, Ordering::Relaxed);
        let right =
            in_turn(turn, move |scratch| scratch.verify(&stored, &text)).await.unwrap_or(false) && known;
        if right {
            self.remember(mark);
        }
        Ok(right)
    }

    async fn turn(&self) -> Result<Turn, Overloaded> {
        struct Waiting<'a>(&'a AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = self.0.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.0.waiting);
        if before >= WAITING {
            return Err(Overloaded);
        }
        match tokio::time::timeout(TURN, Arc::clone(&self.0.turns).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Turn::new(permit, &self.0.kept)),
            _ => Err(Overloaded),
        }
    }

    fn remembers(&self, mark: &[u8; 32]) -> bool {
        let remembered = self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.get(mark).is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    fn remember(&self, mark: [u8; 32]) {
        let mut remembered = self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED_AT_ONCE {
            remembered.retain(|_, at| at.elapsed() < REMEMBERED);
        }
        if remembered.len() < REMEMBERED_AT_ONCE {
            remembered.insert(mark, Instant::now());
        }
    }
}

fn at_once() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors / 2).clamp(*AT_ONCE.start(), *AT_ONCE.end())
}

/// The right to hash, and the memory for it, which goes back before the right does.
struct Turn {
    scratch: Scratch,
    kept: Arc<Mutex<Vec<Scratch>>>,
    _permit: OwnedSemaphorePermit,
}

impl Turn {
    fn new(permit: OwnedSemaphorePermit, kept: &Arc<Mutex<Vec<Scratch>>>) -> Self {
        let scratch = kept.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        Self { scratch, kept: Arc::clone(kept), _permit: permit }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let scratch = std::mem::take(&mut self.scratch);
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }
}

/// Works off the async threads. The turn is held until the work is done, also when whoever asked has gone: else a client
/// that hangs up at once could have any number of hashes under way.
async fn in_turn<T: Send + 'static>(
    mut turn: Turn,
    work: impl FnOnce(&mut Scratch) -> T + Send + 'static,
) -> Option<T> {
    let done = tokio::task::spawn_blocking(move || work(&mut turn.scratch));
    done.await.ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn a_password_is_five_groups_of_four_characters_that_cannot_be_confused() {
        let password = Password::new();
        let groups: Vec<_> = password.expose().split('-').collect();
        assert_eq!(groups.iter().map(|group| group.len()).collect::<Vec<_>>(), [4; 5]);
        assert!(!password.expose().contains(['0', 'o', '1', 'l', 'i']));
        assert_ne!(password.expose(), Password::new().expose());
        assert!(!format!("{password:?}").contains(groups[0]));
    }

    #[tokio::test]
    async fn the_right_password_opens_its_session_and_is_remembered() {
        let passwords = Passwords::new();
        let (password, session) = (Password::new(), SessionId::new());
        let stored = passwords.hash(&password).await.unwrap();
        assert!(stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{stored}");
        assert_eq!(passwords.verify(session, Some(&stored), password.expose()).await, Ok(true));
        assert_eq!(passwords.0.hashes.load(Ordering::Relaxed), 1);
        for _ in 0..86 {
            assert_eq!(passwords.verify(session, Some(&stored), password.expose()).await, Ok(true));
        }
        assert_eq!(passwords.0.hashes.load(Ordering::Relaxed), 1);
        assert_eq!(passwords.verify(session, Some(&stored), "wrong").await, Ok(false));
        assert_eq!(passwords.verify(session, Some(&stored), "wrong").await, Ok(false));
        assert_eq!(passwords.0.hashes.load(Ordering::Relaxed), 3, "a wrong one is never remembered");
    }

    #[tokio::test]
    async fn what_is_remembered_dies_with_the_stored_hash_and_belongs_to_one_session() {
        let passwords = Passwords::new();
        let (password, session) = (Password::new(), SessionId::new());
        let stored = passwords.hash(&password).await.unwrap();
        let other = passwords.hash(&Password::new()).await.unwrap();
        assert_eq!(passwords.verify(session, Some(&stored), password.expose()).await, Ok(true));
        assert_eq!(passwords.verify(session, Some(&other), password.expose()).await, Ok(false));
        assert_eq!(passwords.verify(session, None, password.expose()).await, Ok(false));
        assert_eq!(passwords.verify(session, Some("not a hash"), password.expose()).await, Ok(false));
    }

    #[tokio::test]
    async fn an_unknown_session_costs_a_hash_too() {
        let passwords = Passwords::new();
        assert_eq!(passwords.verify(SessionId::new(), None, "x").await, Ok(false));
        assert_eq!(passwords.0.hashes.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_hash_that_nobody_waits_for_any_more_still_counts() {
        let passwords = Passwords::new();
        let (started, start) = std::sync::mpsc::channel();
        let (finish, finished) = std::sync::mpsc::channel::<()>();
        let turn = passwords.turn().await.unwrap();
        let work = tokio::spawn(in_turn(turn, move |_| {
            started.send(()).unwrap();
            finished.recv().unwrap();
        }));
        tokio::task::spawn_blocking(move || start.recv().unwrap()).await.unwrap();
        work.abort();
        assert!(work.await.unwrap_err().is_cancelled());
        assert_eq!(passwords.0.turns.available_permits(), at_once() - 1);
        finish.send(()).unwrap();
        let all = passwords.0.turns.acquire_many(at_once() as u32);
        assert!(tokio::time::timeout(Duration::from_secs(10), all).await.is_ok());
    }

    #[tokio::test]
    async fn the_queue_is_limited_and_says_so_at_once() {
        let passwords = Passwords::new();
        let _all = passwords.0.turns.acquire_many(at_once() as u32).await.unwrap();
        passwords.0.waiting.store(WAITING, Ordering::Relaxed);
        assert_eq!(passwords.verify(SessionId::new(), None, "x").await, Err(Overloaded));
        assert_eq!(passwords.0.waiting.load(Ordering::Relaxed), WAITING);
    }
}
