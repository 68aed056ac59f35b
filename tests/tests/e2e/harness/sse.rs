//! Server-sent events, read as a browser does.

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use reqwest::Response;
use serde_json::Value;
use tokio::time;

use super::wait::SOON;

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `id:`, which records have and nothing else has.
    pub id: Option<String>,
    /// `event:`.
    pub kind: String,
    /// `data:`.
    pub data: String,
}

impl Event {
    /// The seq in the id.
    pub fn seq(&self) -> Option<u64> {
        self.id.as_ref()?.rsplit('/').next()?.parse().ok()
    }

    /// The data as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.data).with_context(|| format!("data is not JSON: {}", self.data))
    }
}

/// Reads a stream to its `close` event; the close is the last of the result.
pub async fn to_the_close(response: Response) -> Result<Vec<Event>> {
    ensure!(response.status().is_success(), "the stream was refused: {response:?}");
    let mut events = Vec::new();
    let reading = read(response, |event| {
        events.push(event.clone());
        event.kind == "close"
    });
    let closed = time::timeout(SOON, reading)
        .await
        .unwrap_or_else(|_| bail!("no `close` within {SOON:?}"))?;
    ensure!(closed, "the stream ended without `close`: {events:#?}");
    Ok(events)
}

/// Takes events until one is enough. `false`: the stream ended first.
pub async fn read(response: Response, mut take: impl FnMut(&Event) -> bool) -> Result<bool> {
    let mut text = String::new();
    let mut chunks = response.bytes_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.next().await {
        bytes.extend_from_slice(&chunk.context("the stream broke off")?);
        // A chunk may end within a character.
        let valid = match std::str::from_utf8(&bytes) {
            Ok(whole) => whole.len(),
            Err(error) => error.valid_up_to(),
        };
        text += &String::from_utf8_lossy(&bytes[..valid]);
        bytes.drain(..valid);
        while let Some(end) = text.find("\n\n") {
            let event = parse(&text[..end]);
            text.drain(..end + 2);
            if event.is_some_and(|event| take(&event)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The records among the events.
pub fn records(events: &[Event]) -> Vec<Event> {
    events.iter().filter(|event| event.id.is_some()).cloned().collect()
}

fn parse(block: &str) -> Option<Event> {
    let (mut id, mut kind, mut data) = (None, None, Vec::new());
    for line in block.lines() {
        match line.split_once(": ") {
            Some(("id", value)) => id = Some(value.to_owned()),
            Some(("event", value)) => kind = Some(value.to_owned()),
            Some(("data", value)) => data.push(value),
            // A comment keeps the connection open.
            _ => {}
        }
    }
    Some(Event {
        id,
        kind: kind?,
        data: data.join("\n"),
    })
}
