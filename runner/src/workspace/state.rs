//! The session's private folder, and the guard that lets one runner at a time work in it.

#[cfg(test)]
mod tests;

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant, sleep, sleep_until, timeout};

use super::is_full;

/// How often the lease is renewed.
const RENEW: Duration = Duration::from_secs(10);
/// A runner that could not renew its lease for this long stops.
const EXPIRE: Duration = Duration::from_secs(30);
/// How long after the last renewal another node's runner may still be at work.
const FENCE: Duration = Duration::from_secs(45);
/// How far the clocks of two nodes may be apart.
const CLOCKS: Duration = Duration::from_mins(10);

const FULL: &str = "the volume is full: remove what is not needed, or use a larger one (spec.workspace.size)";

/// Who may work on the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lease {
    attempt: u32,
    pod_uid: String,
    /// Kernel under which its owner ran: there the lock says whether the owner is dead.
    kernel: String,
    renewed_at: Timestamp,
    /// The owner ended and left nothing running.
    released: bool,
    /// The owner is not at work yet: the one before it may still be, and learns here that it must not.
    #[serde(default)]
    waits: bool,
}

/// Why the session's folder cannot be worked in.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The volume refuses.
    #[error("failed to {action} {path}: {source} ({hint})")]
    Volume {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What it said.
        source: io::Error,
        /// Who owns it, and what to do.
        hint: String,
    },
    /// No room for the lease.
    #[error("the session's lease could not be renewed: {FULL}")]
    Full,
    /// The volume does not answer.
    #[error("the session's lease could not be renewed for {} s: the volume does not answer", EXPIRE.as_secs())]
    Expired,
    /// Another runner is at work.
    #[error("another runner (attempt {attempt}) drives the session")]
    Superseded {
        /// Its attempt; 0: unknown.
        attempt: u32,
    },
}

fn volume(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    move |source| StateError::Volume {
        action,
        path: path.to_owned(),
        hint: if is_full(&source) { FULL.to_owned() } else { hint(path) },
        source,
    }
}

fn hint(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    let existing = path
        .ancestors()
        .find_map(|folder| Some((folder, fs::metadata(folder).ok()?)));
    let who = rustix::process::getuid().as_raw();
    existing.map_or_else(String::new, |(folder, found)| {
        format!(
            "{} belongs to {}:{}, mode {:o}; the runner is {who}: the volume must be writable for that user, by fsGroup or by its storage class",
            folder.display(),
            found.uid(),
            found.gid(),
            found.mode() & 0o7777,
        )
    })
}

/// Makes a folder and shows that it can be written to.
pub fn prepare(folder: &Path) -> Result<(), StateError> {
    fs::create_dir_all(folder).map_err(volume("create", folder))?;
    let probe = folder.join(".probe");
    // Not synced: the lease is, a moment later and beside it.
    File::create(&probe)
        .and_then(|mut file| file.write_all(b"x"))
        .map_err(volume("write below", folder))?;
    crate::kill_point::pass("probe");
    fs::remove_file(&probe).map_err(volume("remove below", folder))
}

/// The right to work in the session's folder, as long as it is held.
#[derive(Debug)]
pub struct Guard {
    lease: Lease,
    path: PathBuf,
    /// When it was last written.
    renewed: Instant,
    /// Locked until it is dropped, whatever ends the process.
    _lock: File,
}

