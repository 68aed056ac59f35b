//! Opening the file, so that a commit is on disk when it returns.

use std::{fs::File, path::Path, sync::Arc, time::Duration};

use refinery::{Target, error::Kind};
use rusqlite::{Connection, OpenFlags};

use super::StoreError;

mod layout {
    refinery::embed_migrations!("src/store/sqlite/migrations");
}

/// Another process on the same file (an old pod that ends) holds its lock for one commit.
const BUSY: Duration = Duration::from_secs(10);

/// A connection that only reads.
pub(super) fn reader(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "query_only", true)?;
    Ok(connection)
}

/// The connection that writes.
pub(super) fn writer(path: &Path) -> Result<Connection, StoreError> {
    let failed = |source| StoreError::Open {
        path: path.to_owned(),
        source: Arc::new(source),
    };
    let not_durable = |what| StoreError::NotDurable {
        path: path.to_owned(),
        what,
    };
    let mut connection = Connection::open(path).map_err(failed)?;
    connection.busy_timeout(BUSY).map_err(failed)?;
    // FULL: in WAL mode the log is synced before COMMIT returns; NORMAL would acknowledge what a power cut can take back.
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    connection
        .pragma_update(None, "journal_size_limit", 64 << 20)
        .map_err(failed)?;
    let mode: String = connection
        .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
        .map_err(failed)?;
    let synchronous: i64 = connection
        .pragma_query_value(None, "synchronous", |row| row.get(0))
        .map_err(failed)?;
    if mode != "wal" {
        return Err(not_durable("journal_mode=WAL"));
    }
    if synchronous != 2 {
        return Err(not_durable("synchronous=FULL"));
    }
    migrate(&mut connection, path)?;
    // SQLite syncs the folder for its journals, not for the file itself.
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|_| not_durable("fsync of its folder"))?;
    Ok(connection)
}

/// Brings the file to the newest layout, all steps or none.
fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |source: refinery::Error| match source.kind() {
        // It was applied, and we do not have it.
        Kind::MissingVersion(missing) => StoreError::TooNew {
            path: path.to_owned(),
            found: missing.to_string(),
        },
        _ => StoreError::Layout {
            path: path.to_owned(),
            source: Arc::new(source),
        },
    };
    // Before there was a history of layouts, the first one was counted here.
    let counted: rusqlite::Result<i64> = connection.pragma_query_value(None, "user_version", |row| row.get(0));
    if counted.is_ok_and(|count| count == 1) {
        let first = layout::migrations::runner().set_target(Target::FakeVersion(1));
        first.run(connection).map_err(failed)?;
        let _ = connection.pragma_update(None, "user_version", 0);
    }
    let newest = layout::migrations::runner().set_grouped(true);
    newest.run(connection).map_err(failed)?;
    Ok(())
}
