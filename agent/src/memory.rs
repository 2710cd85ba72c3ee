//! Did the kernel end a process for want of memory? The wait status says KILL for that too; the control group's counter tells.
use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use crate::reap::Exit;

/// The counter of the own control group, and how much of it has been explained.
#[derive(Debug)]
pub struct Memory {
    files: Vec<PathBuf>,
    start: u64,
    told: Mutex<u64>,
}

impl Memory {
    /// Finds the counter, of cgroup v2 or v1. Without one, nothing is ever out of memory.
    pub fn new() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let files: Vec<_> = candidates(&own).into_iter().filter(|file| file.exists()).take(1).collect();
        let start = count(&files);
        Self { files, start, told: Mutex::new(start) }
    }

    /// Processes ended for want of memory since the agent started.
    pub fn kills(&self) -> u64 {
        count(&self.files).saturating_sub(self.start)
    }

    /// Explains an exit: one that looks like KILL, while the counter holds a kill that explained no other exit.
    pub fn explains(&self, exit: Exit) -> bool {
        // A shell whose child was killed says 137.
        if exit.code() != 137 {
            return false;
        }
        let now = count(&self.files);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let explained = now > *told;
        *told = now;
        explained
    }
}

fn candidates(own: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            files.push(PathBuf::from("/sys/fs/cgroup").join(path).join("memory.events"));
        } else if controllers.split(',').any(|controller| controller == "memory") {
            files.push(PathBuf::from("/sys/fs/cgroup/memory").join(path).join("memory.oom_control"));
        }
    }
    // As seen from inside a control group namespace.
    files.push("/sys/fs/cgroup/memory.events".into());
    files.push("/sys/fs/cgroup/memory/memory.oom_control".into());
    files
}

fn count(files: &[PathBuf]) -> u64 {
    files.iter().filter_map(|file| parse(&fs::read_to_string(file).ok()?)).max().unwrap_or(0)
}

fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_counter_are_read() {
        assert_eq!(parse("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n"), Some(1));
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), Some(3));
        assert_eq!(parse("oom_kill_disable 0\n"), None);
    }

    #[test]
    fn a_kill_is_told_once_and_only_for_what_looks_like_one() {
        let file = tempfile("oom_kill 4\n");
        let memory = Memory { files: vec![file.clone()], start: 4, told: Mutex::new(4) };
        assert!(!memory.explains(Exit::Signal(9)));
        fs::write(&file, "oom_kill 5\n").unwrap();
        assert!(!memory.explains(Exit::Code(1)));
        assert!(memory.explains(Exit::Signal(9)));
        assert!(!memory.explains(Exit::Signal(9)));
        assert_eq!(memory.kills(), 1);
        fs::remove_file(file).unwrap();
    }

    fn tempfile(text: &str) -> PathBuf {
        let file = std::env::temp_dir().join(format!("carrel-agent-memory-{}", std::process::id()));
        fs::write(&file, text).unwrap();
        file
    }
}
