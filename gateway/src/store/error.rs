//! What can go wrong with the log.

use std::{path::PathBuf, sync::Arc};

use tokio_postgres::error::SqlState;

/// What can go wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The log cannot be opened.
    #[error(
        "failed to open the event log {path}: {source}; check that its folder exists and is writable for this process"
    )]
    Open {
        /// File of the log.
        path: PathBuf,
        /// Why.
        source: Arc<rusqlite::Error>,
    },
    /// Another process has it.
    #[error(
        "failed to open the event log {path}: another gateway has it; end that one, or use PostgreSQL for several (DATABASE_URL)"
    )]
    InUse {
        /// File of the log.
        path: PathBuf,
    },
    /// It cannot be told whether another process has it.
    #[error("failed to open {path}: {source}; check that its folder exists, is writable for this process and has room")]
    Lock {
        /// The file that tells.
        path: PathBuf,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// The log was written by a newer gateway.
    #[error(
        "failed to open the event log {path}: it has the layout {found}, which this gateway does not know; run the newer gateway"
    )]
    TooNew {
        /// File of the log.
        path: PathBuf,
        /// Layout found.
        found: String,
    },
    /// The log's layout cannot be brought up to date.
    #[error("failed to bring the event log {path} to this gateway's layout: {source}; check that its volume has room")]
    Layout {
        /// File of the log.
        path: PathBuf,
        /// Why.
        source: Arc<refinery::Error>,
    },
    /// The log does not keep what it is told to keep.
    #[error(
        "failed to open the event log {path}: the file system refuses {what}; use a volume that supports it (no network file system)"
    )]
    NotDurable {
        /// File of the log.
        path: PathBuf,
        /// Setting that did not take.
        what: &'static str,
    },
    /// A write failed; nothing of it is stored.
    #[error("failed to write to the event log: {0}; check that its volume has room")]
    Write(#[source] Arc<rusqlite::Error>),
    /// A read failed.
    #[error("failed to read the event log: {0}")]
    Read(#[source] Arc<rusqlite::Error>),
    /// PostgreSQL refused or was lost; whether the last write is stored is not known.
    #[error(
        "failed to use the event log in PostgreSQL: {}; check that the server runs, has room and accepts this account",
        said(.0)
    )]
    Database(#[source] Arc<tokio_postgres::Error>),
    /// PostgreSQL does not answer.
    #[error("failed to reach PostgreSQL in time: check that the server of DATABASE_URL runs and can be reached")]
    Silent,
    /// Its address cannot be one. The text is not repeated: it may have a password.
    #[error("failed to understand DATABASE_URL: {0}; give it as postgresql://user:password@host/database")]
    Url(#[source] Arc<tokio_postgres::Error>),
    /// Nobody knows how to check whom it is.
    #[error(
        "failed to understand what DATABASE_URL says of TLS: sslmode is disable, require, verify-ca or verify-full, and sslrootcert a file"
    )]
    TlsMode,
    /// Those who may have issued its certificate cannot be read.
    #[error(
        "failed to read the authorities {path} of the database's certificate: {why}; it must be a PEM file of certificates"
    )]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// There is nobody to trust.
    #[error(
        "failed to check the database's certificate: this system trusts no authority; give one with --database-ca (GATEWAY_DATABASE_CA)"
    )]
    NoAuthorities,
    /// It does not keep what it is told to keep.
    #[error("failed to open the event log in PostgreSQL: the server has fsync off; set `fsync = on`")]
    Fsync,
    /// The database was written by a newer gateway.
    #[error(
        "failed to open the event log in PostgreSQL: it has the layout {0}, which this gateway does not know; run the newer gateway"
    )]
    TooNewDatabase(String),
    /// Its layout cannot be brought up to date.
    #[error(
        "failed to bring the event log in PostgreSQL to this gateway's layout: {0}; the account must own the schema"
    )]
    DatabaseLayout(#[source] Arc<refinery::Error>),
    /// A session did not arrive as it was sent.
    #[error("failed to move session {0} to PostgreSQL: what arrived differs, and was taken back; run the move again")]
    Differs(String),
    /// The log's thread has ended.
    #[error("failed to reach the event log: it has stopped; restart the gateway")]
    Stopped,
}

impl StoreError {
    /// Whether the log cannot be had now and may be had later, without anybody's doing.
    pub fn is_away(&self) -> bool {
        match self {
            Self::Silent => true,
            Self::Database(error) => error.as_db_error().map_or_else(
                || error.is_closed() || has_io(error),
                |server| AWAY.contains(server.code()),
            ),
            _ => false,
        }
    }
}

/// What a server says that starts, ends, or has no place.
const AWAY: [SqlState; 4] = [
    SqlState::CANNOT_CONNECT_NOW,
    SqlState::ADMIN_SHUTDOWN,
    SqlState::CRASH_SHUTDOWN,
    SqlState::TOO_MANY_CONNECTIONS,
];

fn has_io(error: &tokio_postgres::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        // Certificates that are refused come as these, too, and do not become better.
        if let Some(error) = cause.downcast_ref::<std::io::Error>() {
            return error.kind() != std::io::ErrorKind::InvalidData;
        }
        source = cause.source();
    }
    false
}

/// An error in the server's own words, if they are its.
fn said(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(
        || error.to_string(),
        |server| format!("{} (SQLSTATE {})", server.message(), server.code().code()),
    )
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(Arc::new(error))
    }
}
