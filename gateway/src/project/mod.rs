//! Projections: what a record is in the terms of each API. Pure functions of a record.

pub mod claude_code;
pub mod messages;
pub mod tasks;
pub mod transcript;

use protocol::Record;
use serde_json::Value;

/// The body of a record, as JSON.
fn body(record: &Record) -> Value {
    serde_json::from_str(record.body.get()).unwrap_or_default()
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
