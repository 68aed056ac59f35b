//! An answer of the mock on its way, event by event.

use std::io;
use std::time::Duration;

use axum::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{self, MissedTickBehavior};

use super::answer::Answer;
use super::log::End;
use super::script::Place;
use super::server::Exchange;

/// The API keeps a quiet stream open with pings.
const PING: Duration = Duration::from_secs(5);

/// How long bytes take at most from a handler into the socket.
const FLUSHED: Duration = Duration::from_millis(30);

/// What breaks it off.
pub(super) enum Trouble {
    Cut,
    Error(String),
}

/// An answer on its way, event by event.
pub(super) struct Sending {
    pub(super) exchange: Exchange,
    pub(super) sender: mpsc::Sender<Result<Bytes, io::Error>>,
    pub(super) answer: Answer,
    pub(super) trouble: Option<Trouble>,
}

/// The client went away.
struct Gone;

impl Sending {
    pub(super) async fn run(mut self) {
        if let Ok(end) = self.events().await {
            self.exchange.end(end);
        }
    }

    async fn events(&mut self) -> Result<End, Gone> {
        let pace = Duration::from_millis(self.answer.step.chunk_ms);
        let mut waited = false;
        for event in self.answer.events() {
            let is_delta = event["type"] == "content_block_delta";
            if is_delta && !pace.is_zero() {
                tokio::select! {
                    () = time::sleep(pace) => {}
                    () = self.sender.closed() => return Err(Gone),
                }
            }
            self.send(&event).await?;
            if is_delta && !waited {
                waited = true;
                self.middle().await?;
                if let Some(end) = self.trouble().await? {
                    return Ok(end);
                }
            }
        }
        Ok(End::Complete)
    }

    /// Holds and hangs in the middle of the stream, with pings.
    async fn middle(&mut self) -> Result<(), Gone> {
        if self.answer.step.at != Place::Middle {
            return Ok(());
        }
        let waiting = self.exchange.wait(&self.answer.step);
        let mut waiting = std::pin::pin!(waiting);
        let mut pings = time::interval(PING);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut waiting => return Ok(()),
                () = self.sender.closed() => return Err(Gone),
                _ = pings.tick() => {
                    let ping = sse(&json!({ "type": "ping" }));
                    self.sender.send(Ok(ping)).await.map_err(|_| Gone)?;
                }
            }
        }
    }

    async fn trouble(&mut self) -> Result<Option<End>, Gone> {
        match self.trouble.take() {
            None => Ok(None),
            Some(Trouble::Cut) => {
                self.sender.send(cut().await).await.map_err(|_| Gone)?;
                Ok(Some(End::Cut))
            }
            Some(Trouble::Error(kind)) => {
                let error = json!({ "type": "error", "error": { "type": kind, "message": "The mock's error" } });
                self.send(&error).await?;
                Ok(Some(End::Cut))
            }
        }
    }

    async fn send(&self, event: &Value) -> Result<(), Gone> {
        self.sender.send(Ok(sse(event))).await.map_err(|_| Gone)
    }
}

/// What closes the connection, once the bytes before it are on their way: the server drops what it has not flushed.
pub(super) async fn cut() -> Result<Bytes, io::Error> {
    time::sleep(FLUSHED).await;
    Err(io::Error::other("cut as the script says"))
}

fn sse(event: &Value) -> Bytes {
    format!(
        "event: {}\ndata: {event}\n\n",
        event["type"].as_str().unwrap_or_default()
    )
    .into()
}
