//! What the product builds on, shown with the real CLI and the mock model: when one of these fails after a change of the
//! CLI's version, the part that relies on it has to change too.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::cli::{Cli, Home};
use tests::model::{Logged, MockModel, script};
use tokio::time::Instant;
use uuid::Uuid;

const SOON: Duration = Duration::from_mins(1);

fn prompt(text: &str, steps: &Value) -> String {
    script::prompt(text, steps)
}

fn id() -> String {
    Uuid::new_v4().to_string()
}

fn user_lines(transcript: &[Value], uuid: &str) -> usize {
    transcript
        .iter()
        .filter(|line| line["type"] == "user" && line["uuid"] == uuid)
        .count()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !holds() {
        ensure!(Instant::now() < deadline, "not in {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn is_asked(request: &Logged) -> bool {
    request.asks_for_message()
}

#[tokio::test]
async fn the_transcript_has_the_uuid_of_a_message_before_the_model_answers() -> Result<()> {
    let (model, home, session, message) = (MockModel::start().await?, Home::new()?, id(), id());
    let mut cli = Cli::start(&home, &model.url(), &["--session-id", &session], &[])?;
    cli.user(
        &message,
        &prompt("Wait.", &json!([{ "hold": "answer", "text": "done" }])),
    )
    .await?;

    let asked = model.request(SOON, is_asked).await.context("the model was not asked")?;
    ensure!(asked.end.is_none(), "the model must not have answered yet");
    eventually("the line is in the transcript", || {
        user_lines(&home.transcript(&session), &message) == 1
    })
    .await?;
    ensure!(
        model.requests()[0].end.is_none(),
        "the line was written while the model call was open"
    );

    model.release("answer");
    let result = cli.result(SOON).await?;
    ensure!(result["result"] == "done", "{result}");
    ensure!(result["user_message_uuids"] == json!([message]), "{result}");
    ensure!(
        user_lines(&home.transcript(&session), &message) == 1,
        "the line is there once"
    );
    ensure!(cli.finish(SOON).await?.success());
    Ok(())
}

/// The environment with which a cut turn goes on by itself.
const RESUME: &[(&str, &str)] = &[("CLAUDE_CODE_RESUME_INTERRUPTED_TURN", "1")];
const MARKER: &str = "marker-4711";

fn is_running(line: &Value) -> bool {
    line["subtype"] == "session_state_changed" && line["state"] == "running"
}

fn once_in_every_request(model: &MockModel) -> Result<()> {
    let asked: Vec<_> = model.requests().into_iter().filter(is_asked).collect();
    for request in &asked {
        let found = request.user_messages_with(MARKER);
        ensure!(
            found == 1,
            "{found} messages with the marker in request {}: {:#?}",
            request.id,
            request.messages()
        );
    }
    ensure!(!asked.is_empty(), "there was no request");
    Ok(())
}

#[tokio::test]
async fn a_turn_killed_during_a_model_call_goes_on_by_itself_after_resume() -> Result<()> {
    let (model, home, session, message) = (MockModel::start().await?, Home::new()?, id(), id());
    let mut cli = Cli::start(&home, &model.url(), &["--session-id", &session], &[])?;
    cli.user(
        &message,
        &prompt(MARKER, &json!([{ "hold": "answer", "text": "done" }])),
    )
    .await?;
    model.request(SOON, is_asked).await.context("the model was not asked")?;
    eventually("the line is in the transcript", || {
        user_lines(&home.transcript(&session), &message) == 1
    })
    .await?;
    cli.kill().await?;

    model.release("answer");
    let mut resumed = Cli::start(&home, &model.url(), &["--resume", &session], RESUME)?;
    resumed.until(SOON, is_running).await?;
    let result = resumed.result(SOON).await?;
    ensure!(result["result"] == "done" && result["is_error"] == false, "{result}");
    ensure!(result["session_id"] == session, "the CLI session keeps its id");
    ensure!(result["resume_reason"] == "interrupted_turn", "{result}");
    ensure!(
        result["user_message_uuids"] == json!([message]),
        "the result names the cut message: {result}"
    );
    let added = home
        .transcript(&session)
        .into_iter()
        .filter(|line| line["isMeta"] == true && line["type"] == "user");
    let added: Vec<_> = added.map(|line| line["message"]["content"].to_string()).collect();
    ensure!(
        added
            .iter()
            .any(|text| text.contains("Continue from where you left off.")),
        "{added:?}"
    );
    once_in_every_request(&model)?;
    ensure!(resumed.finish(SOON).await?.success());
    Ok(())
}

#[tokio::test]
async fn a_tool_call_cut_by_a_kill_is_asked_for_again_after_resume() -> Result<()> {
    let (model, home, session, message) = (MockModel::start().await?, Home::new()?, id(), id());
    // The kill leaves the tool alive, so it ends with its folder.
    let command = "echo run >> runs.txt; [ $(wc -l < runs.txt) -gt 1 ] || while [ -e runs.txt ]; do sleep 0.1; done";
    let steps = json!([{ "tools": [{ "name": "Bash", "input": { "command": command } }] }, { "text": "done" }]);
    let mut cli = Cli::start(&home, &model.url(), &["--session-id", &session], &[])?;
    cli.user(&message, &prompt(MARKER, &steps)).await?;
    let runs = home.work().join("runs.txt");
    eventually("the tool runs", || runs.exists()).await?;
    let calls = || {
        home.transcript(&session)
            .iter()
            .filter(|line| line["type"] == "assistant")
            .count()
    };
    eventually("the call is in the transcript", || calls() == 1).await?;
    cli.kill().await?;

    let mut resumed = Cli::start(&home, &model.url(), &["--resume", &session], RESUME)?;
    resumed.until(SOON, is_running).await?;
    let result = resumed.result(SOON).await?;
    ensure!(result["result"] == "done" && result["is_error"] == false, "{result}");
    ensure!(result["resume_reason"] == "interrupted_turn", "{result}");
    let steps: Vec<_> = model
        .requests()
        .iter()
        .filter(|request| is_asked(request))
        .map(|request| request.step)
        .collect();
    ensure!(
        steps == [Some(0), Some(0), Some(1)],
        "the cut call is dropped and asked for again: {steps:?}"
    );
    ensure!(
        std::fs::read_to_string(&runs)?.lines().count() == 2,
        "the tool ran once for each kill and once more"
    );
    ensure!(
        result["user_message_uuids"] == json!([message]),
        "the result names the cut message: {result}"
    );
    once_in_every_request(&model)
}

#[tokio::test]
async fn an_interrupted_turn_is_not_taken_up_again_after_resume() -> Result<()> {
    let (model, home, session, follow_up) = (MockModel::start().await?, Home::new()?, id(), id());
    let mut cli = Cli::start(&home, &model.url(), &["--session-id", &session], &[])?;
    cli.user(&id(), &prompt(MARKER, &json!([{ "hold": "for ever" }])))
        .await?;
    model.request(SOON, is_asked).await.context("the model was not asked")?;
    let interrupt = json!({ "type": "control_request", "request_id": "i1", "request": { "subtype": "interrupt" } });
    cli.send(&interrupt).await?;
    ensure!(cli.result(SOON).await?["is_error"] == true);
    cli.kill().await?;

    let mut resumed = Cli::start(&home, &model.url(), &["--resume", &session], RESUME)?;
    resumed
        .user(&follow_up, &prompt("and now?", &json!([{ "text": "answered" }])))
        .await?;
    let result = resumed.result(SOON).await?;
    ensure!(result["result"] == "answered", "{result}");
    ensure!(result["user_message_uuids"] == json!([follow_up]), "{result}");
    let asked = model.requests().into_iter().filter(is_asked).count();
    ensure!(asked == 2, "{asked} requests, one for each message expected");
    Ok(())
}

#[tokio::test]
async fn a_session_without_transcript_cannot_be_resumed() -> Result<()> {
    let (model, home) = (MockModel::start().await?, Home::new()?);
    let mut cli = Cli::start(&home, &model.url(), &["--resume", &id()], RESUME)?;
    let result = cli.result(SOON).await?;
    ensure!(
        result["subtype"] == "error_during_execution" && result["is_error"] == true,
        "{result}"
    );
    ensure!(cli.seen.len() == 1, "nothing comes before it: {:#?}", cli.seen);
    ensure!(cli.finish(SOON).await?.code() == Some(1));
    Ok(())
}

#[tokio::test]
async fn a_finished_turn_is_not_taken_up_again_after_resume() -> Result<()> {
    let (model, home, session, follow_up) = (MockModel::start().await?, Home::new()?, id(), id());
    let mut cli = Cli::start(&home, &model.url(), &["--session-id", &session], &[])?;
    cli.user(
        &id(),
        &prompt(MARKER, &json!([{ "text": "first" }, { "text": "second" }])),
    )
    .await?;
    ensure!(cli.result(SOON).await?["result"] == "first");
    ensure!(cli.finish(SOON).await?.success());

    let mut resumed = Cli::start(&home, &model.url(), &["--resume", &session], RESUME)?;
    resumed.user(&follow_up, "and now?").await?;
    let result = resumed.result(SOON).await?;
    ensure!(result["result"] == "second", "{result}");
    ensure!(
        result["user_message_uuids"] == json!([follow_up]),
        "the first result is the follow-up's: {result}"
    );
    ensure!(
        model.requests().into_iter().filter(is_asked).count() == 2,
        "one request for each message"
    );
    once_in_every_request(&model)
}

#[tokio::test]
async fn max_tokens_and_temperature_reach_the_request() -> Result<()> {
    let (model, home) = (MockModel::start().await?, Home::new()?);
    let environment = [
        ("CLAUDE_CODE_MAX_OUTPUT_TOKENS", "1234"),
        ("CLAUDE_CODE_DISABLE_THINKING", "1"),
        ("CLAUDE_CODE_EXTRA_BODY", r#"{"temperature":0.2}"#),
    ];
    let mut cli = Cli::start(&home, &model.url(), &[], &environment)?;
    cli.user(&id(), "hello").await?;
    let result = cli.result(SOON).await?;
    ensure!(result["is_error"] == false, "{result}");
    let request = model.request(SOON, is_asked).await.context("the model was not asked")?;
    ensure!(request.body["max_tokens"] == 1234, "{}", request.body);
    ensure!(request.body["temperature"] == json!(0.2), "{}", request.body);
    ensure!(request.body.get("thinking").is_none(), "{}", request.body);
    Ok(())
}

#[tokio::test]
async fn a_temperature_beside_thinking_is_refused() -> Result<()> {
    let (model, home) = (MockModel::start().await?, Home::new()?);
    let mut cli = Cli::start(
        &home,
        &model.url(),
        &[],
        &[("CLAUDE_CODE_EXTRA_BODY", r#"{"temperature":0.2}"#)],
    )?;
    cli.user(&id(), "hello").await?;
    let result = cli.result(SOON).await?;
    ensure!(
        result["is_error"] == true && result["api_error_status"] == 400,
        "{result}"
    );
    Ok(())
}
