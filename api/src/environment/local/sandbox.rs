//! How one sandbox is put together from bubblewrap's options, and started.
//!
//! Three processes carry an environment: `timeout` (the guard, which ends it at its lifetime's end even when no server
//! runs), bubblewrap outside, and the agent as the first process inside. The end of any of them is the end of all:
//! bubblewrap dies with the guard, the agent with bubblewrap, everything else with the agent. The server is none of them.
//!
//! The limit on processes counts those of the sandbox's user namespace, from Linux 5.14 on; before that, those of the user, whom
//! all environments share when the server is not root's.
//!
//! Not bounded here: processor time, and the memory of all processes together (each has its own limit). There is no seccomp
//! filter: what keeps a candidate in are namespaces, no capability, `no_new_privs` and no further user namespaces.
use std::{
    fs::File,
    io::{self, Seek, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use carrel_agent::wire::ENV_PREFIX;
use command_fds::{CommandFdExt, FdMapping};
use rustix::fs::{MemfdFlags, memfd_create};

use super::processes::{Instance, host_user};
use crate::{environment::Create, exam::EnvironmentSpec, identity::EnvironmentId};

/// Bytes of a home directory when the exam says nothing.
pub const DEFAULT_STORAGE: u64 = 512 << 20;
/// Bytes of memory of each process when the exam says nothing.
pub const DEFAULT_MEMORY: u64 = 2 << 30;
/// Processes and threads when the exam says nothing.
pub const DEFAULT_PROCESSES: u32 = 512;
/// Bytes of `/tmp`; less if the home directory is smaller.
pub const TMP: u64 = 256 << 20;
/// Bytes of `/dev/shm`; less if the home directory is smaller.
pub const SHM: u64 = 64 << 20;
/// Name of a candidate inside when the exam says nothing.
pub const DEFAULT_USER: &str = "candidate";

/// The candidate's number inside.
const USER: u32 = 1000;
/// Name of the machine inside.
const HOSTNAME: &str = "exam";
/// The first descriptor that bubblewrap is given, after stdin, stdout and stderr.
const FIRST_FD: RawFd = 3;

/// What of `/etc` programs need and everybody may read. No accounts, no keys, no configuration of this machine's services.
const ETC: &[&str] = &[
    "alternatives",
    "bash.bashrc",
    "bash_completion.d",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "fonts",
    "ghc",
    "groff",
    "inputrc",
    "java-11-openjdk",
    "java-17-openjdk",
    "java-21-openjdk",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "lsb-release",
    "magic",
    "magic.mime",
    "manpath.config",
    "maven",
    "mime.types",
    "nanorc",
    "networks",
    "os-release",
    "perl",
    "pki/ca-trust",
    "pki/tls/certs",
    "profile",
    "profile.d",
    "protocols",
    "python3",
    "python3.10",
    "python3.11",
    "python3.12",
    "python3.13",
    "rpc",
    "services",
    "shells",
    "skel",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "texmf",
    "timezone",
    "vim",
    "wgetrc",
    "xattr.conf",
    "xdg",
];

/// Directories of the system besides `/usr`: symlinks into it on most machines, directories of their own on others.
const SYSTEM: &[&str] = &["bin", "sbin", "lib", "lib32", "lib64", "libx32"];

/// Everything that is the same for all sandboxes of a server.
#[derive(Debug)]
pub(super) struct Sandbox {
    bubblewrap: PathBuf,
    guard: PathBuf,
    /// The agent's program in memory. Each sandbox gets a copy: the file in the data directory is not visible to its user.
    agent: File,
    shared: Vec<PathBuf>,
}

/// What differs between sandboxes.
struct Shape<'a> {
    user: &'a str,
    uid: u32,
    home: String,
    storage: u64,
    /// Further names of the user: clients such as Ansible write `~NAME` with the name that they logged in with.
    aliases: Vec<String>,
}

impl<'a> Shape<'a> {
    fn new(spec: &'a EnvironmentSpec) -> Self {
        let user = spec.user.as_deref().unwrap_or(DEFAULT_USER);
        let (uid, home) =
            if user == "root" { (0, "/root".to_owned()) } else { (USER, format!("/home/{user}")) };
        Self {
            user,
            uid,
            home,
            storage: spec.storage.unwrap_or(DEFAULT_STORAGE).max(4096),
            aliases: Vec::new(),
        }
    }

    fn passwd(&self) -> String {
        let line =
            |name: &str| format!("{name}:x:{}:{}:Candidate:{}:/bin/bash\n", self.uid, self.uid, self.home);
        // The user's own name first: that is the one which a uid is looked up as.
        let own: String = line(self.user) + &self.aliases.iter().map(|name| line(name)).collect::<String>();
        let root = "root:x:0:0:root:/root:/usr/sbin/nologin\n";
        let nobody = "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
        format!("{}{own}{nobody}", if self.uid == 0 { "" } else { root })
    }

    fn group(&self) -> String {
        let own = format!("{}:x:{}:\n", self.user, self.uid);
        format!("{}tty:x:5:\n{own}nogroup:x:65534:\n", if self.uid == 0 { "" } else { "root:x:0:\n" })
    }
}

/// Is this a name that `/etc/passwd` and a path can hold?
pub(super) fn is_user_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-'))
        && name != "nobody"
}

