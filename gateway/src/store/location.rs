//! Where the log is.

use std::{path::PathBuf, sync::Arc};

use super::{EventLog, StoreError, memory, postgres, sqlite};

/// Where the log is kept.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// In memory: for tests and trials; acknowledged records die with the process.
    Memory,
    /// In an SQLite file.
    File(PathBuf),
    /// In PostgreSQL, for any number of gateways.
    Database {
        /// The database.
        database: postgres::Database,
        /// Where other gateways find this one.
        address: Option<String>,
    },
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory => write!(f, "memory"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Database { .. } => write!(f, "PostgreSQL"),
        }
    }
}

impl std::str::FromStr for Location {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == ":memory:" {
            Self::Memory
        } else {
            Self::File(PathBuf::from(text))
        })
    }
}

/// Opens the log.
pub async fn open(location: Location) -> Result<Arc<dyn EventLog>, StoreError> {
    Ok(match location {
        Location::Memory => Arc::new(memory::MemoryLog::default()),
        Location::File(path) => Arc::new(sqlite::SqliteLog::open(&path)?),
        Location::Database { database, address } => Arc::new(postgres::PostgresLog::open(&database, address).await?),
    })
}
