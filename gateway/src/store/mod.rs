//! The event log: every session's records, durable before they are acknowledged.
//!
//! `(session uid, seq)` is unique. An equal resend (same CRC32C and length) is a no-op; other bytes for a stored seq are kept
//! beside it and answered as a conflict. One writer at a time: see [`Admission`].

pub mod commands;
pub mod memory;
pub mod news;
pub mod postgres;
pub mod sqlite;

use std::{collections::HashSet, path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use protocol::{Kind, RecordHead};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// Largest seq: a log has room for four billion records a session.
pub const MAX_SEQ: u64 = u32::MAX as u64;

/// Counts the admissions of a session; a batch is taken only under the newest.
pub type Epoch = u64;

/// What can go wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The log cannot be opened.
    #[error(
        "failed to open the event log {path}: {source}; check that its folder exists and is writable for this process"
    )]
    Open {
        /// File of the log.
        path: PathBuf,
        /// Why.
        source: Arc<rusqlite::Error>,
    },
    /// The log was written by a newer gateway.
    #[error(
        "failed to open the event log {path}: it has the layout {found}, which this gateway does not know; run the newer gateway"
    )]
    TooNew {
        /// File of the log.
        path: PathBuf,
        /// Layout found.
        found: String,
    },
    /// The log's layout cannot be brought up to date.
    #[error("failed to bring the event log {path} to this gateway's layout: {source}; check that its volume has room")]
    Layout {
        /// File of the log.
        path: PathBuf,
        /// Why.
        source: Arc<refinery::Error>,
    },
    /// The log does not keep what it is told to keep.
    #[error(
        "failed to open the event log {path}: the file system refuses {what}; use a volume that supports it (no network file system)"
    )]
    NotDurable {
        /// File of the log.
        path: PathBuf,
        /// Setting that did not take.
        what: &'static str,
    },
    /// A write failed; nothing of it is stored.
    #[error("failed to write to the event log: {0}; check that its volume has room")]
    Write(#[source] Arc<rusqlite::Error>),
    /// A read failed.
    #[error("failed to read the event log: {0}")]
    Read(#[source] Arc<rusqlite::Error>),
    /// PostgreSQL refused or was lost; whether the last write is stored is not known.
    #[error(
        "failed to use the event log in PostgreSQL: {0}; check that the server runs, has room and accepts this account"
    )]
    Database(#[source] Arc<tokio_postgres::Error>),
    /// PostgreSQL does not answer.
    #[error("failed to reach PostgreSQL in time: check that the server of DATABASE_URL runs and can be reached")]
    Silent,
    /// Its address cannot be one. The text is not repeated: it may have a password.
    #[error("failed to understand DATABASE_URL: {0}; give it as postgresql://user:password@host/database")]
    Url(#[source] Arc<tokio_postgres::Error>),
    /// It does not keep what it is told to keep.
    #[error("failed to open the event log in PostgreSQL: the server has fsync off; set `fsync = on`")]
    Fsync,
    /// The database was written by a newer gateway.
    #[error(
        "failed to open the event log in PostgreSQL: it has the layout {0}, which this gateway does not know; run the newer gateway"
    )]
    TooNewDatabase(String),
    /// Its layout cannot be brought up to date.
    #[error(
        "failed to bring the event log in PostgreSQL to this gateway's layout: {0}; the account must own the schema"
    )]
    DatabaseLayout(#[source] Arc<refinery::Error>),
    /// A session did not arrive as it was sent.
    #[error("failed to move session {0} to PostgreSQL: what arrived differs, and was taken back; run the move again")]
    Differs(String),
    /// The log's thread has ended.
    #[error("failed to reach the event log: it has stopped; restart the gateway")]
    Stopped,
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(Arc::new(error))
    }
}

/// A pod asks to be the session's writer.
///
/// The order is: read [`EventLog::state`], read the session's CR live, admit with the epoch of that state. So whoever is
/// admitted last was named by the CR after every earlier admission, however the steps of two pods interleave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// UID of the session.
    pub session: String,
    /// Namespace of the session, for people.
    pub namespace: String,
    /// Name of the session, for people.
    pub name: String,
    /// UID of the pod.
    pub pod: String,
    /// Epoch of the state read before the CR.
    pub seen: Epoch,
}

/// Answer to an admission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// This pod is the writer, under this state's epoch.
    Writer(State),
    /// Somebody was admitted since: begin again.
    Outdated,
}

/// What is known of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Admissions so far; 0 when there was none.
    pub epoch: Epoch,
    /// Spool whose records are the newest stored; `None` when nothing is stored.
    pub spool: Option<String>,
    /// How far the log goes.
    pub progress: Progress,
}

