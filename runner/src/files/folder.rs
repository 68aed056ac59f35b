//! One folder's files. The agent can write there at the same time, so nothing is looked at twice and no link is followed.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use protocol::frame::{FileEntry, FileKind, NOT_FOUND, REFUSED};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fchmod, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use uuid::Uuid;

use crate::workspace::beneath;

/// Largest file that is read.
const MAX_READ: u64 = 4 << 30;
/// Largest file that is written.
pub const MAX_WRITE: u64 = 512 << 20;
/// Most entries of a folder that are listed.
const MAX_ENTRIES: usize = 10_000;
/// What unfinished files are called, before a random part.
pub const UNFINISHED: &str = ".agentic-";

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is nothing.
    #[error("{NOT_FOUND}: there is no such file or folder")]
    NotFound,
    /// The path is none that is served.
    #[error("{REFUSED}: {0}")]
    Path(&'static str),
    /// The file system said no.
    #[error("failed to {0}: {1}")]
    Io(&'static str, io::Error),
    /// It cannot be served.
    #[error("{REFUSED}: {0}")]
    Refused(&'static str),
    /// The other side gave up.
    #[error("failed to receive the file: {0}")]
    Given(String),
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> FileError {
    move |error| {
        let error = error.into();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => FileError::NotFound,
            _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
                FileError::Refused("links are not followed")
            }
            ErrorKind::CrossesDevices => FileError::Refused("it leads out of the workspace"),
            ErrorKind::InvalidInput => FileError::Refused("it is not a regular file"),
            ErrorKind::FileTooLarge => FileError::Refused("it is too large"),
            _ => FileError::Io(action, error),
        }
    }
}

/// A folder below which files are served.
pub struct Folder {
    root: OwnedFd,
}

impl Folder {
    /// Opens it; it is ours and cannot be replaced by the agent.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Ok(Self {
            root: beneath::root(path).map_err(failed("open the workspace"))?,
        })
    }

    /// What is in a folder, by name.
    pub fn list(&self, path: &str) -> Result<Vec<FileEntry>, FileError> {
        let folder = beneath::folder(&self.root, &checked(path)?).map_err(failed("open the folder"))?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(folder.as_fd()).map_err(failed("read the folder"))? {
            let entry = entry.map_err(failed("read the folder"))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if entries.len() >= MAX_ENTRIES {
                return Err(FileError::Refused("the folder has too many entries"));
            }
            // What is gone by now was not there.
            if let Ok(stat) = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                entries.push(entry_of(&name.to_string_lossy(), &stat));
            }
        }
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    /// What a path is.
    pub fn stat(&self, path: &str) -> Result<FileEntry, FileError> {
        let path = checked(path)?;
        let Some(name) = path.file_name() else {
            let stat = rustix::fs::fstat(&self.root).map_err(failed("look at the folder"))?;
            return Ok(entry_of("", &stat));
        };
        let folder = self.parent(&path)?;
        let stat = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look at the file"))?;
        Ok(entry_of(&name.to_string_lossy(), &stat))
    }

    /// A part of a file; `length` 0: all that follows `offset`.
    pub fn read(&self, path: &str, offset: u64, length: u64) -> Result<Piece, FileError> {
        let path = checked(path)?;
        let mut file = beneath::open(&self.root, &path, MAX_READ).map_err(failed("open the file"))?;
        let size = file.metadata().map_err(failed("look at the file"))?.len();
        file.seek(SeekFrom::Start(offset)).map_err(failed("read the file"))?;
        let there = size.saturating_sub(offset);
        let left = if length == 0 { there } else { there.min(length) };
        Ok(Piece { file, left })
    }

    /// Begins to replace a file; folders on the way are made.
    pub fn write(&self, path: &str) -> Result<Written, FileError> {
        let path = checked(path)?;
        let name = path.file_name().ok_or(FileError::Path("it names no file"))?.to_owned();
        self.make_parents(&path)?;
        let folder = self.parent(&path)?;
        let mode = match statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => Mode::from_raw_mode(stat.st_mode & 0o777),
                _ => return Err(FileError::Refused("there is something that is not a regular file")),
            },
            Err(rustix::io::Errno::NOENT) => Mode::from_raw_mode(0o644),
            Err(error) => return Err(failed("look at the file")(error)),
        };
        let unfinished = format!("{UNFINISHED}{}", Uuid::new_v4());
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            openat(&folder, unfinished.as_str(), flags, Mode::RUSR | Mode::WUSR).map_err(failed("create the file"))?;
        Ok(Written {
            folder,
            name: name.into(),
            unfinished: Some(unfinished),
            file: file.into(),
            mode,
            length: 0,
        })
    }

    fn parent(&self, path: &Path) -> Result<OwnedFd, FileError> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        beneath::folder(&self.root, parent).map_err(failed("open the file's folder"))
    }

    fn make_parents(&self, path: &Path) -> Result<(), FileError> {
        let mut made = PathBuf::new();
        let parents = path.parent().into_iter().flat_map(Path::components);
        for part in parents {
            let above = if made.as_os_str().is_empty() {
                Path::new(".")
            } else {
                &made
            };
            let folder = beneath::folder(&self.root, above).map_err(failed("open the file's folder"))?;
            match mkdirat(&folder, Path::new(part.as_os_str()), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(failed("create the file's folder")(error)),
            }
            made.push(part);
        }
        Ok(())
    }
}

