//! The event log in PostgreSQL, for more than one gateway.

mod alone;
mod append;
mod commands;
mod link;
mod migrate;
mod peers;
mod pool;
mod removal;
mod tls;

use std::{
    borrow::Cow,
    collections::HashSet,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use serde::de::{IntoDeserializer as _, value::Error as NameError};
use tokio::sync::mpsc;
use tokio_postgres::Row;

use self::{
    alone::Locks,
    link::{Link, Teller},
    peers::Peers,
    pool::Pool,
};
use super::{
    Admission, Admitted, Alone, Appended, Batch, Content, EventLog, Kept, MAX_SEQ, PageSize, Peer, Removed, State,
    StoreError, StoredRecord, news::News,
};

pub use migrate::{Moved, migrate};

mod layout {
    refinery::embed_migrations!("src/store/postgres/migrations");
}

/// Two gateways that start at once change the layout one after the other. Any number that nobody else uses.
const LAYOUT_LOCK: &str = "SELECT pg_advisory_lock(7020317654020)";

/// Where it is, and whom to believe that it is there.
#[derive(Clone, PartialEq, Eq)]
pub struct Database {
    /// URL or words of `libpq`; may have a password. With `sslmode=require` or a stricter one the server is spoken with over TLS, and
    /// its certificate and name are checked.
    pub url: String,
    /// PEM file of the authorities that may have issued its certificate; whom the system trusts when absent.
    pub authorities: Option<PathBuf>,
}

impl From<&str> for Database {
    fn from(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            authorities: None,
        }
    }
}

/// Keeps records in a PostgreSQL database.
pub struct PostgresLog {
    pool: Arc<Pool>,
    news: Teller,
    heard: Mutex<Option<mpsc::Receiver<News>>>,
    removes: Arc<AtomicBool>,
    /// Where other gateways find this one.
    address: Option<String>,
    peers: Peers,
    locks: Arc<Locks>,
}

impl PostgresLog {
    /// Opens the database and brings it to the newest layout. `address` is where other gateways find this one.
    pub async fn open(database: &Database, address: Option<String>) -> Result<Self, StoreError> {
        let pool = Pool::new(database)?;
        let secret = prepare(&pool).await?;
        let Link { teller, heard, removes } = link::open(pool.clone());
        Ok(Self {
            pool,
            news: teller,
            heard: Mutex::new(Some(heard)),
            removes,
            peers: Peers::new(secret, address.clone()),
            address,
            locks: Arc::default(),
        })
    }
}

/// Brings the database to the newest layout; what its gateways know.
async fn prepare(pool: &Pool) -> Result<String, StoreError> {
    let (mut client, connection) = pool.connect().await?;
    let _driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
    let row = client.query_one("SELECT current_setting('fsync')", &[]).await?;
    if row.get::<_, &str>(0) != "on" {
        return Err(StoreError::Fsync);
    }
    client.query(LAYOUT_LOCK, &[]).await?;
    let newest = layout::migrations::runner().set_grouped(true);
    newest
        .run_async(&mut client)
        .await
        .map_err(|source| match source.kind() {
            refinery::error::Kind::MissingVersion(found) => StoreError::TooNewDatabase(found.to_string()),
            _ => StoreError::DatabaseLayout(Arc::new(source)),
        })?;
    Ok(client.query_one("SELECT secret FROM peers", &[]).await?.get(0))
}