impl Guard {
    /// Takes the lock and the lease; waits for another owner that may still be at work.
    pub async fn take(folder: &Path, attempt: u32, pod_uid: &str) -> Result<Self, StateError> {
        let lock = lock(&folder.join("lock")).await?;
        crate::kill_point::pass("locked");
        let path = folder.join("lease");
        let lease = Lease {
            attempt,
            pod_uid: pod_uid.to_owned(),
            kernel: kernel(),
            renewed_at: Timestamp::now(),
            released: false,
            waits: false,
        };
        let mut guard = Self {
            lease,
            path,
            renewed: Instant::now(),
            _lock: lock,
        };
        if let Some(found) = read(&guard.path)? {
            if found.attempt > attempt {
                return Err(StateError::Superseded { attempt: found.attempt });
            }
            let wait = fence(&found, &guard.lease);
            if !wait.is_zero() {
                guard.lease.waits = true;
                guard.write()?;
                tracing::warn!(
                    seconds = wait.as_secs(),
                    attempt = found.attempt,
                    "another runner may still be at work"
                );
                crate::kill_point::pass("fence");
                sleep(wait).await;
            }
        }
        // Somebody may have come while we waited.
        if let Some(found) = read(&guard.path)?.filter(|found| found.attempt > attempt) {
            return Err(StateError::Superseded { attempt: found.attempt });
        }
        guard.lease.waits = false;
        guard.lease.renewed_at = Timestamp::now();
        guard.renewed = Instant::now();
        guard.write()?;
        Ok(guard)
    }

    /// Says that we are still here; finds out whether somebody else is.
    pub fn renew(&mut self) -> Result<(), StateError> {
        let ours = &self.lease;
        let others = |found: &Lease| (found.attempt, &found.pod_uid) != (ours.attempt, &ours.pod_uid);
        if let Some(found) = read(&self.path)?
            && found.attempt >= ours.attempt
            && others(&found)
        {
            return Err(StateError::Superseded { attempt: found.attempt });
        }
        self.lease.renewed_at = Timestamp::now();
        self.renewed = Instant::now();
        self.write()
    }

    /// As [`Self::renew`], when it is time to.
    pub fn renew_in_time(&mut self) -> Result<(), StateError> {
        if self.renewed.elapsed() < RENEW {
            return Ok(());
        }
        self.renew()
    }

    /// Says that nothing of us is left.
    pub fn release(mut self) -> Result<(), StateError> {
        self.lease.released = true;
        self.renew()
    }

    fn write(&self) -> Result<(), StateError> {
        // A struct of numbers and strings always serialises.
        let text = serde_json::to_vec(&self.lease).unwrap_or_default();
        replace(&self.path, &text).map_err(volume("write", &self.path))
    }
}

/// Renews a lease on a thread of its own: a volume that hangs must not keep the runner from noticing.
pub struct Keeper {
    lost: watch::Receiver<Held>,
    guard: Arc<Mutex<Option<Guard>>>,
    /// To have the lease looked at before its time.
    check: Arc<Notify>,
    task: JoinHandle<()>,
}

/// What the thread knows.
#[derive(Clone, Debug)]
enum Held {
    /// Renewed last at this time.
    Since(Instant),
    /// Renewed last at this time; now there is no room for it.
    Full(Instant),
    /// By another runner.
    By(u32),
}

impl Guard {
    /// Has the lease renewed from now on.
    pub fn keep(self) -> Keeper {
        // Not since now: what was done under it until here may have taken long.
        let renewed = self.renewed;
        let (held, lost) = watch::channel(Held::Since(renewed));
        let guard = Arc::new(Mutex::new(Some(self)));
        let check = Arc::new(Notify::new());
        let task = tokio::spawn(renew(Arc::clone(&guard), held, Arc::clone(&check), renewed));
        Keeper {
            lost,
            guard,
            check,
            task,
        }
    }
}

async fn renew(
    guard: Arc<Mutex<Option<Guard>>>,
    held: watch::Sender<Held>,
    check: Arc<Notify>,
    mut renewed_at: Instant,
) {
    loop {
        tokio::select! {
            () = sleep(RENEW) => {}
            () = check.notified() => {}
        }
        let guard = Arc::clone(&guard);
        let renewed = tokio::task::spawn_blocking(move || {
            let mut guard = guard.lock().unwrap_or_else(PoisonError::into_inner);
            guard.as_mut().map(Guard::renew)
        });
        match renewed.await {
            Ok(Some(Ok(()))) => {
                renewed_at = Instant::now();
                held.send_replace(Held::Since(renewed_at))
            }
            Ok(Some(Err(StateError::Superseded { attempt }))) => held.send_replace(Held::By(attempt)),
            // An agent that is quiet while the disk is full would have the lease run out, and nobody would know why.
            Ok(Some(Err(StateError::Volume { source, .. }))) if is_full(&source) => {
                held.send_replace(Held::Full(renewed_at))
            }
            Ok(Some(Err(error))) => {
                tracing::warn!(%error, "the lease could not be renewed");
                continue;
            }
            Ok(None) | Err(_) => return,
        };
    }
}

