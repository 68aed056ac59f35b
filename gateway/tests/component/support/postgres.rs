//! One PostgreSQL server for all tests of this process that do not harm theirs.

use std::sync::OnceLock;

use xtask::postgres::Postgres;

/// A new, empty database.
pub fn database() -> String {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    let server = SERVER.get_or_init(|| Postgres::start().expect("PostgreSQL is needed"));
    server.database().unwrap()
}
