//! Making room: in steps, each one transaction, so that writers need not wait long.

use std::collections::HashSet;

use protocol::Kind;
use tokio_postgres::Error;

use super::{append::lock, pool::Connection};
use crate::store::{Kept, MAX_SEQ, Removed, STEP, SessionKept};

pub(super) async fn kept(connection: &mut Connection) -> Result<Kept, Error> {
    let select = "SELECT uid, namespace, bytes, touched, gone FROM sessions";
    let rows = connection.all(select, &[]).await?;
    let sessions: Vec<_> = rows
        .iter()
        .map(|row| SessionKept {
            uid: row.get(0),
            namespace: row.get(1),
            bytes: row.get::<_, i64>(2).max(0) as u64,
            touched: row.get(3),
            gone: row.get(4),
        })
        .collect();
    Ok(Kept {
        // What is deleted is used again only after a vacuum, so the files do not say how much is kept.
        disk: sessions.iter().map(|session| session.bytes).sum(),
        sessions,
    })
}

pub(super) async fn note(connection: &mut Connection, present: &HashSet<String>, now: i64) -> Result<(), Error> {
    let present: Vec<_> = present.iter().collect();
    let update = "UPDATE sessions SET gone = CASE WHEN gone IS NULL THEN $2::bigint END WHERE (uid = ANY($1)) = (gone IS NOT NULL)";
    connection.change(update, &[&present, &now]).await.map(drop)
}

pub(super) async fn trim(connection: &mut Connection, session: &str, bytes: u64) -> Result<Removed, Error> {
    let mut removed = Removed::default();
    let Some((id, state)) = lock(connection, session).await? else {
        return Ok(removed);
    };
    let (first, last) = (state.progress.removed as i64, state.progress.acked as i64);
    let select = "SELECT seq, kind, octet_length(bytes)::bigint FROM records WHERE session = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4";
    let rows = connection
        .all(select, &[&id, &first, &last, &(STEP.records as i64 + 1)])
        .await?;
    let mut reached = first;
    for (seen, row) in rows.iter().enumerate() {
        if removed.bytes >= bytes {
            break;
        }
        if seen == STEP.records || removed.bytes as usize >= STEP.bytes {
            removed.more = true;
            break;
        }
        reached = row.get(0);
        if row.get::<_, &str>(1) != Kind::End.as_str() {
            removed.records += 1;
            removed.bytes += row.get::<_, i64>(2) as u64;
        }
    }
    let delete = "DELETE FROM records WHERE session = $1 AND seq > $2 AND seq <= $3 AND kind <> $4";
    connection
        .change(delete, &[&id, &first, &reached, &Kind::End.as_str()])
        .await?;
    let conflicts = delete_conflicts(connection, id, first, reached).await?;
    let update = "UPDATE sessions SET removed = $2, bytes = bytes - $3 WHERE id = $1";
    connection
        .change(update, &[&id, &reached, &(removed.bytes as i64 + conflicts)])
        .await?;
    Ok(removed)
}

async fn delete_conflicts(connection: &mut Connection, id: i64, first: i64, last: i64) -> Result<i64, Error> {
    let delete = "WITH gone AS (DELETE FROM conflicts WHERE session = $1 AND seq > $2 AND seq <= $3 RETURNING length)
        SELECT coalesce(sum(length), 0)::bigint FROM gone";
    let row = connection.one(delete, &[&id, &first, &last]).await?;
    Ok(row.map_or(0, |row| row.get(0)))
}

pub(super) async fn forget(connection: &mut Connection, session: &str) -> Result<Removed, Error> {
    let mut removed = Removed::default();
    let Some((id, _)) = lock(connection, session).await? else {
        return Ok(removed);
    };
    let select = "SELECT seq, octet_length(bytes)::bigint FROM records WHERE session = $1 ORDER BY seq LIMIT $2";
    let rows = connection.all(select, &[&id, &(STEP.records as i64 + 1)]).await?;
    let mut reached = MAX_SEQ as i64;
    for row in &rows {
        if removed.records as usize == STEP.records || removed.bytes as usize >= STEP.bytes {
            removed.more = true;
            break;
        }
        reached = row.get(0);
        removed.records += 1;
        removed.bytes += row.get::<_, i64>(1) as u64;
    }
    let all = if removed.more { reached } else { MAX_SEQ as i64 };
    connection
        .change("DELETE FROM records WHERE session = $1 AND seq <= $2", &[&id, &all])
        .await?;
    delete_conflicts(connection, id, 0, all).await?;
    if !removed.more {
        connection
            .change("DELETE FROM missing WHERE session = $1", &[&id])
            .await?;
        connection
            .change("DELETE FROM commands WHERE session = $1", &[&session])
            .await?;
        connection.change("DELETE FROM sessions WHERE id = $1", &[&id]).await?;
    }
    Ok(removed)
}
