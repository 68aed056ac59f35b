//! Storing records, in one transaction that holds the session's row: its writers take turns, whichever gateway they are at.

use std::collections::HashMap;

use jiff::Timestamp;
use tokio_postgres::{Error, Row};

use super::{commands, pool::Connection, text};
use crate::store::{
    Admission, Admitted, Appended, Batch, Epoch, Missing, NewRecord, Progress, Receipt, State, progress::PASSED,
};

/// Rows looked at first behind a hole; each further look is at so many times as many.
const LOOK: i64 = 16;

/// Columns of records as arrays; the seqs that were new.
pub(super) const INSERT: &str = "INSERT INTO records (session, seq, kind, attempt, turn, ts, checksum, bytes)
    SELECT $1, * FROM unnest($2::bigint[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bytea[])
    ON CONFLICT DO NOTHING RETURNING seq";
const FIND: &str = "SELECT id, epoch, spool, acked, last, ended, removed FROM sessions WHERE uid = $1";
const LOCK: &str = "SELECT id, epoch, spool, acked, last, ended, removed FROM sessions WHERE uid = $1 FOR UPDATE";

fn state(row: &Row) -> (i64, State) {
    let number = |column| row.get::<_, i64>(column) as u64;
    let state = State {
        epoch: number(1) as Epoch,
        spool: row.get(2),
        progress: Progress {
            acked: number(3),
            last: number(4),
            ended: number(5) as u32,
            removed: number(6),
        },
    };
    (row.get(0), state)
}

pub(super) async fn find(connection: &mut Connection, session: &str) -> Result<Option<(i64, State)>, Error> {
    Ok(connection.one(FIND, &[&session]).await?.as_ref().map(state))
}

/// Like [`find`], and nobody else changes it until the transaction's end.
pub(super) async fn lock(connection: &mut Connection, session: &str) -> Result<Option<(i64, State)>, Error> {
    Ok(connection.one(LOCK, &[&session]).await?.as_ref().map(state))
}

pub(super) async fn admit(
    connection: &mut Connection,
    admission: &Admission,
    gateway: Option<&str>,
) -> Result<Admitted, Error> {
    let Admission {
        session,
        namespace,
        name,
        pod,
        seen,
        heard: _,
    } = admission;
    let now = Timestamp::now().as_second();
    if *seen == 0 {
        let insert = "INSERT INTO sessions (uid, namespace, name, created, touched) VALUES ($1, $2, $3, $4, $4) ON CONFLICT DO NOTHING";
        connection.change(insert, &[session, namespace, name, &now]).await?;
    }
    let Some((id, found)) = lock(connection, session)
        .await?
        .filter(|(_, found)| found.epoch == *seen)
    else {
        return Ok(Admitted::Outdated);
    };
    let epoch = admission.epoch();
    let update = "UPDATE sessions SET writer = $2, epoch = $3, gateway = $4 WHERE id = $1";
    connection
        .change(update, &[&id, pod, &(epoch as i64), &gateway])
        .await?;
    Ok(Admitted::Writer(State { epoch, ..found }))
}

pub(super) async fn append(connection: &mut Connection, batch: &Batch) -> Result<Appended, Error> {
    let Some((id, mut receipt)) = batch.begin(lock(connection, &batch.session).await?) else {
        return Ok(Appended::Superseded);
    };
    let before = receipt.progress;
    for (command, answer) in &batch.answers {
        commands::set(connection, &batch.session, command, answer).await?;
    }
    // What was removed is not stored again.
    let removed = batch
        .records
        .partition_point(|record| record.head.seq <= before.removed);
    let (old, rest) = batch.records.split_at(removed);
    let new = insert(connection, id, rest).await?;
    let is_new = |record: &&NewRecord| new.contains(&(record.head.seq as i64));
    let known: Vec<_> = old.iter().chain(rest.iter().filter(|record| !is_new(record))).collect();
    let mut conflicts = 0;
    if !known.is_empty() {
        conflicts = compare(connection, id, &known, &mut receipt).await?;
    }
    let mut bytes = conflicts;
    for record in rest.iter().filter(is_new) {
        receipt.new += 1;
        bytes += record.bytes.len() as i64;
        receipt.progress.add(&record.head);
        if let Some(Missing { first, last }) = record.missing {
            let insert = "INSERT INTO missing (session, first, last) VALUES ($1, $2, $3)";
            connection
                .change(insert, &[&id, &(first as i64), &(last as i64)])
                .await?;
        }
    }
    if receipt.progress.has_hole() {
        receipt.more = pass(connection, id, &mut receipt.progress).await?;
    }
    let Progress {
        acked,
        last,
        ended,
        removed: _,
    } = receipt.progress;
    if receipt.new > 0 {
        let spool = text(&batch.spool);
        let update = "UPDATE sessions SET spool = $2, acked = $3, last = $4, ended = $5, bytes = bytes + $6, touched = $7 WHERE id = $1";
        let now = Timestamp::now().as_second();
        connection
            .change(
                update,
                &[
                    &id,
                    &&*spool,
                    &(acked as i64),
                    &(last as i64),
                    &i64::from(ended),
                    &bytes,
                    &now,
                ],
            )
            .await?;
    } else if conflicts > 0 || acked > before.acked {
        let update = "UPDATE sessions SET acked = $2, bytes = bytes + $3 WHERE id = $1";
        connection.change(update, &[&id, &(acked as i64), &conflicts]).await?;
    }
    Ok(Appended::Stored(receipt))
}

/// The seqs that were new.
async fn insert(
    connection: &mut Connection,
    id: i64,
    records: &[NewRecord],
) -> Result<std::collections::HashSet<i64>, Error> {
    let column = |of: fn(&NewRecord) -> i64| records.iter().map(of).collect::<Vec<_>>();
    let seqs = column(|record| record.head.seq as i64);
    let kinds: Vec<_> = records.iter().map(|record| record.head.kind.as_str()).collect();
    let attempts = column(|record| i64::from(record.head.attempt));
    let turns = column(|record| i64::from(record.head.turn));
    let times = column(|record| record.head.ts.as_millisecond());
    let checksums = column(|record| i64::from(record.checksum));
    let bytes: Vec<_> = records.iter().map(|record| &record.bytes[..]).collect();
    let rows = connection
        .all(
            INSERT,
            &[&id, &seqs, &kinds, &attempts, &turns, &times, &checksums, &bytes],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Records whose seq is taken: equal ones, removed ones, and conflicts, which are kept. The bytes of new conflicts.
async fn compare(
    connection: &mut Connection,
    id: i64,
    known: &[&NewRecord],
    receipt: &mut Receipt,
) -> Result<i64, Error> {
    let seqs: Vec<_> = known.iter().map(|record| record.head.seq as i64).collect();
    let select = "SELECT seq, checksum, octet_length(bytes)::bigint FROM records WHERE session = $1 AND seq = ANY($2)";
    let rows = connection.all(select, &[&id, &seqs]).await?;
    let stored: HashMap<i64, (i64, i64)> = rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
    let mut kept = 0;
    for record in known {
        let this = (i64::from(record.checksum), record.bytes.len() as i64);
        let seq = record.head.seq as i64;
        if stored.get(&seq).is_none_or(|stored| *stored == this) {
            receipt.equal += 1;
            continue;
        }
        receipt.conflicts.push(record.head.seq);
        let insert = "INSERT INTO conflicts (session, seq, checksum, length, bytes, received) VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING";
        let now = Timestamp::now().as_second();
        let rows = connection
            .change(insert, &[&id, &seq, &this.0, &this.1, &&record.bytes[..], &now])
            .await?;
        kept += if rows > 0 { this.1 } else { 0 };
    }
    Ok(kept)
}

/// See [`Progress::pass`]; what is passed need not be known as missing any more.
async fn pass(connection: &mut Connection, id: i64, progress: &mut Progress) -> Result<bool, Error> {
    let before = progress.acked;
    let mut look = LOOK;
    let mut more = true;
    while more && look < PASSED as i64 {
        more = pass_some(connection, id, progress, look).await?;
        // Mostly the first look finds the hole.
        look *= LOOK;
    }
    if progress.acked > before {
        let delete = "DELETE FROM missing WHERE session = $1 AND first <= $2 AND last <= $2";
        connection.change(delete, &[&id, &(progress.acked as i64)]).await?;
    }
    Ok(more)
}

/// Passes what the next `look` rows of each sort say. Whether there may be more.
async fn pass_some(connection: &mut Connection, id: i64, progress: &mut Progress, look: i64) -> Result<bool, Error> {
    let select = "SELECT seq FROM records WHERE session = $1 AND seq > $2 ORDER BY seq LIMIT $3";
    let acked = progress.acked as i64;
    let stored = connection.all(select, &[&id, &acked, &look]).await?;
    let select = "SELECT first, last FROM missing WHERE session = $1 AND last > $2 ORDER BY first LIMIT $3";
    let missing = connection.all(select, &[&id, &acked, &look]).await?;
    let number = |row: &Row, column| row.get::<_, i64>(column) as u64;
    let seqs = stored.iter().map(|row| Ok(number(row, 0)));
    let gaps = missing.iter().map(|row| {
        Ok(Missing {
            first: number(row, 0),
            last: number(row, 1),
        })
    });
    let more = progress.pass::<Error>(seqs, gaps)?;
    let is_over = |rows: &[Row]| {
        let last = rows.last().map(|row| number(row, 0));
        rows.len() as i64 == look && last.is_some_and(|last| last <= progress.acked + 1)
    };
    Ok(more || is_over(&stored) || is_over(&missing))
}
