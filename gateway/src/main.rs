//! `carrel`: wires the command line to the parts.
#![forbid(unsafe_code)]
use std::process::ExitCode;

use carrel_gateway::{
    demo, keys,
    options::{Cli, Command, LogFormat},
    serve::{EndSignals, Server},
    tools,
};
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    if let Some(arguments) = tools::arguments(std::env::args_os()) {
        return runtime.block_on(tools::run(arguments));
    }
    runtime.block_on(run(Cli::parse())).unwrap_or_else(|error| failed(&error))
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Serve(options) => {
            start_log(options.log_format, "info");
            let mut told_to_end = EndSignals::new()?;
            let server = Server::start(&options).await?;
            told_to_end.wait().await;
            server.stop().await;
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo(options) => {
            start_log(options.log_format, "warn");
            demo::run(&options).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::ApiKey { database, action } => Ok(keys::run(&database, action).await),
    }
}

/// To stderr; `CARREL_LOG` filters as `tracing_subscriber::EnvFilter` reads it.
fn start_log(format: LogFormat, default: &str) {
    let filter = EnvFilter::try_from_env("CARREL_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    // At the level of traces libraries show what passes through them, keystrokes too: no setting brings that into a log.
    log::set_max_level(log::max_level().min(log::LevelFilter::Debug));
}

#[expect(clippy::print_stderr, reason = "the last words of a command line program")]
fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("carrel: {error:#}");
    ExitCode::FAILURE
}
