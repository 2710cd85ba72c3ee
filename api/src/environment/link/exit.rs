//! How a process ended, read from trailers that a tenant may have made up.
use carrel_agent::{
    flow::Inbound,
    wire::{EXIT_CODE, EXIT_REASON, EXIT_SIGNAL},
};
use http::HeaderMap;

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code.
    Code(u8),
    /// A signal ended it.
    Signal {
        /// Without `SIG`, of `[A-Z0-9+-]`, at most 16 characters.
        name: String,
        /// The kernel ended it for want of memory.
        out_of_memory: bool,
    },
    /// Nobody knows: its stream ended without a status. Never taken for success. The text is for staff.
    Lost(String),
}

/// A lost process's status, as OpenSSH's client reports a lost connection.
const LOST: u32 = 255;

/// Linux's signals by number, on every architecture that Carrel is built for.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

impl Exit {
    /// As a shell would report it: the code; 128 + n for a signal; 255 when it is lost or the signal is none of Linux's.
    #[must_use]
    pub fn status(&self) -> u32 {
        match self {
            Self::Code(code) => u32::from(*code),
            Self::Signal { name, .. } => SIGNALS
                .iter()
                .position(|known| known == name)
                .and_then(|index| u32::try_from(index).ok())
                .map_or(LOST, |index| 129 + index),
            Self::Lost(_) => LOST,
        }
    }

    /// Anything but exactly one well-formed status is `Lost`.
    pub(super) fn from_trailers(trailers: &HeaderMap) -> Self {
        let text = |name| trailers.get(name).map(|value| value.to_str().unwrap_or("\u{fffd}"));
        match (text(EXIT_CODE), text(EXIT_SIGNAL)) {
            (Some(code), None) if is_decimal(code) => {
                code.parse().map_or_else(|_| Self::Lost("the exit code is out of range".into()), Self::Code)
            }
            (None, Some(name)) if is_signal(name) => Self::Signal {
                name: name.to_owned(),
                out_of_memory: text(EXIT_REASON) == Some("out_of_memory"),
            },
            (None, None) => Self::Lost("the process ended without a status".into()),
            _ => Self::Lost("the agent reported a malformed status".into()),
        }
    }
}

/// Waits for the end of a process and says how it ended. To be called after the end of its stdout: the end of a stream
/// whose bytes nobody reads may never come.
pub async fn exit(stdout: &mut Inbound) -> Exit {
    match stdout.trailers().await {
        Some(trailers) => Exit::from_trailers(&trailers),
        None => Exit::Lost("the process ended without a status".into()),
    }
}

fn is_decimal(text: &str) -> bool {
    (1..=3).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_signal(text: &str) -> bool {
    (1..=16).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || matches!(byte, b'+' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&'static str, &str)]) -> Exit {
        let mut trailers = HeaderMap::new();
        for (name, value) in pairs {
            trailers.append(*name, value.parse().unwrap());
        }
        Exit::from_trailers(&trailers)
    }

    #[test]
    fn every_code_is_kept_exactly() {
        for code in 0..=255u8 {
            let exit = of(&[(EXIT_CODE, &code.to_string())]);
            assert_eq!(exit, Exit::Code(code));
            assert_eq!(exit.status(), u32::from(code));
        }
    }

    #[test]
    fn a_signal_is_128_and_its_number() {
        for (name, status) in
            [("HUP", 129), ("INT", 130), ("KILL", 137), ("SEGV", 139), ("TERM", 143), ("SYS", 159)]
        {
            assert_eq!(of(&[(EXIT_SIGNAL, name)]).status(), status, "{name}");
        }
    }

    #[test]
    fn the_want_of_memory_is_told() {
        let exit = of(&[(EXIT_SIGNAL, "KILL"), (EXIT_REASON, "out_of_memory")]);
        assert_eq!(exit, Exit::Signal { name: "KILL".into(), out_of_memory: true });
    }

    #[test]
    fn a_missing_or_malformed_status_is_lost_and_never_zero() {
        let long = "K".repeat(17);
        let cases: &[&[(&'static str, &str)]] = &[
            &[],
            &[(EXIT_CODE, "")],
            &[(EXIT_CODE, "256")],
            &[(EXIT_CODE, "-1")],
            &[(EXIT_CODE, "+0")],
            &[(EXIT_CODE, "0x0")],
            &[(EXIT_CODE, " 0")],
            &[(EXIT_CODE, "0000")],
            &[(EXIT_CODE, "\u{e9}")],
            &[(EXIT_CODE, "0"), (EXIT_SIGNAL, "KILL")],
            &[(EXIT_SIGNAL, "")],
            &[(EXIT_SIGNAL, "KILL\t")],
            &[(EXIT_SIGNAL, &long)],
            &[(EXIT_REASON, "out_of_memory")],
        ];
        for case in cases {
            let exit = of(case);
            assert!(matches!(exit, Exit::Lost(_)), "{case:?} gave {exit:?}");
            assert_eq!(exit.status(), 255);
        }
    }

    #[test]
    fn an_unknown_signal_is_not_success() {
        assert_eq!(of(&[(EXIT_SIGNAL, "RTMIN+3")]).status(), 255);
    }
}
