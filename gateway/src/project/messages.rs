//! Records as the messages of the Ambient platform: what people and agent said, and what was done.

use jiff::Timestamp;
use protocol::{Kind, Record};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::{body, parts};

/// A message of a session.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Message {
    /// Number of the record that it is of; a record may be several messages, or none.
    pub seq: u64,
    /// `user.message`, `agent.message`, `agent.waiting` (a permission question) or `system.message`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// When it was recorded.
    pub timestamp: Timestamp,
    /// Turn that it belongs to, from 1; 0 before the first.
    pub turn: u32,
    /// What it says.
    pub payload: Value,
}

/// The messages that a record is.
pub fn messages(record: &Record) -> Vec<Message> {
    let body = body(record);
    let payloads: Vec<(&'static str, Value)> = match record.kind {
        Kind::User => vec![("user.message", json!({"content": body["text"], "id": body["command"]}))],
        Kind::Cli => cli(&body),
        Kind::Log => vec![(
            "system.message",
            json!({"message": body["message"], "level": body["level"]}),
        )],
        Kind::Git => vec![("system.message", json!({"git": body}))],
        Kind::Gap => vec![("system.message", json!({"gap": body}))],
        Kind::End => vec![("system.message", json!({"end": {"outcome": body["outcome"]}}))],
        Kind::Session => session(&body),
        Kind::Usage => Vec::new(),
    };
    payloads
        .into_iter()
        .map(|(kind, payload)| Message {
            seq: record.seq,
            kind,
            timestamp: record.ts,
            turn: record.turn,
            payload,
        })
        .collect()
}

/// A message that stands for a record too long to be read at once.
pub fn long(seq: u64, kind: Kind, length: usize) -> Message {
    Message {
        seq,
        kind: "system.message",
        timestamp: Timestamp::UNIX_EPOCH,
        turn: 0,
        payload: json!({"long": {"kind": kind, "bytes": length}, "message": "too long for a list: see the events or the transcript"}),
    }
}

fn cli(line: &Value) -> Vec<(&'static str, Value)> {
    let of_subagent = !line["parent_tool_use_id"].is_null();
    match line["type"].as_str() {
        Some("assistant") => said(line)
            .filter_map(|part| agent_part(&part))
            .map(|mut payload| {
                if of_subagent {
                    payload["parent_tool_use_id"] = line["parent_tool_use_id"].clone();
                }
                ("agent.message", payload)
            })
            .collect(),
        Some("user") => said(line)
            .filter(|part| part["type"] == "tool_result")
            .map(|part| {
                let result = json!({
                    "tool_use_id": part["tool_use_id"], "content": part["content"],
                    "is_error": part["is_error"].as_bool().unwrap_or_default(),
                });
                ("agent.message", json!({"tool_result": result}))
            })
            .collect(),
        Some("result") => {
            let names = [
                "subtype",
                "duration_ms",
                "duration_api_ms",
                "is_error",
                "num_turns",
                "session_id",
                "total_cost_usd",
                "usage",
                "result",
            ];
            let payload: serde_json::Map<_, _> = names
                .iter()
                .filter(|name| !line[**name].is_null())
                .map(|name| ((*name).to_owned(), line[*name].clone()))
                .collect();
            vec![("agent.message", json!({"type": "result.message", "payload": payload}))]
        }
        Some("control_request") if line["request"]["subtype"] == "can_use_tool" => {
            let request = &line["request"];
            let payload = json!({"permission": {
                "requestId": line["request_id"], "tool": request["tool_name"], "input": request["input"],
            }});
            vec![("agent.waiting", payload)]
        }
        _ => Vec::new(),
    }
}

fn said(line: &Value) -> impl Iterator<Item = Value> {
    parts(&line["message"]["content"]).into_iter()
}

fn agent_part(part: &Value) -> Option<Value> {
    match part["type"].as_str()? {
        "text" => Some(json!({"type": "agent_message", "content": {"type": "text_block", "text": part["text"]}})),
        "tool_use" => Some(json!({"tool": part["name"], "input": part["input"], "id": part["id"]})),
        _ => None,
    }
}

fn session(body: &Value) -> Vec<(&'static str, Value)> {
    let payload = match body["event"].as_str() {
        Some("turnEnded") => json!({"turnEnded": {"turn": body["turn"], "outcome": body["outcome"]}}),
        Some("permissionAnswered") => {
            json!({"permissionAnswered": {"requestId": body["requestId"], "allowed": body["allowed"]}})
        }
        Some("agentRestarted") => json!({"agentRestarted": {"outOfMemory": body["outOfMemory"]}}),
        Some("conversationReset") => json!({"conversationReset": {}}),
        _ => return Vec::new(),
    };
    vec![("system.message", payload)]
}