/// Descriptors for bubblewrap, which closes each of them once it has read it.
struct Descriptors {
    mappings: Vec<FdMapping>,
    /// Descriptors that this server has inherited itself and that a new process would inherit in turn. Their numbers are
    /// used up first: what they stood for does not get into a sandbox.
    inherited: Vec<RawFd>,
    next: RawFd,
}

impl Descriptors {
    fn new() -> io::Result<Self> {
        Ok(Self { mappings: Vec::new(), inherited: inherited()?, next: FIRST_FD })
    }

    fn add(&mut self, descriptor: OwnedFd) -> String {
        let number = self.inherited.pop().unwrap_or_else(|| {
            while self.mappings.iter().any(|mapping| mapping.child_fd == self.next) {
                self.next += 1;
            }
            self.next
        });
        self.mappings.push(FdMapping { parent_fd: descriptor, child_fd: number });
        number.to_string()
    }

    fn add_bytes(&mut self, bytes: &[u8]) -> io::Result<String> {
        Ok(self.add(in_memory(bytes)?.into()))
    }

    /// All of them, with nothing behind the inherited numbers that are left.
    fn finish(mut self) -> io::Result<Vec<FdMapping>> {
        for number in self.inherited {
            self.mappings.push(FdMapping { parent_fd: File::open("/dev/null")?.into(), child_fd: number });
        }
        Ok(self.mappings)
    }
}

