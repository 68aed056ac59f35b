//! The event log: every session's records, durable before they are acknowledged.
//!
//! `(session uid, seq)` is unique. An equal resend (same CRC32C and length) is a no-op; other bytes for a stored seq are kept
//! beside it and answered as a conflict. One writer at a time: see [`Admission`].

pub mod commands;
mod error;
mod location;
pub mod memory;
pub mod news;
pub mod postgres;
mod progress;
pub mod sqlite;

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use protocol::{Kind, RecordHead};
use tokio::sync::mpsc;

use crate::room::Taken;

pub use self::{
    error::StoreError,
    location::{Location, open},
    progress::{Missing, Progress},
};

/// Largest seq: a log has room for four billion records a session.
pub const MAX_SEQ: u64 = u32::MAX as u64;

/// Counts the admissions of a session; a batch is taken only under the newest.
pub type Epoch = u64;

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
    /// Newest epoch that this gateway has heard of: higher than that of a database of which an older copy was put back. What was
    /// admitted then is not to be taken for what is admitted now.
    pub heard: Epoch,
}

impl Admission {
    /// The epoch that it begins.
    fn epoch(&self) -> Epoch {
        self.seen.max(self.heard) + 1
    }
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

impl Batch {
    /// What storing it begins with; `None`: its writer is none any more.
    fn begin(&self, found: Option<(i64, State)>) -> Option<(i64, Receipt)> {
        let (id, State { epoch, progress, .. }) = found?;
        let receipt = Receipt {
            progress,
            ..Receipt::default()
        };
        (epoch == self.epoch).then_some((id, receipt))
    }
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
    /// The log goes farther than it is said to: an empty batch says how far.
    pub more: bool,
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

    /// Makes its bytes hold the room that was taken for them.
    #[must_use]
    pub fn in_room(self, room: &Arc<Taken>) -> Self {
        let content = match self.content {
            Content::Whole(bytes) => Content::Whole(room.hold(bytes)),
            long @ Content::Long(_) => long,
        };
        Self { content, ..self }
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
    /// Whether its last write found no room.
    fn is_full(&self) -> bool {
        false
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
    /// Waits until none of the gateways on the same log has this to itself, and takes it: until the answer is dropped.
    fn alone(&self, of: &str) -> BoxFuture<'static, Result<Alone, StoreError>> {
        let _ = of;
        async { Ok(Alone::default()) }.boxed()
    }
    /// Address of another gateway that the session's runner was last connected to.
    fn elsewhere(&self, session: &str) -> BoxFuture<'static, Result<Option<String>, StoreError>> {
        let _ = session;
        async { Ok(None) }.boxed()
    }
}

/// What one of several gateways on a log does while the others wait; over when it is dropped. Where there are no others: nothing.
#[derive(Default)]
pub struct Alone(#[expect(dead_code, reason = "its drop lets the others go on")] Option<Box<dyn Send + Sync>>);

/// How gateways on one log know each other.
pub trait Peer: Send + Sync {
    /// What this gateway answers to a question; nobody else can.
    fn answer(&self, question: &str) -> Option<String>;
    /// Whether an answer is that of the gateway at this address.
    fn is_answer(&self, address: &str, question: &str, answer: &str) -> bool;
}
