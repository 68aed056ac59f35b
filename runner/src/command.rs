//! What people ask of a running session, through the gateway or through the control socket.

use protocol::frame::{CommandResult, MAX_COMMAND_ID};
use protocol::identity;
use tokio::sync::mpsc;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// A message for the agent.
    UserMessage(String),
    /// Stop this turn.
    Interrupt(u32),
    /// End an interactive session.
    EndSession,
    /// An answer to a permission question.
    PermissionResponse {
        /// The CLI's id of the question.
        request_id: String,
        /// The answer in the CLI's own form.
        response: String,
    },
}

/// An order with its id; the same id is carried out once.
#[derive(Debug)]
pub struct Command {
    /// Id.
    pub id: String,
    /// What is asked.
    pub order: Order,
    /// Where to say how it went, once that is on disk. Nobody may be there any more.
    pub answer: mpsc::UnboundedSender<CommandResult>,
}

impl Command {
    /// Why the id cannot be one.
    pub fn refused(&self) -> Option<&'static str> {
        let ours = self.id == identity::PROMPT_COMMAND || self.id.starts_with("continue/");
        if self.id.is_empty() || self.id.len() > MAX_COMMAND_ID || ours {
            return Some("a command's id must have 1 to 128 bytes and be none of the runner's own");
        }
        None
    }
}
