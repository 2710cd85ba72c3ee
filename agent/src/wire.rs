//! Requests and answers between the gateway (HTTP/2 client) and the agent (HTTP/2 server).
//!
//! | request | body in | body out | answer |
//! | --- | --- | --- | --- |
//! | `POST /v1/processes/{id}` with [`SPEC`] and, for a command, [`COMMAND`] | stdin; END_STREAM is its EOF | stdout (for a pty: the terminal) | 200 with [`PROCESS`] and [`RESUMED`]; trailers [`EXIT_CODE`] or [`EXIT_SIGNAL`], perhaps [`EXIT_REASON`] |
//! | `GET /v1/processes/{id}/stderr` | – | stderr | 200; may be asked before its process, and ends with it |
//! | `POST /v1/processes/{id}/resize` with [`WINDOW`] | – | – | 204, 404 |
//! | `POST /v1/processes/{id}/signal` with [`SIGNAL`] | – | – | 204, 404 |
//! | `POST /v1/setup` | a shell script, at most [`limits::SETUP_BYTES`] | – | 200 [`SetupResult`]; runs once, later calls get the same answer |
//! | `CONNECT 127.0.0.1:{port}` | bytes | bytes | 200; 502 with [`ERROR`] when nothing listens |
//! | `GET /v1/health` | – | – | 200 [`Health`] |
//!
//! `{id}` is chosen by the client: 1 to 64 characters of `[A-Za-z0-9-]`, never used before on this agent. A stream that is reset
//! by the client, or lost with its connection, means that the client is gone: its process group gets HUP, after 5 s KILL; a kept
//! terminal is detached instead. A client whose connection was lost asks for the very same terminal with [`ProcessSpec::terminal`].
//! The answer to a process on pipes ends when nobody holds its stdout or stderr any more, as with sshd; that to a terminal as soon as
//! its process has ended and everything written was passed on. A stderr that nobody asks for is not read: the process waits once it
//! has written what a pipe holds (64 KiB). END_STREAM at a terminal types its end-of-file character, unless others are attached.
//! Errors are a 4xx or 5xx status with [`ERROR`], a sentence.
use serde::{Deserialize, Serialize};

/// A variable of the agent's own environment that begins so is given to every process, without this. Secrets may be among them: in
/// arguments every user of the machine could read them.
pub const ENV_PREFIX: &str = "CARREL_ENV_";

/// Header: base64url (no padding) of the JSON of a [`ProcessSpec`].
pub const SPEC: &str = "carrel-spec";
/// Header: base64url (no padding) of a command's raw bytes, given to the shell with `-c`. Absent: a login shell.
pub const COMMAND: &str = "carrel-command";
/// Response header: the id of the process that answers. For a resumed terminal it is not the id that was asked with.
pub const PROCESS: &str = "carrel-process";
/// Response header, `1` when an existing terminal was joined.
pub const RESUMED: &str = "carrel-resumed";
/// Header: `{cols}x{rows}`.
pub const WINDOW: &str = "carrel-window";
/// Header: a signal's name without `SIG`, as RFC 4254 6.10 spells it.
pub const SIGNAL: &str = "carrel-signal";
/// Trailer: exit code, 0 to 255.
pub const EXIT_CODE: &str = "carrel-exit-code";
/// Trailer: the name of the signal that ended the process, without `SIG`.
pub const EXIT_SIGNAL: &str = "carrel-exit-signal";
/// Trailer: `out_of_memory` when the kernel ended the process for want of memory.
pub const EXIT_REASON: &str = "carrel-exit-reason";
/// Response header of an error: one sentence for people.
pub const ERROR: &str = "carrel-error";

/// Limits that both ends hold.
pub mod limits {
    /// Streams open at once in one environment's connection.
    pub const STREAMS: u32 = 512;
    /// Window of one stream, bytes: what may wait for a slow reader.
    pub const STREAM_WINDOW: u32 = 1 << 20;
    /// Window of the connection, bytes: more than all streams can hold, so that stalled ones never stop the others.
    pub const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW + STREAM_WINDOW;
    /// Largest frame from the agent to the gateway, bytes. The other way it is HTTP/2's default, 16 KiB.
    pub const FRAME: u32 = 64 * 1024;
    /// Headers of one request, bytes as HTTP/2 counts them.
    pub const HEADER_LIST: u32 = 256 * 1024;
    /// A command's raw bytes: what Linux takes as one argument (MAX_ARG_STRLEN), less its final NUL.
    pub const COMMAND_BYTES: usize = 128 * 1024 - 1;
    /// A setup script, bytes.
    pub const SETUP_BYTES: usize = 256 * 1024;
    /// Environment variables of one process.
    pub const ENV_VARS: usize = 128;
    /// Streams reset by the peer before they were accepted, and local error resets, that do not end the connection.
    pub const RESETS: usize = 4096;
    /// Processes and terminals alive or kept at once.
    pub const PROCESSES: usize = 512;
    /// A kept terminal stays this long at least when its last client's connection was lost, seconds: that client may still be there,
    /// and come back with [`ProcessSpec::terminal`](super::ProcessSpec::terminal).
    pub const LOST_SECONDS: u64 = 90;
    /// Kept terminals that have ended and whose end is remembered; of more, the oldest are forgotten.
    pub const ENDS: usize = 64;
}

/// How to run one process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessSpec {
    /// Variables added to the base environment (`HOME USER LOGNAME SHELL PATH`); later ones win.
    pub env: Vec<(String, String)>,
    /// A terminal instead of three pipes.
    pub pty: Option<Pty>,
    /// For an interactive shell on a pty: how long it is kept without anybody attached (see also [`limits::LOST_SECONDS`]).
    /// `None`: it ends with its client.
    pub keep_seconds: Option<u64>,
    /// May this request join a kept terminal instead of starting a shell?
    pub join: Join,
    /// The client's name at a terminal that is kept, the same over all its connections: whoever has it there already is let go, for
    /// that is what a lost connection has left behind.
    pub attachment: Option<String>,
    /// The terminal that answered with this [`PROCESS`] and no other; `join` says as whom. One that has ended answers as if it ended
    /// now, for as long as its end is remembered ([`limits::ENDS`]); then 404.
    pub terminal: Option<String>,
    /// Run the file transfer server (`sftp-server` of the environment, else the agent's own) instead of a command.
    pub sftp: bool,
}

/// A terminal's first size and kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// `TERM`.
    pub term: String,
    /// Columns, 1 to 500.
    pub cols: u16,
    /// Rows, 1 to 300.
    pub rows: u16,
    /// Terminal modes of RFC 4254, 8: (opcode, value). Unknown ones are ignored.
    #[serde(default)]
    pub modes: Vec<(u8, u32)>,
}

/// Which terminal a request for an interactive shell gets. The first shell of an environment is its main terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Join {
    /// A new one.
    #[default]
    Never,
    /// An SSH client: the main terminal unless another SSH client is attached to it, else one that nobody is attached to, else a new one.
    Ssh,
    /// A browser: the main terminal, else a new one.
    Browser,
    /// Look at the main terminal; what is sent is dropped. 404 when there is none.
    Watch,
}

/// Answer of `POST /v1/setup`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupResult {
    /// Exit code; 128+n for a signal.
    pub exit_code: i32,
    /// The last lines of its output, at most 4 KiB.
    pub tail: String,
}

/// Answer of `GET /v1/health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The agent's version.
    pub version: String,
    /// Processes and terminals alive or kept.
    pub processes: usize,
    /// Processes ended by the kernel for want of memory since the start.
    pub oom_kills: u64,
}
