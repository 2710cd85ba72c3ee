//! Starting a child, taking over an inherited descriptor, waiting for one: what has no safe interface.
//!
//! This module does not know what the child is for.
#![allow(unsafe_code, reason = "what runs between fork and exec, and a descriptor known by its number only")]

use std::{
    io,
    os::{
        fd::{FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command},
};

use rustix::process::{Resource, Rlimit};
use tokio::io::unix::AsyncFd;

/// Starts `command` in a session, and so a process group, of its own; with `terminal`, its stdin becomes the controlling terminal.
/// `files` is the limit of open files that it starts with: the agent raises its own.
///
/// # Errors
/// Of fork, of the steps before exec, and of exec itself.
pub fn spawn(command: &mut Command, terminal: bool, files: Rlimit) -> io::Result<Child> {
    // SAFETY: between fork and exec only async-signal-safe functions may be called. These are bare system calls of rustix: they
    // take no lock and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            if terminal {
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            }
            rustix::process::setrlimit(Resource::Nofile, files)?;
            Ok(())
        });
    }
    command.spawn()
}

/// Takes over a descriptor that this process was started with.
///
/// # Errors
/// When no descriptor of that number is open.
pub fn inherited(descriptor: RawFd) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: called once per number, at the start, before anything else was opened: nobody else owns it. Whether it is open is
    // asked before it is used.
    let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
    if let Err(error) = rustix::io::fcntl_getfd(&owned) {
        // Closing what is not open would be an error of its own.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(owned);
        return Err(error.into());
    }
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
}

/// Registers a descriptor with the runtime.
///
/// # Errors
/// For a file, which cannot be waited for.
pub fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and always the same descriptor, until it is dropped.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}
