//! One process on a file: streams of a second one would never hear of what the first stores.

use std::{fs::File, path::Path, sync::Arc};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::StoreError;

/// Holds a log for this process until it is dropped, or the process dies.
#[derive(Debug)]
pub(in crate::store) struct Lock(#[expect(dead_code, reason = "closing it unlocks")] File);

impl Lock {
    /// Of the log in this file.
    pub(super) fn take(log: &Path) -> Result<Self, StoreError> {
        let mut path = log.as_os_str().to_owned();
        path.push(".lock");
        let path = Path::new(&path);
        let file = File::options().create(true).append(true).open(path);
        let file = file.map_err(|error| StoreError::Lock {
            path: path.to_owned(),
            source: Arc::new(error),
        })?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(Errno::WOULDBLOCK) => Err(StoreError::InUse { path: log.to_owned() }),
            Err(_) => Err(StoreError::NotDurable {
                path: log.to_owned(),
                what: "locks",
            }),
        }
    }
}
