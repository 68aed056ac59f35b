//! The gateway on real sockets and a real event log, with a cluster whose answers the tests decide.

mod api;
mod ingest;
mod kill;
mod store;
mod streams;
mod support;
