//! Reading the file, on connections of its own: the writer waits for nobody who reads.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use protocol::Kind;
use rusqlite::{Connection, params};
use serde::de::{IntoDeserializer as _, value::Error as NameError};
use tokio::sync::Semaphore;

use super::{
    append::{find, key, seq},
    open,
};
use crate::store::{Content, MAX_SEQ, PageSize, StoreError, StoredRecord};

/// Reads at once; each has a connection with a page cache of its own.
const READERS: usize = 8;

/// Connections that only read.
#[derive(Debug)]
pub(super) struct Readers {
    path: PathBuf,
    places: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

impl Readers {
    pub(super) fn new(path: &Path) -> Arc<Self> {
        Arc::new(Self {
            path: path.to_owned(),
            places: Semaphore::new(READERS),
            idle: Mutex::default(),
        })
    }

    /// Asks on one of them.
    pub(super) async fn query<T: Send + 'static>(
        self: Arc<Self>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        // In a task of its own: whoever asks may not be polled for long (a client that does not read), and a place that is
        // given to it would be nobody's.
        let answer = tokio::spawn(async move {
            let run = self.clone();
            let _place = self.places.acquire().await.map_err(|_| StoreError::Stopped)?;
            tokio::task::spawn_blocking(move || run.run(query))
                .await
                .map_err(|_| StoreError::Stopped)?
        });
        answer.await.map_err(|_| StoreError::Stopped)?
    }

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

pub(super) fn read(
    connection: &Connection,
    session: &str,
    after: u64,
    page: PageSize,
) -> rusqlite::Result<Vec<StoredRecord>> {
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

pub(super) fn piece(
    connection: &Connection,
    session: &str,
    seq: u64,
    offset: usize,
    length: usize,
) -> rusqlite::Result<Bytes> {
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

fn kind(name: &str) -> rusqlite::Result<Kind> {
    let kind: Result<Kind, NameError> = serde::Deserialize::deserialize(name.into_deserializer());
    kind.map_err(|error| rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, Box::new(error)))
}
