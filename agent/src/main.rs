//! The agent: runs inside an environment and serves its processes, terminals and TCP to the gateway.
//!
//! `main` only wires; `carrel-agent --help` says what there is.
mod account;
mod attachment;
mod handoff;
mod join;
mod memory;
mod options;
mod process;
mod pty;
mod reap;
mod registry;
mod request;
mod screen;
mod seats;
mod serve;
mod session;
mod setup;
mod sftp;
mod spawn;
mod tcp;
mod terminal;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use options::Command;

fn main() -> ExitCode {
    match options::parse(std::env::args_os().skip(1)) {
        Ok(command) => match run(command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error.to_string(), ExitCode::FAILURE),
        },
        Err(error) => complain(&error.to_string(), ExitCode::from(2)),
    }
}

fn run(command: Command) -> io::Result<()> {
    match command {
        Command::Serve(options) => serve::run(options),
        Command::Connect { socket } => handoff::connect(&socket),
        Command::Install { destination } => options::install(&destination),
        Command::Idle => loop {
            std::thread::park();
        },
        Command::Sftp => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(sftp::run());
            // A read of stdin that nobody waits for must not hold the end up.
            runtime.shutdown_background();
            Ok(())
        }
        Command::Print(text) => io::stdout().write_all(text.as_bytes()),
    }
}

fn complain(text: &str, code: ExitCode) -> ExitCode {
    // Nobody can be told when stderr does not take it.
    let _ = writeln!(io::stderr(), "carrel-agent: {text}");
    code
}
