//! `carrel-agent sftp`: file transfer for environments that have no `sftp-server` of their own.
//!
//! A process like any other, on its stdin and stdout, with the candidate's rights. SFTP version 3 by crate `russh-sftp`,
//! with the extensions that OpenSSH's `scp` and `sftp` use. File names that are no UTF-8 cannot be named through it.
use std::{
    collections::HashMap,
    fs::{self, File, Metadata, OpenOptions, Permissions, ReadDir},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use russh_sftp::{
    protocol::{
        Attrs, Data, File as Entry, FileAttributes, Handle, Name, OpenFlags, Packet, Status, StatusCode,
        Version,
    },
    server::{self, StatusReply},
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

/// Files and directories open at once.
const HANDLES: usize = 256;
/// Bytes of one read; clients ask for 32 to 256 KiB and take less.
const READ: usize = 256 * 1024;
/// Names of one answer.
const NAMES: usize = 128;

/// Serves stdin and stdout until stdin ends.
///
/// # Errors
/// When there is no such runtime or stream.
pub async fn run() {
    let stdio = tokio::io::join(tokio::io::stdin(), tokio::io::stdout());
    let (ours, theirs) = tokio::io::duplex(512 * 1024);
    // The library spawns its loop and tells nobody when it ends: the copy does.
    server::run(theirs, Session::default()).await;
    let (mut stdio, mut ours) = (stdio, ours);
    let _ = tokio::io::copy_bidirectional(&mut stdio, &mut ours).await;
}

enum Open {
    File { file: File, append: bool },
    Directory { path: PathBuf, entries: ReadDir },
}

#[derive(Default)]
struct Session {
    open: HashMap<String, Open>,
    next: u64,
}

/// An error of the file system, as SFTP tells it.
struct Failure(StatusReply);

impl From<Failure> for StatusReply {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => StatusCode::NoSuchFile,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                StatusCode::PermissionDenied
            }
            io::ErrorKind::UnexpectedEof => StatusCode::Eof,
            _ => StatusCode::Failure,
        };
        Self(code.with_message(error.to_string()))
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(errno: rustix::io::Errno) -> Self {
        io::Error::from(errno).into()
    }
}

impl From<StatusCode> for Failure {
    fn from(code: StatusCode) -> Self {
        Self(code.into())
    }
}

fn done(id: u32) -> Status {
    Status { id, status_code: StatusCode::Ok, error_message: "ok".to_owned(), language_tag: "en".to_owned() }
}

/// The empty path is the current directory.
fn local(path: &str) -> &Path {
    Path::new(if path.is_empty() { "." } else { path })
}

fn attributes(metadata: &Metadata) -> FileAttributes {
    FileAttributes::from(metadata)
}

fn entry(path: &Path) -> Entry {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let attrs =
        fs::symlink_metadata(path).map_or_else(|_| FileAttributes::empty(), |metadata| attributes(&metadata));
    Entry::new(name, attrs)
}

fn timestamps(attrs: &FileAttributes) -> Option<Timestamps> {
    let at = |seconds: u32| Timespec { tv_sec: i64::from(seconds), tv_nsec: 0 };
    match (attrs.atime, attrs.mtime) {
        (Some(accessed), Some(modified)) => {
            Some(Timestamps { last_access: at(accessed), last_modification: at(modified) })
        }
        _ => None,
    }
}

fn set(path: &Path, attrs: &FileAttributes) -> Result<(), Failure> {
    if let Some(size) = attrs.size {
        OpenOptions::new().write(true).open(path)?.set_len(size)?;
    }
    if let Some(mode) = attrs.permissions {
        fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))?;
    }
    if let (Some(uid), Some(gid)) = (attrs.uid, attrs.gid) {
        std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
    }
    if let Some(times) = timestamps(attrs) {
        rustix::fs::utimensat(CWD, path, &times, AtFlags::empty())?;
    }
    Ok(())
}

/// The path without `.`, `..` and links; what does not exist yet keeps its last part.
fn real(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent =
                path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Ok(parent.canonicalize()?.join(path.file_name().ok_or(error)?))
        }
        result => result,
    }
}

