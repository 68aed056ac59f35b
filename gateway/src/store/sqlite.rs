//! The event log in an SQLite file: one writer thread that commits what has gathered while the last commit synced.

mod append;
mod ballast;
mod commands;
mod lock;
mod open;
mod read;
mod removal;

use std::{
    collections::HashSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use self::{
    append::{admit, append, find},
    ballast::Ballast,
    lock::Lock,
    read::{Readers, piece, read},
    removal::Removal,
};
use super::{
    Admission, Admitted, Appended, Batch, EventLog, Kept, PageSize, Removed, STEP, State, StoreError, StoredRecord,
};

/// Bounds of one commit.
const MAX_COMMIT_JOBS: usize = 512;
const MAX_COMMIT_BYTES: usize = 16 << 20;
/// Batches that may wait for the writer; each connection has at most one under way.
const QUEUE: usize = 1024;

enum Job {
    Admit(Task<Admission, Admitted>),
    Append(Task<Batch, Appended>),
    Remove(Task<Removal, Removed>),
    Command(Task<commands::Write, commands::Written>),
}

/// A write and its answer, which is given when its transaction is on disk.
struct Task<I, O> {
    input: I,
    output: Option<O>,
    reply: oneshot::Sender<Result<O, StoreError>>,
}

/// A connection to the file that nobody can write to meanwhile.
pub(super) fn exclusive(path: &Path) -> Result<(Connection, Lock), StoreError> {
    let lock = Lock::take(path)?;
    let connection = open::writer(path)?;
    connection
        .execute_batch("BEGIN IMMEDIATE")
        .map_err(|source| StoreError::Open {
            path: path.to_owned(),
            source: Arc::new(source),
        })?;
    Ok((connection, lock))
}

/// Keeps records in an SQLite file.
#[derive(Debug)]
pub struct SqliteLog {
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    readers: Arc<Readers>,
    full: Arc<AtomicBool>,
    _lock: Lock,
}

/// What the thread that writes has.
struct Writer {
    connection: Connection,
    ballast: Ballast,
    /// The volume took nothing more.
    full: Arc<AtomicBool>,
}

impl SqliteLog {
    /// Opens the file, creating it when there is none.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let lock = Lock::take(path)?;
        let ballast = Ballast::beside(path);
        let connection = match open::writer(path) {
            // To open it takes room too.
            Err(_) if ballast.drop_it() => open::writer(path)?,
            opened => opened?,
        };
        let mut writer = Writer {
            connection,
            ballast,
            full: Arc::default(),
        };
        writer.ballast.lay();
        let full = writer.full.clone();
        let (jobs, mut queue) = mpsc::channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("event-log".to_owned())
            .spawn(move || {
                while let Some(first) = queue.blocking_recv() {
                    writer.commit(gather(first, &mut queue));
                }
            })
            .map_err(|_| StoreError::Stopped)?;
        Ok(Self {
            jobs: Some(jobs),
            writer: Some(thread),
            readers: Readers::new(path),
            full,
            _lock: lock,
        })
    }

    fn submit<I, O: Send + 'static>(
        &self,
        input: I,
        job: impl FnOnce(Task<I, O>) -> Job,
    ) -> BoxFuture<'static, Result<O, StoreError>> {
        let (reply, answer) = oneshot::channel();
        let output = None;
        let (jobs, job) = (self.jobs.clone(), job(Task { input, output, reply }));
        async move {
            jobs.ok_or(StoreError::Stopped)?
                .send(job)
                .await
                .map_err(|_| StoreError::Stopped)?;
            answer.await.map_err(|_| StoreError::Stopped)?
        }
        .boxed()
    }

    fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        self.readers.clone().query(query).boxed()
    }
}

impl Drop for SqliteLog {
    fn drop(&mut self) {
        // The thread commits and answers what is queued, then ends.
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl EventLog for SqliteLog {
    fn state(&self, session: &str) -> BoxFuture<'static, Result<State, StoreError>> {
        let session = session.to_owned();
        self.query(move |connection| Ok(find(connection, &session)?.map(|(_, state)| state).unwrap_or_default()))
    }

    fn admit(&self, admission: Admission) -> BoxFuture<'static, Result<Admitted, StoreError>> {
        self.submit(admission, Job::Admit)
    }

