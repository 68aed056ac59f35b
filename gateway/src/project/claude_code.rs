//! Records as the lines of the claude-code API.

use std::collections::HashMap;

use protocol::{
    Kind, Outcome, Record,
    record::{EndBody, SessionBody},
};
use serde_json::{Value, json, value::RawValue};

use super::{
    line::{Line, Part},
    typed,
};

/// Messages that a client is shown on request, bytes at most.
const MAX_MESSAGES: usize = 4 << 20;

/// Tools at work whose names are known, at most.
const MAX_TOOLS: usize = 1024;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With the agent's answer.
    Answered(String),
    /// Without one: why, one word and for people.
    Failed(String, String),
}

/// What a session's records are to the one client that waits for its answer.
#[derive(Debug, Default)]
pub struct Query {
    tools: HashMap<String, String>,
    result: Option<String>,
    errors: Option<String>,
    keep: bool,
    messages: Vec<Box<RawValue>>,
    bytes: usize,
    omitted: usize,
    /// How it ended, when it has.
    pub end: Option<End>,
}

impl Query {
    /// With all messages of the CLI kept for the answer, if they are wanted.
    pub fn new(verbose: bool) -> Self {
        Self {
            keep: verbose,
            ..Self::default()
        }
    }

    /// The messages, if they are wanted.
    pub fn messages(&mut self) -> Option<Vec<Box<RawValue>>> {
        self.keep.then(|| std::mem::take(&mut self.messages))
    }

    /// How many messages had no room.
    pub fn omitted(&self) -> usize {
        self.omitted
    }

    /// Takes the session's next record. The lines that it is.
    pub fn take(&mut self, record: &Record) -> Vec<Value> {
        match record.kind {
            Kind::Cli => {
                let line = Line::of(record);
                self.keep(&line, &record.body);
                self.cli(line)
            }
            Kind::Session => {
                if let Some(SessionBody::TurnEnded { outcome, .. }) = typed(record) {
                    self.ended(outcome);
                }
                Vec::new()
            }
            Kind::End => {
                if let Some(EndBody { outcome, .. }) = typed(record)
                    && self.end.is_none()
                {
                    self.ended(outcome);
                }
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn keep(&mut self, line: &Line<'_>, text: &RawValue) {
        let hidden = matches!(line, Line::Question(_) | Line::Withdrawn(_) | Line::Other);
        if !self.keep || hidden {
            return;
        }
        let bytes = text.get().len();
        if self.bytes + bytes > MAX_MESSAGES {
            self.omitted += 1;
            return;
        }
        self.bytes += bytes;
        self.messages.push(text.to_owned());
    }

    fn ended(&mut self, outcome: Outcome) {
        self.end = match outcome {
            Outcome::Succeeded | Outcome::EndedByRequest => Some(End::Answered(self.result.take().unwrap_or_default())),
            // Another attempt may go on with it.
            outcome if outcome.is_transient() => return,
            outcome => match outcome.reason() {
                Some(reason) => {
                    let said = self.result.take().or_else(|| self.errors.take());
                    let said = said.unwrap_or_else(|| format!("the agent ended with {reason}"));
                    Some(End::Failed(reason.to_string(), said))
                }
                None => return,
            },
        };
    }

    fn cli(&mut self, line: Line<'_>) -> Vec<Value> {
        match line {
            Line::Assistant(response) => response.parts.into_iter().filter_map(|part| self.said(part)).collect(),
            Line::User { parts, .. } => parts.into_iter().filter_map(|part| self.result_of(part)).collect(),
            Line::Result { result, errors } => {
                self.result = result;
                self.errors = errors;
                Vec::new()
            }
            Line::Question(_) | Line::Withdrawn(_) | Line::System | Line::Other => Vec::new(),
        }
    }

    fn said(&mut self, part: Part<'_>) -> Option<Value> {
        match part {
            Part::Text(text) => Some(json!({"type": "assistant", "content": text})),
            Part::ToolUse { id, tool, input } => {
                let line = json!({"type": "tool_call", "tool": tool, "input": input.map_or("null", RawValue::get)});
                if self.tools.len() < MAX_TOOLS {
                    self.tools.insert(id, tool);
                }
                Some(line)
            }
            Part::ToolResult { .. } => None,
        }
    }

    fn result_of(&mut self, part: Part<'_>) -> Option<Value> {
        let Part::ToolResult { id, text, .. } = part else {
            return None;
        };
        let tool = self.tools.remove(&id).unwrap_or_default();
        Some(json!({"type": "tool_result", "tool": tool, "result": text}))
    }
}
