//! What the records of sessions say of their tasks, read on as they grow.

use std::{
    collections::{HashMap, VecDeque},
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{Bytes, BytesMut};
use protocol::Record;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{
    project::tasks::{Event, Tasks},
    store::{Content, EventLog, PageSize, StoreError, StoredRecord},
};

/// Sessions remembered; of others the records are read again.
const REMEMBERED: usize = 256;
/// Records read at once.
const PAGE: PageSize = PageSize {
    records: 512,
    bytes: 256 << 10,
};
/// A record longer than this is passed over: nothing that these APIs show is so long.
const LONGEST: usize = 8 << 20;
/// Bytes of a long record read at once.
const PIECE: usize = 256 << 10;
/// Long records that are held at once, by all who read.
static LONG: Semaphore = Semaphore::const_new(2);

/// A session's tasks, up to a record.
#[derive(Debug, Default)]
pub struct Fold {
    cursor: u64,
    /// Its tasks.
    pub tasks: Tasks,
}

impl Fold {
    /// Reads on to the end of what is stored.
    pub async fn catch_up(&mut self, log: &dyn EventLog, session: &str) -> Result<(), StoreError> {
        loop {
            let page = log.read(session, self.cursor, PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            let last = last.seq;
            for stored in page {
                if let Some(record) = read(log, session, &stored).await? {
                    self.tasks.take(&record);
                }
            }
            self.cursor = last;
        }
    }

    /// Takes the next record. What it is in the newest task.
    pub fn take(&mut self, record: &Record) -> Vec<Event> {
        self.cursor = record.seq;
        self.tasks.take(record)
    }
}

/// What the agent answered to a task, from the log: of the oldest tasks of a session nothing else keeps it.
pub async fn answer(log: &dyn EventLog, session: &str, command: &str) -> Result<Option<String>, StoreError> {
    let (mut tasks, mut cursor) = (Tasks::default(), 0);
    loop {
        let page = log.read(session, cursor, PAGE).await?;
        let Some(last) = page.last() else { return Ok(None) };
        cursor = last.seq;
        for stored in page {
            let Some(record) = read(log, session, &stored).await? else {
                continue;
            };
            tasks.take(&record);
            if let Some(task) = tasks.of(command).filter(|task| task.is_over()) {
                return Ok(task.result.clone());
            }
        }
    }
}

/// A record that was read. Others wait for a long one to be dropped.
#[derive(Debug)]
pub struct Read {
    record: Record,
    _turn: Option<SemaphorePermit<'static>>,
}

impl Deref for Read {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

/// A stored record, unless it is too long or not understood.
pub async fn read(log: &dyn EventLog, session: &str, stored: &StoredRecord) -> Result<Option<Read>, StoreError> {
    let turn = match &stored.content {
        Content::Long(length) if *length <= LONGEST => LONG.acquire().await.ok(),
        _ => None,
    };
    let bytes: Bytes = match &stored.content {
        Content::Whole(bytes) => bytes.clone(),
        Content::Long(length) if *length > LONGEST => return Ok(None),
        Content::Long(length) => {
            let mut whole = BytesMut::with_capacity(*length);
            while whole.len() < *length {
                let piece = log.piece(session, stored.seq, whole.len(), PIECE).await?;
                if piece.is_empty() {
                    return Ok(None);
                }
                whole.extend_from_slice(&piece);
            }
            whole.freeze()
        }
    };
    let record = serde_json::from_slice(&bytes).ok();
    Ok(record.map(|record| Read { record, _turn: turn }))
}

type Shared = Arc<tokio::sync::Mutex<Fold>>;

/// The folds of sessions that were asked for last.
#[derive(Debug, Default)]
pub struct Folds {
    known: Mutex<(HashMap<String, Shared>, VecDeque<String>)>,
}

impl Folds {
    /// That of a session (by UID).
    pub fn of(&self, session: &str) -> Shared {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (folds, order) = &mut *known;
        if let Some(fold) = folds.get(session) {
            return fold.clone();
        }
        if order.len() >= REMEMBERED
            && let Some(oldest) = order.pop_front()
        {
            folds.remove(&oldest);
        }
        let fold = Shared::default();
        folds.insert(session.to_owned(), fold.clone());
        order.push_back(session.to_owned());
        fold
    }
}