    fn append(&self, batch: Batch) -> BoxFuture<'static, Result<Appended, StoreError>> {
        self.submit(batch, Job::Append)
    }

    fn read(
        &self,
        session: &str,
        after: u64,
        page: PageSize,
    ) -> BoxFuture<'static, Result<Vec<StoredRecord>, StoreError>> {
        let session = session.to_owned();
        self.query(move |connection| read(connection, &session, after, page))
    }

    fn piece(
        &self,
        session: &str,
        seq: u64,
        offset: usize,
        length: usize,
    ) -> BoxFuture<'static, Result<Bytes, StoreError>> {
        let session = session.to_owned();
        self.query(move |connection| piece(connection, &session, seq, offset, length))
    }

    fn kept(&self) -> BoxFuture<'static, Result<Kept, StoreError>> {
        self.query(removal::kept)
    }

    fn note_present(&self, present: HashSet<String>, now: i64) -> BoxFuture<'static, Result<(), StoreError>> {
        let done = self.submit(Removal::Note { present, now }, Job::Remove);
        async { done.await.map(drop) }.boxed()
    }

    fn trim(&self, session: &str, bytes: u64) -> BoxFuture<'static, Result<Removed, StoreError>> {
        let session = session.to_owned();
        self.submit(Removal::Trim { session, bytes }, Job::Remove)
    }

    fn forget(&self, session: &str) -> BoxFuture<'static, Result<Removed, StoreError>> {
        let session = session.to_owned();
        self.submit(Removal::Forget { session }, Job::Remove)
    }

    fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }
}

fn gather(first: Job, queue: &mut mpsc::Receiver<Job>) -> Vec<Job> {
    let mut bytes = first.bytes();
    let mut jobs = vec![first];
    while jobs.len() < MAX_COMMIT_JOBS && bytes < MAX_COMMIT_BYTES {
        let Ok(job) = queue.try_recv() else { break };
        bytes += job.bytes();
        jobs.push(job);
    }
    jobs
}

impl Writer {
    /// All jobs in one transaction, answered after its commit; if anything fails nothing of it is stored and all are told so.
    fn commit(&mut self, mut jobs: Vec<Job>) {
        let mut outcome = commit_all(&mut self.connection, &mut jobs);
        let removes = jobs.iter().any(|job| matches!(job, Job::Remove(_)));
        if outcome.as_ref().is_err_and(is_full) {
            outcome = self.on_a_full_volume(&mut jobs);
        }
        if removes && outcome.as_ref().is_err_and(is_full) && self.ballast.drop_it() {
            tracing::warn!("the event log's volume is full: room that was kept is used to remove records");
            outcome = self.on_a_full_volume(&mut jobs);
        }
        match &outcome {
            Ok(()) => {
                let stores = jobs.iter().any(|job| matches!(job, Job::Append(_)));
                if stores && self.full.swap(false, Ordering::Relaxed) {
                    tracing::info!("the event log's volume has room again");
                }
                if removes {
                    self.ballast.lay();
                }
            }
            Err(error) if is_full(error) => {
                if !self.full.swap(true, Ordering::Relaxed) {
                    tracing::error!(
                        "the event log's volume is full: nothing is stored until records are removed (--retention-size) or it is larger"
                    );
                }
            }
            Err(_) => {}
        }
        let outcome = outcome.map_err(|source| StoreError::Write(Arc::new(source)));
        for job in jobs {
            match job {
                Job::Admit(task) => task.answer(&outcome),
                Job::Append(task) => task.answer(&outcome),
                Job::Remove(task) => task.answer(&outcome),
                Job::Command(task) => task.answer(&outcome),
            }
        }
    }

    /// Tries once more when what was written before is in the file itself, which may have pages that are free.
    fn on_a_full_volume(&mut self, jobs: &mut [Job]) -> rusqlite::Result<()> {
        // What cannot be moved stays where it is.
        let _ = self
            .connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        commit_all(&mut self.connection, jobs)
    }
}

fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DiskFull)
}

fn commit_all(connection: &mut Connection, jobs: &mut [Job]) -> rusqlite::Result<()> {
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for job in jobs {
        match job {
            Job::Admit(task) => task.output = Some(admit(&tx, &task.input)?),
            Job::Append(task) => task.output = Some(append(&tx, &task.input)?),
            Job::Remove(task) => task.output = Some(removal::step(&tx, &task.input)?),
            Job::Command(task) => task.run(&tx)?,
        }
    }
    tx.commit()
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Admit(_) => 0,
            Self::Command(task) => task.input.bytes(),
            // A commit of its own, as far as the bounds go.
            Self::Remove(_) => STEP.bytes,
            Self::Append(task) => task.input.records.iter().map(|record| record.bytes.len()).sum(),
        }
    }
}

impl<I, O> Task<I, O> {
    fn answer(self, outcome: &Result<(), StoreError>) {
        let answer = match outcome {
            Ok(()) => self.output.ok_or(StoreError::Stopped),
            Err(error) => Err(error.clone()),
        };
        // Nobody waits: the connection is gone. What is stored is found by its next one.
        let _ = self.reply.send(answer);
    }
}
