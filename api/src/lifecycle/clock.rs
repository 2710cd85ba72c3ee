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

    /// Takes a reading that has just arrived. It was told some time before, so this clock is behind the database's by at most
    /// the time of the way, and never ahead: no exam ends before its time.
    pub(super) fn set(&self, reading: i64) {
        let arrived = millis(self.origin.elapsed()).saturating_add(1);
        self.at_origin.store(reading.saturating_sub(arrived), Ordering::Relaxed);
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_carried_on_from_its_arrival_and_never_ahead() {
        let clock = Clock::new();
        let arrived = Instant::now();
        clock.set(5_000_000);
        let now = clock.now_ms();
        assert!(now <= 5_000_000 + millis(arrived.elapsed()) && now >= 4_999_999, "{now}");
        assert!(clock.now_ms() >= now);
    }
}
