//! Pseudo-terminals of the kernel: opening one, its size, and the modes that an SSH client asks for.
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use carrel_agent::wire;
use rustix::{
    process::Pid,
    pty::OpenptFlags,
    termios::{
        ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios,
        Winsize, tcgetattr, tcgetpgrp, tcsetattr, tcsetwinsize,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use bytes::Bytes;

use crate::{process::read_some, spawn};

/// Opcode of RFC 4254, 8 for a character that does nothing.
const DISABLED: u32 = 255;

/// The agent's side.
#[derive(Debug)]
pub struct Master {
    descriptor: AsyncFd<OwnedFd>,
}

/// The process's side.
#[derive(Debug)]
pub struct Slave {
    /// For stdin, stdout and stderr.
    pub descriptor: OwnedFd,
    /// `/dev/pts/N`.
    pub name: String,
}

/// Opens a pair with the size and modes that are asked for.
///
/// # Errors
/// When the kernel or the environment's `/dev/pts` has none to give.
pub fn open(wanted: &wire::Pty) -> io::Result<(Master, Slave)> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    let mut termios = tcgetattr(&slave)?;
    apply(&mut termios, &wanted.modes);
    tcsetattr(&slave, OptionalActions::Now, &termios)?;
    rustix::io::ioctl_fionbio(&master, true)?;
    let master = Master { descriptor: spawn::watch(master)? };
    master.resize(wanted.cols, wanted.rows)?;
    Ok((master, Slave { descriptor: slave, name }))
}

impl Master {
    /// Waits until there may be something to read, or room to write.
    pub async fn ready(&self, interest: Interest) -> io::Result<()> {
        self.descriptor.ready(interest).await.map(|mut guard| guard.retain_ready())
    }

    /// What the process has written and is there; empty when its side is closed for good.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing.
    pub fn read(&self) -> io::Result<Bytes> {
        let read = self.descriptor.try_io(Interest::READABLE, |descriptor| {
            read_some(|buffer| Ok(rustix::io::read(descriptor, buffer)?))
        });
        match read {
            // Linux says this once nobody holds the other side.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                Ok(Bytes::new())
            }
            other => other,
        }
    }

    /// As [`Self::read`], without regard to what was known before: after the process has ended.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing.
    pub fn drain(&self) -> io::Result<Bytes> {
        match read_some(|buffer| Ok(rustix::io::read(self.descriptor.get_ref(), buffer)?)) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Ok(Bytes::new()),
            other => other,
        }
    }

    /// Writes what the process's side has room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.descriptor.try_io(Interest::WRITABLE, |descriptor| Ok(rustix::io::write(descriptor, bytes)?))
    }

    /// Sets the size; the foreground hears of it (WINCH) when it is another one.
    ///
    /// # Errors
    /// Of the kernel.
    pub fn resize(&self, cols: u16, rows: u16) -> io::Result<()> {
        Ok(tcsetwinsize(
            self.descriptor.as_fd(),
            Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 },
        )?)
    }

    /// The process group in the foreground.
    pub fn foreground(&self) -> Option<Pid> {
        tcgetpgrp(self.descriptor.as_fd()).ok()
    }

    /// The character that ends input.
    pub fn end_of_file(&self) -> Option<u8> {
        let termios = tcgetattr(self.descriptor.as_fd()).ok()?;
        Some(termios.special_codes[SpecialCodeIndex::VEOF]).filter(|code| *code != 0)
    }
}

/// Sets the modes of RFC 4254, 8. Unknown ones, and those that a pseudo-terminal has no use for, are ignored.
fn apply(termios: &mut Termios, modes: &[(u8, u32)]) {
    // All clients speak UTF-8, and OpenSSH's older ones do not say so.
    termios.input_modes.insert(InputModes::IUTF8);
    for (opcode, value) in modes {
        let on = *value != 0;
        if let Some(index) = special_code(*opcode) {
            termios.special_codes[index] =
                if *value == DISABLED { 0 } else { u8::try_from(*value).unwrap_or_default() };
        } else if let Some(mode) = input_mode(*opcode) {
            termios.input_modes.set(mode, on);
        } else if let Some(mode) = local_mode(*opcode) {
            termios.local_modes.set(mode, on);
        } else if let Some(mode) = output_mode(*opcode) {
            termios.output_modes.set(mode, on);
        } else {
            control_mode(&mut termios.control_modes, *opcode, on);
        }
    }
}

