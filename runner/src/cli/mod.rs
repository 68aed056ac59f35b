//! The Claude Code CLI: how it is started, its line protocol, and when a turn is over.

pub mod command;
pub mod options;
pub mod turn;
pub mod wire;

pub use turn::{Turn, outcome};
pub use wire::{Event, Lines, RawLine, ResultLine};

/// Version of the CLI that this runner is tested with. Others work as long as they keep the line protocol; a session says
/// so in a record when it meets one.
pub const TESTED_VERSION: &str = "2.1.329";
