//! One PostgreSQL server for all tests of this process that do not harm theirs.

use std::sync::OnceLock;

use xtask::postgres::Postgres;

pub fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start().expect("PostgreSQL is needed"))
}

/// A new, empty database.
pub fn database() -> String {
    server().database().unwrap()
}

/// Runs a statement in a database.
pub fn say(database: &str, statement: &str) -> String {
    server().say(database, statement).unwrap()
}
