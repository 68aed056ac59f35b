//! The task API and the claude-code API, by clients that are not ours, with the real CLI.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tests::http;
use tests::model::script;

use crate::harness::audit::events;
use crate::harness::command::kubectl;
use crate::harness::forward::Forward;
use crate::harness::mock::Mock;
use crate::harness::scene::{compat_scene, marker};
use crate::harness::wait::{SOON, until};
use crate::harness::{COMPAT, SYSTEM, root};

/// Held by who makes the task of that name, which the documents have.
pub static TASK_123: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Every line of the guide, shells and Python programs one after the other.
fn guide(python: &Path, folder: &Path) -> Result<String> {
    let text = std::fs::read_to_string(root().join("docs/task-api.md"))?;
    let mut script = "set -eux\n".to_owned();
    let blocks = text.split("\n```").skip(1).step_by(2);
    for (number, (language, code)) in blocks.filter_map(|block| block.split_once('\n')).enumerate() {
        match language {
            "sh" => script += code,
            "python" => {
                let file = folder.join(format!("{number}.py"));
                std::fs::write(&file, code)?;
                let _ = write!(script, "{} {}", python.display(), file.display());
            }
            "js" => {
                let file = folder.join(format!("{number}.mjs"));
                std::fs::write(&file, code)?;
                let _ = write!(script, "node --experimental-websocket {}", file.display());
            }
            _ => {}
        }
        script += "\n";
    }
    Ok(script)
}

async fn reach() -> Result<Forward> {
    Forward::to_service(SYSTEM, "agentic-gateway", 8080).await
}

async fn ask(server: &Forward, method: Method, path: &str, body: &Value) -> Result<(u16, Value)> {
    let mut request = http::client().request(method, format!("{}{path}", server.url()));
    if !body.is_null() {
        request = request.json(body);
    }
    let response = request.send().await?;
    let (code, text) = (response.status().as_u16(), response.text().await?);
    Ok((code, serde_json::from_str(&text).unwrap_or(Value::String(text))))
}

/// A task, when it is over.
async fn done(server: &Forward, task: &Value) -> Result<Value> {
    let (code, answer) = ask(server, Method::POST, "/api/v1/tasks", task).await?;
    ensure!(code == 200, "{code}: {answer}");
    let id = answer["task_id"].as_str().context("no id")?.to_owned();
    until(&format!("task {id} to be over"), SOON, async || {
        let (_, task) = ask(server, Method::GET, &format!("/api/v1/tasks/{id}"), &Value::Null).await?;
        Ok((task["status"] != "running").then_some(task))
    })
    .await
}

