//! From an SQLite file into PostgreSQL: each session in one transaction, so that what was begun can be begun again.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::FutureExt as _;
use rusqlite::{Connection as File, Row, params};
use tokio_postgres::Error;

use super::{
    Database,
    append::INSERT,
    pool::{Connection, Pool},
    prepare, text,
};
use crate::store::{MAX_SEQ, STEP, StoreError, sqlite};

/// What was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Sessions.
    pub sessions: u64,
    /// Their records.
    pub records: u64,
    /// Sessions that were there already, and stayed as they were.
    pub known: u64,
}

/// A row of the file's sessions.
struct Session {
    id: i64,
    texts: [String; 4],
    spool: Option<String>,
    numbers: [i64; 8],
    gone: Option<i64>,
}

/// Moves all that is in `file` into the database. No gateway may write to either meanwhile; the file is left as it is.
pub async fn migrate(file: &Path, database: &Database) -> Result<Moved, StoreError> {
    let mut moved = Moved::default();
    if !file.exists() {
        return Ok(moved);
    }
    let read = |source| StoreError::Read(Arc::new(source));
    let (file, _lock) = sqlite::exclusive(file)?;
    let sessions = sessions(&file).map_err(read)?;
    let pool = Pool::new(database)?;
    prepare(&pool).await?;
    let file = Arc::new(Mutex::new(file));
    for session in sessions {
        let (uid, source) = (session.texts[0].clone(), file.clone());
        let copied = pool.transact(move |connection| async move { copy(connection, &source, session).await }.boxed());
        match copied.await? {
            Copied::Records(records) => {
                moved.sessions += 1;
                moved.records += records;
                tracing::info!(session_uid = uid, records, "session moved");
            }
            Copied::Known => moved.known += 1,
            Copied::Failed(source) => return Err(read(source)),
            Copied::Differs => return Err(StoreError::Differs(uid)),
        }
    }
    let source = file.clone();
    let commands = pool.transact(move |connection| async move { commands(connection, &source).await }.boxed());
    commands.await?.map_err(read)?;
    Ok(moved)
}

fn sessions(file: &File) -> rusqlite::Result<Vec<Session>> {
    file.prepare(
        "SELECT id, uid, namespace, name, writer, spool, epoch, acked, last, ended, removed, bytes, created, touched, gone FROM sessions",
    )?
    .query_map([], |row| {
        Ok(Session {
            id: row.get(0)?,
            texts: [row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?],
            spool: row.get(5)?,
            numbers: [
                row.get(6)?,
                row.get(7)?,
                row.get(8)?,
                row.get(9)?,
                row.get(10)?,
                row.get(11)?,
                row.get(12)?,
                row.get(13)?,
            ],
            gone: row.get(14)?,
        })
    })?
    .collect()
}

enum Copied {
    Records(u64),
    /// It was there.
    Known,
    /// The file could not be read: the transaction must not be committed with what came so far.
    Failed(rusqlite::Error),
    /// What arrived is not what was sent.
    Differs,
}

fn locked(file: &Mutex<File>) -> MutexGuard<'_, File> {
    file.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn copy(connection: &mut Connection, file: &Mutex<File>, session: Session) -> Result<Copied, Error> {
    let Session {
        id: from,
        texts: [uid, namespace, name, writer],
        spool,
        numbers: [epoch, acked, last, ended, removed, bytes, created, touched],
        gone,
    } = session;
    let spool = spool.as_deref().map(text);
    let spool = spool.as_deref();
    let insert = "INSERT INTO sessions (uid, namespace, name, writer, spool, epoch, acked, last, ended, removed, bytes, created, touched, gone)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) ON CONFLICT DO NOTHING RETURNING id";
    let row = connection
        .one(
            insert,
            &[
                &uid, &namespace, &name, &writer, &spool, &epoch, &acked, &last, &ended, &removed, &bytes, &created,
                &touched, &gone,
            ],
        )
        .await?;
    let Some(to) = row.map(|row| row.get::<_, i64>(0)) else {
        return Ok(Copied::Known);
    };
    let (mut after, mut count, mut length) = (from << 32, 0, 0);
    loop {
        let page = page(&locked(file), after, from << 32 | MAX_SEQ as i64);
        let page = match page {
            Ok(page) if page.keys.is_empty() => break,
            Ok(page) => page,
            Err(error) => return undone(connection, Copied::Failed(error)).await,
        };
        let seqs: Vec<_> = page.keys.iter().map(|key| key & MAX_SEQ as i64).collect();
        let Page {
            keys,
            kinds,
            attempts,
            turns,
            times,
            checksums,
            bytes,
        } = &page;
        connection
            .all(INSERT, &[&to, &seqs, kinds, attempts, turns, times, checksums, bytes])
            .await?;
        after = keys.last().copied().unwrap_or(after);
        count += keys.len() as i64;
        length += bytes.iter().map(Vec::len).sum::<usize>() as i64;
    }
    let rest = rest(&locked(file), from);
    let (conflicts, missing) = match rest {
        Ok(rest) => rest,
        Err(error) => return undone(connection, Copied::Failed(error)).await,
    };
    for (seq, checksum, length, bytes, received) in &conflicts {
        let insert =
            "INSERT INTO conflicts (session, seq, checksum, length, bytes, received) VALUES ($1, $2, $3, $4, $5, $6)";
        connection
            .change(insert, &[&to, seq, checksum, length, bytes, received])
            .await?;
    }
    for (first, last) in &missing {
        let insert = "INSERT INTO missing (session, first, last) VALUES ($1, $2, $3)";
        connection.change(insert, &[&to, first, last]).await?;
    }
    let check = "SELECT count(*), coalesce(sum(octet_length(bytes)), 0)::bigint FROM records WHERE session = $1";
    let row = connection.one(check, &[&to]).await?;
    if row.is_none_or(|row| (row.get::<_, i64>(0), row.get::<_, i64>(1)) != (count, length)) {
        return undone(connection, Copied::Differs).await;
    }
    Ok(Copied::Records(count as u64))
}

