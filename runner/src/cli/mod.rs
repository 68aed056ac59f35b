//! The Claude Code CLI: how it is started, its line protocol, and when a turn is over.

pub mod command;
mod lines;
pub mod options;
pub mod stdin;
pub mod turn;
pub mod wire;

pub use lines::{Lines, RawLine};
pub use turn::{Turn, outcome};
pub use wire::{Event, ResultLine};

/// Version of the CLI that this runner is tested with. Others work as long as they keep the line protocol; a session says
/// so in a record when it meets one.
pub const TESTED_VERSION: &str = "2.1.329";