/// A part of a file that is being read.
#[derive(Debug)]
pub struct Piece {
    file: File,
    left: u64,
}

impl Piece {
    /// The next bytes. A file that became shorter meanwhile ends earlier.
    pub fn next(&mut self, most: usize) -> Result<Vec<u8>, FileError> {
        let mut bytes = Vec::new();
        let wanted = self.left.min(most as u64);
        (&mut self.file)
            .take(wanted)
            .read_to_end(&mut bytes)
            .map_err(failed("read the file"))?;
        self.left -= bytes.len() as u64;
        if (bytes.len() as u64) < wanted {
            self.left = 0;
        }
        Ok(bytes)
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }
}

/// A file that is being written; it has its name when it is finished, and is removed when it is not.
#[derive(Debug)]
pub struct Written {
    folder: OwnedFd,
    name: PathBuf,
    unfinished: Option<String>,
    file: File,
    mode: Mode,
    length: u64,
}

impl Written {
    /// Adds bytes, in order.
    pub fn append(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FileError> {
        if offset != self.length {
            return Err(FileError::Refused("a piece of it is missing"));
        }
        self.length += bytes.len() as u64;
        if self.length > MAX_WRITE {
            return Err(FileError::Refused("it is too large"));
        }
        self.file.write_all(bytes).map_err(failed("write the file"))
    }

    /// Puts it in its place, as a whole.
    pub fn finish(mut self) -> Result<(), FileError> {
        fchmod(&self.file, self.mode).map_err(failed("write the file"))?;
        self.file.sync_all().map_err(failed("write the file"))?;
        let Some(unfinished) = &self.unfinished else {
            return Ok(());
        };
        // A link of this name is replaced, not followed.
        renameat(&self.folder, unfinished.as_str(), &self.folder, &self.name)
            .map_err(failed("put the file in place"))?;
        self.unfinished = None;
        rustix::fs::fsync(&self.folder).map_err(failed("put the file in place"))
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if let Some(unfinished) = &self.unfinished {
            let _ = unlinkat(&self.folder, unfinished.as_str(), AtFlags::empty());
        }
    }
}

/// A path below the folder, without detours; empty: the folder itself.
fn checked(path: &str) -> Result<PathBuf, FileError> {
    if path.contains('\0') || path.len() > 4_096 {
        return Err(FileError::Path("it is too long or has a NUL"));
    }
    let mut plain = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(FileError::Path("it must lead downwards from the workspace"));
            }
        }
    }
    if plain.as_os_str().is_empty() {
        plain.push(".");
    }
    Ok(plain)
}

fn entry_of(name: &str, stat: &Stat) -> FileEntry {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Folder,
        FileType::Symlink => FileKind::Link,
        _ => FileKind::Other,
    };
    FileEntry {
        name: name.to_owned(),
        kind,
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        modified: jiff::Timestamp::new(stat.st_mtime, i32::try_from(stat.st_mtime_nsec).unwrap_or_default())
            .unwrap_or_default(),
    }
}