/// Takes back what the transaction has done so far: its commit will be one of nothing.
async fn undone(connection: &mut Connection, outcome: Copied) -> Result<Copied, Error> {
    connection.change("ROLLBACK", &[]).await?;
    Ok(outcome)
}

/// Columns of some records.
#[derive(Default)]
struct Page {
    keys: Vec<i64>,
    kinds: Vec<String>,
    attempts: Vec<i64>,
    turns: Vec<i64>,
    times: Vec<i64>,
    checksums: Vec<i64>,
    bytes: Vec<Vec<u8>>,
}

fn page(file: &File, after: i64, last: i64) -> rusqlite::Result<Page> {
    let mut page = Page::default();
    let mut size = 0;
    let mut statement = file.prepare_cached(
        "SELECT key, kind, attempt, turn, ts, checksum, bytes FROM records WHERE key > ?1 AND key <= ?2 ORDER BY key LIMIT ?3",
    )?;
    let mut rows = statement.query(params![after, last, STEP.records as i64])?;
    while let Some(row) = rows.next()?
        && size < STEP.bytes
    {
        let bytes: Vec<u8> = row.get(6)?;
        size += bytes.len();
        page.keys.push(row.get(0)?);
        page.kinds.push(row.get(1)?);
        page.attempts.push(row.get(2)?);
        page.turns.push(row.get(3)?);
        page.times.push(row.get(4)?);
        page.checksums.push(row.get(5)?);
        page.bytes.push(bytes);
    }
    Ok(page)
}

type Conflict = (i64, i64, i64, Vec<u8>, i64);

/// Conflicts, and what is said to be missing.
type Rest = (Vec<Conflict>, Vec<(i64, i64)>);

fn rest(file: &File, from: i64) -> rusqlite::Result<Rest> {
    let conflict = |row: &Row<'_>| {
        let key: i64 = row.get(0)?;
        Ok((key & MAX_SEQ as i64, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
    };
    let conflicts = file
        .prepare_cached("SELECT key, checksum, length, bytes, received FROM conflicts WHERE key > ?1 AND key <= ?2")?
        .query_map([from << 32, from << 32 | MAX_SEQ as i64], conflict)?
        .collect::<Result<_, _>>()?;
    let missing = file
        .prepare_cached("SELECT first, last FROM missing WHERE session = ?1")?
        .query_map([from], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    Ok((conflicts, missing))
}

/// A row of the file's commands.
struct Kept {
    texts: [String; 7],
    created: i64,
    error: Option<String>,
    seq: Option<i64>,
    answered: Option<i64>,
}

fn kept(file: &File) -> rusqlite::Result<Vec<Kept>> {
    file.prepare(
        "SELECT session, namespace, name, id, frame, asked, state, created, error, seq, answered FROM commands ORDER BY number",
    )?
    .query_map([], |row| {
        Ok(Kept {
            texts: [
                row.get(0)?,
                row.get(1)?,
                row.get(2)?,
                row.get(3)?,
                row.get(4)?,
                row.get(5)?,
                row.get(6)?,
            ],
            created: row.get(7)?,
            error: row.get(8)?,
            seq: row.get(9)?,
            answered: row.get(10)?,
        })
    })?
    .collect()
}

/// Commands in their order.
async fn commands(connection: &mut Connection, file: &Mutex<File>) -> Result<rusqlite::Result<()>, Error> {
    let commands = match kept(&locked(file)) {
        Ok(commands) => commands,
        Err(error) => return Ok(Err(error)),
    };
    for command in &commands {
        let error = command.error.as_deref().map(text);
        let error = error.as_deref();
        let Kept {
            texts: [session, namespace, name, id, frame, asked, state],
            created,
            error: _,
            seq,
            answered,
        } = command;
        let id = text(id);
        let insert =
            "INSERT INTO commands (session, namespace, name, id, frame, asked, state, created, error, seq, answered)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING";
        connection
            .change(
                insert,
                &[
                    session, namespace, name, &&*id, frame, asked, state, created, &error, seq, answered,
                ],
            )
            .await?;
    }
    Ok(Ok(()))
}
