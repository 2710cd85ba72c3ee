//! The command line.
use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

/// What `--help` prints.
const HELP: &str = "\
carrel-agent serve [--listen-fd N] [--socket SOCKET] [--shell PATH] [--home DIR]
                   [--limit-processes N] [--limit-file-size BYTES] [--limit-memory BYTES]
    Serves HTTP/2 on an inherited listening socket, and on what `connect` hands over at SOCKET:
    a path, or @NAME, which is no file and belongs to the network namespace.
    Its own variables CARREL_ENV_NAME are given to every process as NAME.
carrel-agent connect --socket SOCKET
    Hands its stdin and stdout to the agent at SOCKET and waits until they are done with.
    An agent that is just starting is waited for.
carrel-agent install DESTINATION
    Copies this program.
carrel-agent idle
    Does nothing until it is killed.
carrel-agent sftp
    Serves file transfer on stdin and stdout, where the environment has no sftp-server.
carrel-agent --version
";

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Be an environment's agent.
    Serve(Serve),
    /// Hand stdin and stdout to the agent.
    Connect {
        /// Where it listens.
        socket: PathBuf,
    },
    /// Copy this program.
    Install {
        /// A file that need not exist yet.
        destination: PathBuf,
    },
    /// Do nothing.
    Idle,
    /// Serve file transfer on stdin and stdout.
    Sftp,
    /// Say something and end.
    Print(String),
}

/// Options of `serve`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Serve {
    /// An inherited descriptor: a listening unix socket.
    pub listen_fd: Option<i32>,
    /// Where `connect` finds this agent.
    pub socket: Option<PathBuf>,
    /// Instead of the shell in `/etc/passwd`.
    pub shell: Option<String>,
    /// Instead of the home in `/etc/passwd`.
    pub home: Option<String>,
    /// RLIMIT_NPROC.
    pub limit_processes: Option<u64>,
    /// RLIMIT_FSIZE, bytes.
    pub limit_file_size: Option<u64>,
    /// RLIMIT_DATA, bytes.
    pub limit_memory: Option<u64>,
}

/// A command line that makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; see carrel-agent --help")]
pub struct BadUsage(String);

/// Reads the command line, without the program's name.
///
/// # Errors
/// For anything that is not described by `--help`.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, BadUsage> {
    let mut arguments = arguments.into_iter();
    let verb = arguments.next().ok_or_else(|| BadUsage("a command is missing".into()))?;
    match verb.to_str() {
        Some("--version" | "-V") => {
            Ok(Command::Print(format!("carrel-agent {}\n", env!("CARGO_PKG_VERSION"))))
        }
        Some("--help" | "-h" | "help") => Ok(Command::Print(HELP.into())),
        Some("idle") => Ok(Command::Idle),
        Some("sftp") => Ok(Command::Sftp),
        Some("serve") => serve(arguments).map(Command::Serve),
        Some("connect") => match (arguments.next(), arguments.next(), arguments.next()) {
            (Some(flag), Some(socket), None) if flag == "--socket" => {
                Ok(Command::Connect { socket: socket.into() })
            }
            _ => Err(BadUsage("connect takes --socket SOCKET".into())),
        },
        Some("install") => match (arguments.next(), arguments.next()) {
            (Some(destination), None) => Ok(Command::Install { destination: destination.into() }),
            _ => Err(BadUsage("install takes one DESTINATION".into())),
        },
        _ => Err(BadUsage(format!("there is no command {}", verb.display()))),
    }
}

fn serve(mut arguments: impl Iterator<Item = OsString>) -> Result<Serve, BadUsage> {
    let mut options = Serve::default();
    while let Some(flag) = arguments.next() {
        let flag = text(&flag)?;
        let value = arguments.next().ok_or_else(|| BadUsage(format!("{flag} needs a value")))?;
        match flag.as_str() {
            "--listen-fd" => options.listen_fd = Some(number(&flag, &value)?),
            "--socket" => options.socket = Some(value.into()),
            "--shell" => options.shell = Some(text(&value)?),
            "--home" => options.home = Some(text(&value)?),
            "--limit-processes" => options.limit_processes = Some(number(&flag, &value)?),
            "--limit-file-size" => options.limit_file_size = Some(number(&flag, &value)?),
            "--limit-memory" => options.limit_memory = Some(number(&flag, &value)?),
            _ => return Err(BadUsage(format!("serve has no option {flag}"))),
        }
    }
    if options.listen_fd.is_none() && options.socket.is_none() {
        return Err(BadUsage("serve needs --listen-fd or --socket".into()));
    }
    Ok(options)
}

fn text(value: &OsStr) -> Result<String, BadUsage> {
    value.to_str().map(Into::into).ok_or_else(|| BadUsage(format!("{} is not UTF-8", value.display())))
}

fn number<N: std::str::FromStr>(flag: &str, value: &OsStr) -> Result<N, BadUsage> {
    text(value)?.parse().map_err(|_| BadUsage(format!("{flag} takes a number")))
}

/// Copies this program to `destination` (mode 0555), making its directory if need be. A running copy there is replaced, not written into.
///
/// # Errors
/// Of the file system.
pub fn install(destination: &Path) -> io::Result<()> {
    if let Some(directory) = destination.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    let mut temporary = destination.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    fs::copy("/proc/self/exe", &temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o555))?;
    fs::rename(&temporary, destination)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, BadUsage> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn serve_takes_its_options() {
        let Ok(Command::Serve(serve)) =
            parsed("serve --listen-fd 0 --socket /run/a --shell /bin/sh --home /h --limit-processes 5")
        else {
            panic!("not understood")
        };
        assert_eq!(serve.listen_fd, Some(0));
        assert_eq!(serve.limit_processes, Some(5));
    }

    #[test]
    fn nonsense_is_refused_with_a_sentence() {
        for line in [
            "",
            "serve",
            "serve --listen-fd",
            "serve --listen-fd x",
            "serve --listen-fd 0 --env A=b",
            "connect",
            "fly",
            "install",
        ] {
            assert!(parsed(line).unwrap_err().to_string().contains("--help"), "{line}");
        }
    }
}
