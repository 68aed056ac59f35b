//! The event log in an SQLite file: one writer thread that commits what has gathered while the last commit synced.

mod commands;
mod open;
mod removal;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use protocol::Kind;
use rusqlite::{
    CachedStatement, Connection, OptionalExtension as _, ToSql, Transaction, TransactionBehavior, blob::ZeroBlob,
    params,
};
use serde::de::{IntoDeserializer as _, value::Error as NameError};
use tokio::sync::{Semaphore, mpsc, oneshot};

use removal::Removal;

use super::{
    Admission, Admitted, Appended, Batch, Content, Epoch, EventLog, Kept, MAX_SEQ, Missing, NewRecord, PageSize,
    Progress, Receipt, Removed, STEP, State, StoreError, StoredRecord,
};

/// Bounds of one commit.
const MAX_COMMIT_JOBS: usize = 512;
const MAX_COMMIT_BYTES: usize = 16 << 20;
/// Records longer than this are written in place.
const LONG: usize = 1 << 20;
/// Batches that may wait for the writer; each connection has at most one under way.
const QUEUE: usize = 1024;
/// Reads at once; each has a connection with a page cache of its own.
const READERS: usize = 8;

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
pub(super) fn exclusive(path: &Path) -> Result<Connection, StoreError> {
    let connection = open::writer(path)?;
    connection
        .execute_batch("BEGIN IMMEDIATE")
        .map_err(|source| StoreError::Open {
            path: path.to_owned(),
            source: Arc::new(source),
        })?;
    Ok(connection)
}

/// Keeps records in an SQLite file.
#[derive(Debug)]
pub struct SqliteLog {
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    readers: Arc<Readers>,
}

