//! The spool: every record of the session, on disk before anybody else sees it.
//!
//! Append-only segments `<first seq>.spool` of entries `[length u32 LE][CRC32C u32 LE][record]`, behind a header with the
//! spool's random id. A thread of its own writes what has come since its last fsync and syncs once for all of it, so the
//! next batch collects while one syncs. Readers see records up to the last fsync only.

mod reader;
mod segment;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use protocol::record::{EndBody, GapBody};
use protocol::{Kind, Outcome, Record};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::workspace::is_full;
use crate::workspace::state::Holding;

pub use reader::{Reader, Stored};
use segment::{Scan, Scanner};

/// Bytes that may wait for the disk before [`Spool::room`] makes the producer wait.
const MAX_PENDING: u64 = 32 << 20;

/// How long a spool is read before others have their turn.
const TURN: std::time::Duration = std::time::Duration::from_millis(20);

/// How long the writer may take to end.
const CLOSING: std::time::Duration = std::time::Duration::from_secs(5);

/// What keeps records from the disk.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system said no.
    #[error("failed to {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What it said.
        source: Arc<std::io::Error>,
    },
    /// A value could not be written as JSON.
    #[error("failed to write a record of kind {kind}: {reason}")]
    Encode {
        /// Kind of the record.
        kind: &'static str,
        /// What the encoder said.
        reason: String,
    },
    /// The writer is gone.
    #[error("failed to write to the spool: it was closed")]
    Closed,
    /// Somebody else may be writing.
    #[error("failed to write to the spool: the session's lease is lost, and another runner may be at work")]
    NotOurs,
}

impl SpoolError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source: Arc::new(source),
        }
    }

    /// How an attempt ends that met this.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Io { source, .. } if is_full(source) => Outcome::DiskFull,
            Self::Io { .. } | Self::NotOurs => Outcome::VolumeUnavailable,
            Self::Encode { .. } | Self::Closed => Outcome::RunnerError,
        }
    }
}

/// How far the disk is.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Last seq that is fsynced.
    pub durable: u64,
    /// Bytes handed over, and bytes fsynced, since the spool was opened.
    synced_bytes: u64,
    /// Sums behind the last record that is fsynced.
    sums: Sums,
    /// Why nothing more will be.
    pub failed: Option<SpoolError>,
}

/// Sums over the records of one attempt.
#[derive(Clone, Debug, Default)]
struct Sums {
    attempt: u32,
    last_seq: u64,
    bytes: u64,
    hash: Sha256,
    ended: bool,
}

impl Sums {
    fn add(&mut self, seq: u64, attempt: u32, kind: Kind, bytes: &[u8]) {
        // What was appended again belongs to its old attempt, whose end is written already.
        if attempt < self.attempt {
            return;
        }
        if attempt > self.attempt {
            *self = Self {
                attempt,
                ..Self::default()
            };
        }
        self.last_seq = seq;
        self.ended = kind == Kind::End;
        if !self.ended {
            self.bytes += bytes.len() as u64;
            self.hash.update(bytes);
        }
    }

    fn end(&self, outcome: Outcome) -> EndBody {
        EndBody {
            outcome,
            last_seq: self.last_seq,
            bytes: self.bytes,
            sha256: hex::encode(self.hash.clone().finalize()),
        }
    }
}

