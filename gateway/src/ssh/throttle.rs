//! Who may try to log in now: early drop of unauthenticated connections, and a budget of failures per source.
//!
//! Only failures cost: an exam hall of hundreds is often one address.
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Unauthenticated connections at once: none beyond.
const UNAUTHENTICATED: usize = 512;
/// From here on some are dropped at random, the more the fuller.
const EARLY_DROP: usize = 256;
/// Failed logins that a source may have in store.
const FAILURES: f64 = 60.0;
/// Failures forgiven a second.
const FORGIVEN: f64 = 1.0;
/// Sources remembered. When full, those with nothing to forgive any more go first, then no new one is recorded.
const SOURCES: usize = 65_536;

/// A network in CIDR notation, exempt from the budget of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    network: u128,
    mask: u128,
}

/// Not `ADDRESS/LENGTH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a network of the form 192.0.2.0/24 or 2001:db8::/32")]
pub struct MalformedCidr;

fn bits(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

impl FromStr for Cidr {
    type Err = MalformedCidr;

    fn from_str(text: &str) -> Result<Self, MalformedCidr> {
        let (address, length) = text.split_once('/').ok_or(MalformedCidr)?;
        let address: IpAddr = address.parse().map_err(|_| MalformedCidr)?;
        let length: u32 = length.parse().map_err(|_| MalformedCidr)?;
        let (spare, most) = if address.is_ipv4() { (96, 32) } else { (0, 128) };
        if length > most {
            return Err(MalformedCidr);
        }
        let mask = u128::MAX.checked_shl(128 - spare - length).unwrap_or(0);
        Ok(Self { network: bits(address) & mask, mask })
    }
}

impl Cidr {
    fn contains(self, address: IpAddr) -> bool {
        bits(address) & self.mask == self.network
    }
}

/// Shared by all connections of one server.
#[derive(Debug)]
pub struct Throttle {
    waiting: Arc<AtomicUsize>,
    sources: Mutex<HashMap<IpAddr, Account>>,
    exempt: Vec<Cidr>,
}

#[derive(Debug, Clone, Copy)]
struct Account {
    spent: f64,
    at: Instant,
}

impl Account {
    fn spent_at(self, now: Instant) -> f64 {
        FORGIVEN.mul_add(-now.duration_since(self.at).as_secs_f64(), self.spent).max(0.0)
    }
}

/// Why a connection is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Too many connections are waiting to log in.
    Busy,
    /// Too many failures from this source; how long until the next try.
    Penalty(Duration),
}

/// A place among the unauthenticated, given back when dropped.
#[derive(Debug)]
pub struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Throttle {
    /// Sources within `exempt` have no budget.
    pub fn new(exempt: Vec<Cidr>) -> Self {
        Self { waiting: Arc::default(), sources: Mutex::default(), exempt }
    }

    /// May a connection from `source` try to log in? `dice` is uniform in 0..1.
    pub fn admit(&self, source: IpAddr, now: Instant, dice: f64) -> Result<Place, Refused> {
        if let Some(account) = self.lock().get(&key(source)) {
            let over = account.spent_at(now) - FAILURES;
            if over > 0.0 {
                return Err(Refused::Penalty(Duration::from_secs_f64((over / FORGIVEN).ceil().max(1.0))));
            }
        }
        let place = Place(Arc::clone(&self.waiting));
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        if before >= UNAUTHENTICATED || dice < early_drop(before) {
            return Err(Refused::Busy);
        }
        Ok(place)
    }

    /// A login from `source` failed.
    pub fn failed(&self, source: IpAddr, now: Instant) {
        if self.exempt.iter().any(|network| network.contains(source)) {
            return;
        }
        let mut sources = self.lock();
        if sources.len() >= SOURCES {
            sources.retain(|_, account| account.spent_at(now) > 0.0);
        }
        if sources.len() >= SOURCES && !sources.contains_key(&key(source)) {
            return;
        }
        let account = sources.entry(key(source)).or_insert(Account { spent: 0.0, at: now });
        // A flood is not held against the source for longer than two budgets.
        *account = Account { spent: (account.spent_at(now) + 1.0).min(2.0 * FAILURES), at: now };
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Account>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An IPv6 customer has a /64: that is one source.
fn key(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most 512")]
fn early_drop(waiting: usize) -> f64 {
    waiting.saturating_sub(EARLY_DROP) as f64 / (UNAUTHENTICATED - EARLY_DROP) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn failures_beyond_the_budget_cost_time_and_are_forgiven() {
        let throttle = Throttle::new(Vec::new());
        let now = Instant::now();
        for _ in 0..60 {
            throttle.failed(HALL, now);
        }
        assert!(throttle.admit(HALL, now, 1.0).is_ok());
        throttle.failed(HALL, now);
        assert_eq!(throttle.admit(HALL, now, 1.0).unwrap_err(), Refused::Penalty(Duration::from_secs(1)));
        assert!(throttle.admit(HALL, now + Duration::from_secs(2), 1.0).is_ok());
        assert!(throttle.admit("192.0.2.2".parse().unwrap(), now, 1.0).is_ok());
    }

    #[test]
    fn an_exempt_network_has_no_budget() {
        let throttle = Throttle::new(vec!["192.0.2.0/24".parse().unwrap()]);
        let now = Instant::now();
        for _ in 0..1000 {
            throttle.failed(HALL, now);
        }
        assert!(throttle.admit(HALL, now, 1.0).is_ok());
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let throttle = Throttle::new(Vec::new());
        let now = Instant::now();
        let places: Vec<_> = (0..512).filter_map(|_| throttle.admit(HALL, now, 1.0).ok()).collect();
        assert_eq!(places.len(), 512);
        assert_eq!(throttle.admit(HALL, now, 1.0).unwrap_err(), Refused::Busy);
        drop(places);
        assert!(throttle.admit(HALL, now, 1.0).is_ok());
    }

    #[test]
    fn early_drop_begins_at_half_and_grows() {
        assert!(early_drop(256) <= 0.0);
        assert!((early_drop(384) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn networks_are_read_and_compared_by_their_prefix() {
        let network: Cidr = "10.0.0.0/8".parse().unwrap();
        assert!(network.contains("10.255.0.1".parse().unwrap()));
        assert!(network.contains("::ffff:10.1.1.1".parse().unwrap()));
        assert!(!network.contains("11.0.0.1".parse().unwrap()));
        assert!("0.0.0.0/0".parse::<Cidr>().unwrap().contains("1.2.3.4".parse().unwrap()));
        assert!("::/0".parse::<Cidr>().unwrap().contains("2001:db8::1".parse().unwrap()));
        assert_eq!("10.0.0.0/33".parse::<Cidr>(), Err(MalformedCidr));
        assert_eq!("10.0.0.0".parse::<Cidr>(), Err(MalformedCidr));
    }
}
