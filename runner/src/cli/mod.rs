//! The Claude Code CLI: how it is started, its line protocol, and when a turn is over.

pub mod command;
pub mod turn;
pub mod wire;

pub use turn::{Turn, outcome};
pub use wire::{Event, Lines, RawLine, ResultLine};
