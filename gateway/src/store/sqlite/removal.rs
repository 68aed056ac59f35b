//! Making room: in steps, each one transaction, so that writers need not wait long.

use std::collections::HashSet;

use protocol::Kind;
use rusqlite::{Connection, Transaction, params};

use super::append::{find, key, seq};
use crate::store::{Kept, MAX_SEQ, Removed, STEP, SessionKept};

/// What to do.
pub(super) enum Removal {
    Note { present: HashSet<String>, now: i64 },
    Trim { session: String, bytes: u64 },
    Forget { session: String },
}

pub(super) fn step(tx: &Transaction<'_>, removal: &Removal) -> rusqlite::Result<Removed> {
    match removal {
        Removal::Note { present, now } => note(tx, present, *now).map(|()| Removed::default()),
        Removal::Trim { session, bytes } => trim(tx, session, *bytes),
        Removal::Forget { session } => forget(tx, session),
    }
}

pub(super) fn kept(connection: &Connection) -> rusqlite::Result<Kept> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let pages = pragma("page_count")? - pragma("freelist_count")?;
    let mut statement = connection.prepare_cached("SELECT uid, namespace, bytes, touched, gone FROM sessions")?;
    let sessions = statement.query_map([], |row| {
        Ok(SessionKept {
            uid: row.get(0)?,
            namespace: row.get(1)?,
            bytes: row.get::<_, i64>(2)?.max(0) as u64,
            touched: row.get(3)?,
            gone: row.get(4)?,
        })
    })?;
    Ok(Kept {
        sessions: sessions.collect::<Result<_, _>>()?,
        disk: (pages * pragma("page_size")?).max(0) as u64,
    })
}

fn note(tx: &Transaction<'_>, present: &HashSet<String>, now: i64) -> rusqlite::Result<()> {
    let known: Vec<(i64, String, Option<i64>)> = tx
        .prepare_cached("SELECT id, uid, gone FROM sessions")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<Result<_, _>>()?;
    let mut update = tx.prepare_cached("UPDATE sessions SET gone = ?2 WHERE id = ?1")?;
    for (id, uid, gone) in known {
        if present.contains(&uid) == gone.is_some() {
            update.execute(params![id, gone.is_none().then_some(now)])?;
        }
    }
    Ok(())
}

fn trim(tx: &Transaction<'_>, session: &str, bytes: u64) -> rusqlite::Result<Removed> {
    let mut removed = Removed::default();
    let Some((id, state)) = find(tx, session)? else {
        return Ok(removed);
    };
    let (first, last) = (key(id, state.progress.removed), key(id, state.progress.acked));
    let mut reached = first;
    {
        // The length is in a record's header: its bytes are not read.
        let mut statement = tx.prepare_cached(
            "SELECT key, kind, length(bytes) FROM records WHERE key > ?1 AND key <= ?2 ORDER BY key LIMIT ?3",
        )?;
        let mut rows = statement.query([first, last, STEP.records as i64 + 1])?;
        let mut seen = 0;
        while let Some(row) = rows.next()? {
            if removed.bytes >= bytes {
                break;
            }
            if seen == STEP.records || removed.bytes as usize >= STEP.bytes {
                removed.more = true;
                break;
            }
            seen += 1;
            reached = row.get(0)?;
            if row.get_ref(1)?.as_str()? != Kind::End.as_str() {
                removed.records += 1;
                removed.bytes += row.get::<_, i64>(2)? as u64;
            }
        }
    }
    tx.prepare_cached("DELETE FROM records WHERE key > ?1 AND key <= ?2 AND kind <> ?3")?
        .execute(params![first, reached, Kind::End.as_str()])?;
    let conflicts = delete_conflicts(tx, first, reached)?;
    tx.prepare_cached("UPDATE sessions SET removed = ?2, bytes = bytes - ?3 WHERE id = ?1")?
        .execute([id, seq(reached) as i64, removed.bytes as i64 + conflicts])?;
    Ok(removed)
}

fn delete_conflicts(tx: &Transaction<'_>, first: i64, last: i64) -> rusqlite::Result<i64> {
    let bytes = tx
        .prepare_cached("SELECT coalesce(sum(length), 0) FROM conflicts WHERE key > ?1 AND key <= ?2")?
        .query_row([first, last], |row| row.get(0))?;
    tx.prepare_cached("DELETE FROM conflicts WHERE key > ?1 AND key <= ?2")?
        .execute([first, last])?;
    Ok(bytes)
}

fn forget(tx: &Transaction<'_>, session: &str) -> rusqlite::Result<Removed> {
    let mut removed = Removed::default();
    let Some((id, _)) = find(tx, session)? else {
        return Ok(removed);
    };
    let (first, last) = (key(id, 0), key(id, MAX_SEQ));
    let mut reached = last;
    {
        let mut statement =
            tx.prepare_cached("SELECT key, length(bytes) FROM records WHERE key > ?1 AND key <= ?2 ORDER BY key")?;
        let mut rows = statement.query([first, last])?;
        while let Some(row) = rows.next()? {
            if removed.records as usize == STEP.records || removed.bytes as usize >= STEP.bytes {
                removed.more = true;
                break;
            }
            reached = row.get(0)?;
            removed.records += 1;
            removed.bytes += row.get::<_, i64>(1)? as u64;
        }
    }
    let all = if removed.more { reached } else { last };
    tx.prepare_cached("DELETE FROM records WHERE key > ?1 AND key <= ?2")?
        .execute([first, all])?;
    delete_conflicts(tx, first, all)?;
    if !removed.more {
        tx.prepare_cached("DELETE FROM missing WHERE session = ?1")?
            .execute([id])?;
        tx.prepare_cached("DELETE FROM commands WHERE session = ?1")?
            .execute([session])?;
        tx.prepare_cached("DELETE FROM sessions WHERE id = ?1")?.execute([id])?;
    }
    Ok(removed)
}