const fn special_code(opcode: u8) -> Option<SpecialCodeIndex> {
    Some(match opcode {
        1 => SpecialCodeIndex::VINTR,
        2 => SpecialCodeIndex::VQUIT,
        3 => SpecialCodeIndex::VERASE,
        4 => SpecialCodeIndex::VKILL,
        5 => SpecialCodeIndex::VEOF,
        6 => SpecialCodeIndex::VEOL,
        7 => SpecialCodeIndex::VEOL2,
        8 => SpecialCodeIndex::VSTART,
        9 => SpecialCodeIndex::VSTOP,
        10 => SpecialCodeIndex::VSUSP,
        12 => SpecialCodeIndex::VREPRINT,
        13 => SpecialCodeIndex::VWERASE,
        14 => SpecialCodeIndex::VLNEXT,
        16 => SpecialCodeIndex::VSWTC,
        18 => SpecialCodeIndex::VDISCARD,
        _ => return None,
    })
}

const fn input_mode(opcode: u8) -> Option<InputModes> {
    Some(match opcode {
        30 => InputModes::IGNPAR,
        31 => InputModes::PARMRK,
        32 => InputModes::INPCK,
        33 => InputModes::ISTRIP,
        34 => InputModes::INLCR,
        35 => InputModes::IGNCR,
        36 => InputModes::ICRNL,
        37 => InputModes::IUCLC,
        38 => InputModes::IXON,
        39 => InputModes::IXANY,
        40 => InputModes::IXOFF,
        41 => InputModes::IMAXBEL,
        42 => InputModes::IUTF8,
        _ => return None,
    })
}

const fn local_mode(opcode: u8) -> Option<LocalModes> {
    Some(match opcode {
        50 => LocalModes::ISIG,
        51 => LocalModes::ICANON,
        52 => LocalModes::XCASE,
        53 => LocalModes::ECHO,
        54 => LocalModes::ECHOE,
        55 => LocalModes::ECHOK,
        56 => LocalModes::ECHONL,
        57 => LocalModes::NOFLSH,
        58 => LocalModes::TOSTOP,
        59 => LocalModes::IEXTEN,
        60 => LocalModes::ECHOCTL,
        61 => LocalModes::ECHOKE,
        62 => LocalModes::PENDIN,
        _ => return None,
    })
}

const fn output_mode(opcode: u8) -> Option<OutputModes> {
    Some(match opcode {
        70 => OutputModes::OPOST,
        71 => OutputModes::OLCUC,
        72 => OutputModes::ONLCR,
        73 => OutputModes::OCRNL,
        74 => OutputModes::ONOCR,
        75 => OutputModes::ONLRET,
        _ => return None,
    })
}

fn control_mode(modes: &mut ControlModes, opcode: u8, on: bool) {
    match opcode {
        90 | 91 if on => {
            modes.remove(ControlModes::CSIZE);
            modes.insert(if opcode == 90 { ControlModes::CS7 } else { ControlModes::CS8 });
        }
        92 => modes.set(ControlModes::PARENB, on),
        93 => modes.set(ControlModes::PARODD, on),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn modes_and_size_are_those_asked_for() {
        // Codes as OpenSSH sends them: ^X interrupts, no quit character, no echo, no ONLCR.
        let modes = vec![(1, 24), (2, 255), (53, 0), (72, 0), (51, 1), (128, 38400), (200, 7)];
        let wanted = wire::Pty { term: "xterm".into(), cols: 132, rows: 43, modes };
        let (master, slave) = open(&wanted).unwrap();
        let termios = tcgetattr(&slave.descriptor).unwrap();
        assert_eq!(termios.special_codes[SpecialCodeIndex::VINTR], 24);
        assert_eq!(termios.special_codes[SpecialCodeIndex::VQUIT], 0);
        assert!(!termios.local_modes.contains(LocalModes::ECHO));
        assert!(termios.local_modes.contains(LocalModes::ICANON));
        assert!(!termios.output_modes.contains(OutputModes::ONLCR));
        assert!(termios.input_modes.contains(InputModes::IUTF8));
        let size = rustix::termios::tcgetwinsize(&slave.descriptor).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (132, 43));
        assert_eq!(master.end_of_file(), Some(4));
        assert!(slave.name.starts_with("/dev/pts/"));
    }
}
