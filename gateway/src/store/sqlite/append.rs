//! Storing records, in the transaction of the writer.

use jiff::Timestamp;
use rusqlite::{CachedStatement, Connection, OptionalExtension as _, ToSql, Transaction, blob::ZeroBlob, params};

use super::commands;
use crate::store::{Admission, Admitted, Appended, Batch, Epoch, MAX_SEQ, Missing, NewRecord, Progress, State};

/// Records longer than this are written in place.
const LONG: usize = 1 << 20;

pub(super) fn admit(tx: &Transaction<'_>, admission: &Admission) -> rusqlite::Result<Admitted> {
    let Admission {
        session,
        namespace,
        name,
        pod,
        seen,
        heard: _,
    } = admission;
    let found = find(tx, session)?.map(|(_, state)| state).unwrap_or_default();
    if found.epoch != *seen {
        return Ok(Admitted::Outdated);
    }
    let epoch = admission.epoch();
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

pub(super) fn append(tx: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<Appended> {
    let Some((id, mut receipt)) = batch.begin(find(tx, &batch.session)?) else {
        return Ok(Appended::Superseded);
    };
    let before = receipt.progress;
    for (command, answer) in &batch.answers {
        commands::set(tx, &batch.session, command, answer)?;
    }
    let mut bytes = 0;
    // Looked up once: finding a statement takes nearly as long as running it.
    let mut insertion = tx.prepare_cached(
        "INSERT INTO records (key, kind, attempt, turn, ts, checksum, bytes) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO NOTHING",
    )?;
    for record in &batch.records {
        match insert(tx, &mut insertion, id, before.removed, record)? {
            Inserted::New => {
                receipt.new += 1;
                bytes += record.bytes.len();
                receipt.progress.add(&record.head);
            }
            Inserted::Equal => receipt.equal += 1,
            Inserted::Conflict => receipt.conflicts.push(record.head.seq),
        }
    }
    drop(insertion);
    if receipt.progress.has_hole() {
        receipt.more = pass(tx, id, &mut receipt.progress)?;
    }
    let Progress {
        acked,
        last,
        ended,
        removed: _,
    } = receipt.progress;
    if receipt.new > 0 {
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
    } else if acked > before.acked {
        tx.prepare_cached("UPDATE sessions SET acked = ?2 WHERE id = ?1")?
            .execute([id, acked as i64])?;
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

/// See [`Progress::pass`]; what is passed need not be known as missing any more.
fn pass(tx: &Transaction<'_>, id: i64, progress: &mut Progress) -> rusqlite::Result<bool> {
    let before = progress.acked;
    let more = {
        let mut stored = tx.prepare_cached("SELECT key FROM records WHERE key > ?1 AND key <= ?2 ORDER BY key")?;
        let stored = stored.query_map([key(id, before), key(id, progress.last)], |row| row.get(0).map(seq))?;
        let mut missing = tx.prepare_cached("SELECT first, last FROM missing WHERE session = ?1 ORDER BY first")?;
        let missing = missing.query_map([id], |row| {
            let (first, last): (i64, i64) = (row.get(0)?, row.get(1)?);
            Ok(Missing {
                first: first as u64,
                last: last as u64,
            })
        })?;
        progress.pass(stored, missing)?
    };
    if progress.acked > before {
        tx.prepare_cached("DELETE FROM missing WHERE session = ?1 AND first <= ?2 AND last <= ?2")?
            .execute([id, progress.acked as i64])?;
    }
    Ok(more)
}

pub(super) fn find(connection: &Connection, session: &str) -> rusqlite::Result<Option<(i64, State)>> {
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

pub(super) fn key(id: i64, seq: u64) -> i64 {
    id << 32 | seq as i64
}

pub(super) fn seq(key: i64) -> u64 {
    key as u64 & MAX_SEQ
}
