//! Ending what a client leaves behind: all processes of a session, also those that have left its process group.
use std::{fs, sync::Arc, time::Duration};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::reap::{Ending, Reaper};

/// Between HUP and KILL.
pub const GRACE: Duration = Duration::from_secs(5);

/// HUP to the session's processes (and CONT, so that stopped ones hear it).
pub fn hang_up(leader: Pid) {
    for signal in [Signal::HUP, Signal::CONT] {
        // It may be empty already.
        let _ = kill_process_group(leader, signal);
    }
}

/// HUP now, KILL for what is still there after [`GRACE`].
pub async fn end(leader: Pid, ending: Ending, reaper: Arc<Reaper>) {
    hang_up(leader);
    tokio::time::sleep(GRACE).await;
    if ending.is_known() && reaper.is_running(leader) {
        // The number belongs to a later child.
        return;
    }
    kill(leader);
}

/// KILL to everything in the session.
pub fn kill(leader: Pid) {
    if !is_reused(leader) {
        let _ = kill_process_group(leader, Signal::KILL);
    }
    // A process may start another between the look and the KILL; it cannot do so for ever.
    for _ in 0..8 {
        let members = members(leader);
        if members.is_empty() {
            return;
        }
        for pid in members {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// A process of this number that leads no session is not the one that did.
fn is_reused(leader: Pid) -> bool {
    stat(leader).is_some_and(|(_, session)| session != leader.as_raw_nonzero().get())
}

/// Processes of the session that still run.
fn members(leader: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
        .filter(|pid| {
            stat(*pid)
                .is_some_and(|(state, session)| session == leader.as_raw_nonzero().get() && state != 'Z')
        })
        .collect()
}

/// State and session of a process.
fn stat(pid: Pid) -> Option<(char, i32)> {
    parse_stat(&fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?)
}

/// proc_pid_stat(5): the name stands in parentheses and may contain anything, parentheses too.
fn parse_stat(stat: &str) -> Option<(char, i32)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(2)?.parse().ok()?))
}

/// A signal by its name in RFC 4254, 6.10, which is that of signal(7) without `SIG`.
pub fn signal_named(name: &str) -> Option<Signal> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal)
}

/// The name of a signal, without `SIG`; `None` for real-time ones.
pub fn name_of(signal: i32) -> Option<&'static str> {
    NAMES.iter().find(|(_, known)| known.as_raw() == signal).map(|(name, _)| *name)
}

const NAMES: [(&str, Signal); 30] = [
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("ILL", Signal::ILL),
    ("TRAP", Signal::TRAP),
    ("ABRT", Signal::ABORT),
    ("BUS", Signal::BUS),
    ("FPE", Signal::FPE),
    ("KILL", Signal::KILL),
    ("USR1", Signal::USR1),
    ("SEGV", Signal::SEGV),
    ("USR2", Signal::USR2),
    ("PIPE", Signal::PIPE),
    ("ALRM", Signal::ALARM),
    ("TERM", Signal::TERM),
    ("CHLD", Signal::CHILD),
    ("CONT", Signal::CONT),
    ("STOP", Signal::STOP),
    ("TSTP", Signal::TSTP),
    ("TTIN", Signal::TTIN),
    ("TTOU", Signal::TTOU),
    ("URG", Signal::URG),
    ("XCPU", Signal::XCPU),
    ("XFSZ", Signal::XFSZ),
    ("VTALRM", Signal::VTALARM),
    ("PROF", Signal::PROF),
    ("WINCH", Signal::WINCH),
    ("IO", Signal::IO),
    ("PWR", Signal::POWER),
    ("SYS", Signal::SYS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        assert_eq!(parse_stat("7 (a) R 1 ) b) S 1 7 6 0 -1 4194560"), Some(('S', 6)));
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn signals_are_known_by_name_and_number() {
        assert_eq!(signal_named("KILL"), Some(Signal::KILL));
        assert_eq!(name_of(15), Some("TERM"));
        assert_eq!(name_of(6), Some("ABRT"));
        assert_eq!(signal_named("SIGKILL"), None);
    }
}
