//! The runner as a whole: the real binary, the real CLI, the mock model.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a helper that fails fails its test"
)]

mod backends;
mod budget;
mod commands;
mod common;
mod crash;
mod drain;
mod flags;
mod fuzz;
mod git;
mod hostile;
mod interactive;
mod kill;
mod local;
mod played;
mod pod;
mod real_cli;
mod replay;
mod repos;
mod resume;
mod rounds;
mod shim;
mod ssh;
mod trace;
mod volume;
