//! How an attempt ends, and what made it.

use protocol::Outcome;

use crate::proxy::ProxyError;
use crate::spool::SpoolError;
use crate::workspace::is_full;
use crate::workspace::state::StateError;

/// How an attempt ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Outcome.
    pub outcome: Outcome,
    /// For people: what happened and what to do.
    pub message: String,
}

impl End {
    pub(super) fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            outcome,
            message: message.into(),
        }
    }
}

impl From<SpoolError> for End {
    fn from(error: SpoolError) -> Self {
        Self::new(error.outcome(), chain(&error))
    }
}

impl From<StateError> for End {
    fn from(error: StateError) -> Self {
        let outcome = match &error {
            StateError::Superseded { .. } => Outcome::Superseded,
            StateError::Full => Outcome::DiskFull,
            StateError::Volume { source, .. } if is_full(source) => Outcome::DiskFull,
            StateError::Volume { .. } | StateError::Expired => Outcome::VolumeUnavailable,
        };
        Self::new(outcome, error.to_string())
    }
}

impl From<ProxyError> for End {
    fn from(error: ProxyError) -> Self {
        let outcome = match &error {
            ProxyError::BaseUrl(_) | ProxyError::Credential(_) => Outcome::ConfigError,
            ProxyError::Listen(_) | ProxyError::Client(_) => Outcome::RunnerError,
        };
        Self::new(outcome, chain(&error))
    }
}

/// An error and what caused it, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
