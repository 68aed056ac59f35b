//! The events of the task API.

use protocol::Usage;
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};

/// What happened in a task.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// Which sort of thing.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// What.
    pub data: Data,
}

/// What happened.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Data {
    /// A tool is used.
    ToolUse(ToolUse),
    /// Anything else.
    Other(Value),
}

/// The use of a tool.
#[derive(Clone, Debug, Serialize)]
pub struct ToolUse {
    /// Its id.
    pub id: String,
    /// The tool.
    pub tool: String,
    /// Its input as the agent wrote it; `None`: it is too long to be shown.
    pub input: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    task_id: Option<String>,
}

impl ToolUse {
    /// The event of a tool that is used.
    pub(super) fn event(id: String, tool: String, input: Option<&RawValue>) -> Event {
        Event {
            kind: EventType::ToolUse,
            data: Data::ToolUse(Self {
                id,
                tool,
                input: input.map(RawValue::to_owned),
                task_id: None,
            }),
        }
    }
}

impl Event {
    pub(super) fn new(kind: EventType, data: Value) -> Self {
        Self {
            kind,
            data: Data::Other(data),
        }
    }

    /// Says which task it is of.
    pub fn set_task(&mut self, id: &str) {
        match &mut self.data {
            Data::ToolUse(tool) => tool.task_id = Some(id.to_owned()),
            Data::Other(data) => data["task_id"] = id.into(),
        }
    }
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
