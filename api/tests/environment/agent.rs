//! The agent's program that tests put into environments.
use std::path::PathBuf;

/// The one that `CARREL_AGENT` names, or that was built last.
pub fn agent() -> PathBuf {
    let built = "../target/agent/x86_64-unknown-linux-gnu/agent/carrel-agent";
    std::env::var_os("CARREL_AGENT").map_or_else(|| built.into(), PathBuf::from)
}
