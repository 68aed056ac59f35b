//! Opening what lies below a folder that the agent can write. There can be symlinks, pipes, devices and giants there, and
//! they can change while we look.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

/// Opens a regular file below `folder`, of at most `max` bytes, for reading.
pub fn open(folder: impl AsFd, path: &Path, max: u64) -> io::Result<File> {
    let file = File::from(opened(folder, path, OFlags::RDONLY)?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if metadata.len() > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too large"));
    }
    Ok(file)
}

/// Opens a folder that is ours and cannot be replaced by the agent.
pub fn root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

/// Opens a folder below `folder`.
pub fn folder(folder: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    opened(folder, path, OFlags::DIRECTORY)
}

fn opened(folder: impl AsFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    // A pipe must not make us wait.
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(folder, path, flags, Mode::empty(), resolve)?)
}

/// Reads a file to its end, at most `max` bytes: it may grow while it is read.
pub fn read(file: File, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_regular_files_below_the_folder_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir_all(inner.join("sub")).unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        std::fs::write(inner.join("good"), "fine").unwrap();
        symlink("../secret", inner.join("link")).unwrap();
        symlink("/", inner.join("sub/out")).unwrap();
        let fifo = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(CWD, inner.join("pipe"), rustix::fs::FileType::Fifo, fifo, 0).unwrap();
        let root = root(&inner).unwrap();
        assert!(open(&root, Path::new("good"), 4).is_ok());
        for (path, max) in [
            ("good", 3),
            ("link", 9),
            ("pipe", 9),
            ("sub", 9),
            ("../secret", 9),
            ("sub/out/etc/passwd", 1 << 20),
        ] {
            assert!(open(&root, Path::new(path), max).is_err(), "{path}");
        }
    }
}