#[tokio::test]
async fn every_line_of_the_task_guide_works_as_printed() -> Result<()> {
    compat_scene(async || {
        let _alone = TASK_123.lock().await;
        let python = tokio::task::spawn_blocking(xtask::python_websockets).await??;
        let server = reach().await?;
        let folder = std::env::temp_dir().join(marker());
        std::fs::create_dir(&folder)?;
        let output = tokio::process::Command::new("bash")
            .arg("-c")
            .arg(guide(&python, &folder)?)
            .current_dir(&folder)
            .env("SERVER", server.url())
            .env("no_proxy", "127.0.0.1")
            .env("NO_PROXY", "127.0.0.1")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await?;
        std::fs::remove_dir_all(&folder)?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "{said}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(said.matches("Event: complete").count() == 2, "{said}");
        ensure!(said.matches(r#""type":"result""#).count() == 2, "{said}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn ten_requests_at_once_do_not_see_each_other_and_a_models_name_arrives_unchanged() -> Result<()> {
    compat_scene(async || {
        let server = reach().await?;
        let requests = (0..10).map(|n| {
            let (marker, server) = (marker(), &server);
            async move {
                let write = format!("test ! -e seen && echo {marker} > seen && ls");
                let steps = json!([
                    {"tools": [{"name": "Bash", "input": {"command": write, "description": "test"}}]},
                    {"text": format!("answer {n}")},
                ]);
                let body = json!({
                    "prompt": script::prompt(&marker, &steps), "model": "openrouter/qwen/qwen3-coder", "stream": false,
                    "verbose": true, "additionalArgs": ["--append-system-prompt", format!("Say {marker}.")],
                });
                let (code, answer) = ask(server, Method::POST, "/claude-code", &body).await?;
                ensure!(
                    code == 200 && answer["result"] == format!("answer {n}"),
                    "{code}: {answer}"
                );
                let asked = Mock::reach().await?.requests(&marker).await?;
                let model = |request: &tests::model::Logged| request.body["model"].clone();
                ensure!(
                    !asked.is_empty()
                        && asked
                            .iter()
                            .all(|request| model(request) == "openrouter/qwen/qwen3-coder"),
                    "{asked:#?}"
                );
                ensure!(
                    asked.iter().any(|request| request.system_end.contains(&marker)),
                    "the argument acts: {asked:#?}"
                );
                ensure!(
                    !answer["messages"].to_string().contains("\"is_error\":true"),
                    "{answer}"
                );
                Ok(answer["sessionId"].as_str().context("no session")?.to_owned())
            }
        });
        let answers: Result<BTreeSet<String>> = futures::future::join_all(requests).await.into_iter().collect();
        ensure!(answers?.len() == 10, "ten sessions");
        Ok(())
    })
    .await
}

/// Answers that use a tool again and again.
fn busy(command: &str) -> Value {
    let step = json!({"tools": [{"name": "Bash", "input": {"command": command, "description": "test"}}]});
    Value::Array(vec![step; 8])
}

#[tokio::test]
async fn limits_and_lists_of_tools_act() -> Result<()> {
    compat_scene(async || {
        let (server, mock) = (reach().await?, Mock::reach().await?);
        let said = marker();
        let body = json!({"prompt": script::prompt(&said, &busy("echo a")), "stream": false, "maxTurns": 2});
        let (code, answer) = ask(&server, Method::POST, "/claude-code", &body).await?;
        ensure!(code == 500 && answer["error"] == "MaxTurns", "{code}: {answer}");
        ensure!(mock.requests(&said).await?.len() <= 3, "no more rounds than allowed");

        let said = marker();
        let shared = |id: &str, steps: &Value, options: Value| {
            json!({
                "task_id": format!("{said}-{id}"), "prompt": script::prompt(&format!("{said} {id}"), steps), "workspace": said,
                "options": options, "session": {"reuse_existing": true},
            })
        };
        let touch = json!([
            {"tools": [{"name": "Bash", "input": {"command": "touch no", "description": "test"}}]},
            {"tools": [{"name": "Bash", "input": {"command": "echo allowed-42", "description": "test"}}]},
            {"text": "Done."},
        ]);
        let options = json!({"allowed_tools": ["Bash(echo *)"]});
        let task = done(&server, &shared("tools", &touch, options)).await?;
        ensure!(task["status"] == "completed" && task["result"] == "Done.", "{task}");
        let asked = mock.requests(&said).await?;
        let last = asked.last().context("the model was not asked")?;
        let results: Vec<_> = last
            .messages()
            .iter()
            .filter_map(|message| message["content"].as_array())
            .flatten()
            .filter(|part| part["type"] == "tool_result")
            .collect();
        ensure!(results.len() == 2, "{results:?}");
        ensure!(results[0]["is_error"] == true, "what is not in the list is denied: {results:?}");
        ensure!(results[1].to_string().contains("allowed-42"), "what is in it runs: {results:?}");

        let task = done(&server, &shared("turns", &busy("echo b"), json!({"max_turns": 2}))).await?;
        ensure!(task["status"] == "failed" && task["error"] == "MaxTurns", "{task}");
        let hang = json!([{"hang": true}]);
        let task = done(&server, &shared("timeout", &hang, json!({"timeout": 3}))).await?;
        ensure!(task["status"] == "failed" && task["error"] == "Timeout", "{task}");
        // The session goes on after all that.
        let task = done(&server, &shared("last", &json!([{"text": "Still here."}]), json!({}))).await?;
        ensure!(task["result"] == "Still here.", "{task}");
        let alone = json!({
            "prompt": script::prompt("alone", &hang), "options": {"timeout": 5}, "task_id": format!("{said}-alone"),
        });
        let task = done(&server, &alone).await?;
        ensure!(task["status"] == "failed" && task["error"] == "Timeout", "{task}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_agent_and_its_session() -> Result<()> {
    compat_scene(async || {
        let (server, mock, said) = (reach().await?, Mock::reach().await?, marker());
        let steps = json!([{"text": "A beginning that goes on.", "hang": true, "at": "middle"}]);
        let body = json!({"prompt": script::prompt(&said, &steps), "additionalArgs": ["--append-system-prompt", said]});
        let request = http::client()
            .post(format!("{}/claude-code", server.url()))
            .json(&body)
            .send()
            .await?;
        ensure!(request.status() == 200, "{request:?}");
        mock.request(&said, SOON, |request| {
            request.status == Some(200) && request.end.is_none()
        })
        .await?;
        let session = session_of(&said).await?.context("the request has no session")?;
        drop(request);
        until("the end of the session", SOON, async || {
            Ok(session_of(&said).await?.is_none().then_some(()))
        })
        .await?;
        mock.request(&said, SOON, |request| {
            request.end == Some(tests::model::End::ClientGone)
        })
        .await?;
        let label = format!("vteam.ambient-code/session={session}");
        until("the end of its pod", SOON, async || {
            let pods = kubectl(&["get", "pods", "-n", COMPAT, "-l", &label, "-o", "name"]).await?;
            Ok(pods.trim().is_empty().then_some(()))
        })
        .await
    })
    .await
}

/// Name of the session whose prompt has this marker.
async fn session_of(marker: &str) -> Result<Option<String>> {
    let all: Value = serde_json::from_str(&kubectl(&["get", "agenticsessions", "-n", COMPAT, "-o", "json"]).await?)?;
    let all = all["items"].as_array().context("no list")?;
    let ours = all
        .iter()
        .find(|session| session["spec"]["prompt"].to_string().contains(marker));
    Ok(ours
        .and_then(|session| session["metadata"]["name"].as_str())
        .map(str::to_owned))
}

#[tokio::test]
async fn a_request_pays_for_no_claim_and_its_events_are_all_there() -> Result<()> {
    compat_scene(async || {
        let (server, said) = (reach().await?, marker());
        let body = json!({"prompt": script::prompt(&said, &json!([{"text": "Thrown away."}])), "stream": false});
        let (code, answer) = ask(&server, Method::POST, "/claude-code", &body).await?;
        ensure!(code == 200 && answer["result"] == "Thrown away.", "{code}: {answer}");
        let name = answer["sessionId"].as_str().context("no session")?;
        let ended = until("what became of the session's records", SOON, async || {
            let text = kubectl(&["get", "agenticsession", name, "-n", COMPAT, "-o", "json"]).await?;
            let session: Value = serde_json::from_str(&text)?;
            let conditions = session["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let delivered = conditions.into_iter().find(|c| c["type"] == "EventsDelivered");
            Ok(delivered.filter(|_| session["status"]["phase"] == "Completed"))
        })
        .await?;
        ensure!(ended["status"] == "True", "{ended}");
        let claim = format!("ambient-workspace-{name}");
        let made = events()?.into_iter().any(|event| event["objectRef"]["name"] == *claim);
        ensure!(!made, "{claim} was made");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_documents_metrics_are_on_their_own_port() -> Result<()> {
    compat_scene(async || {
        let server = reach().await?;
        let task = json!({"prompt": script::prompt(&marker(), &json!([{"text": "Counted."}]))});
        ensure!(done(&server, &task).await?["status"] == "completed");
        let metrics = Forward::to_service(SYSTEM, "agentic-gateway", 9090).await?;
        until("the task in the metrics", SOON, async || {
            let text = http::client()
                .get(format!("{}/metrics", metrics.url()))
                .send()
                .await?
                .text()
                .await?;
            let all = [
                "http_requests_total{",
                "tasks_total{status=\"completed\"}",
                "tasks_duration_seconds_count",
                "active_sessions ",
                "tokens_used_total{type=",
            ];
            let missing: Vec<_> = all.into_iter().filter(|name| !text.contains(name)).collect();
            ensure!(missing.is_empty(), "{missing:?} not in {text}");
            Ok(Some(()))
        })
        .await
    })
    .await
}
