//! The command line of `carrel`. Every option is a flag and a `CARREL_*` variable.
use std::{net::SocketAddr, path::PathBuf, str::FromStr};

use carrel_api::environment::kubernetes::KubernetesOptions;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::ssh::throttle::Cidr;

/// An SSH gateway that gives every exam candidate an isolated shell of their own.
#[derive(Debug, Parser)]
#[command(name = "carrel", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "one value in a process's life")]
pub enum Command {
    /// API, pages, SSH and the lifecycle loop in one process
    Serve(Serve),
    /// A complete server with one exam and one session in a fresh directory, gone when it ends
    Demo(Demo),
    /// Keys for platforms and staff
    ApiKey {
        /// Where the keys are.
        #[command(flatten)]
        database: Database,
        /// What to do with them.
        #[command(subcommand)]
        action: ApiKeyAction,
    },
}

/// What to do with API keys.
#[derive(Debug, Subcommand)]
pub enum ApiKeyAction {
    /// Makes one and prints it, this once
    Create {
        /// For people, to tell keys apart
        #[arg(long)]
        name: String,
        /// What it may do: platform, operator, proctor, grader
        #[arg(long = "scope", value_name = "SCOPE", required = true, num_args = 1..)]
        scopes: Vec<String>,
    },
    /// Lists them, without their secrets
    List,
    /// Ends one
    Revoke {
        /// Its id, as listed
        #[arg(long)]
        id: String,
    },
}

/// Which database.
#[derive(Debug, Clone, Args)]
pub struct Database {
    /// sqlite:PATH, or postgres://USER@HOST/NAME. Default: sqlite:carrel.db in the data directory
    #[arg(long, env = "CARREL_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// A file with the URL in it, for a URL with a password
    #[arg(long, env = "CARREL_DATABASE_URL_FILE", conflicts_with = "database_url")]
    pub database_url_file: Option<PathBuf>,
    /// Database, host key and environments of this server
    #[arg(long, env = "CARREL_DATA_DIR", default_value = "./carrel-data")]
    pub data_dir: PathBuf,
}

/// Where sessions run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EnvironmentKind {
    /// Linux namespaces on this machine
    Local,
    /// Pods
    Kubernetes,
}

/// Options of `carrel serve`.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    /// Which database.
    #[command(flatten)]
    pub database: Database,
    /// Address of API and pages; port 0 means any free one
    #[arg(long, env = "CARREL_HTTP_LISTEN", default_value = "127.0.0.1:8080")]
    pub http_listen: SocketAddr,
    /// Address of the SSH server; port 0 means any free one
    #[arg(long, env = "CARREL_SSH_LISTEN", default_value = "127.0.0.1:2222")]
    pub ssh_listen: SocketAddr,
    /// How browsers reach the pages. Default: http:// and the address that was bound
    #[arg(long, env = "CARREL_PUBLIC_URL")]
    pub public_url: Option<String>,
    /// How ssh clients reach the server. Default: the address that was bound
    #[arg(long, env = "CARREL_PUBLIC_SSH", value_name = "HOST:PORT")]
    pub public_ssh: Option<HostPort>,
    /// Where sessions run
    #[arg(long, env = "CARREL_ENVIRONMENT", value_enum, default_value = "local")]
    pub environment: EnvironmentKind,
    /// Exam files (*.yaml), read at start
    #[arg(long, env = "CARREL_EXAMS", value_name = "DIR")]
    pub exams: Option<PathBuf>,
    /// The cluster, for `--environment kubernetes`.
    #[command(flatten)]
    pub kubernetes: KubernetesOptions,
    /// The SSH host key. Default: made in the data directory; replicas share one from a Secret
    #[arg(long, env = "CARREL_SSH_HOST_KEY_FILE", value_name = "FILE")]
    pub ssh_host_key_file: Option<PathBuf>,
    /// The key that signs the pages' cookies. Default: made in the data directory; replicas share one from a Secret
    #[arg(long, env = "CARREL_SECRET_KEY_FILE", value_name = "FILE")]
    pub secret_key_file: Option<PathBuf>,
    /// Further paths of this machine that local environments can read: tool chains outside of /usr
    #[arg(long, env = "CARREL_LOCAL_SHARE", value_name = "PATH", value_delimiter = ':')]
    pub local_share: Vec<PathBuf>,
    /// Networks whose failed logins are not counted against their address
    #[arg(long, env = "CARREL_SSH_PENALTY_EXEMPT", value_name = "CIDR", value_delimiter = ',')]
    pub ssh_penalty_exempt: Vec<Cidr>,
    /// Further origins whose pages may open a terminal, beside the public URL
    #[arg(long, env = "CARREL_ALLOWED_ORIGINS", value_name = "ORIGIN", value_delimiter = ',')]
    pub allowed_origins: Vec<String>,
    /// Who signs candidates' bearer tokens.
    #[command(flatten)]
    pub jwt: carrel_api::access::JwtOptions,
    /// Form of the log on stderr
    #[arg(long, env = "CARREL_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

/// Options of `carrel demo`.
#[derive(Debug, Clone, Args)]
pub struct Demo {
    /// One line of JSON as soon as the session is ready, instead of text for people
    #[arg(long)]
    pub json: bool,
    /// Address of API and pages; port 0 means any free one
    #[arg(long, env = "CARREL_HTTP_LISTEN", default_value = "127.0.0.1:0")]
    pub http_listen: SocketAddr,
    /// Address of the SSH server; port 0 means any free one
    #[arg(long, env = "CARREL_SSH_LISTEN", default_value = "127.0.0.1:0")]
    pub ssh_listen: SocketAddr,
    /// Form of the log on stderr
    #[arg(long, env = "CARREL_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One object a line
    Json,
}

/// `HOST:PORT`, where the host may be a name, an IPv4 address, or an IPv6 address in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// Without brackets.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

/// Not `HOST:PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not of the form HOST:PORT, for example exam.example.org:22")]
pub struct MalformedHostPort;

impl FromStr for HostPort {
    type Err = MalformedHostPort;

    fn from_str(text: &str) -> Result<Self, MalformedHostPort> {
        let (host, port) = text.rsplit_once(':').ok_or(MalformedHostPort)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        let plain = bracketed.is_some() || !host.contains(':');
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(MalformedHostPort)?;
        if host.is_empty() || !plain || host.contains(char::is_whitespace) {
            return Err(MalformedHostPort);
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl From<SocketAddr> for HostPort {
    /// What a client on this machine connects to; an unspecified address becomes loopback.
    fn from(address: SocketAddr) -> Self {
        let host = match address {
            SocketAddr::V4(v4) if v4.ip().is_unspecified() => "127.0.0.1".to_owned(),
            SocketAddr::V6(v6) if v6.ip().is_unspecified() => "::1".to_owned(),
            other => other.ip().to_string(),
        };
        Self { host, port: address.port() }
    }
}

impl HostPort {
    /// For a URL's authority.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn hosts_and_ports_are_read_strictly() {
        assert_eq!("[::1]:22".parse(), Ok(HostPort { host: "::1".to_owned(), port: 22 }));
        assert_eq!(
            "exam.example.org:2222".parse(),
            Ok(HostPort { host: "exam.example.org".to_owned(), port: 2222 })
        );
        for bad in ["host", "host:0", "host:x", ":22", "::1:22", "a b:22"] {
            assert_eq!(bad.parse::<HostPort>(), Err(MalformedHostPort), "{bad}");
        }
        assert_eq!(HostPort::from("[::]:80".parse::<SocketAddr>().unwrap()).authority(), "[::1]:80");
    }
}
