//! Commands in the SQLite file.

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};

use super::{
    Job, SqliteLog, Task,
    append::{find, key},
};
use crate::store::{
    StoreError,
    commands::{Accepted, Answer, Command, CommandLog, KEPT_SECONDS, MAX_PENDING, NewCommand, Waiting},
};

/// A write on the commands.
pub(super) enum Write {
    Keep(NewCommand),
    Answer {
        session: String,
        id: String,
        answer: Answer,
    },
    Forget(Timestamp),
}

/// What came of it.
pub(super) enum Written {
    Accepted(Accepted),
    Answered(bool),
    Forgotten,
}

const COLUMNS: &str = "number, id, frame, asked, created, state, error, seq";

impl SqliteLog {
    fn write(&self, write: Write) -> BoxFuture<'static, Result<Written, StoreError>> {
        self.submit(write, Job::Command)
    }
}

impl CommandLog for SqliteLog {
    fn keep(&self, command: NewCommand) -> BoxFuture<'static, Result<Accepted, StoreError>> {
        let written = self.write(Write::Keep(command));
        async move {
            match written.await? {
                Written::Accepted(kept) => Ok(kept),
                Written::Answered(_) | Written::Forgotten => Err(StoreError::Stopped),
            }
        }
        .boxed()
    }

    fn command(&self, session: &str, id: &str) -> BoxFuture<'static, Result<Option<Command>, StoreError>> {
        let (session, id) = (session.to_owned(), id.to_owned());
        self.query(move |connection| by_id(connection, &session, &id))
    }

    fn pending(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Vec<Command>, StoreError>> {
        let session = session.to_owned();
        self.query(move |connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {COLUMNS} FROM commands WHERE session = ?1 AND number > ?2 AND state = 'pending' ORDER BY number"
                ))?
                .query_map(params![session, after as i64], command)?
                .collect()
        })
    }

    fn next(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Option<Command>, StoreError>> {
        let session = session.to_owned();
        self.query(move |connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {COLUMNS} FROM commands WHERE session = ?1 AND number > ?2 AND state = 'pending' ORDER BY number LIMIT 1"
                ))?
                .query_row(params![session, after as i64], command)
                .optional()
        })
    }

    fn waiting(&self) -> BoxFuture<'static, Result<Vec<Waiting>, StoreError>> {
        self.query(|connection| {
            connection
                .prepare_cached("SELECT DISTINCT session, namespace, name FROM commands WHERE state = 'pending'")?
                .query_map([], |row| {
                    Ok(Waiting {
                        session: row.get(0)?,
                        namespace: row.get(1)?,
                        name: row.get(2)?,
                    })
                })?
                .collect()
        })
    }

    fn answer(&self, session: &str, id: &str, answer: Answer) -> BoxFuture<'static, Result<bool, StoreError>> {
        let (session, id) = (session.to_owned(), id.to_owned());
        let written = self.write(Write::Answer { session, id, answer });
        async move { Ok(matches!(written.await?, Written::Answered(true))) }.boxed()
    }

    fn forget_answered(&self, now: Timestamp) -> BoxFuture<'static, Result<(), StoreError>> {
        let written = self.write(Write::Forget(now));
        async move { written.await.map(drop) }.boxed()
    }

    fn turn(&self, session: &str) -> BoxFuture<'static, Result<u32, StoreError>> {
        let session = session.to_owned();
        self.query(move |connection| {
            let Some((id, state)) = find(connection, &session)? else {
                return Ok(0);
            };
            let turn = connection
                .prepare_cached("SELECT turn FROM records WHERE key = ?1")?
                .query_row([key(id, state.progress.last)], |row| row.get(0))
                .optional()?;
            Ok(turn.unwrap_or_default())
        })
    }
}

impl Write {
    /// How much it writes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Keep(command) => command.frame.len() + command.asked.len(),
            Self::Answer { .. } | Self::Forget(_) => 0,
        }
    }
}

impl Task<Write, Written> {
    /// Within the transaction of all jobs.
    pub(super) fn run(&mut self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        self.output = Some(match &self.input {
            Write::Keep(command) => Written::Accepted(keep(tx, command)?),
            Write::Answer { session, id, answer } => Written::Answered(set(tx, session, id, answer)?),
            Write::Forget(now) => {
                tx.prepare_cached("DELETE FROM commands WHERE answered < ?1")?
                    .execute([now.as_second() - KEPT_SECONDS])?;
                Written::Forgotten
            }
        });
        Ok(())
    }
}

fn keep(tx: &Transaction<'_>, new: &NewCommand) -> rusqlite::Result<Accepted> {
    if let Some(known) = by_id(tx, &new.session, &new.id)? {
        return Ok(if known.asked == new.asked {
            Accepted::Same(known)
        } else {
            Accepted::Other
        });
    }
    let pending: i64 = tx
        .prepare_cached("SELECT count(*) FROM commands WHERE session = ?1 AND state = 'pending'")?
        .query_row([&new.session], |row| row.get(0))?;
    if pending >= MAX_PENDING as i64 {
        return Ok(Accepted::Full);
    }
    let created = Timestamp::now().as_millisecond();
    tx.prepare_cached(
        "INSERT INTO commands (session, namespace, name, id, frame, asked, created, state)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'pending')",
    )?
    .execute(params![
        new.session,
        new.namespace,
        new.name,
        new.id,
        new.frame,
        new.asked,
        created
    ])?;
    by_id(tx, &new.session, &new.id)?
        .map(Accepted::New)
        .ok_or(rusqlite::Error::QueryReturnedNoRows)
}

/// Gives a command its answer unless it has one.
pub(super) fn set(tx: &Transaction<'_>, session: &str, id: &str, answer: &Answer) -> rusqlite::Result<bool> {
    let changed = tx
        .prepare_cached(
            "UPDATE commands SET state = ?3, error = ?4, seq = ?5, answered = ?6
             WHERE session = ?1 AND id = ?2 AND state = 'pending'",
        )?
        .execute(params![
            session,
            id,
            answer.state(),
            answer.error(),
            answer.seq().map(|seq| seq as i64),
            Timestamp::now().as_second()
        ])?;
    Ok(changed > 0)
}

fn by_id(connection: &Connection, session: &str, id: &str) -> rusqlite::Result<Option<Command>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM commands WHERE session = ?1 AND id = ?2"
        ))?
        .query_row([session, id], command)
        .optional()
}

fn command(row: &Row<'_>) -> rusqlite::Result<Command> {
    let state: String = row.get(5)?;
    let seq: Option<i64> = row.get(7)?;
    Ok(Command {
        number: row.get::<_, i64>(0)? as u64,
        id: row.get(1)?,
        frame: row.get(2)?,
        asked: row.get(3)?,
        created: Timestamp::from_millisecond(row.get(4)?).unwrap_or_default(),
        answer: Answer::of(&state, row.get(6)?, seq.map(|seq| seq as u64)),
    })
}
