//! Interactive sessions, led with `kubectl` alone and led over REST.

use anyhow::{Context as _, Result, ensure};
use crds::Phase;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::model::script::prompt;

use crate::events::complete_log;
use crate::harness::client::Gateway;
use crate::harness::command::kubectl_with;
use crate::harness::mock::Mock;
use crate::harness::scene::{Scene, marker, small};
use crate::harness::wait::{SOON, until};
use crate::harness::{Keys, scene};

/// A tool that works until somebody stops it. The CLI refuses a plain `sleep`.
const ENDLESS: &str = "touch began; while [ ! -e never ]; do sleep 0.2; done";

/// Says something to the runner in the session's pod.
pub async fn say(scene: &Scene, session: &str, words: &[&str]) -> Result<String> {
    let pod = scene.status(session).await?.pod_name.context("no pod in status")?;
    let mut arguments = vec!["exec", &pod, "-c", "runner", "--", "runner"];
    arguments.extend(words);
    scene.kubectl(&arguments).await
}

/// Waits until the session waits for a message behind this turn.
pub async fn idle(scene: &Scene, session: &str, turn: u64) -> Result<Value> {
    until(&format!("turn {turn} to be over"), SOON, async || {
        // Until the pod runs there is nobody to ask.
        let Ok(said) = say(scene, session, &["status", "--json"]).await else {
            return Ok(None);
        };
        let status: Value = serde_json::from_str(&said)?;
        Ok((status["phase"] == "idle" && status["turn"] == turn).then_some(status))
    })
    .await
}

/// Waits until the agent's tool has made a file in its workspace.
async fn agent_made(scene: &Scene, session: &str, file: &str) -> Result<()> {
    let pod = scene.status(session).await?.pod_name.context("no pod in status")?;
    until(&format!("{file} in the workspace"), SOON, async || {
        let file = format!("/workspace/{file}");
        let looked = scene
            .kubectl(&["exec", &pod, "-c", "agent", "--", "test", "-e", &file])
            .await;
        Ok(looked.is_ok().then_some(()))
    })
    .await
}

fn bash(command: &str) -> Value {
    json!({ "name": "Bash", "input": { "command": command, "description": "t" } })
}

#[tokio::test]
async fn a_conversation_is_led_suspended_resumed_and_ended_with_kubectl() -> Result<()> {
    scene("conversation", Keys::Good, async |scene| {
        let (mock, first) = (Mock::reach().await?, marker());
        let mut spec = small();
        spec.interactive = Some(true);
        spec.prompt = Some(prompt(&first, &json!([{ "text": "One." }])));
        scene.create_with("talk", spec).await?;
        idle(scene, "talk", 1).await?;

        let second = marker();
        let tool = json!([{ "tools": [bash(ENDLESS)] }]);
        say(scene, "talk", &["send", &prompt(&second, &tool)]).await?;
        agent_made(scene, "talk", "began").await?;
        let pod = scene.status("talk").await?.pod_name.context("no pod in status")?;
        let late = [
            "exec",
            "-n",
            &scene.namespace,
            &pod,
            "-c",
            "runner",
            "--",
            "runner",
            "interrupt",
            "--turn",
            "1",
        ];
        let refused = kubectl_with(&late, "").await?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(
            !refused.status.success() && said.contains("turn 1 does not run"),
            "an interrupt stops only the turn that it names: {said}"
        );
        say(scene, "talk", &["interrupt", "--turn", "2"]).await?;
        let status = idle(scene, "talk", 2).await?;
        ensure!(status["unacked"].is_u64() && status["rounds"] == 2, "{status:#}");
        let cost = status["costUSD"].clone();

        let patch = |suspend: bool| json!({ "spec": { "suspend": suspend } }).to_string();
        scene
            .kubectl(&["patch", "as", "talk", "--type=merge", "-p", &patch(true)])
            .await?;
        let stopped = scene.phase("talk", Phase::Stopped).await?;
        ensure!(stopped.reason.as_deref() == Some("StoppedByUser"), "{stopped:#?}");
        let before = mock.requests(&first).await?.len();
        scene
            .kubectl(&["patch", "as", "talk", "--type=merge", "-p", &patch(false)])
            .await?;
        scene.phase("talk", Phase::Running).await?;
        let status = idle(scene, "talk", 2).await?;
        ensure!(
            mock.requests(&first).await?.len() == before,
            "it waits, and asks for nothing"
        );
        ensure!(
            status["costUSD"] == cost,
            "what it cost so far is not forgotten: {status:#}, before {cost}"
        );
        agent_made(scene, "talk", "began").await?;

        let third = marker();
        say(
            scene,
            "talk",
            &["send", "--id", "third", &prompt(&third, &json!([{ "text": "Three." }]))],
        )
        .await?;
        say(
            scene,
            "talk",
            &["send", "--id", "third", "the same id is the same message"],
        )
        .await?;
        idle(scene, "talk", 3).await?;
        let requests = mock.requests(&first).await?;
        let last = requests.last().context("no request")?;
        for marker in [&first, &second, &third] {
            ensure!(last.user_messages_with(marker) == 1, "{marker}: {:#?}", last.messages());
        }
        let shown = say(scene, "talk", &["status"]).await?;
        ensure!(shown.contains("phase      waits for a message"), "{shown}");
        say(scene, "talk", &["end"]).await?;
        let status = scene.phase("talk", Phase::Completed).await?;
        ensure!(status.reason.as_deref() == Some("Completed"), "{status:#?}");
        ensure!(status.result.as_deref() == Some("Three."), "{status:#?}");
        ensure!(status.run == Some(2) && status.turns == Some(3), "{status:#?}");
        Ok(())
    })
    .await
}

