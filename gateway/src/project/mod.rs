//! Projections: what a record is in the terms of each API. Pure functions of a record.

pub mod claude_code;
mod line;
pub mod messages;
pub mod tasks;
pub mod transcript;

use protocol::Record;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Longest body of a record of the runner's own: what is read of them may take many times as much.
const MAX_TYPED: usize = 256 << 10;

/// The body of a record, as JSON.
fn body(record: &Record) -> Value {
    serde_json::from_str(record.body.get()).unwrap_or_default()
}

/// The body of a record of the runner's own; `None` when it is none, or too long to be one.
pub(crate) fn typed<T: DeserializeOwned>(record: &Record) -> Option<T> {
    let body = record.body.get();
    let body = (body.len() <= MAX_TYPED).then_some(body)?;
    serde_json::from_str(body).ok()
}

/// The parts of a message's content; a plain text is one part.
fn parts(content: &Value) -> Vec<Value> {
    match content {
        Value::String(text) => vec![serde_json::json!({"type": "text", "text": text})],
        Value::Array(parts) => parts.clone(),
        _ => Vec::new(),
    }
}

/// The text of a tool's result.
fn result_text(content: &Value) -> String {
    let texts: Vec<_> = parts(content)
        .iter()
        .filter_map(|part| part["text"].as_str().map(str::to_owned))
        .collect();
    texts.join("\n")
}
