//! What a developer's commands and the tests share.

pub mod claude_cli;

pub use claude_cli::{cache_dir, claude_cli};
