//! Phases of a session.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a session is: `Pending → Creating → Running → Completed | Failed | Stopped`, with `Stopping` between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Nothing runs yet; the reason and message say what the session waits for.
    #[default]
    Pending,
    /// Its pod is being made.
    Creating,
    /// Its agent works.
    Running,
    /// Its agent is being stopped.
    Stopping,
    /// Its task is done.
    Completed,
    /// It ended without its task being done.
    Failed,
    /// It was stopped, with workspace and conversation kept.
    Stopped,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Creating,
        Self::Running,
        Self::Stopping,
        Self::Completed,
        Self::Failed,
        Self::Stopped,
    ];

    /// The phase as it stands in status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Creating => "Creating",
            Self::Running => "Running",
            Self::Stopping => "Stopping",
            Self::Completed => "Completed",
            Self::Failed => "Failed",
            Self::Stopped => "Stopped",
        }
    }

    /// Whether the run has ended.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Stopped)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