/// Sends a command and waits until the runner has answered it.
async fn carried_out(gateway: &Gateway, path: &str, body: &Value) -> Result<Value> {
    let (status, sent) = gateway.ask(Method::POST, path, Some(body)).await?;
    ensure!(status == StatusCode::ACCEPTED, "{path}: {status}: {sent}");
    let session = path.split('/').nth(1).context("a path names a session")?;
    let command = format!("/{session}/commands/{}", sent["id"].as_str().context("no id")?);
    until("the runner's answer", SOON, async || {
        let (_, found) = gateway.ask(Method::GET, &command, None).await?;
        Ok((found["state"] != "pending").then_some(found))
    })
    .await
}

/// Waits for a message of the session that satisfies `wanted`.
async fn message(gateway: &Gateway, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    until(what, SOON, async || {
        let (status, page) = gateway
            .ask(Method::GET, &format!("/{name}/messages?limit=1000"), None)
            .await?;
        ensure!(status == StatusCode::OK, "{status}: {page}");
        let messages = page["messages"].as_array().context("no messages")?;
        Ok(messages.iter().find(|message| wanted(message)).cloned())
    })
    .await
}

async fn turn_is_over(gateway: &Gateway, name: &str, turn: u64) -> Result<Value> {
    let over = |message: &Value| message["payload"]["turnEnded"]["turn"] == turn;
    message(gateway, name, &format!("turn {turn} to be over"), over).await
}

