//! The task API, asked as its clients ask, with a runner whose words the tests decide.

mod abuse;
mod clocks;
mod sharing;
mod submitting;

use std::{net::SocketAddr, time::Duration};

use futures::StreamExt as _;
use gateway::compat::Settings;
use protocol::frame::GatewayFrame;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{Error, Message, client::IntoClientRequest as _};

use crate::support::{
    Served,
    cluster::Cluster,
    end,
    runner::{Runner, hello},
    soon,
    sse::http,
};

/// Both APIs, with the defaults of the task API's document: nobody needs a key.
pub fn open() -> Settings {
    Settings {
        tasks: true,
        claude_code: true,
        namespace: "team-a".to_owned(),
        open: true,
        rate: None,
        max_turns: 50,
        max_concurrent: 10,
        idle_seconds: 1800,
        session_seconds: 604_800,
        cleanup_every: Duration::from_mins(5),
        keep_ended: Duration::from_hours(24),
        request_max: 20,
        request_seconds: 600,
        request_keep_seconds: 60,
        request_ephemeral: true,
        ..Settings::default()
    }
}

/// Status and JSON of a request, and what it says of when to come again.
pub async fn ask(address: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
    let mut request = http().request(method.parse().unwrap(), format!("http://{address}{path}"));
    if let Some(body) = body {
        request = request.json(body);
    }
    let response = request.send().await.unwrap();
    let code = response.status().as_u16();
    let text = response.text().await.unwrap();
    (code, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// A submission that is taken.
async fn submit(served: &Served, body: Value) -> Value {
    let (code, answer) = ask(served.address, "POST", "/api/v1/tasks", Some(&body)).await;
    assert_eq!(code, 200, "{answer}");
    answer
}

async fn status(served: &Served, id: &str) -> Value {
    let (code, answer) = ask(served.address, "GET", &format!("/api/v1/tasks/{id}"), None).await;
    assert_eq!(code, 200, "{answer}");
    answer
}

/// Waits until a task is not running any more.
async fn over(served: &Served, id: &str) -> Value {
    let over = async {
        loop {
            let task = status(served, id).await;
            if task["status"] != "running" {
                return task;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    Box::pin(soon("the task's end", over)).await
}

/// The one session that the cluster has, with its name.
pub fn only_session(cluster: &Cluster) -> (String, Value) {
    let sessions = cluster.sessions("team-a");
    assert_eq!(sessions.len(), 1, "{sessions:?}");
    sessions.into_iter().next().unwrap()
}

pub fn record(seq: u64, turn: u32, kind: &str, body: &Value) -> String {
    json!({"seq": seq, "attempt": 1, "turn": turn, "ts": jiff::Timestamp::now(), "kind": kind, "body": body})
        .to_string()
}

pub fn user(seq: u64, turn: u32, command: &str) -> String {
    let uuid = "00000000-0000-5000-8000-000000000001";
    record(
        seq,
        turn,
        "user",
        &json!({"command": command, "uuid": uuid, "text": "p"}),
    )
}

pub fn said(seq: u64, turn: u32, id: &str, part: &Value) -> String {
    let message = json!({"type": "assistant", "message": {"id": id, "content": [part]}, "parent_tool_use_id": null});
    record(seq, turn, "cli", &message)
}

pub fn tool_result(seq: u64, turn: u32, id: &str, text: &str) -> String {
    let part = json!({"type": "tool_result", "tool_use_id": id, "content": text, "is_error": false});
    let message = json!({"type": "user", "message": {"role": "user", "content": [part]}, "parent_tool_use_id": null});
    record(seq, turn, "cli", &message)
}

pub fn usage(seq: u64, turn: u32, id: &str) -> String {
    let now = jiff::Timestamp::now();
    let body = json!({
        "messageId": id, "model": "m", "inputTokens": 100, "outputTokens": 20, "cacheReadInputTokens": 0,
        "cacheCreationInputTokens": 0, "startedAt": now,
    });
    record(seq, turn, "usage", &body)
}

pub fn answered(seq: u64, turn: u32, text: &str) -> [String; 2] {
    let result = json!({"type": "result", "subtype": "success", "is_error": false, "result": text, "num_turns": 1});
    [
        record(seq, turn, "cli", &result),
        turn_ended(seq + 1, turn, "succeeded"),
    ]
}

pub fn turn_ended(seq: u64, turn: u32, outcome: &str) -> String {
    record(
        seq,
        turn,
        "session",
        &json!({"event": "turnEnded", "turn": turn, "outcome": outcome}),
    )
}

pub fn running() -> Value {
    json!({"phase": "Running", "podUID": "p1", "attempt": 1, "run": 1})
}

/// A session's pod has begun: its runner.
pub async fn begin(served: &Served, name: &str) -> Runner {
    served.cluster.runner("t1", Some("p1"));
    served.cluster.set_status("team-a", name, &running());
    let hello = hello(name, &format!("uid-of-{name}"), "p1");
    Runner::admitted(served.address, &hello, "t1").await.0
}

/// The next frame that is no acknowledgement.
async fn order(runner: &mut Runner) -> Value {
    // Pings come all the time.
    let next = async {
        loop {
            match runner.frame().await {
                GatewayFrame::Ack(_) => {}
                frame => return serde_json::to_value(frame).unwrap(),
            }
        }
    };
    soon("an order", next).await
}

/// A session's run ends well.
pub async fn complete(served: &Served, name: &str, runner: &mut Runner, seq: u64) {
    runner.send(&[end(seq)]).await;
    while !matches!(runner.frame().await, GatewayFrame::Ack(ack) if ack.seq == seq) {}
    let completed = json!({
        "phase": "Completed", "reason": "Completed", "podUID": "p1", "attempt": 1, "run": 1, "result": "r",
        "completionTime": jiff::Timestamp::now(),
    });
    served.cluster.set_status("team-a", name, &completed);
}

/// All events of a task, and the code with which its socket is closed.
async fn events(served: &Served, path: &str) -> Result<(Vec<Value>, u16), Error> {
    let request = format!("ws://{}{path}", served.address).into_client_request().unwrap();
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await?;
    let mut events = Vec::new();
    loop {
        match soon("an event", socket.next()).await {
            Some(Ok(Message::Text(text))) => events.push(serde_json::from_str(&text).unwrap()),
            Some(Ok(Message::Close(close))) => return Ok((events, close.map_or(0, |close| close.code.into()))),
            Some(Ok(_)) => {}
            other => panic!("{other:?} after {events:#?}"),
        }
    }
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}
