//! Records as the lines of the claude-code API.

use std::collections::HashMap;

use protocol::{
    Kind, Outcome, Record,
    record::{EndBody, SessionBody},
};
use serde_json::{Value, json};

use super::{body, parts, result_text};

/// Messages that a client is shown on request, bytes at most.
const MAX_MESSAGES: usize = 8 << 20;

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
    messages: Vec<Value>,
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
    pub fn messages(&mut self) -> Option<Vec<Value>> {
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
                let line = body(record);
                let lines = self.cli(&line);
                self.keep(line, record.body.get().len());
                lines
            }
            Kind::Session => {
                if let Ok(SessionBody::TurnEnded { outcome, .. }) = serde_json::from_str(record.body.get()) {
                    self.ended(outcome);
                }
                Vec::new()
            }
            Kind::End => {
                if let Ok(EndBody { outcome, .. }) = serde_json::from_str(record.body.get())
                    && self.end.is_none()
                {
                    self.ended(outcome);
                }
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn keep(&mut self, line: Value, bytes: usize) {
        let shown = matches!(line["type"].as_str(), Some("system" | "assistant" | "user" | "result"));
        if !self.keep || !shown {
            return;
        }
        if self.bytes + bytes > MAX_MESSAGES {
            self.omitted += 1;
            return;
        }
        self.bytes += bytes;
        self.messages.push(line);
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

    fn cli(&mut self, line: &Value) -> Vec<Value> {
        match line["type"].as_str() {
            Some("assistant") => {
                let parts = parts(&line["message"]["content"]);
                parts.iter().filter_map(|part| self.said(part)).collect()
            }
            Some("user") => {
                let parts = parts(&line["message"]["content"]);
                let results = parts.iter().filter(|part| part["type"] == "tool_result");
                results.map(|part| self.result_of(part)).collect()
            }
            Some("result") => {
                self.result = line["result"].as_str().map(str::to_owned);
                let errors = line["errors"].as_array().into_iter().flatten();
                let errors: Vec<_> = errors.filter_map(Value::as_str).collect();
                self.errors = (!errors.is_empty()).then(|| errors.join("; "));
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn said(&mut self, part: &Value) -> Option<Value> {
        match part["type"].as_str()? {
            "text" => Some(json!({"type": "assistant", "content": part["text"]})),
            "tool_use" => {
                let name = part["name"].as_str().unwrap_or_default().to_owned();
                let line = json!({"type": "tool_call", "tool": name, "input": part["input"].to_string()});
                if self.tools.len() < MAX_TOOLS {
                    self.tools
                        .insert(part["id"].as_str().unwrap_or_default().to_owned(), name);
                }
                Some(line)
            }
            _ => None,
        }
    }

    fn result_of(&mut self, part: &Value) -> Value {
        let id = part["tool_use_id"].as_str().unwrap_or_default();
        let tool = self.tools.remove(id).unwrap_or_default();
        json!({"type": "tool_result", "tool": tool, "result": result_text(&part["content"])})
    }
}