/// The spool of a session, open for writing. There is one at a time: the session's lock guards it.
pub struct Spool {
    dir: PathBuf,
    id: String,
    next_seq: u64,
    handed_bytes: u64,
    sums: Sums,
    entries: std_mpsc::Sender<writer::Entry>,
    progress: watch::Receiver<Progress>,
    /// The record for the reserve is with the writer, which meets the full disk once more or ends.
    last_handed: bool,
    holding: Arc<OnceLock<Holding>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Spool {
    /// Opens the spool in `dir`, or makes it there. A torn tail is cut; each intact record is shown to `see` in order.
    pub fn open(dir: &Path, mut see: impl FnMut(&Record)) -> Result<Self, SpoolError> {
        let mut opening = Opening::of(dir)?;
        while opening.next(&mut see)? {}
        opening.finish(dir)
    }

    /// The same, in turns with others: a long spool takes minutes on a slow volume, and a signal is not heard meanwhile.
    pub async fn open_in_turns(dir: &Path, mut see: impl FnMut(&Record)) -> Result<Self, SpoolError> {
        let mut opening = Opening::of(dir)?;
        let mut since = std::time::Instant::now();
        while opening.next(&mut see)? {
            if since.elapsed() >= TURN {
                tokio::task::yield_now().await;
                since = std::time::Instant::now();
            }
        }
        opening.finish(dir)
    }

    /// Has nothing more written once the session's lease is lost, which a runner that stood still learns late.
    pub fn write_while(&self, held: Holding) {
        // There is one lease for the life of a spool.
        let _ = self.holding.set(held);
    }

    /// Random id of the spool.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Seq of the next record.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The last attempt that wrote here (0: none) and whether it wrote its end.
    pub fn last_attempt(&self) -> (u32, bool) {
        (self.sums.attempt, self.sums.ended)
    }

    /// How far the disk is, to wait on.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// A reader of what is durable, from `seq` on.
    pub fn reader(&self, seq: u64) -> Reader {
        Reader::new(self.dir.clone(), seq)
    }

    /// What makes readers, for somebody who outlives a borrow.
    pub fn readers(&self) -> impl Fn(u64) -> Reader + Send + use<> {
        let dir = self.dir.clone();
        move |seq| Reader::new(dir.clone(), seq)
    }

    /// Gives a record its seq and hands it to the writer; it is on disk when [`Spool::durable`] says so.
    pub fn append(&mut self, attempt: u32, turn: u32, kind: Kind, body: Box<RawValue>) -> Result<Record, SpoolError> {
        let ts = Timestamp::now();
        self.put(Record {
            seq: self.next_seq,
            attempt,
            turn,
            ts,
            kind,
            was: None,
            body,
        })
    }

    /// Appends a record of this spool again under a new seq, because its old seq is taken in the gateway's log.
    pub fn append_again(&mut self, record: Record) -> Result<Record, SpoolError> {
        let was = record.was.or(Some(record.seq));
        self.put(Record {
            seq: self.next_seq,
            was,
            ..record
        })
    }

    /// Makes `seq` the least that the next record may have.
    pub fn skip_to(&mut self, seq: u64) {
        self.next_seq = self.next_seq.max(seq);
    }

    /// Writes the end of the last attempt that wrote here: its sums run over that attempt's records so far.
    pub fn append_end(&mut self, turn: u32, outcome: Outcome) -> Result<Record, SpoolError> {
        let full = self.failure().is_some_and(|error| error.outcome() == Outcome::DiskFull);
        if full {
            self.back_to_durable();
        }
        let attempt = self.sums.attempt;
        let record = Record {
            seq: self.next_seq,
            attempt,
            turn,
            ts: Timestamp::now(),
            kind: Kind::End,
            was: None,
            body: raw(Kind::End, &self.sums.end(outcome))?,
        };
        if full {
            self.hand(record, true)
        } else {
            self.put(record)
        }
    }

    fn failure(&self) -> Option<SpoolError> {
        self.progress.borrow().failed.clone()
    }

    /// Forgets what the full disk did not take: the attempt ends behind its last record that is there.
    fn back_to_durable(&mut self) {
        let progress = self.progress.borrow();
        let mut sums = progress.sums.clone();
        if sums.attempt < self.sums.attempt {
            sums = Sums {
                attempt: self.sums.attempt,
                last_seq: progress.durable,
                ..Sums::default()
            };
        }
        self.sums = sums;
        self.next_seq = progress.durable + 1;
    }

    fn put(&mut self, record: Record) -> Result<Record, SpoolError> {
        match self.failure() {
            Some(error) => Err(error),
            None => self.hand(record, false),
        }
    }

    /// Hands a record to the writer; `last`: also on a full disk.
    fn hand(&mut self, record: Record, last: bool) -> Result<Record, SpoolError> {
        let bytes = serde_json::to_vec(&record).map_err(|error| SpoolError::Encode {
            kind: record.kind.as_str(),
            reason: error.to_string(),
        })?;
        self.sums.add(record.seq, record.attempt, record.kind, &bytes);
        self.next_seq = record.seq + 1;
        self.handed_bytes += bytes.len() as u64;
        self.entries
            .send(writer::Entry {
                seq: record.seq,
                bytes,
                sums: self.sums.clone(),
                last,
            })
            .map_err(|_| SpoolError::Closed)?;
        self.last_handed |= last;
        Ok(record)
    }

    /// Waits until `seq` is on disk.
    pub async fn durable(&self, seq: u64) -> Result<(), SpoolError> {
        self.wait(|progress| progress.durable >= seq).await
    }

    /// Waits until the disk has nearly caught up with what it was given, so that memory stays bounded.
    pub async fn room(&self) -> Result<(), SpoolError> {
        let least = self.handed_bytes.saturating_sub(MAX_PENDING);
        self.wait(|progress| progress.synced_bytes >= least).await
    }

    async fn wait(&self, enough: impl Fn(&Progress) -> bool) -> Result<(), SpoolError> {
        let mut progress = self.progress.clone();
        // The failure that the reserve is there for is known; the next one ends the writer.
        let over = |now: &Progress| enough(now) || (now.failed.is_some() && !self.last_handed);
        let writer_lives = progress.wait_for(over).await.is_ok();
        let seen = progress.borrow();
        match &seen.failed {
            _ if enough(&seen) => Ok(()),
            Some(error) => Err(error.clone()),
            None if writer_lives => Ok(()),
            None => Err(SpoolError::Closed),
        }
    }
}

/// A spool whose records are read.
struct Opening {
    scanner: Scanner,
    sums: Sums,
}

impl Opening {
    fn of(dir: &Path) -> Result<Self, SpoolError> {
        std::fs::create_dir_all(dir).map_err(SpoolError::io("create", dir))?;
        Ok(Self {
            scanner: Scanner::of(dir)?,
            sums: Sums::default(),
        })
    }