/// Knows whether the lease is held, for whoever writes.
#[derive(Clone)]
pub struct Holding(watch::Receiver<Held>);

impl Holding {
    /// One that is lost when the function is called.
    #[cfg(test)]
    pub fn to_be_lost() -> (Self, impl FnOnce()) {
        let (sender, holding) = watch::channel(Held::Since(Instant::now()));
        let lose = move || {
            sender.send_replace(Held::By(2));
        };
        (Self(holding), lose)
    }

    /// Whether nobody else may be at work yet.
    pub fn is_held(&self) -> bool {
        match *self.0.borrow() {
            Held::Since(renewed) | Held::Full(renewed) => renewed.elapsed() < EXPIRE,
            Held::By(_) => false,
        }
    }
}

impl Keeper {
    /// Knows whether the lease is held.
    pub fn holding(&self) -> Holding {
        Holding(self.lost.clone())
    }

    /// Waits until the lease is lost. May be dropped while it waits.
    pub async fn lost(&mut self) -> StateError {
        loop {
            let expires = match *self.lost.borrow_and_update() {
                Held::By(attempt) => return StateError::Superseded { attempt },
                Held::Full(_) => return StateError::Full,
                Held::Since(renewed) => renewed + EXPIRE,
            };
            tokio::select! {
                changed = self.lost.changed() => {
                    if changed.is_err() {
                        return StateError::Expired;
                    }
                }
                () = sleep_until(expires) => return StateError::Expired,
            }
        }
    }

    /// Has the lease looked at now: somebody said that it is not ours any more.
    pub fn check(&self) {
        self.check.notify_one();
    }

    /// Says that nothing of us is left; waits at most `patience`.
    pub async fn release(self, patience: Duration) -> Result<(), StateError> {
        self.task.abort();
        let released = tokio::task::spawn_blocking(move || {
            let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner).take();
            guard.map_or(Ok(()), Guard::release)
        });
        match timeout(patience, released).await {
            Ok(Ok(released)) => released,
            Ok(Err(_)) | Err(_) => Err(StateError::Expired),
        }
    }
}

/// How long `next` has to wait for the owner of `found`. The lock is ours already.
fn fence(found: &Lease, next: &Lease) -> Duration {
    // Under the same kernel the lock would not be ours if the owner lived. One that cannot be told is no other's.
    let same = !found.kernel.is_empty() && found.kernel == next.kernel;
    // Who died while it waited has not seen the end of the one before it.
    if found.released || (same && !found.waits) {
        return Duration::ZERO;
    }
    let since = next.renewed_at.duration_since(found.renewed_at);
    // A clock that runs ahead of ours says nothing, so the whole time is waited.
    let since = Duration::try_from(since).unwrap_or_default();
    FENCE.saturating_sub(since.saturating_sub(CLOCKS))
}

async fn lock(path: &Path) -> Result<File, StateError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(volume("open", path))?;
    let deadline = Instant::now() + FENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(volume("lock", path)(error)),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                return Err(StateError::Superseded { attempt: 0 });
            }
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(100)).await,
        }
    }
}

fn read(path: &Path) -> Result<Option<Lease>, StateError> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(volume("read", path)(error)),
    }
}

/// Replaces a file so that a crash leaves the old one or the new one.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let next = path.with_extension("next");
    let mut file = File::create(&next)?;
    crate::kill_point::pass("lease-created");
    file.write_all(bytes)?;
    file.sync_data()?;
    crate::kill_point::pass("lease-synced");
    fs::rename(&next, path)?;
    crate::kill_point::pass("lease-renamed");
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    crate::kill_point::pass("lease");
    Ok(())
}

/// Id of the running kernel: the same in every container of a node, another after each boot.
fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}