impl EventLog for PostgresLog {
    fn state(&self, session: &str) -> BoxFuture<'static, Result<State, StoreError>> {
        let session = session.to_owned();
        self.pool.run(move |connection| {
            async move {
                let found = append::find(connection, &session).await?;
                Ok(found.map(|(_, state)| state).unwrap_or_default())
            }
            .boxed()
        })
    }

    fn admit(&self, admission: Admission) -> BoxFuture<'static, Result<Admitted, StoreError>> {
        let (news, session, address) = (self.news.clone(), admission.session.clone(), self.address.clone());
        let admitted = self.pool.transact(move |connection| {
            async move { append::admit(connection, &admission, address.as_deref()).await }.boxed()
        });
        async move {
            let admitted = admitted.await?;
            if let Admitted::Writer(State { epoch, .. }) = admitted {
                news.tell(News::Admitted { session, epoch });
            }
            Ok(admitted)
        }
        .boxed()
    }

    fn append(&self, batch: Batch) -> BoxFuture<'static, Result<Appended, StoreError>> {
        let (news, session) = (self.news.clone(), batch.session.clone());
        let appended = self
            .pool
            .transact(move |connection| async move { append::append(connection, &batch).await }.boxed());
        async move {
            let appended = appended.await?;
            if let Appended::Stored(receipt) = &appended {
                let progress = receipt.progress;
                news.tell(News::Stored { session, progress });
            }
            Ok(appended)
        }
        .boxed()
    }

    fn read(
        &self,
        session: &str,
        after: u64,
        page: PageSize,
    ) -> BoxFuture<'static, Result<Vec<StoredRecord>, StoreError>> {
        let session = session.to_owned();
        self.pool.run(move |connection| {
            async move {
                // As long as there is room; of a record longer than all of it only the length.
                let select = "SELECT seq, kind, length, CASE WHEN length <= $4::bigint THEN bytes END FROM (
                        SELECT seq, kind, octet_length(records.bytes)::bigint AS length, records.bytes,
                            sum(CASE WHEN octet_length(records.bytes) <= $4::bigint THEN octet_length(records.bytes) ELSE 0 END) OVER (ORDER BY seq) AS total
                        FROM records, sessions
                        WHERE uid = $1 AND session = id AND seq > $2 AND seq <= acked ORDER BY seq LIMIT $3
                    ) AS page WHERE total <= $4::bigint ORDER BY seq";
                let (after, records, bytes) = (after.min(MAX_SEQ) as i64, page.records as i64, page.bytes as i64);
                let rows = connection.all(select, &[&session, &after, &records, &bytes]).await?;
                Ok(rows.iter().map(record).collect())
            }
            .boxed()
        })
    }

    fn piece(
        &self,
        session: &str,
        seq: u64,
        offset: usize,
        length: usize,
    ) -> BoxFuture<'static, Result<Bytes, StoreError>> {
        let session = session.to_owned();
        self.pool.run(move |connection| {
            async move {
                let select = "SELECT substring(records.bytes FROM $3 FOR $4) FROM records, sessions WHERE uid = $1 AND session = id AND seq = $2";
                let (first, length) = (offset as i32 + 1, length.min(i32::MAX as usize) as i32);
                let row = connection.one(select, &[&session, &(seq as i64), &first, &length]).await?;
                Ok(row.map_or_else(Bytes::new, |row| Bytes::copy_from_slice(row.get(0))))
            }
            .boxed()
        })
    }

    fn kept(&self) -> BoxFuture<'static, Result<Kept, StoreError>> {
        self.pool.run(|connection| removal::kept(connection).boxed())
    }

    fn note_present(&self, present: HashSet<String>, now: i64) -> BoxFuture<'static, Result<(), StoreError>> {
        self.pool
            .run(move |connection| async move { removal::note(connection, &present, now).await }.boxed())
    }

    fn trim(&self, session: &str, bytes: u64) -> BoxFuture<'static, Result<Removed, StoreError>> {
        let session = session.to_owned();
        self.pool
            .transact(move |connection| async move { removal::trim(connection, &session, bytes).await }.boxed())
    }

    fn forget(&self, session: &str) -> BoxFuture<'static, Result<Removed, StoreError>> {
        let session = session.to_owned();
        self.pool
            .transact(move |connection| async move { removal::forget(connection, &session).await }.boxed())
    }

    fn news(&self) -> Option<mpsc::Receiver<News>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn tell(&self, news: News) {
        self.news.tell(news);
    }

    fn removes(&self) -> bool {
        self.removes.load(Ordering::Relaxed)
    }

    fn peer(&self) -> Option<&dyn Peer> {
        Some(&self.peers)
    }

    fn alone(&self, of: &str) -> BoxFuture<'static, Result<Alone, StoreError>> {
        self.locks.clone().take(self.pool.clone(), of.to_owned()).boxed()
    }

    fn elsewhere(&self, session: &str) -> BoxFuture<'static, Result<Option<String>, StoreError>> {
        let (session, own) = (session.to_owned(), self.address.clone());
        self.pool.run(move |connection| {
            async move {
                let row = connection
                    .one("SELECT gateway FROM sessions WHERE uid = $1", &[&session])
                    .await?;
                Ok(row
                    .and_then(|row| row.get(0))
                    .filter(|address| Some(address) != own.as_ref()))
            }
            .boxed()
        })
    }
}

/// A text as PostgreSQL can keep it: it knows no NUL.
fn text(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        return text.replace('\0', "\u{fffd}").into();
    }
    text.into()
}

fn record(row: &Row) -> StoredRecord {
    let kind: Result<_, NameError> = serde::Deserialize::deserialize(row.get::<_, &str>(1).into_deserializer());
    StoredRecord {
        seq: row.get::<_, i64>(0) as u64,
        // It was one when it was stored.
        kind: kind.unwrap_or(protocol::Kind::Log),
        content: match row.get::<_, Option<&[u8]>>(3) {
            Some(bytes) => Content::Whole(Bytes::copy_from_slice(bytes)),
            None => Content::Long(row.get::<_, i64>(2) as usize),
        },
    }
}
