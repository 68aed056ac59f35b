//! The lines of the CLI as far as a trace needs them.

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use crate::cli::wire::or_default;

/// A line of the CLI.
#[expect(clippy::struct_excessive_bools, reason = "the CLI's own fields")]
#[derive(Debug, Deserialize)]
pub struct Line<'a> {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is in particular.
    pub subtype: Option<String>,
    /// A message, or a text in some system lines.
    #[serde(borrow)]
    pub message: Option<&'a RawValue>,
    /// The tool call in which a sub-agent speaks.
    pub parent_tool_use_id: Option<String>,
    /// A message of ours, shown again.
    #[serde(default, rename = "isReplay", deserialize_with = "or_default")]
    pub is_replay: bool,
    /// The message stands for an error of the API.
    #[serde(default, deserialize_with = "or_default")]
    pub is_api_error_message: bool,
    /// Tool call that a task belongs to.
    pub tool_use_id: Option<String>,
    /// Name of the tool that was denied.
    pub tool_name: Option<String>,
    /// What kind of task.
    pub task_type: Option<String>,
    /// What kind of sub-agent.
    pub subagent_type: Option<String>,
    /// The task goes on while the conversation does.
    #[serde(default, deserialize_with = "or_default")]
    pub is_backgrounded: bool,
    /// How a task ended.
    pub status: Option<String>,
    /// What a task says at its end.
    pub summary: Option<String>,
    /// The last answer.
    pub result: Option<String>,
    /// What went wrong, in a result without an answer.
    pub errors: Option<Value>,
    /// Whether the turn failed.
    #[serde(default, deserialize_with = "or_default")]
    pub is_error: bool,
    /// Rounds of the turn.
    pub num_turns: Option<Value>,
    /// What the CLI says that its process has cost.
    pub total_cost_usd: Option<Value>,
    /// Why the model stopped.
    pub stop_reason: Option<String>,
    /// Why the turn ended.
    pub terminal_reason: Option<String>,
    /// Number of a retry.
    pub attempt: Option<u64>,
    /// Status that is tried again.
    pub error_status: Option<u64>,
    /// Version of the CLI.
    pub claude_code_version: Option<String>,
}

/// A message of the conversation.
#[derive(Debug, Deserialize)]
pub struct Message {
    /// The API's id.
    #[serde(default, deserialize_with = "or_default")]
    pub id: String,
    /// The model.
    #[serde(default, deserialize_with = "or_default")]
    pub model: String,
    /// Text or blocks.
    #[serde(default)]
    pub content: Value,
}

impl Line<'_> {
    /// The line's message.
    pub fn message(&self) -> Option<Message> {
        serde_json::from_str(self.message?.get()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_absent() {
        let line = r#"{"type":"assistant","message":{"id":null,"model":null,"content":null},"isReplay":null,"is_api_error_message":null,"is_backgrounded":null,"is_error":null}"#;
        let line: Line<'_> = serde_json::from_str(line).unwrap();
        let bools = [
            line.is_replay,
            line.is_api_error_message,
            line.is_backgrounded,
            line.is_error,
        ];
        assert!(bools.iter().all(|set| !set));
        let message = line.message().unwrap();
        assert_eq!((message.id.as_str(), message.model.as_str()), ("", ""));
    }
}
