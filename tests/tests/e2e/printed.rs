//! Every example that the two systems document whose APIs are served here, word for word: their ports, `localhost`, no key.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::compat::TASK_123;
use crate::harness::printed::Printed;
use crate::harness::scene::compat_scene;
use crate::harness::wait::{SOON, until};

/// The gateway's port and that of its metrics at those of the task API.
const TASKS: [&str; 2] = ["8000:8080", "9090:9090"];
/// The gateway's port at those of the other API: in its container, and in development.
const CLAUDE_CODE: [&str; 2] = ["3000:8080", "8788:8080"];

const SUBMIT: &str = r#"curl -sS -X POST http://localhost:8000/api/v1/tasks -H 'Content-Type: application/json' -d '{
  "task_id": "task-123",
  "prompt": "Implement user authentication",
  "workspace": "/workspace/project",
  "options": {
    "allowed_tools": ["Read", "Write", "Edit", "Bash"],
    "permission_mode": "acceptEdits",
    "max_turns": 50,
    "timeout": 3600
  },
  "session": {
    "reuse_existing": false
  }
}'"#;

/// Ends with the last event.
const FOLLOW: &str = r#"cat > "$TMP/follow.mjs" <<'END'
const ws = new WebSocket('ws://localhost:8000/ws/tasks/task-123');

ws.onmessage = (event) => {
  const data = JSON.parse(event.data);
  console.log('Event:', data.type, data.data);
};
END
node --experimental-websocket "$TMP/follow.mjs""#;

const FOLLOW_IN_PYTHON: &str = r#"cat > "$TMP/follow.py" <<'END'
import asyncio, json, requests, websockets

async def follow():
    async with websockets.connect('ws://localhost:8000/ws/tasks/task-123') as ws:
        async for message in ws:
            data = json.loads(message)
            print('Event:', data['type'], data['data'])

asyncio.run(follow())
assert requests.get('http://localhost:8000/api/v1/tasks/task-123').json()['status'] == 'completed'
END
"$PYTHON" "$TMP/follow.py""#;

fn object(said: &str) -> Result<Value> {
    serde_json::from_str(said).with_context(|| format!("not JSON: {said:?}"))
}

