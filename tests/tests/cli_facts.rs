//! What the product builds on, shown with the real CLI and the mock model: when one of these fails after a change of the
//! CLI's version, the part that relies on it has to change too.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::cli::{Cli, Home};
use tests::model::{End, Logged, MockModel, script};
use tokio::time::Instant;
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(60);

fn prompt(text: &str, steps: &Value) -> String {
    script::prompt(text, steps)
}

fn id() -> String {
    Uuid::new_v4().to_string()
}

fn user_lines(transcript: &[Value], uuid: &str) -> usize {
    transcript.iter().filter(|line| line["type"] == "user" && line["uuid"] == uuid).count()
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
    cli.user(&message, &prompt("Wait.", &json!([{ "hold": "answer", "text": "done" }]))).await?;

    let asked = model.request(SOON, is_asked).await.context("the model was not asked")?;
    ensure!(asked.end.is_none(), "the model must not have answered yet");
    eventually("the line is in the transcript", || user_lines(&home.transcript(&session), &message) == 1).await?;
    ensure!(model.requests()[0].end.is_none(), "the line was written while the model call was open");

    model.release("answer");
    let result = cli.result(SOON).await?;
    ensure!(result["result"] == "done", "{result}");
    ensure!(result["user_message_uuids"] == json!([message]), "{result}");
    ensure!(user_lines(&home.transcript(&session), &message) == 1, "the line is there once");
    ensure!(cli.finish(SOON).await?.success());
    Ok(())
}