/// A string of an extension's body, and what follows it.
fn string(data: &[u8]) -> Result<(&str, &[u8]), Failure> {
    let bad = || Failure::from(StatusCode::BadMessage);
    let (length, rest) = data.split_first_chunk::<4>().ok_or_else(bad)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| bad())?;
    let (text, rest) = rest.split_at_checked(length).ok_or_else(bad)?;
    Ok((std::str::from_utf8(text).map_err(|_| bad())?, rest))
}

impl Session {
    fn add(&mut self, id: u32, open: Open) -> Result<Handle, Failure> {
        if self.open.len() >= HANDLES {
            return Err(Failure(StatusCode::Failure.with_message("too many open files")));
        }
        self.next += 1;
        let handle = self.next.to_string();
        self.open.insert(handle.clone(), open);
        Ok(Handle { id, handle })
    }

    fn file(&self, handle: &str) -> Result<(&File, bool), Failure> {
        match self.open.get(handle) {
            Some(Open::File { file, append }) => Ok((file, *append)),
            _ => Err(Failure(StatusCode::Failure.with_message("no such file handle"))),
        }
    }
}

impl server::Handler for Session {
    type Error = Failure;

    fn unimplemented(&self) -> Failure {
        StatusCode::OpUnsupported.into()
    }

    async fn init(
        &mut self,
        _version: u32,
        _extensions: HashMap<String, String>,
    ) -> Result<Version, Failure> {
        let mut version = Version::new();
        for (name, revision) in [
            ("posix-rename@openssh.com", "1"),
            ("fsync@openssh.com", "1"),
            ("hardlink@openssh.com", "1"),
            ("expand-path@openssh.com", "1"),
        ] {
            version.extensions.insert(name.to_owned(), revision.to_owned());
        }
        Ok(version)
    }

    async fn open(
        &mut self,
        id: u32,
        filename: String,
        flags: OpenFlags,
        attrs: FileAttributes,
    ) -> Result<Handle, Failure> {
        let append = flags.contains(OpenFlags::APPEND);
        let write = flags.contains(OpenFlags::WRITE) || append;
        let file = OpenOptions::new()
            .read(flags.contains(OpenFlags::READ))
            .write(write && !append)
            .append(append)
            .create(write && flags.contains(OpenFlags::CREATE))
            .create_new(write && flags.contains(OpenFlags::CREATE) && flags.contains(OpenFlags::EXCLUDE))
            .truncate(write && !append && flags.contains(OpenFlags::TRUNCATE))
            .mode(attrs.permissions.unwrap_or(0o666) & 0o7777)
            .open(local(&filename))?;
        self.add(id, Open::File { file, append })
    }

    async fn close(&mut self, id: u32, handle: String) -> Result<Status, Failure> {
        self.open.remove(&handle).ok_or(StatusCode::Failure)?;
        Ok(done(id))
    }

    async fn read(&mut self, id: u32, handle: String, offset: u64, len: u32) -> Result<Data, Failure> {
        let (file, _) = self.file(&handle)?;
        let mut data = vec![0; usize::try_from(len).unwrap_or(READ).min(READ)];
        let got = file.read_at(&mut data, offset)?;
        if got == 0 && len > 0 {
            return Err(StatusCode::Eof.into());
        }
        data.truncate(got);
        Ok(Data { id, data })
    }

    async fn write(
        &mut self,
        id: u32,
        handle: String,
        offset: u64,
        data: Vec<u8>,
    ) -> Result<Status, Failure> {
        let (mut file, append) = self.file(&handle)?;
        if append {
            io::Write::write_all(&mut file, &data)?;
        } else {
            file.write_all_at(&data, offset)?;
        }
        Ok(done(id))
    }

    async fn lstat(&mut self, id: u32, path: String) -> Result<Attrs, Failure> {
        Ok(Attrs { id, attrs: attributes(&fs::symlink_metadata(local(&path))?) })
    }

    async fn stat(&mut self, id: u32, path: String) -> Result<Attrs, Failure> {
        Ok(Attrs { id, attrs: attributes(&fs::metadata(local(&path))?) })
    }

    async fn fstat(&mut self, id: u32, handle: String) -> Result<Attrs, Failure> {
        Ok(Attrs { id, attrs: attributes(&self.file(&handle)?.0.metadata()?) })
    }

    async fn setstat(&mut self, id: u32, path: String, attrs: FileAttributes) -> Result<Status, Failure> {
        set(local(&path), &attrs)?;
        Ok(done(id))
    }