#[tokio::test]
async fn every_example_of_the_task_apis_document_works_as_it_is_printed_there() -> Result<()> {
    compat_scene(async || {
        let _alone = TASK_123.lock().await;
        let server = Printed::on(&TASKS).await?;
        let status = "curl -sS http://localhost:8000/api/v1/tasks/task-123";
        until("an earlier task of that name to be gone", SOON, async || {
            server
                .run("curl -sS -X DELETE http://localhost:8000/api/v1/sessions/session-task-123")
                .await?;
            let code =
                server.run("curl -sS -o /dev/null -w '%{http_code}' http://localhost:8000/api/v1/tasks/task-123");
            Ok((code.await? == "404").then_some(()))
        })
        .await?;

        let health = object(&server.run("curl -sS http://localhost:8000/health").await?)?;
        ensure!(
            health["status"] == "healthy" && health["version"].is_string(),
            "{health}"
        );
        for name in ["active_sessions", "active_tasks", "uptime_seconds"] {
            ensure!(health[name].is_u64(), "{name}: {health}");
        }
        let task = object(&server.run(SUBMIT).await?)?;
        let created = task["created_at"].as_str().context("no time")?.to_owned();
        let expected = json!({
            "task_id": "task-123", "session_id": "session-task-123", "status": "running",
            "websocket_url": "ws://localhost:8000/ws/tasks/task-123", "created_at": created,
        });
        ensure!(
            task == expected && created.len() == "2026-01-19T10:00:00Z".len(),
            "{task}"
        );
        let sessions = object(&server.run("curl -sS http://localhost:8000/api/v1/sessions").await?)?;
        ensure!(sessions.to_string().contains("session-task-123"), "{sessions}");

        let folder = tempfile::tempdir()?;
        let tmp = format!("export TMP={}\n", folder.path().display());
        let events = server.run(&format!("{tmp}{FOLLOW}")).await?;
        ensure!(
            events.contains("Event: message") && events.contains("Event: complete"),
            "{events}"
        );
        let task = object(&server.run(status).await?)?;
        ensure!(task["status"] == "completed", "{task}");
        let python = tokio::task::spawn_blocking(xtask::python_websockets).await??;
        let python = format!("export PYTHON={}\n", python.display());
        let events = server.run(&format!("{tmp}{python}{FOLLOW_IN_PYTHON}")).await?;
        ensure!(events.contains("Event: complete"), "{events}");
        let interrupt = "curl -sS -X POST http://localhost:8000/api/v1/tasks/task-123/interrupt";
        let task = object(&server.run(interrupt).await?)?;
        ensure!(task["status"] == "completed", "what is over stays as it is: {task}");
        until("the task in the metrics", SOON, async || {
            let metrics = server.run("curl -sS http://localhost:9090/metrics").await?;
            let names = [
                "http_requests_total{",
                "tasks_total{",
                "tasks_duration_seconds_count",
                "active_sessions ",
                "tokens_used_total{",
            ];
            Ok(names.iter().all(|name| metrics.contains(name)).then_some(()))
        })
        .await?;
        server
            .run("curl -sS --fail -X DELETE http://localhost:8000/api/v1/sessions/session-task-123")
            .await?;
        // A connection to a task that does not exist is refused.
        tokio::time::timeout(Duration::from_mins(1), async {
            let refused = server
                .run(&format!("{tmp}{FOLLOW} || true").replace("task-123", "task-none"))
                .await;
            ensure!(!refused?.contains("complete"), "there is no such task");
            anyhow::Ok(())
        })
        .await??;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn every_example_of_the_claude_code_apis_document_works_as_it_is_printed_there() -> Result<()> {
    compat_scene(async || {
        let server = Printed::on(&CLAUDE_CODE).await?;
        let root = server.run("curl -sS --fail http://localhost:3000/").await?;
        ensure!(object(&root)?["status"] == "healthy", "{root}");
        let debug = server.run("curl -sS --fail http://localhost:3000/debug").await?;
        ensure!(
            object(&debug)?["defaultMaxTurns"] == 3 && !debug.contains("sk-ant"),
            "{debug}"
        );

        let query = |stream: &str| {
            format!(
                r#"curl -sS -X POST http://localhost:8788/claude-code -H "Content-Type: application/json" -d '{{
  "prompt": "What is 7 * 6?",
  "model": "openrouter/qwen/qwen3-coder",
  {stream}
  "maxTurns": 3
}}'"#
            )
        };
        let answer = object(&server.run(&query(r#""stream": false,"#)).await?)?;
        ensure!(answer["type"] == "result" && answer["result"].is_string(), "{answer}");
        ensure!(
            answer["sessionId"].is_string() && answer.get("messages").is_none(),
            "{answer}"
        );
        let other = object(&server.run(&query(r#""stream": false, "verbose": true,"#)).await?)?;
        ensure!(
            other["sessionId"] != answer["sessionId"],
            "a session for each request: {other}"
        );
        ensure!(
            other["messages"]
                .as_array()
                .is_some_and(|messages| !messages.is_empty()),
            "{other}"
        );

        let lines = server.run(
            r#"curl -sS -D "$(mktemp -u)" -w '\n%{content_type}' -X POST http://localhost:3000 \
  -H "Content-Type: application/json" \
  -d '{"prompt": "What is 2+2?", "model": "openrouter/qwen/qwen3-coder"}'"#,
        );
        let lines = lines.await?;
        let (lines, content) = lines.trim_end().rsplit_once('\n').context("no type")?;
        ensure!(content.starts_with("text/plain"), "{content}");
        let lines: Result<Vec<Value>> = lines.lines().filter(|line| !line.is_empty()).map(object).collect();
        let lines = lines?;
        let types: Vec<_> = lines
            .iter()
            .map(|line| line["type"].as_str().unwrap_or_default())
            .collect();
        ensure!(types == ["assistant", "result"], "{lines:?}");
        ensure!(lines[0]["content"] == lines[1]["result"], "{lines:?}");

        let wrong = r#"curl -sS -X POST http://localhost:8788/claude-code -H "Content-Type: application/json" -d '{}'"#;
        let wrong = object(&server.run(wrong).await?)?;
        for name in ["error", "message", "details"] {
            ensure!(wrong["type"] == "error" && wrong[name].is_string(), "{name}: {wrong}");
        }
        Ok(())
    })
    .await
}
