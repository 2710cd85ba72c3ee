//! The command line tools, `carrel <name> <verb>`: JSON on stdout, errors as JSON on stderr, the contract's exit codes.
//!
//! What they do is in `carrel_api::cli`; here is where they find the database and the environments of a server.
use std::{ffi::OsString, io::Write, path::PathBuf, process::ExitCode};

use carrel_api::{
    cli::{self, Context, Exit, NAMES, Output, Tool},
    environment::kubernetes::KubernetesOptions,
    store::{Store, StoreError},
};
use clap::Parser;
use serde_json::json;

use crate::{
    options::{Database, EnvironmentKind, HostPort, MalformedHostPort},
    serve::{self, Places, StartError, data_dir, database_url},
};

/// Where a server's things are: the same flags and variables as `carrel serve`.
#[derive(Debug, Parser)]
#[command(name = "carrel", version, max_term_width = 100)]
pub struct ToolCli {
    /// sqlite:PATH, or postgres://USER@HOST/NAME. Default: sqlite:carrel.db in the data directory
    #[arg(long, global = true, env = "CARREL_DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// A file with the URL in it, for a URL with a password
    #[arg(long, global = true, env = "CARREL_DATABASE_URL_FILE")]
    database_url_file: Option<PathBuf>,
    /// The server's data directory
    #[arg(long, global = true, env = "CARREL_DATA_DIR", default_value = "./carrel-data")]
    data_dir: PathBuf,
    /// Where sessions run
    #[arg(long, global = true, env = "CARREL_ENVIRONMENT", value_enum, default_value = "local")]
    environment: EnvironmentKind,
    /// Further paths of this machine that local environments can read
    #[arg(long, global = true, env = "CARREL_LOCAL_SHARE", value_name = "PATH", value_delimiter = ':')]
    local_share: Vec<PathBuf>,
    /// How browsers reach the pages
    #[arg(long, global = true, env = "CARREL_PUBLIC_URL", default_value = "http://127.0.0.1:8080")]
    public_url: String,
    /// How ssh clients reach the server
    #[arg(
        long,
        global = true,
        env = "CARREL_PUBLIC_SSH",
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:2222"
    )]
    public_ssh: String,
    /// The SSH host key. Default: in the data directory
    #[arg(long, global = true, env = "CARREL_SSH_HOST_KEY_FILE", value_name = "FILE")]
    ssh_host_key_file: Option<PathBuf>,
    /// The cluster, for `--environment kubernetes`.
    #[command(flatten)]
    kubernetes: KubernetesOptions,
    /// Which tool.
    #[command(subcommand)]
    tool: Tool,
}

/// The arguments for a tool, if that is what was called: by its first word, or by the program's own name.
pub fn arguments(arguments: impl Iterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut all: Vec<_> = arguments.collect();
    let own = PathBuf::from(all.first()?);
    let own = own.file_name()?.to_str()?;
    if NAMES.contains(&own) {
        all.insert(1, own.to_owned().into());
        return Some(all);
    }
    let called = |word: &OsString| word.to_str().is_some_and(|word| NAMES.contains(&word));
    all.get(1).is_some_and(called).then_some(all)
}

/// Runs one and prints what it has to say.
pub async fn run(arguments: Vec<OsString>) -> ExitCode {
    let output = match ToolCli::try_parse_from(arguments) {
        Ok(options) => tool(&options).await,
        Err(asked) if !asked.use_stderr() => {
            // `--help` and `--version`.
            let _ = write!(std::io::stdout(), "{asked}");
            return ExitCode::SUCCESS;
        }
        Err(error) => Output::bad_arguments(&error),
    };
    say(&output)
}

/// Prints it to where it belongs; the exit code says the same.
pub fn say(output: &Output) -> ExitCode {
    let told = match output.exit {
        Exit::Ok => writeln!(std::io::stdout(), "{}", output.json),
        _ => writeln!(std::io::stderr(), "{}", output.json),
    };
    match told {
        Ok(()) => ExitCode::from(output.exit as u8),
        Err(_) => ExitCode::from(Exit::General as u8),
    }
}

async fn tool(options: &ToolCli) -> Output {
    if !options.tool.needs_store() {
        return cli::run(&options.tool, None).await;
    }
    match context(options).await {
        Ok(context) => cli::run(&options.tool, Some(&context)).await,
        Err(error) => unavailable(&error),
    }
}

/// What keeps every command from its work.
pub fn unavailable(error: &StartError) -> Output {
    Output::error(Exit::General, "BACKEND_UNAVAILABLE", &error.to_string(), json!({}))
}

/// A database that does not do as asked, for commands of the gateway's own.
pub fn refused(error: &StoreError) -> Output {
    let (exit, code) = match error {
        StoreError::NotFound => (Exit::NotFound, "NOT_FOUND"),
        StoreError::Unavailable(_) => (Exit::General, "BACKEND_UNAVAILABLE"),
        _ => (Exit::General, "INTERNAL"),
    };
    Output::error(exit, code, &error.to_string(), json!({}))
}

async fn context(options: &ToolCli) -> Result<Context, StartError> {
    let data_dir = data_dir(&options.data_dir)?;
    let database = Database {
        database_url: options.database_url.clone(),
        database_url_file: options.database_url_file.clone(),
        data_dir: data_dir.clone(),
    };
    let store = Store::open(&database_url(&database, &data_dir)?).await?;
    let environment = if options.tool.needs_environment() {
        let places = Places {
            kind: options.environment,
            data_dir: &data_dir,
            local_share: &options.local_share,
            kubernetes: &options.kubernetes,
        };
        let environment = serve::environment(&places).await?;
        store.work_at(&environment.place(), None).await?;
        Some(environment)
    } else {
        None
    };
    let public = if matches!(options.tool, Tool::Exam { .. }) {
        let ssh: HostPort = options
            .public_ssh
            .parse()
            .map_err(|error: MalformedHostPort| StartError::PublicSsh(options.public_ssh.clone(), error))?;
        Some(serve::public(&options.public_url, ssh, options.ssh_host_key_file.as_deref(), &data_dir)?.0)
    } else {
        None
    };
    Ok(Context { store, environment, public })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> impl Iterator<Item = OsString> {
        text.split(' ').map(OsString::from).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn a_tool_is_called_by_its_first_word_or_by_the_programs_name() {
        assert!(arguments(words("/usr/bin/carrel session-status get")).is_some());
        assert_eq!(arguments(words("./session-status get")).unwrap().get(1).unwrap(), "session-status");
        assert!(arguments(words("carrel serve")).is_none());
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        ToolCli::command().debug_assert();
    }
}
