//! Puts the static agent and the web page where the crate embeds them from. `make build` makes both first; without
//! them the crate still compiles (for checks and documentation), and the binary says at start what it lacks.
use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?);
    let target = env::var("TARGET").map_err(io::Error::other)?;
    let agent = Path::new("../target/agent").join(target).join("agent/carrel-agent");
    println!("cargo::rerun-if-changed={}", agent.display());
    let binary = match fs::read(&agent) {
        Ok(binary) => binary,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    fs::write(out.join("carrel-agent"), binary)?;

    // rust-embed wants the folder at compile time.
    let page = Path::new("page/dist");
    println!("cargo::rerun-if-changed={}", page.display());
    fs::create_dir_all(page)
}
