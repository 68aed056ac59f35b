//! Records as a text for people.

use std::fmt::Write as _;

use protocol::{Kind, Record};
use serde_json::Value;

use super::{body, parts, result_text};

/// Characters of a tool's input and result that are shown.
const SHOWN: usize = 2_000;

/// What a record adds to the transcript; empty: nothing. Ends with a line break. Control characters but newline and tab are
/// escaped, so that a terminal that shows it does nothing else.
pub fn text(record: &Record) -> String {
    let body = body(record);
    let mut text = String::new();
    match record.kind {
        Kind::User => paragraph(&mut text, "USER", &string(&body["text"])),
        Kind::Cli => cli(&mut text, &body),
        Kind::Log => paragraph(
            &mut text,
            &string(&body["level"]).to_uppercase(),
            &string(&body["message"]),
        ),
        Kind::Git => git(&mut text, &body),
        Kind::Gap => paragraph(&mut text, "GAP", &gap(&body)),
        Kind::End => paragraph(&mut text, "END", &string(&body["outcome"])),
        Kind::Session => session(&mut text, &body),
        Kind::Usage => {}
    }
    text
}

/// What stands for a record too long to be read at once.
pub fn long(seq: u64, kind: Kind, length: usize) -> String {
    let mut text = String::new();
    let said = format!(
        "record {seq} ({}) has {length} bytes: see the JSONL transcript",
        kind.as_str()
    );
    paragraph(&mut text, "LONG", &said);
    text
}

fn cli(text: &mut String, line: &Value) {
    let content = parts(&line["message"]["content"]);
    match line["type"].as_str() {
        Some("assistant") => content.iter().for_each(|part| match part["type"].as_str() {
            Some("text") => paragraph(text, "AGENT", &string(&part["text"])),
            Some("tool_use") => {
                let input = part["input"].to_string();
                paragraph(text, &format!("TOOL {}", string(&part["name"])), &cut(&input));
            }
            _ => {}
        }),
        Some("user") => content
            .iter()
            .filter(|part| part["type"] == "tool_result")
            .for_each(|part| {
                let name = if part["is_error"] == true {
                    "TOOL FAILED"
                } else {
                    "TOOL RESULT"
                };
                paragraph(text, name, &cut(&result_text(&part["content"])));
            }),
        Some("control_request") if line["request"]["subtype"] == "can_use_tool" => {
            let request = &line["request"];
            let asks = format!(
                "{} {}",
                string(&request["tool_name"]),
                cut(&request["input"].to_string())
            );
            paragraph(text, &format!("PERMISSION {}", string(&line["request_id"])), &asks);
        }
        Some("result") if line["is_error"] == true => {
            let said = if line["result"].is_null() {
                &line["subtype"]
            } else {
                &line["result"]
            };
            paragraph(text, "FAILED", &string(said));
        }
        _ => {}
    }
}

fn git(text: &mut String, body: &Value) {
    let done = if body["pushed"] == true { "pushed" } else { "cloned" };
    let mut said = format!(
        "{} {done} {} {} {}",
        string(&body["name"]),
        string(&body["url"]),
        string(&body["branch"]),
        string(&body["commit"])
    );
    if let Some(error) = body["error"].as_str() {
        let _ = write!(said, ": {error}");
    }
    paragraph(text, "GIT", &said);
}

fn gap(body: &Value) -> String {
    match (body["from"].as_u64(), body["to"].as_u64(), body["length"].as_u64()) {
        (Some(from), Some(to), _) => format!("records {from} to {to} are lost"),
        (_, _, Some(length)) => format!("a line of {length} bytes was too long"),
        _ => "earlier records are lost".to_owned(),
    }
}

fn session(text: &mut String, body: &Value) {
    let said = match body["event"].as_str() {
        Some("permissionAnswered") if body["allowed"] == true => "allowed",
        Some("permissionAnswered") => "denied",
        Some("agentRestarted") => "the agent was restarted",
        Some("conversationReset") => "a new conversation began",
        _ => return,
    };
    paragraph(text, "SESSION", said);
}

fn string(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{} … ({} characters more)", &text[..end], text[end..].chars().count()),
        None => text.to_owned(),
    }
}

fn paragraph(text: &mut String, name: &str, said: &str) {
    let line = format!("{name}: {}\n", said.trim_end());
    for c in line.chars() {
        if c.is_control() && c != '\n' && c != '\t' {
            let _ = write!(text, "{}", c.escape_default());
        } else {
            text.push(c);
        }
    }
}