    async fn fsetstat(&mut self, id: u32, handle: String, attrs: FileAttributes) -> Result<Status, Failure> {
        let (file, _) = self.file(&handle)?;
        if let Some(size) = attrs.size {
            file.set_len(size)?;
        }
        if let Some(mode) = attrs.permissions {
            file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        }
        if let (Some(uid), Some(gid)) = (attrs.uid, attrs.gid) {
            std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
        }
        if let Some(times) = timestamps(&attrs) {
            rustix::fs::futimens(file, &times)?;
        }
        Ok(done(id))
    }

    async fn opendir(&mut self, id: u32, path: String) -> Result<Handle, Failure> {
        let path = local(&path).to_owned();
        let entries = fs::read_dir(&path)?;
        self.add(id, Open::Directory { path, entries })
    }

    async fn readdir(&mut self, id: u32, handle: String) -> Result<Name, Failure> {
        let Some(Open::Directory { path, entries }) = self.open.get_mut(&handle) else {
            return Err(Failure(StatusCode::Failure.with_message("no such directory handle")));
        };
        let mut files = Vec::new();
        for found in entries.by_ref().take(NAMES) {
            files.push(entry(&path.join(found?.file_name())));
        }
        if files.is_empty() { Err(StatusCode::Eof.into()) } else { Ok(Name { id, files }) }
    }

    async fn remove(&mut self, id: u32, filename: String) -> Result<Status, Failure> {
        fs::remove_file(local(&filename))?;
        Ok(done(id))
    }

    async fn mkdir(&mut self, id: u32, path: String, attrs: FileAttributes) -> Result<Status, Failure> {
        fs::create_dir(local(&path))?;
        if let Some(mode) = attrs.permissions {
            fs::set_permissions(local(&path), Permissions::from_mode(mode & 0o7777))?;
        }
        Ok(done(id))
    }

    async fn rmdir(&mut self, id: u32, path: String) -> Result<Status, Failure> {
        fs::remove_dir(local(&path))?;
        Ok(done(id))
    }

    async fn realpath(&mut self, id: u32, path: String) -> Result<Name, Failure> {
        let path = real(local(&path))?;
        Ok(Name { id, files: vec![Entry::dummy(path.to_string_lossy())] })
    }

    async fn rename(&mut self, id: u32, oldpath: String, newpath: String) -> Result<Status, Failure> {
        // Version 3 says that an existing target is an error; `posix-rename` replaces it.
        if fs::symlink_metadata(local(&newpath)).is_ok() {
            return Err(Failure(StatusCode::Failure.with_message("the target exists")));
        }
        fs::rename(local(&oldpath), local(&newpath))?;
        Ok(done(id))
    }

    async fn readlink(&mut self, id: u32, path: String) -> Result<Name, Failure> {
        let target = fs::read_link(local(&path))?;
        Ok(Name { id, files: vec![Entry::dummy(target.to_string_lossy())] })
    }

    /// OpenSSH sends the two paths in the other order than the draft; every client follows it.
    async fn symlink(&mut self, id: u32, linkpath: String, targetpath: String) -> Result<Status, Failure> {
        std::os::unix::fs::symlink(local(&linkpath), local(&targetpath))?;
        Ok(done(id))
    }

    async fn extended(&mut self, id: u32, request: String, data: Vec<u8>) -> Result<Packet, Failure> {
        let (first, rest) = string(&data)?;
        match request.as_str() {
            "posix-rename@openssh.com" => fs::rename(local(first), local(string(rest)?.0))?,
            "hardlink@openssh.com" => fs::hard_link(local(first), local(string(rest)?.0))?,
            "fsync@openssh.com" => self.file(first)?.0.sync_all()?,
            "expand-path@openssh.com" => {
                let home = std::env::var("HOME").unwrap_or_else(|_| "/".to_owned());
                let path = match first.strip_prefix('~') {
                    Some("") => PathBuf::from(home),
                    Some(rest) if rest.starts_with('/') => {
                        Path::new(&home).join(rest.trim_start_matches('/'))
                    }
                    _ => local(first).to_owned(),
                };
                return Ok(Name { id, files: vec![Entry::dummy(real(&path)?.to_string_lossy())] }.into());
            }
            _ => return Err(StatusCode::OpUnsupported.into()),
        }
        Ok(done(id).into())
    }
}