    /// Shows the next record; `false`: there is none.
    fn next(&mut self, see: &mut impl FnMut(&Record)) -> Result<bool, SpoolError> {
        let Some((record, bytes)) = self.scanner.next()? else {
            return Ok(false);
        };
        self.sums.add(record.seq, record.attempt, record.kind, &bytes);
        see(&record);
        Ok(true)
    }

    fn finish(self, dir: &Path) -> Result<Spool, SpoolError> {
        let Self { scanner, sums } = self;
        let Scan {
            id,
            next_seq,
            segment,
            missing,
        } = scanner.finish()?;
        let (progress_tx, progress) = watch::channel(Progress {
            durable: next_seq - 1,
            sums: sums.clone(),
            ..Progress::default()
        });
        segment::keep_reserve(dir);
        let (entries, queue) = std_mpsc::channel();
        let holding = Arc::default();
        let writer = writer::Writer::new(dir.to_owned(), id.clone(), segment, progress_tx, Arc::clone(&holding));
        let thread = std::thread::Builder::new()
            .name("spool".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(SpoolError::io("start the writer of", dir))?;
        let mut spool = Spool {
            dir: dir.to_owned(),
            id,
            next_seq,
            handed_bytes: 0,
            sums,
            entries,
            progress,
            last_handed: false,
            holding,
            thread: Some(thread),
        };
        for (from, to) in missing {
            let body = GapBody {
                from: Some(from),
                to: Some(to),
                length: None,
            };
            let (attempt, _) = spool.last_attempt();
            spool.append(attempt, 0, Kind::Gap, raw(Kind::Gap, &body)?)?;
        }
        Ok(spool)
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // The writer ends when its queue does; what was handed over is written before that.
        let (gone, _) = std_mpsc::channel();
        self.entries = gone;
        let Some(thread) = self.thread.take() else { return };
        let begun = std::time::Instant::now();
        // A volume that hangs must not keep the process from ending.
        while !thread.is_finished() && begun.elapsed() < CLOSING {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// A body as JSON.
pub fn raw<T: serde::Serialize>(kind: Kind, body: &T) -> Result<Box<RawValue>, SpoolError> {
    serde_json::value::to_raw_value(body).map_err(|error| SpoolError::Encode {
        kind: kind.as_str(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests;