/// How far a session's log goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Last seq without a hole before it, holes that a `gap` record declares apart; 0: none. Readers are shown no more than
    /// this.
    pub acked: u64,
    /// Last seq stored.
    pub last: u64,
    /// Highest attempt whose `end` record is stored; 0: none.
    pub ended: u32,
    /// Records up to this seq were removed to make room, but for `end` records; 0: none.
    pub removed: u64,
}

impl Progress {
    /// The farther of two views of one log.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            acked: self.acked.max(other.acked),
            last: self.last.max(other.last),
            ended: self.ended.max(other.ended),
            removed: self.removed.max(other.removed),
        }
    }

    /// Takes a newly stored record into account. `true`: a hole may have been filled, look at what is stored behind it.
    fn add(&mut self, head: &RecordHead) -> bool {
        self.last = self.last.max(head.seq);
        if head.kind == Kind::End {
            self.ended = self.ended.max(head.attempt);
        }
        if head.seq == self.acked + 1 {
            self.acked = head.seq;
        }
        self.acked < self.last
    }

    /// Moves `acked` over the seqs that follow it, given those stored behind it in order. Whether it moved.
    fn pass_stored<E>(&mut self, stored: impl IntoIterator<Item = Result<u64, E>>) -> Result<bool, E> {
        let before = self.acked;
        for seq in stored {
            if seq? != self.acked + 1 {
                break;
            }
            self.acked += 1;
        }
        Ok(self.acked > before)
    }

    /// Moves `acked` over seqs that will never come, given those said to be missing. Whether it moved.
    fn pass_missing(&mut self, missing: impl IntoIterator<Item = Missing>) -> bool {
        let next = self.acked + 1;
        let around = missing
            .into_iter()
            .filter(|missing| missing.first <= next && next <= missing.last);
        let last = around.map(|missing| missing.last).max();
        self.acked = last.unwrap_or(self.acked);
        last.is_some()
    }
}

/// Seqs that a `gap` record says will never come: acknowledgements pass over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The first.
    pub first: u64,
    /// The last.
    pub last: u64,
}

/// A record on its way into the log.
#[derive(Clone, Debug)]
pub struct NewRecord {
    /// Its fields.
    pub head: RecordHead,
    /// [`protocol::record::checksum`] of its bytes.
    pub checksum: u32,
    /// What it says is missing before it.
    pub missing: Option<Missing>,
    /// Its bytes as the runner spooled them.
    pub bytes: Bytes,
}

/// Records of one writer.
#[derive(Clone, Debug)]
pub struct Batch {
    /// UID of the session.
    pub session: String,
    /// Epoch under which the writer was admitted.
    pub epoch: Epoch,
    /// Spool that the records come from.
    pub spool: String,
    /// The records, ascending.
    pub records: Vec<NewRecord>,
    /// Answers to commands, by id, that the records are; taken together with them.
    pub answers: Vec<(String, commands::Answer)>,
}

/// Answer to a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The batch is on disk.
    Stored(Receipt),
    /// Another writer was admitted: nothing of the batch is stored.
    Superseded,
}

/// What became of a stored batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// How far the log goes now.
    pub progress: Progress,
    /// Records that were new.
    pub new: usize,
    /// Records that were there already, equal.
    pub equal: usize,
    /// Seqs that hold other bytes.
    pub conflicts: Vec<u64>,
}

/// A record as readers get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRecord {
    /// See [`protocol::Record::seq`].
    pub seq: u64,
    /// See [`protocol::Record::kind`].
    pub kind: Kind,
    /// The record itself.
    pub content: Content,
}

impl StoredRecord {
    /// Its bytes, if they were read.
    pub fn whole(&self) -> Option<&Bytes> {
        match &self.content {
            Content::Whole(bytes) => Some(bytes),
            Content::Long(_) => None,
        }
    }
}

/// A record's bytes, or how many there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// All of it.
    Whole(Bytes),
    /// Longer than the page that was asked for: so many bytes, which [`EventLog::piece`] reads one piece at a time.
    Long(usize),
}

impl Content {
    /// Bytes that it takes here.
    pub fn held(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.len(),
            Self::Long(_) => 0,
        }
    }
}

/// Bounds of one read. A record longer than all of it is returned as [`Content::Long`].
#[derive(Clone, Copy, Debug)]
pub struct PageSize {
    /// Records at most.
    pub records: usize,
    /// Bytes at most.
    pub bytes: usize,
}

