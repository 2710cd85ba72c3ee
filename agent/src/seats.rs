//! Which terminal a request for an interactive shell gets.
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use carrel_agent::wire::Join;

/// Terminals that can be joined, oldest first.
#[derive(Debug, Default)]
pub struct Terminals {
    known: Mutex<Vec<Known>>,
}

/// One of them, by its process's id.
#[derive(Debug)]
struct Known {
    id: String,
    counts: Arc<Counts>,
}

/// Who is attached, or about to be.
#[derive(Debug, Default)]
struct Counts {
    ssh: AtomicUsize,
    people: AtomicUsize,
}

/// A place at a terminal, given back when dropped.
#[derive(Debug)]
pub struct Seat {
    counts: Arc<Counts>,
    join: Join,
}

impl Seat {
    fn take(counts: &Arc<Counts>, join: Join) -> Self {
        let seat = Self { counts: Arc::clone(counts), join };
        seat.count(|counter| {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        seat
    }

    fn count(&self, change: impl Fn(&AtomicUsize)) {
        if self.join != Join::Watch {
            change(&self.counts.people);
        }
        // What asks for a terminal of its own is no browser.
        if matches!(self.join, Join::Ssh | Join::Never) {
            change(&self.counts.ssh);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.count(|counter| {
            counter.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

impl Terminals {
    fn lock(&self) -> MutexGuard<'_, Vec<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place at an existing terminal; `None`: a new one is to be started (or, to watch, there is none).
    pub fn join(&self, join: Join) -> Option<(String, Seat)> {
        let known = self.lock();
        let seats: Vec<_> = known
            .iter()
            .map(|known| {
                (known.counts.ssh.load(Ordering::Relaxed), known.counts.people.load(Ordering::Relaxed))
            })
            .collect();
        let known = known.get(choose(join, &seats)?)?;
        Some((known.id.clone(), Seat::take(&known.counts, join)))
    }

    /// A place at this very terminal, whoever is there; `None` when it can be joined no more.
    pub fn seat_at(&self, id: &str, join: Join) -> Option<Seat> {
        self.lock().iter().find(|known| known.id == id).map(|known| Seat::take(&known.counts, join))
    }

    /// Adds a new terminal and takes the first place at it.
    pub fn add(&self, id: &str, join: Join) -> Seat {
        let counts = Arc::default();
        let seat = Seat::take(&counts, join);
        self.lock().push(Known { id: id.into(), counts });
        seat
    }

    /// This one can be joined no more.
    pub fn remove(&self, id: &str) {
        self.lock().retain(|known| known.id != id);
    }
}

/// The rule of [`Join`], on (SSH clients, people) at each terminal; the first is the main one.
fn choose(join: Join, seats: &[(usize, usize)]) -> Option<usize> {
    match (join, seats.first()?) {
        (Join::Never, _) => None,
        (Join::Browser | Join::Watch, _) | (Join::Ssh, (0, _)) => Some(0),
        (Join::Ssh, _) => seats.iter().position(|(_, people)| *people == 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_of_joining() {
        for join in [Join::Never, Join::Ssh, Join::Browser, Join::Watch] {
            assert_eq!(choose(join, &[]), None);
        }
        assert_eq!(choose(Join::Never, &[(0, 0)]), None);
        assert_eq!(choose(Join::Browser, &[(1, 3), (0, 0)]), Some(0));
        assert_eq!(choose(Join::Watch, &[(1, 3)]), Some(0));
        // The main one, also beside a browser; else a free one; else a new one.
        assert_eq!(choose(Join::Ssh, &[(0, 1), (0, 0)]), Some(0));
        assert_eq!(choose(Join::Ssh, &[(1, 1), (1, 1), (0, 0)]), Some(2));
        assert_eq!(choose(Join::Ssh, &[(1, 1), (0, 1)]), None);
    }

    #[test]
    fn a_seat_is_free_again_when_it_is_given_back() {
        let terminals = Terminals::default();
        let first = terminals.add("a", Join::Ssh);
        assert!(terminals.join(Join::Ssh).is_none());
        let (_, watcher) = terminals.join(Join::Watch).unwrap();
        drop(first);
        let (id, seat) = terminals.join(Join::Ssh).unwrap();
        assert_eq!(id, "a");
        // Whoever names it gets a place beside.
        let again = terminals.seat_at("a", Join::Ssh).unwrap();
        drop(seat);
        assert!(terminals.join(Join::Ssh).is_none());
        drop(again);
        let (_, _seat) = terminals.join(Join::Ssh).unwrap();
        drop(watcher);
        assert!(terminals.join(Join::Ssh).is_none());
        terminals.remove("a");
        assert!(terminals.join(Join::Watch).is_none());
    }
}