#[tokio::test]
async fn a_conversation_is_led_over_rest_with_files_and_permission_questions() -> Result<()> {
    scene("dialogue", Keys::Good, async |scene| {
        let (gateway, mock, first) = (Gateway::reach(scene).await?, Mock::reach().await?, marker());
        let body = json!({
            "prompt": prompt(&first, &json!([{ "text": "One." }])), "interactive": true, "timeout": 600,
            "tools": { "permissionMode": "default" }, "workspace": { "size": "256Mi" },
        });
        let (status, created) = gateway.ask(Method::POST, "", Some(&body)).await?;
        ensure!(status == StatusCode::CREATED, "{status}: {created}");
        let name = created["name"].as_str().context("no name")?;
        turn_is_over(&gateway, name, 1).await?;

        files_are_listed_read_and_written(&gateway, name).await?;

        let second = marker();
        let asks = json!([{ "tools": [bash("cat notes/style.md > copied.txt")] }, { "text": "Two." }]);
        let words = json!({ "id": "second", "text": prompt(&second, &asks) });
        let sent = carried_out(&gateway, &format!("/{name}/messages"), &words).await?;
        ensure!(sent["state"] == "done", "{sent}");
        let waits = |message: &Value| message["type"] == "agent.waiting";
        let question = message(&gateway, name, "the agent's question", waits).await?;
        ensure!(question["payload"]["permission"]["tool"] == "Bash", "{question}");
        let request = &question["payload"]["permission"]["requestId"];
        let (status, nothing) = gateway
            .ask(Method::GET, &format!("/{name}/workspace/copied.txt"), None)
            .await?;
        ensure!(
            status == StatusCode::NOT_FOUND,
            "the tool waits for the answer: {status}: {nothing}"
        );
        let allow = json!({ "requestId": request, "behavior": "allow" });
        let answered = carried_out(&gateway, &format!("/{name}/permissions"), &allow).await?;
        ensure!(answered["state"] == "done", "{answered}");
        turn_is_over(&gateway, name, 2).await?;
        let (status, copied) = gateway
            .ask(Method::GET, &format!("/{name}/workspace/copied.txt"), None)
            .await?;
        ensure!(
            status == StatusCode::OK && copied == "Be brief.\n",
            "{status}: {copied}"
        );
        let (status, again) = gateway
            .ask(Method::POST, &format!("/{name}/messages"), Some(&words))
            .await?;
        ensure!(
            status == StatusCode::ACCEPTED && again["state"] == "done",
            "{status}: {again}"
        );

        let (third, deny) = (
            marker(),
            json!([{ "tools": [bash("touch forbidden.txt")] }, { "text": "Three.", "hang": true }]),
        );
        carried_out(
            &gateway,
            &format!("/{name}/messages"),
            &json!({ "text": prompt(&third, &deny) }),
        )
        .await?;
        let waits = |message: &Value| message["type"] == "agent.waiting" && message["turn"] == 3;
        let question = message(&gateway, name, "the agent's second question", waits).await?;
        let request = &question["payload"]["permission"]["requestId"];
        let no = json!({ "requestId": request, "behavior": "deny", "message": "Not this file." });
        carried_out(&gateway, &format!("/{name}/permissions"), &no).await?;
        let told = mock.request(&first, SOON, |request| {
            let last = request.messages().last().map(ToString::to_string);
            last.is_some_and(|last| last.contains("tool_result") && last.contains("Not this file."))
        });
        ensure!(told.await?.user_messages_with(&third) == 1, "the model is told why");
        let stopped = carried_out(&gateway, &format!("/{name}/interrupt"), &json!({ "turn": 3 })).await?;
        ensure!(stopped["state"] == "done", "{stopped}");
        let over = turn_is_over(&gateway, name, 3).await?;
        ensure!(over["payload"]["turnEnded"]["outcome"] == "stoppedByUser", "{over}");
        let late = carried_out(&gateway, &format!("/{name}/interrupt"), &json!({ "turn": 3 })).await?;
        ensure!(late["state"] == "refused", "its turn is over: {late}");

        carried_out(&gateway, &format!("/{name}/end"), &json!({})).await?;
        let status = scene.phase(name, Phase::Completed).await?;
        ensure!(status.reason.as_deref() == Some("Completed"), "{status:#?}");
        for marker in [&first, &second, &third] {
            mock.said_once(&first, marker).await?;
        }
        complete_log(&gateway, name).await?;
        nobody_is_there(&gateway, name, "/start").await
    })
    .await
}

async fn files_are_listed_read_and_written(gateway: &Gateway, name: &str) -> Result<()> {
    let path = format!("/{name}/workspace/notes/style.md");
    let put = gateway.request(Method::PUT, &path).body("Be brief.\n").send().await?;
    let (status, said) = (put.status(), put.text().await?);
    ensure!(status.is_success(), "{status}: {said}");
    let (status, listed) = gateway
        .ask(Method::GET, &format!("/{name}/workspace/notes"), None)
        .await?;
    ensure!(
        status == StatusCode::OK && listed["items"][0]["name"] == "style.md" && listed["items"][0]["size"] == 10,
        "{status}: {listed}"
    );
    let part = gateway
        .request(Method::GET, &path)
        .header("range", "bytes=3-7")
        .send()
        .await?;
    ensure!(part.status() == StatusCode::PARTIAL_CONTENT, "{part:?}");
    ensure!(part.text().await? == "brief");
    for outside in ["..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd"] {
        let (status, answer) = gateway
            .ask(Method::GET, &format!("/{name}/workspace/{outside}"), None)
            .await?;
        ensure!(status.is_client_error(), "{outside}: {status}: {answer}");
    }
    Ok(())
}

/// Files and commands are for a session that runs; the answer says what to do.
async fn nobody_is_there(gateway: &Gateway, name: &str, to_do: &str) -> Result<()> {
    for (method, path, body) in [
        (Method::GET, "workspace/notes/style.md", None),
        (Method::POST, "messages", Some(json!({ "text": "Are you there?" }))),
        (Method::POST, "interrupt", Some(json!({ "turn": 1 }))),
        (Method::POST, "end", Some(json!({}))),
    ] {
        let (status, answer) = gateway.ask(method, &format!("/{name}/{path}"), body.as_ref()).await?;
        let said = answer["message"].as_str().unwrap_or_default();
        ensure!(
            status == StatusCode::CONFLICT && said.contains(name) && said.contains(to_do),
            "{path}: {status}: {answer}"
        );
    }
    Ok(())
}
