//! What recordings of the real CLI are in the terms of each API.

use std::fmt::Write as _;

use gateway::project::{claude_code::Query, messages::messages, tasks::Tasks, transcript};
use protocol::Record;
use rstest::rstest;
use serde_json::{Value, json};

/// A recording as the records that a runner makes of it.
fn recorded(name: &str) -> Vec<Record> {
    let path = format!("{}/../runner/tests/recordings/{name}.jsonl", env!("CARGO_MANIFEST_DIR"));
    let lines = std::fs::read_to_string(path).unwrap();
    let lines = lines.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        // Some recordings say who wrote a line.
        match line.get("dir").or(line.get("from")) {
            Some(from) if from != "out" && from != "cli" => None,
            Some(_) => Some(line.get("msg").or(line.get("line")).cloned().unwrap()),
            None => Some(line),
        }
    });
    let record = |(number, line): (usize, Value)| {
        let record = json!({
            "seq": number + 1, "attempt": 1, "turn": 1, "ts": "2026-01-02T03:04:05Z", "kind": "cli", "body": line,
        });
        serde_json::from_value(record).unwrap()
    };
    lines.enumerate().map(record).collect()
}

#[rstest]
#[case("tools")]
#[case("subagent")]
#[case("question")]
#[case("interrupt")]
#[case("overloaded")]
fn recordings_become_messages(#[case] name: &str) {
    let mut text = String::new();
    for message in recorded(name).iter().flat_map(messages) {
        writeln!(text, "{} {} {}", message.seq, message.kind, message.payload).unwrap();
    }
    assert!(!text.is_empty());
    insta::assert_snapshot!(format!("messages_{name}"), text);
}

#[rstest]
#[case("tools")]
#[case("subagent")]
#[case("question")]
#[case("interrupt")]
#[case("overloaded")]
fn recordings_become_a_text_for_people(#[case] name: &str) {
    let text: String = recorded(name).iter().map(transcript::text).collect();
    assert!(!text.is_empty());
    insta::assert_snapshot!(format!("transcript_{name}"), text);
}

/// A record of the runner's beside the recorded ones.
fn of_runner(seq: usize, kind: &str, body: &Value) -> Record {
    let record = json!({"seq": seq, "attempt": 1, "turn": 1, "ts": "2026-01-02T03:04:07Z", "kind": kind, "body": body});
    serde_json::from_value(record).unwrap()
}

/// A recording as the whole of a one-shot: with its message before it and the end of its turn behind it.
fn one_shot(name: &str, outcome: &str) -> Vec<Record> {
    let uuid = "00000000-0000-5000-8000-000000000001";
    let mut records = vec![of_runner(
        1,
        "user",
        &json!({"command": "prompt", "uuid": uuid, "text": "p"}),
    )];
    records.extend(recorded(name));
    let ended = json!({"event": "turnEnded", "turn": 1, "outcome": outcome});
    records.push(of_runner(records.len() + 1, "session", &ended));
    records
}

#[rstest]
#[case("tools", "succeeded")]
#[case("subagent", "succeeded")]
#[case("interrupt", "stoppedByUser")]
#[case("overloaded", "agentError")]
fn recordings_become_the_events_of_a_task(#[case] name: &str, #[case] outcome: &str) {
    let mut tasks = Tasks::default();
    let mut text = String::new();
    for record in one_shot(name, outcome) {
        for event in tasks.take(&record) {
            writeln!(text, "{}", json!(event)).unwrap();
        }
    }
    assert!(tasks.open().is_none(), "it is over");
    insta::assert_snapshot!(format!("task_{name}"), text);
}

#[rstest]
#[case("tools", "succeeded")]
#[case("subagent", "succeeded")]
#[case("interrupt", "stoppedByUser")]
#[case("overloaded", "agentError")]
fn recordings_become_the_lines_of_a_query(#[case] name: &str, #[case] outcome: &str) {
    let mut query = Query::new(false);
    let mut text = String::new();
    for record in one_shot(name, outcome) {
        for line in query.take(&record) {
            writeln!(text, "{line}").unwrap();
        }
    }
    writeln!(text, "{:?}", query.end).unwrap();
    insta::assert_snapshot!(format!("query_{name}"), text);
}

#[rstest]
#[case("user", json!({"command": "prompt", "uuid": "00000000-0000-5000-8000-000000000001", "text": "Hello\u{1b}[31m"}))]
#[case("log", json!({"level": "warning", "message": "a thing"}))]
#[case("git", json!({"name": "a", "url": "https://example.com/a.git", "branch": "b", "commit": "c0ffee", "pushed": true}))]
#[case("gap", json!({"from": 3, "to": 5}))]
#[case("session", json!({"event": "turnEnded", "turn": 1, "outcome": "succeeded"}))]
#[case("session", json!({"event": "permissionAnswered", "requestId": "r1", "allowed": false}))]
#[case("end", json!({"outcome": "succeeded", "lastSeq": 6, "bytes": 9, "sha256": "00"}))]
#[case("cli", json!({"text": "no JSON"}))]
fn records_of_the_runner_become_what_people_understand(#[case] kind: &str, #[case] body: Value) {
    let record = json!({"seq": 7, "attempt": 1, "turn": 1, "ts": "2026-01-02T03:04:05Z", "kind": kind, "body": body});
    let record: Record = serde_json::from_value(record).unwrap();
    let shown = json!({"messages": messages(&record), "text": transcript::text(&record)});
    let event = body["event"].as_str().unwrap_or_default();
    insta::assert_snapshot!(format!("{kind}_{event}"), serde_json::to_string_pretty(&shown).unwrap());
    assert!(!transcript::text(&record).contains('\u{1b}'));
}
