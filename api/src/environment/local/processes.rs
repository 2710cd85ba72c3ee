//! Which processes of this machine belong to which environment, read from `/proc`.
//!
//! Nothing is recorded when a process starts: a record could be lost between the start and the write, or outlive its
//! process. An environment's own three processes (guard, bubblewrap, agent) carry its [marker](Marker) in their command
//! lines instead, from before their first instruction to their end, so that whoever looks finds them.
use std::{
    collections::BTreeMap,
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use uuid::Uuid;

use crate::identity::EnvironmentId;

/// Where the agent stands in a sandbox: a path that names the environment and the data directory it belongs to.
const MARK: &str = "/run/carrel/";
/// The rest of that path after the marker.
const AGENT: &str = "/agent";
/// A command line is read this far: bubblewrap's own is within it.
const COMMAND_LINE: usize = 64 * 1024;
/// The first of the users that a server which runs as root gives its environments.
const USERS: u32 = 0x7000_0000;
/// How long processes may take to be gone after SIGKILL.
const GONE: Duration = Duration::from_secs(10);

/// Names one data directory, so that two servers on one machine leave each other's environments alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instance(pub Uuid);

impl Instance {
    /// The agent's path inside the sandbox of `id`.
    pub(super) fn agent_path(self, id: EnvironmentId) -> String {
        format!("{MARK}{id}.{}{AGENT}", self.0)
    }

    /// The environment that a command line names, if it is one of this instance.
    fn environment_of(self, command_line: &[u8]) -> Option<EnvironmentId> {
        let suffix = format!(".{}{AGENT}", self.0);
        command_line.split(|byte| *byte == 0).find_map(|argument| {
            let id = std::str::from_utf8(argument).ok()?.strip_prefix(MARK)?.strip_suffix(suffix.as_str())?;
            id.parse().ok()
        })
    }
}

/// The unprivileged user that an environment's processes have on the host.
///
/// A server that runs as root gives each environment one of its own: root would be exempt from the limit on processes, and
/// would own the machine's files. The range lies above the users of systemd (up to 0x6fff_ffff) and of `/etc/subuid`.
#[must_use]
pub(super) fn host_user(id: EnvironmentId) -> u32 {
    let own = rustix::process::geteuid();
    if own.is_root() { USERS | low_bits(id.uuid()) } else { own.as_raw() }
}

/// Spares most processes of the machine the look at their command line.
fn may_be_ours(user: u32) -> bool {
    let own = rustix::process::geteuid();
    if own.is_root() { user & 0xf000_0000 == USERS } else { user == own.as_raw() }
}

fn low_bits(id: Uuid) -> u32 {
    let (.., low) = id.as_u64_pair();
    u32::try_from(low & 0x0fff_ffff).unwrap_or(0)
}

/// The processes of all environments of an instance that carry the marker. Others' processes are not looked at: a
/// command line can be forged, its user cannot.
pub(super) fn all(instance: Instance) -> std::io::Result<BTreeMap<EnvironmentId, Vec<Pid>>> {
    let mut found: BTreeMap<EnvironmentId, Vec<Pid>> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some((pid, user)) = entry.ok().and_then(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            Some((pid, entry.metadata().ok()?.uid()))
        }) else {
            continue;
        };
        if !may_be_ours(user) {
            continue;
        }
        if let Some(id) = environment_of(instance, pid).filter(|id| host_user(*id) == user) {
            found.entry(id).or_default().push(pid);
        }
    }
    Ok(found)
}

fn environment_of(instance: Instance, pid: Pid) -> Option<EnvironmentId> {
    use std::io::Read;
    let path = PathBuf::from(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
    let mut line = Vec::new();
    // A process that has ended meanwhile cannot be read: then it is nobody's.
    fs::File::open(path).ok()?.take(COMMAND_LINE as u64).read_to_end(&mut line).ok()?;
    instance.environment_of(&line)
}

/// A handle of a process that is still what it was taken for: it cannot come to mean another one.
fn hold(instance: Instance, id: EnvironmentId, pid: Pid) -> Option<OwnedFd> {
    let handle = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
    (environment_of(instance, pid) == Some(id)).then_some(handle)
}

/// Kills everything of an environment and waits until it is gone. With the first process of its PID namespace all others
/// in it end, and the kernel reports that one's end only after theirs.
pub(super) fn kill_all(instance: Instance, id: EnvironmentId) -> Result<(), String> {
    let deadline = Instant::now() + GONE;
    loop {
        let pids = all(instance)
            .map_err(|error| format!("/proc cannot be read: {error}"))?
            .remove(&id)
            .unwrap_or_default();
        if pids.is_empty() {
            return Ok(());
        }
        // All at once, and then another look: a process that was being started meanwhile carries the marker too.
        let handles: Vec<OwnedFd> = pids.iter().filter_map(|pid| hold(instance, id, *pid)).collect();
        for handle in &handles {
            match pidfd_send_signal(handle, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(format!("a process cannot be killed: {error}")),
            }
        }
        for handle in &handles {
            if !wait(handle, deadline) {
                return Err("a process does not end after SIGKILL".into());
            }
        }
        if Instant::now() >= deadline {
            return Err("processes keep appearing".into());
        }
    }
}

/// Waits for a process to end; false when it has not by the deadline.
fn wait(handle: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_names_its_environment_only_to_its_own_instance() {
        let (instance, other) = (Instance(Uuid::new_v4()), Instance(Uuid::new_v4()));
        let id = EnvironmentId::new();
        let line = format!("timeout\09\0bwrap\0--\0{}\0serve\0", instance.agent_path(id));
        assert_eq!(instance.environment_of(line.as_bytes()), Some(id));
        assert_eq!(other.environment_of(line.as_bytes()), None);
        assert_eq!(instance.environment_of(b"/run/carrel/\0\xff\xfe\0"), None);
        assert_eq!(
            instance.environment_of(format!("sh\0-c\0x {}\0", instance.agent_path(id)).as_bytes()),
            None
        );
    }

    #[test]
    fn users_of_environments_are_outside_the_ranges_of_others() {
        for _ in 0..1000 {
            let user = USERS | low_bits(EnvironmentId::new().uuid());
            assert!((0x7000_0000..0x8000_0000).contains(&user));
        }
    }
}
