//! Drives the Claude Code CLI for one attempt of a session.
//!
//! [`drive`] is the whole run from top to bottom; every other module is one thing that it uses.

pub mod address;
pub mod agent;
pub mod cli;
pub mod command;
pub mod config;
pub mod control;
pub mod drain;
pub mod drive;
pub mod files;
pub mod history;
pub mod journal;
pub mod kill_point;
pub mod langfuse;
pub mod last_word;
mod lenient;
pub mod limits;
pub mod log;
pub mod outlet;
pub mod plan;
pub mod proxy;
pub mod redact;
pub mod report;
pub mod secrets;
pub mod spool;
pub mod status;
pub mod transcript;
pub mod uplink;
pub mod watchdog;
pub mod workspace;
