//! The database's clock, carried on between readings by this machine's monotonic one.
use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Tells the database's time without asking it.
#[derive(Debug)]
pub(super) struct Clock {
    origin: Instant,
    /// The database's time at `origin`, ms since 1970. Until the first reading, this machine's.
    at_origin: AtomicI64,
}

impl Clock {
    pub(super) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { origin: Instant::now(), at_origin: AtomicI64::new(millis(now)) }
    }

    pub(super) fn now_ms(&self) -> i64 {
        self.at_origin.load(Ordering::Relaxed).saturating_add(millis(self.origin.elapsed()))
    }

    /// Takes a reading that was asked for at `asked` and has just arrived: the database told it halfway between.
    pub(super) fn set(&self, reading: i64, asked: Instant) {
        let told = asked.duration_since(self.origin) + asked.elapsed() / 2;
        self.at_origin.store(reading.saturating_sub(millis(told)), Ordering::Relaxed);
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_carried_on_from_when_it_was_told() {
        let clock = Clock::new();
        clock.set(5_000_000, Instant::now());
        let now = clock.now_ms();
        assert!((4_999_999..5_001_000).contains(&now), "{now}");
        assert!(clock.now_ms() >= now);
    }
}
