//! When to try again.
use std::time::Duration;

use rand::RngExt as _;
use tokio::time::{Instant, sleep};

/// Before the second try; each further wait is twice as long.
const FIRST: Duration = Duration::from_millis(100);
/// No wait is longer: who was away is found again soon after it has come back.
const LONGEST: Duration = Duration::from_secs(4);

/// Waits between tries that grow and have an end. Each is between half and all of its length, so that a hall of candidates does not come
/// back as one.
#[derive(Debug)]
pub struct Retry {
    end: Instant,
    next: Duration,
}

impl Retry {
    /// Tries for so long.
    pub fn within(limit: Duration) -> Self {
        Self { end: Instant::now() + limit, next: FIRST }
    }

    /// Waits for the next try; false when there is none any more.
    pub async fn wait(&mut self) -> bool {
        if Instant::now() >= self.end {
            return false;
        }
        let length = self.length(rand::rng().random_range(0.5..=1.0));
        sleep(length).await;
        true
    }

    fn length(&mut self, part: f64) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(LONGEST);
        whole.mul_f64(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tries_come_less_often_and_have_an_end() {
        let mut retry = Retry::within(Duration::from_secs(60));
        let waits: Vec<_> = (0..20).map(|_| retry.length(1.0)).collect();
        assert_eq!(waits[0], FIRST);
        assert!(waits.windows(2).all(|pair| pair[1] == (pair[0] * 2).min(LONGEST)));
        assert_eq!(waits[19], LONGEST);
        assert_eq!(retry.length(0.5), LONGEST / 2);
        assert!(!Retry::within(Duration::ZERO).wait().await);
        assert!(Retry::within(FIRST).wait().await);
    }
}
