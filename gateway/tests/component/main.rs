//! The gateway on real sockets and a real event log, with a cluster whose answers the tests decide.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod api;
mod claude_code;
mod commands;
mod database_tls;
mod durable;
mod follower;
mod guide;
mod ingest;
mod kill;
mod memory;
mod no_record_lost;
mod one_process;
mod plane;
mod projections;
mod replicas;
mod restore;
mod retention;
mod rights;
mod schema;
mod security;
mod server;
mod several;
mod sockets;
mod store;
mod streams;
mod support;
mod task_guide;
mod task_settings;
mod tasks;
mod workspace;
