//! The session's folders on its volume: state that only the runner writes, and what the agent can write.

pub mod beneath;
pub mod git;
pub mod state;
pub mod transcripts;

pub use state::{Guard, StateError};
