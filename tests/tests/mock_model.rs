//! The mock model API over HTTP: what the product's tests rely on when they script it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use tests::http::client;
use tests::model::{End, FAKE_KEY, MockModel, script};

const SOON: Duration = Duration::from_secs(10);

async fn ask(client: &Client, model: &MockModel, steps: &Value, stream: bool) -> reqwest::Result<Response> {
    let body = json!({
        "model": "claude-opus-5-5", "max_tokens": 100, "stream": stream,
        "messages": [{ "role": "user", "content": script::prompt("Do it.", steps) }],
    });
    let request = client
        .post(format!("{}/v1/messages?beta=true", model.url()))
        .json(&body);
    request
        .header("x-api-key", FAKE_KEY)
        .header("anthropic-version", "2023-06-01")
        .send()
        .await
}

#[tokio::test]
async fn an_error_lasts_as_long_as_the_script_says() -> Result<()> {
    let (client, model) = (client(), MockModel::start().await?);
    let steps = json!([{ "error": { "status": 529, "times": 2 }, "headers": { "retry-after": "3" }, "text": "fine" }]);
    for _ in 0..2 {
        let answer = ask(&client, &model, &steps, true).await?;
        ensure!(
            answer.status() == 529 && answer.headers()["retry-after"] == "3",
            "{answer:?}"
        );
        let body: Value = answer.json().await?;
        ensure!(body["error"]["type"] == "overloaded_error", "{body}");
    }
    let answer: Value = ask(&client, &model, &steps, false).await?.json().await?;
    ensure!(answer["content"][0]["text"] == "fine", "{answer}");
    let ends: Vec<_> = model
        .requests()
        .iter()
        .map(|request| (request.status, request.end))
        .collect();
    ensure!(
        ends == [
            (Some(529), Some(End::Complete)),
            (Some(529), Some(End::Complete)),
            (Some(200), Some(End::Complete))
        ]
    );
    Ok(())
}

#[tokio::test]
async fn a_cut_answer_breaks_off_streamed_or_not() -> Result<()> {
    let (client, model) = (client(), MockModel::start().await?);
    let steps = json!([{ "text": "a text that is longer than one chunk of the stream is", "cut": {} }]);
    for stream in [true, false] {
        let read = ask(&client, &model, &steps, stream).await?.bytes().await;
        ensure!(read.is_err(), "the body must break off: {read:?}");
    }
    ensure!(model.requests().iter().all(|request| request.end == Some(End::Cut)));
    Ok(())
}

#[tokio::test]
async fn a_broken_stream_says_so_in_an_event() -> Result<()> {
    let (client, model) = (client(), MockModel::start().await?);
    let steps = json!([{ "text": "x", "sse_error": { "type": "overloaded_error" } }]);
    let text = ask(&client, &model, &steps, true).await?.text().await?;
    ensure!(
        text.contains("event: error\n") && text.contains("overloaded_error"),
        "{text}"
    );
    ensure!(!text.contains("message_stop"), "{text}");
    Ok(())
}

#[tokio::test]
async fn an_answer_is_held_in_mid_stream_until_released() -> Result<()> {
    let (client, model) = (client(), MockModel::start().await?);
    let steps = json!([{ "text": "held", "chunk_chars": 2, "hold": "a", "at": "middle" }]);
    let mut answer = ask(&client, &model, &steps, true).await?;
    let mut seen = String::new();
    while !seen.contains("event: ping") {
        seen += std::str::from_utf8(&answer.chunk().await?.context("the stream ended")?)?;
    }
    ensure!(
        seen.contains(r#""text":"he""#) && !seen.contains(r#""text":"ld""#),
        "{seen}"
    );
    model.release("a");
    let rest = answer.text().await?;
    ensure!(
        rest.contains(r#""text":"ld""#) && rest.contains("message_stop"),
        "{rest}"
    );
    Ok(())
}

#[tokio::test]
async fn a_client_that_goes_away_is_noted() -> Result<()> {
    let (client, model) = (client(), MockModel::start().await?);
    for (steps, stream) in [
        (json!([{ "hang": true }]), false),
        (json!([{ "text": "x", "hang": true, "at": "middle" }]), true),
    ] {
        model.reset();
        let asking = tokio::time::timeout(Duration::from_millis(200), async {
            ask(&client, &model, &steps, stream).await?.bytes().await
        });
        ensure!(asking.await.is_err(), "the answer hangs");
        let gone = model
            .request(SOON, |request| request.end == Some(End::ClientGone))
            .await;
        ensure!(gone.is_some(), "{:?}", model.requests());
    }
    Ok(())
}

#[tokio::test]
async fn keys_are_logged_as_length_and_hash_only() -> Result<()> {
    let (client, model) = (client(), MockModel::start().await?);
    let wrong = "sk-ant-fake-wrong-key";
    let answer = client
        .get(format!("{}/v1/models", model.url()))
        .header("x-api-key", wrong)
        .send()
        .await?;
    ensure!(answer.status() == 401);
    ensure!(
        client
            .get(format!("{}/v1/complete", model.url()))
            .send()
            .await?
            .status()
            == 404
    );
    let log = client
        .get(format!("{}/__mock/requests", model.url()))
        .send()
        .await?
        .text()
        .await?;
    ensure!(!log.contains(wrong), "{log}");
    ensure!(model.requests()[0].keys[0].length == wrong.len(), "{log}");
    ensure!(
        model.requests()[1].path == "/v1/complete",
        "unknown paths are logged too: {log}"
    );
    Ok(())
}