/// Open descriptors of this process, besides the first three, that are not closed when a program is started.
fn inherited() -> io::Result<Vec<RawFd>> {
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo")? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // One that is gone meanwhile was not inherited.
        let Ok(info) = std::fs::read_to_string(entry.path()) else { continue };
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        if let (Some(number @ FIRST_FD..), Some(flags)) = (number, flags)
            && flags & CLOSE_ON_EXEC == 0
        {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("carrel", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

impl Sandbox {
    /// `bubblewrap` and `guard` are the programs `bwrap` and `timeout`; `shared` are shown read-only at their own paths.
    pub(super) fn new(
        bubblewrap: PathBuf,
        guard: PathBuf,
        agent: &[u8],
        shared: Vec<PathBuf>,
    ) -> io::Result<Self> {
        Ok(Self { bubblewrap, guard, agent: in_memory(agent)?, shared })
    }

    /// Paths of this machine that can be read inside.
    pub(super) fn visible(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(Path::new("/usr")).chain(self.shared.iter().map(PathBuf::as_path))
    }

    /// Starts an environment's processes. The agent's stdin is the listening socket: a tenant can neither see nor replace it.
    pub(super) fn start(
        &self,
        instance: Instance,
        request: &Create,
        socket: UnixListener,
    ) -> io::Result<Child> {
        let spec = &request.spec;
        let mut shape = Shape::new(spec);
        if let Some((user_id, session_id)) = request.owner {
            shape.aliases = vec![session_id.to_string(), format!("{user_id}+{session_id}")];
        }
        let mut descriptors = Descriptors::new()?;
        let mut options = self.options(&shape, &mut descriptors)?;
        let path = instance.agent_path(request.environment_id);
        // Opened anew: a duplicate would share its position with all other sandboxes.
        let agent = File::open(format!("/proc/self/fd/{}", self.agent.as_raw_fd()))?;
        options
            .extend(["--perms", "0555", "--file", &descriptors.add(agent.into()), &path].map(str::to_owned));
        options.extend(["--remount-ro", "/"].map(str::to_owned));
        for (name, value) in &spec.env {
            options.extend(["--setenv".to_owned(), format!("{ENV_PREFIX}{name}"), value.clone()]);
        }

        let mut agent: Vec<String> = vec![path, "serve".into(), "--listen-fd".into(), "0".into()];
        let mut option = |name: &str, value: String| agent.extend([format!("--{name}"), value]);
        option("home", shape.home.clone());
        option("limit-processes", spec.processes.unwrap_or(DEFAULT_PROCESSES).to_string());
        option("limit-file-size", shape.storage.to_string());
        option("limit-memory", spec.memory.unwrap_or(DEFAULT_MEMORY).to_string());
        if let Some(shell) = &spec.shell {
            option("shell", shell.clone());
        }

        // 0 would mean no limit.
        let lifetime = request.lifetime_seconds.max(1);
        let mut command =
            self.command(request.environment_id, lifetime, &options, &mut descriptors, &agent)?;
        command.stdin(OwnedFd::from(socket));
        run(command, descriptors)
    }

    /// Makes a sandbox and ends it at once; the error is what bubblewrap said.
    pub(super) fn try_out(&self) -> io::Result<Result<(), String>> {
        let spec = EnvironmentSpec::default();
        let mut descriptors = Descriptors::new()?;
        let mut options = self.options(&Shape::new(&spec), &mut descriptors)?;
        options.extend(["--remount-ro", "/"].map(str::to_owned));
        let program = ["/bin/sh".to_owned(), "-c".into(), "exit 0".into()];
        let id = EnvironmentId::new();
        let mut command = self.command(id, 10, &options, &mut descriptors, &program)?;
        command.stdin(Stdio::null());
        let output = run(command, descriptors)?.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok(if output.status.success() { Ok(()) } else { Err(said) })
    }

    fn command(
        &self,
        id: EnvironmentId,
        lifetime: u64,
        options: &[String],
        descriptors: &mut Descriptors,
        program: &[String],
    ) -> io::Result<Command> {
        // Not as arguments: every user of the machine could read them.
        let mut text = options.join("\0").into_bytes();
        text.push(0);
        let options = descriptors.add_bytes(&text)?;
        let mut command = Command::new(&self.guard);
        command
            .args(["--signal=KILL", &lifetime.to_string()])
            .arg(&self.bubblewrap)
            .args(["--args", &options, "--"])
            .args(program)
            // Nothing of the server's own environment.
            .env_clear()
            .current_dir("/")
            // A Ctrl-C for the server is none for its environments.
            .process_group(0);
        if rustix::process::geteuid().is_root() {
            let user = host_user(id);
            command.uid(user).gid(user);
        }
        Ok(command)
    }

    fn options(&self, shape: &Shape<'_>, descriptors: &mut Descriptors) -> io::Result<Vec<String>> {
        let mut options = Options::default();
        options
            .add(&["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"])
            .add(&[
                "--unshare-cgroup-try",
                "--disable-userns",
                "--die-with-parent",
                "--as-pid-1",
                "--new-session",
            ])
            .add(&["--cap-drop", "ALL", "--clearenv", "--hostname", HOSTNAME])
            .add(&["--uid", &shape.uid.to_string(), "--gid", &shape.uid.to_string()])
            .add(&["--ro-bind", "/usr", "/usr"])
            // Else bubblewrap makes the directories that it needs itself, for their owner only.
            .add(&["--dir", "/etc", "--dir", "/etc/ssl", "--dir", "/home"]);
        for name in SYSTEM {
            let path = format!("/{name}");
            match std::fs::read_link(&path) {
                Ok(target) => options.add(&["--symlink", &target.to_string_lossy(), &path]),
                Err(_) => options.add(&["--ro-bind-try", &path, &path]),
            };
        }
        for name in ETC {
            let path = format!("/etc/{name}");
            if Path::new(&path).exists() {
                options.add(&["--ro-bind", &path, &path]);
            }
        }
        for path in &self.shared {
            let path = path.to_string_lossy();
            options.add(&["--ro-bind", &path, &path]);
        }
        let hosts = format!("127.0.0.1 localhost {HOSTNAME}\n::1 localhost\n");
        let files: [(&str, &str); 6] = [
            ("/etc/passwd", &shape.passwd()),
            ("/etc/group", &shape.group()),
            ("/etc/hosts", &hosts),
            ("/etc/hostname", &format!("{HOSTNAME}\n")),
            (
                "/etc/nsswitch.conf",
                "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
            ),
            ("/etc/resolv.conf", ""),
        ];
        for (path, text) in files {
            let descriptor = descriptors.add_bytes(text.as_bytes())?;
            options.add(&["--perms", "0444", "--file", &descriptor, path]);
        }
        let room = |bytes: u64| shape.storage.min(bytes).to_string();
        options
            .add(&[
                "--symlink",
                "/proc/mounts",
                "/etc/mtab",
                "--dir",
                "/var",
                "--symlink",
                "/run",
                "/var/run",
            ])
            .add(&["--symlink", "/tmp", "/var/tmp", "--proc", "/proc", "--dev", "/dev"])
            .add(&["--perms", "1777", "--size", &room(SHM), "--tmpfs", "/dev/shm"])
            // The directories that hold the mounts are file systems in memory without a limit: nobody may write to them.
            .add(&["--remount-ro", "/dev"])
            .add(&["--perms", "1777", "--size", &room(TMP), "--tmpfs", "/tmp"])
            .add(&["--perms", "0700", "--size", &shape.storage.to_string(), "--tmpfs", &shape.home])
            .add(&["--chdir", &shape.home]);
        Ok(options.0)
    }
}

fn run(mut command: Command, descriptors: Descriptors) -> io::Result<Child> {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command.fd_mappings(descriptors.finish()?).map_err(io::Error::other)?;
    command.spawn()
}

#[derive(Default)]
struct Options(Vec<String>);

impl Options {
    fn add(&mut self, options: &[&str]) -> &mut Self {
        self.0.extend(options.iter().map(|option| (*option).to_owned()));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_name_cannot_add_a_line_or_leave_the_home_directories() {
        for name in ["candidate", "_x", "a-1", "root"] {
            assert!(is_user_name(name), "{name}");
        }
        for name in ["", "A", "../x", "a:b", "a\nb", "1a", "a b", "nobody", &"a".repeat(33)] {
            assert!(!is_user_name(name), "{name}");
        }
    }

    #[test]
    fn the_user_has_one_line_in_passwd_even_as_root() {
        let root = EnvironmentSpec { user: Some("root".into()), ..EnvironmentSpec::default() };
        for spec in [EnvironmentSpec::default(), root] {
            let shape = Shape::new(&spec);
            let passwd = shape.passwd();
            let own: Vec<&str> =
                passwd.lines().filter(|line| line.starts_with(&format!("{}:", shape.user))).collect();
            assert_eq!(own.len(), 1, "{passwd}");
        }
    }
}
