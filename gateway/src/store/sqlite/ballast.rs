//! Room on the volume that is kept for the day on which it is full: to remove records takes some.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// Bytes that are kept: what the journal may have, when a long record was written last.
const LENGTH: u64 = 96 << 20;
/// Part of the volume that is kept at most.
const PART: u64 = 4;
/// Fewer bytes are of no use.
const LEAST: u64 = 256 << 10;

/// A file beside the log that only takes room.
#[derive(Debug)]
pub(super) struct Ballast {
    path: PathBuf,
}

impl Ballast {
    /// Beside this log.
    pub(super) fn beside(log: &Path) -> Self {
        let mut path = log.as_os_str().to_owned();
        path.push(".ballast");
        Self { path: path.into() }
    }

    /// Gives the room back. Whether there was some.
    pub(super) fn drop_it(&self) -> bool {
        fs::remove_file(&self.path).is_ok()
    }

    /// Takes room, half of what there is at most, unless it has some.
    pub(super) fn lay(&self) {
        if self.path.exists() {
            return;
        }
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let Ok(volume) = statvfs(folder.unwrap_or(Path::new("."))) else {
            return;
        };
        let length = LENGTH
            .min(volume.f_blocks * volume.f_frsize / PART)
            .min(volume.f_bavail * volume.f_frsize / 2);
        if length < LEAST {
            return;
        }
        if let Err(error) = self.write(length) {
            tracing::warn!(%error, "no room could be kept for a full volume");
            self.drop_it();
        }
    }

    fn write(&self, length: u64) -> std::io::Result<()> {
        let mut file = File::create(&self.path)?;
        if fallocate(&file, FallocateFlags::empty(), 0, length).is_err() {
            // Not every file system knows how to reserve.
            let zeros = vec![0; 64 << 10];
            for _ in 0..length / zeros.len() as u64 {
                file.write_all(&zeros)?;
            }
        }
        file.sync_all()
    }
}
