//! The events of the task API.

use protocol::Usage;
use serde::Serialize;
use serde_json::{Value, json};

use super::super::result_text;

/// What happened in a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// Which sort of thing.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// What.
    pub data: Value,
}

/// The sorts of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventType {
    /// The agent said something.
    Message,
    /// The agent uses a tool.
    ToolUse,
    /// What the tool did.
    ToolResult,
    /// What was used up so far.
    Progress,
    /// The task is done: the last event.
    Complete,
    /// The task is over and not done: the last event.
    Error,
}

pub(super) fn tool_result(part: &Value) -> Event {
    Event {
        kind: EventType::ToolResult,
        data: json!({
            "tool_use_id": part["tool_use_id"], "content": result_text(&part["content"]),
            "is_error": part["is_error"].as_bool().unwrap_or_default(),
        }),
    }
}

/// Tokens by sort, in the API's own words.
pub fn tokens(usage: &Usage) -> Value {
    let Usage {
        input_tokens,
        output_tokens,
        cache_read_input_tokens,
        cache_creation_input_tokens,
    } = *usage;
    json!({
        "input": input_tokens, "output": output_tokens, "cache_read": cache_read_input_tokens,
        "cache_creation": cache_creation_input_tokens,
    })
}