/// What the log keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Of each session.
    pub sessions: Vec<SessionKept>,
    /// Bytes that the log takes on disk, space that it will use again left out.
    pub disk: u64,
}

/// What the log keeps of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionKept {
    /// UID of the session.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Bytes of its records.
    pub bytes: u64,
    /// When something was stored last, seconds since 1970 by this clock.
    pub touched: i64,
    /// When it was first seen that the session is deleted, seconds since 1970.
    pub gone: Option<i64>,
}

/// What was removed by one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Records.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// There is more to do: take another step.
    pub more: bool,
}

/// Bounds of one step of removal: writers wait meanwhile.
const STEP: PageSize = PageSize {
    records: 1000,
    bytes: 8 << 20,
};

/// A durable log of records.
pub trait EventLog: commands::CommandLog {
    /// What is known of a session; the default for one never seen.
    fn state(&self, session: &str) -> BoxFuture<'static, Result<State, StoreError>>;
    /// Makes a pod the session's writer.
    fn admit(&self, admission: Admission) -> BoxFuture<'static, Result<Admitted, StoreError>>;
    /// Stores records; when it answers `Stored` they survive the death of the process and of the machine.
    fn append(&self, batch: Batch) -> BoxFuture<'static, Result<Appended, StoreError>>;
    /// Records behind `after` in order, none beyond the first hole. Empty: there are none.
    fn read(
        &self,
        session: &str,
        after: u64,
        page: PageSize,
    ) -> BoxFuture<'static, Result<Vec<StoredRecord>, StoreError>>;
    /// At most `length` bytes of a record from `offset` on; none at its end, or when it is not there (any more).
    fn piece(
        &self,
        session: &str,
        seq: u64,
        offset: usize,
        length: usize,
    ) -> BoxFuture<'static, Result<Bytes, StoreError>>;
    /// What is kept.
    fn kept(&self) -> BoxFuture<'static, Result<Kept, StoreError>>;
    /// Notes which sessions are still there; `now` is in seconds since 1970.
    fn note_present(&self, present: HashSet<String>, now: i64) -> BoxFuture<'static, Result<(), StoreError>>;
    /// One step: removes a session's oldest records, `end` records and what is not acknowledged apart, until `bytes` of them
    /// are gone.
    fn trim(&self, session: &str, bytes: u64) -> BoxFuture<'static, Result<Removed, StoreError>>;
    /// One step: removes all that is known of a session.
    fn forget(&self, session: &str) -> BoxFuture<'static, Result<Removed, StoreError>>;
    /// What other gateways on the same log do, for one listener; `None`: there can be none.
    fn news(&self) -> Option<mpsc::Receiver<news::News>> {
        None
    }
    /// Tells other gateways what is in no log.
    fn tell(&self, news: news::News) {
        drop(news);
    }
    /// Whether this gateway is the one that makes room.
    fn removes(&self) -> bool {
        true
    }
    /// How gateways on the same log know each other.
    fn peer(&self) -> Option<&dyn Peer> {
        None
    }
    /// Address of another gateway that the session's runner was last connected to.
    fn elsewhere(&self, session: &str) -> BoxFuture<'static, Result<Option<String>, StoreError>> {
        let _ = session;
        async { Ok(None) }.boxed()
    }
}

/// How gateways on one log know each other.
pub trait Peer: Send + Sync {
    /// What this gateway answers to a question; nobody else can.
    fn answer(&self, question: &str) -> Option<String>;
    /// Whether an answer is that of the gateway at this address.
    fn is_answer(&self, address: &str, question: &str, answer: &str) -> bool;
}

/// Where the log is kept.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// In memory: for tests and trials; acknowledged records die with the process.
    Memory,
    /// In an SQLite file.
    File(PathBuf),
    /// In PostgreSQL, for any number of gateways.
    Database {
        /// The database, which may have a password in it.
        url: String,
        /// Where other gateways find this one.
        address: Option<String>,
    },
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory => write!(f, "memory"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Database { .. } => write!(f, "PostgreSQL"),
        }
    }
}

impl std::str::FromStr for Location {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == ":memory:" {
            Self::Memory
        } else {
            Self::File(PathBuf::from(text))
        })
    }
}

/// Opens the log.
pub async fn open(location: Location) -> Result<Arc<dyn EventLog>, StoreError> {
    Ok(match location {
        Location::Memory => Arc::new(memory::MemoryLog::default()),
        Location::File(path) => Arc::new(sqlite::SqliteLog::open(&path)?),
        Location::Database { url, address } => Arc::new(postgres::PostgresLog::open(&url, address).await?),
    })
}
