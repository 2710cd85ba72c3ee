//! Counts for Prometheus, kept in atomics: there are few of them, and a registry would be more code than the numbers.
use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use crate::{
    access::{How, LoginError},
    session::State,
    store::WarmState,
};

/// What came of a login.
const RESULTS: [&str; 4] = ["accepted", "denied", "overloaded", "unavailable"];
/// How somebody logged in.
const METHODS: [How; 5] = [How::Password, How::PublicKey, How::Ticket, How::Cookie, How::Bearer];

/// Counters of one process. Shared; every method is cheap and never waits.
#[derive(Debug, Default)]
pub struct Metrics {
    logins: [[AtomicU64; RESULTS.len()]; METHODS.len()],
    requests: [AtomicU64; 5],
    sessions_created: AtomicU64,
    ssh_connections: AtomicI64,
    web_sockets: AtomicI64,
}

/// What the database tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Sessions not yet released, by state.
    pub sessions: Vec<(State, u64)>,
    /// Environments that no session has, by state.
    pub warm: Vec<(WarmState, u64)>,
}

/// Something that is open while this lives.
#[derive(Debug)]
pub struct Open {
    metrics: Arc<Metrics>,
    gauge: fn(&Metrics) -> &AtomicI64,
}

impl Drop for Open {
    fn drop(&mut self) {
        (self.gauge)(&self.metrics).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Metrics {
    /// Counts a login.
    pub fn login(&self, how: How, result: Result<(), LoginError>) {
        let column = match result {
            Ok(()) => 0,
            Err(LoginError::Denied) => 1,
            Err(LoginError::Overloaded) => 2,
            Err(LoginError::Unavailable) => 3,
        };
        let row = METHODS.iter().position(|method| *method == how).and_then(|row| self.logins.get(row));
        if let Some(cell) = row.and_then(|row| row.get(column)) {
            cell.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a request to the API by the class of its status.
    pub fn request(&self, status: u16) {
        if let Some(cell) = self.requests.get(usize::from(status / 100).saturating_sub(1)) {
            cell.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a session made here.
    pub fn session_created(&self) {
        self.sessions_created.fetch_add(1, Ordering::Relaxed);
    }

    /// An SSH connection, counted as open until the answer is dropped.
    #[must_use]
    pub fn ssh_connection(self: &Arc<Self>) -> Open {
        self.open(|metrics| &metrics.ssh_connections)
    }

    /// A WebSocket, counted as open until the answer is dropped.
    #[must_use]
    pub fn web_socket(self: &Arc<Self>) -> Open {
        self.open(|metrics| &metrics.web_sockets)
    }

    fn open(self: &Arc<Self>, gauge: fn(&Self) -> &AtomicI64) -> Open {
        gauge(self).fetch_add(1, Ordering::Relaxed);
        Open { metrics: Arc::clone(self), gauge }
    }

    /// The text format of Prometheus. `counts` is `None` when the database does not tell.
    #[must_use]
    pub fn render(&self, counts: Option<&Counts>) -> String {
        let mut all = head("carrel_up", "gauge", "1 when the database answers.");
        // Writing to a String cannot fail.
        let _ = writeln!(all, "carrel_up {}", u8::from(counts.is_some()));
        all += &head("carrel_sessions", "gauge", "Sessions whose environment is not released yet, by state.");
        for (state, count) in counts.map(|counts| counts.sessions.as_slice()).unwrap_or_default() {
            let _ = writeln!(all, "carrel_sessions{{state=\"{state}\"}} {count}");
        }
        all += &head("carrel_warm_environments", "gauge", "Environments that no session has yet, by state.");
        for (state, count) in counts.map(|counts| counts.warm.as_slice()).unwrap_or_default() {
            let _ = writeln!(all, "carrel_warm_environments{{state=\"{}\"}} {count}", state.as_str());
        }
        all += &head("carrel_sessions_created_total", "counter", "Sessions made by this process.");
        let _ =
            writeln!(all, "carrel_sessions_created_total {}", self.sessions_created.load(Ordering::Relaxed));
        all += &head("carrel_logins_total", "counter", "Logins by method and result.");
        for (how, row) in METHODS.iter().zip(&self.logins) {
            for (result, count) in RESULTS.iter().zip(row) {
                let count = count.load(Ordering::Relaxed);
                let _ = writeln!(
                    all,
                    "carrel_logins_total{{method=\"{}\",result=\"{result}\"}} {count}",
                    how.as_str()
                );
            }
        }
        all += &head("carrel_http_requests_total", "counter", "Requests to the API by class of status.");
        for (class, count) in self.requests.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            let _ = writeln!(all, "carrel_http_requests_total{{status=\"{}xx\"}} {count}", class + 1);
        }
        all += &head("carrel_ssh_connections", "gauge", "SSH connections open now.");
        let _ = writeln!(all, "carrel_ssh_connections {}", self.ssh_connections.load(Ordering::Relaxed));
        all += &head("carrel_web_sockets", "gauge", "WebSockets open now.");
        let _ = writeln!(all, "carrel_web_sockets {}", self.web_sockets.load(Ordering::Relaxed));
        all
    }
}

fn head(name: &str, kind: &str, help: &str) -> String {
    format!("# HELP {name} {help}\n# TYPE {name} {kind}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_shown_once_with_its_labels() {
        let metrics = Arc::new(Metrics::default());
        metrics.login(How::Password, Ok(()));
        metrics.login(How::Password, Err(LoginError::Denied));
        metrics.login(How::Password, Err(LoginError::Denied));
        metrics.request(403);
        metrics.request(999);
        let open = metrics.ssh_connection();
        let text = metrics
            .render(Some(&Counts { sessions: vec![(State::Ready, 2)], warm: vec![(WarmState::Making, 3)] }));
        for line in [
            "carrel_up 1",
            "carrel_sessions{state=\"ready\"} 2",
            "carrel_warm_environments{state=\"making\"} 3",
            "carrel_logins_total{method=\"password\",result=\"accepted\"} 1",
            "carrel_logins_total{method=\"password\",result=\"denied\"} 2",
            "carrel_logins_total{method=\"bearer\",result=\"denied\"} 0",
            "carrel_http_requests_total{status=\"4xx\"} 1",
            "carrel_ssh_connections 1",
        ] {
            assert_eq!(text.lines().filter(|shown| *shown == line).count(), 1, "{line}\n{text}");
        }
        drop(open);
        assert!(metrics.render(None).contains("carrel_ssh_connections 0\n"));
        assert!(metrics.render(None).contains("carrel_up 0\n"));
    }
}
