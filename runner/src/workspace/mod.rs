//! The session's folders on its volume: state that only the runner writes, and what the agent can write.

pub mod beneath;
pub mod git;
pub mod state;
pub mod transcripts;

use std::io::{Error, ErrorKind};

pub use state::{Guard, StateError};

/// Whether a volume has no room left, or its quota gives no more.
pub fn is_full(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}