#[derive(Debug)]
struct Readers {
    path: PathBuf,
    places: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

impl SqliteLog {
    /// Opens the file, creating it when there is none.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut connection = open::writer(path)?;
        let (jobs, mut queue) = mpsc::channel(QUEUE);
        let writer = std::thread::Builder::new()
            .name("event-log".to_owned())
            .spawn(move || {
                while let Some(first) = queue.blocking_recv() {
                    commit(&mut connection, gather(first, &mut queue));
                }
            })
            .map_err(|_| StoreError::Stopped)?;
        Ok(Self {
            jobs: Some(jobs),
            writer: Some(writer),
            readers: Arc::new(Readers {
                path: path.to_owned(),
                places: Semaphore::new(READERS),
                idle: Mutex::default(),
            }),
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
        let readers = self.readers.clone();
        async move {
            // In a task of its own: whoever asks may not be polled for long (a client that does not read), and a place that
            // is given to it would be nobody's.
            let answer = tokio::spawn(async move {
                let run = readers.clone();
                let _place = readers.places.acquire().await.map_err(|_| StoreError::Stopped)?;
                tokio::task::spawn_blocking(move || run.run(query))
                    .await
                    .map_err(|_| StoreError::Stopped)?
            });
            answer.await.map_err(|_| StoreError::Stopped)?
        }
        .boxed()
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
}

impl Readers {
    fn run<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        let failed = |source| StoreError::Read(Arc::new(source));
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => open::reader(&self.path).map_err(failed)?,
        };
        // A connection that failed is not used again.
        let answer = query(&connection).map_err(failed)?;
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
        Ok(answer)
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

/// All jobs in one transaction, answered after its commit; if anything fails nothing of it is stored and all are told so.
fn commit(connection: &mut Connection, mut jobs: Vec<Job>) {
    let outcome = commit_all(connection, &mut jobs).map_err(|source| StoreError::Write(Arc::new(source)));
    for job in jobs {
        match job {
            Job::Admit(task) => task.answer(&outcome),
            Job::Append(task) => task.answer(&outcome),
            Job::Remove(task) => task.answer(&outcome),
            Job::Command(task) => task.answer(&outcome),
        }
    }
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

fn admit(tx: &Transaction<'_>, admission: &Admission) -> rusqlite::Result<Admitted> {
    let Admission {
        session,
        namespace,
        name,
        pod,
        seen,
    } = admission;
    let found = find(tx, session)?.map(|(_, state)| state).unwrap_or_default();
    if found.epoch != *seen {
        return Ok(Admitted::Outdated);
    }
    let epoch = seen + 1;
    tx.prepare_cached(
        "INSERT INTO sessions (uid, namespace, name, writer, epoch, created) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (uid) DO UPDATE SET writer = excluded.writer, epoch = excluded.epoch",
    )?
    .execute(params![
        session,
        namespace,
        name,
        pod,
        epoch as i64,
        Timestamp::now().as_second()
    ])?;
    Ok(Admitted::Writer(State { epoch, ..found }))
}

fn append(tx: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<Appended> {
    let Some((id, state)) = find(tx, &batch.session)? else {
        return Ok(Appended::Superseded);
    };
    if state.epoch != batch.epoch {
        return Ok(Appended::Superseded);
    }
    let mut receipt = Receipt {
        progress: state.progress,
        ..Receipt::default()
    };
    for (command, answer) in &batch.answers {
        commands::set(tx, &batch.session, command, answer)?;
    }
    let (mut holes, mut bytes) = (false, 0);
    // Looked up once: finding a statement takes nearly as long as running it.
    let mut insertion = tx.prepare_cached(
        "INSERT INTO records (key, kind, attempt, turn, ts, checksum, bytes) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO NOTHING",
    )?;
    for record in &batch.records {
        match insert(tx, &mut insertion, id, receipt.progress.removed, record)? {
            Inserted::New => {
                receipt.new += 1;
                bytes += record.bytes.len();
                holes = receipt.progress.add(&record.head);
            }
            Inserted::Equal => receipt.equal += 1,
            Inserted::Conflict => receipt.conflicts.push(record.head.seq),
        }
    }
    drop(insertion);
    if holes {
        close_holes(tx, id, &mut receipt.progress)?;
    }
    if receipt.new > 0 {
        let Progress {
            acked,
            last,
            ended,
            removed: _,
        } = receipt.progress;
        tx.prepare_cached(
            "UPDATE sessions SET spool = ?2, acked = ?3, last = ?4, ended = ?5, bytes = bytes + ?6, touched = ?7 WHERE id = ?1",
        )?
        .execute(params![
            id,
            batch.spool,
            acked as i64,
            last as i64,
            ended,
            bytes as i64,
            Timestamp::now().as_second()
        ])?;
    }
    Ok(Appended::Stored(receipt))
}

enum Inserted {
    New,
    Equal,
    Conflict,
}

fn insert(
    tx: &Transaction<'_>,
    insertion: &mut CachedStatement<'_>,
    id: i64,
    removed: u64,
    record: &NewRecord,
) -> rusqlite::Result<Inserted> {
    let NewRecord {
        head,
        checksum,
        missing,
        bytes,
    } = record;
    let key = key(id, head.seq);
    if head.seq <= removed && !is_there(tx, key)? {
        // It was there, and was removed.
        return Ok(Inserted::Equal);
    }
    let long = bytes.len() > LONG;
    let content: &dyn ToSql = if long {
        &ZeroBlob(bytes.len() as i32)
    } else {
        &&bytes[..]
    };
    let inserted = insertion.execute(params![
        key,
        head.kind.as_str(),
        head.attempt,
        head.turn,
        head.ts.as_millisecond(),
        checksum,
        content
    ])?;
    if inserted == 1 {
        if long {
            // In place, where a parameter would be copied twice.
            tx.blob_open("main", "records", "bytes", key, false)?
                .write_at(bytes, 0)?;
        }
        if let Some(Missing { first, last }) = missing {
            tx.prepare_cached("INSERT INTO missing (session, first, last) VALUES (?1, ?2, ?3)")?
                .execute([id, *first as i64, *last as i64])?;
        }
        return Ok(Inserted::New);
    }
    let stored: (u32, i64) = tx
        .prepare_cached("SELECT checksum, length(bytes) FROM records WHERE key = ?1")?
        .query_row([key], |row| Ok((row.get(0)?, row.get(1)?)))?;
    if stored == (*checksum, bytes.len() as i64) {
        return Ok(Inserted::Equal);
    }
    let kept = tx.prepare_cached(
        "INSERT INTO conflicts (key, checksum, length, bytes, received) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
    )?
    .execute(params![key, checksum, bytes.len() as i64, &bytes[..], Timestamp::now().as_second()])?;
    if kept == 1 {
        tx.prepare_cached("UPDATE sessions SET bytes = bytes + ?2 WHERE id = ?1")?
            .execute([id, bytes.len() as i64])?;
    }
    Ok(Inserted::Conflict)
}

fn is_there(tx: &Transaction<'_>, key: i64) -> rusqlite::Result<bool> {
    tx.prepare_cached("SELECT 1 FROM records WHERE key = ?1")?.exists([key])
}

fn close_holes(tx: &Transaction<'_>, id: i64, progress: &mut Progress) -> rusqlite::Result<()> {
    let mut statement = tx.prepare_cached("SELECT key FROM records WHERE key > ?1 AND key <= ?2 ORDER BY key")?;
    let mut missing = tx.prepare_cached("SELECT first, last FROM missing WHERE session = ?1")?;
    let missing: Vec<Missing> = missing
        .query_map([id], |row| {
            let (first, last): (i64, i64) = (row.get(0)?, row.get(1)?);
            Ok(Missing {
                first: first as u64,
                last: last as u64,
            })
        })?
        .collect::<Result<_, _>>()?;
    loop {
        let range = [key(id, progress.acked), key(id, progress.last)];
        let moved = progress.pass_stored(statement.query_map(range, |row| row.get(0).map(seq))?)?;
        if !progress.pass_missing(missing.iter().copied()) && !moved {
            return Ok(());
        }
    }
}

fn find(connection: &Connection, session: &str) -> rusqlite::Result<Option<(i64, State)>> {
    connection
        .prepare_cached("SELECT id, epoch, spool, acked, last, ended, removed FROM sessions WHERE uid = ?1")?
        .query_row([session], |row| {
            let state = State {
                epoch: row.get::<_, i64>(1)? as Epoch,
                spool: row.get(2)?,
                progress: Progress {
                    acked: row.get::<_, i64>(3)? as u64,
                    last: row.get::<_, i64>(4)? as u64,
                    ended: row.get(5)?,
                    removed: row.get::<_, i64>(6)? as u64,
                },
            };
            Ok((row.get(0)?, state))
        })
        .optional()
}

fn read(connection: &Connection, session: &str, after: u64, page: PageSize) -> rusqlite::Result<Vec<StoredRecord>> {
    let Some((id, state)) = find(connection, session)? else {
        return Ok(Vec::new());
    };
    // A column is read when it is asked for: of a long record only the length, from its header.
    let mut statement = connection.prepare_cached(
        "SELECT key, kind, length(bytes), iif(length(bytes) <= ?4, bytes, NULL) FROM records
         WHERE key > ?1 AND key <= ?2 ORDER BY key LIMIT ?3",
    )?;
    let (first, last) = (key(id, after.min(MAX_SEQ)), key(id, state.progress.acked));
    let mut rows = statement.query(params![first, last, page.records as i64, page.bytes as i64])?;
    let (mut records, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let content = match row.get_ref(3)?.as_blob_or_null()? {
            Some(record) => {
                bytes += record.len();
                if bytes > page.bytes {
                    break;
                }
                Content::Whole(Bytes::copy_from_slice(record))
            }
            None => Content::Long(row.get::<_, i64>(2)? as usize),
        };
        records.push(StoredRecord {
            seq: seq(row.get(0)?),
            kind: kind(row.get_ref(1)?.as_str()?)?,
            content,
        });
    }
    Ok(records)
}

fn piece(connection: &Connection, session: &str, seq: u64, offset: usize, length: usize) -> rusqlite::Result<Bytes> {
    let Some((id, _)) = find(connection, session)? else {
        return Ok(Bytes::new());
    };
    let blob = match connection.blob_open("main", "records", "bytes", key(id, seq), true) {
        Ok(blob) => blob,
        // What it says when there is no such row (any more).
        Err(rusqlite::Error::SqliteFailure(error, _)) if error.code == rusqlite::ErrorCode::Unknown => {
            return Ok(Bytes::new());
        }
        Err(error) => return Err(error),
    };
    let mut piece = vec![0; length.min(blob.len().saturating_sub(offset))];
    blob.read_at_exact(&mut piece, offset)?;
    Ok(piece.into())
}

fn key(id: i64, seq: u64) -> i64 {
    id << 32 | seq as i64
}

fn seq(key: i64) -> u64 {
    key as u64 & MAX_SEQ
}

fn kind(name: &str) -> rusqlite::Result<Kind> {
    let kind: Result<Kind, NameError> = serde::Deserialize::deserialize(name.into_deserializer());
    kind.map_err(|error| rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, Box::new(error)))
}
