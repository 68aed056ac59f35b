//! Commands in PostgreSQL.

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use tokio_postgres::{Error, Row};

use super::{PostgresLog, pool::Connection, text};
use crate::store::{
    StoreError,
    commands::{Accepted, Answer, Command, CommandLog, KEPT_SECONDS, MAX_PENDING, NewCommand, Waiting},
    news::News,
};

impl CommandLog for PostgresLog {
    fn keep(&self, command: NewCommand) -> BoxFuture<'static, Result<Accepted, StoreError>> {
        let (news, session) = (self.news.clone(), command.session.clone());
        let kept = self
            .pool
            .transact(|connection| async move { keep(connection, &command).await }.boxed());
        async move {
            let kept = kept.await?;
            news.tell(News::Commanded { session });
            Ok(kept)
        }
        .boxed()
    }

    fn command(&self, session: &str, id: &str) -> BoxFuture<'static, Result<Option<Command>, StoreError>> {
        let (session, id) = (session.to_owned(), id.to_owned());
        self.pool
            .run(|connection| async move { by_id(connection, &session, &id).await }.boxed())
    }

    fn pending(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Vec<Command>, StoreError>> {
        let session = session.to_owned();
        self.pool.run(move |connection| {
            async move {
                let select = "SELECT number, id, frame, asked, created, state, error, seq FROM commands
                    WHERE session = $1 AND number > $2 AND state = 'pending' ORDER BY number";
                let rows = connection.all(select, &[&session, &(after as i64)]).await?;
                Ok(rows.iter().map(command).collect())
            }
            .boxed()
        })
    }

    fn next(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Option<Command>, StoreError>> {
        let session = session.to_owned();
        self.pool.run(move |connection| {
            async move {
                let select = "SELECT number, id, frame, asked, created, state, error, seq FROM commands
                    WHERE session = $1 AND number > $2 AND state = 'pending' ORDER BY number LIMIT 1";
                let row = connection.one(select, &[&session, &(after as i64)]).await?;
                Ok(row.as_ref().map(command))
            }
            .boxed()
        })
    }

    fn waiting(&self) -> BoxFuture<'static, Result<Vec<Waiting>, StoreError>> {
        self.pool.run(|connection| {
            async move {
                let select = "SELECT DISTINCT session, namespace, name FROM commands WHERE state = 'pending'";
                let waiting = |row: &Row| Waiting {
                    session: row.get(0),
                    namespace: row.get(1),
                    name: row.get(2),
                };
                Ok(connection.all(select, &[]).await?.iter().map(waiting).collect())
            }
            .boxed()
        })
    }

    fn answer(&self, session: &str, id: &str, answer: Answer) -> BoxFuture<'static, Result<bool, StoreError>> {
        let (session, id) = (session.to_owned(), id.to_owned());
        self.pool
            .run(move |connection| async move { set(connection, &session, &id, &answer).await }.boxed())
    }

    fn forget_answered(&self, now: Timestamp) -> BoxFuture<'static, Result<(), StoreError>> {
        let before = now.as_second() - KEPT_SECONDS;
        self.pool.run(move |connection| {
            async move {
                let delete = "DELETE FROM commands WHERE answered < $1";
                connection.change(delete, &[&before]).await.map(drop)
            }
            .boxed()
        })
    }

    fn turn(&self, session: &str) -> BoxFuture<'static, Result<u32, StoreError>> {
        let session = session.to_owned();
        self.pool.run(move |connection| {
            async move {
                let select = "SELECT turn FROM sessions JOIN records ON session = id AND seq = last WHERE uid = $1";
                let row = connection.one(select, &[&session]).await?;
                Ok(row.map_or(0, |row| row.get::<_, i64>(0) as u32))
            }
            .boxed()
        })
    }
}

async fn keep(connection: &mut Connection, new: &NewCommand) -> Result<Accepted, Error> {
    // Held to the commit: who reads the numbers of a session in order misses none that appears later.
    connection
        .all("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", &[&new.session])
        .await?;
    if let Some(known) = by_id(connection, &new.session, &new.id).await? {
        return Ok(if known.asked == new.asked {
            Accepted::Same(known)
        } else {
            Accepted::Other
        });
    }
    let count = "SELECT count(*) FROM commands WHERE session = $1 AND state = 'pending'";
    let pending = connection.one(count, &[&new.session]).await?;
    if pending.is_some_and(|row| row.get::<_, i64>(0) >= MAX_PENDING as i64) {
        return Ok(Accepted::Full);
    }
    let insert = "INSERT INTO commands (session, namespace, name, id, frame, asked, created, state)
        VALUES ($1, $2, $3, $4, $5, $6, $7, 'pending') RETURNING number";
    let created = Timestamp::now();
    let NewCommand {
        session,
        namespace,
        name,
        id,
        frame,
        asked,
    } = new;
    let row = connection
        .one(
            insert,
            &[session, namespace, name, id, frame, asked, &created.as_millisecond()],
        )
        .await?;
    Ok(Accepted::New(Command {
        number: row.map_or(0, |row| row.get::<_, i64>(0) as u64),
        id: id.clone(),
        frame: frame.clone(),
        asked: asked.clone(),
        created: Timestamp::from_millisecond(created.as_millisecond()).unwrap_or(created),
        answer: Answer::Pending,
    }))
}

/// Gives a command its answer unless it has one.
pub(super) async fn set(connection: &mut Connection, session: &str, id: &str, answer: &Answer) -> Result<bool, Error> {
    let update = "UPDATE commands SET state = $3, error = $4, seq = $5, answered = $6
        WHERE session = $1 AND id = $2 AND state = 'pending'";
    let seq = answer.seq().map(|seq| seq as i64);
    let (id, error) = (text(id), answer.error().map(text));
    let (id, error) = (&*id, error.as_deref());
    let now = Timestamp::now().as_second();
    let changed = connection
        .change(update, &[&session, &id, &answer.state(), &error, &seq, &now])
        .await?;
    Ok(changed > 0)
}

async fn by_id(connection: &mut Connection, session: &str, id: &str) -> Result<Option<Command>, Error> {
    let select =
        "SELECT number, id, frame, asked, created, state, error, seq FROM commands WHERE session = $1 AND id = $2";
    let id = text(id);
    Ok(connection.one(select, &[&session, &&*id]).await?.as_ref().map(command))
}

fn command(row: &Row) -> Command {
    let seq: Option<i64> = row.get(7);
    Command {
        number: row.get::<_, i64>(0) as u64,
        id: row.get(1),
        frame: row.get(2),
        asked: row.get(3),
        created: Timestamp::from_millisecond(row.get(4)).unwrap_or_default(),
        answer: Answer::of(row.get(5), row.get(6), seq.map(|seq| seq as u64)),
    }
}
