//! A client that follows a session.

use std::net::SocketAddr;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde_json::Value;

use super::{Served, soon};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub id: Option<String>,
    pub name: String,
    pub data: String,
}

impl Event {
    pub fn seq(&self) -> Option<u64> {
        self.id.as_ref()?.rsplit_once('/')?.1.parse().ok()
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap()
    }
}

pub struct Events {
    body: std::pin::Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
    text: String,
    /// Bytes of a character that is not whole yet.
    rest: Vec<u8>,
}

pub fn http() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

impl Events {
    pub async fn of(served: &Served, session: &str, token: &str, last_event_id: Option<&str>) -> Self {
        Self::at(served.address, session, token, last_event_id).await.unwrap()
    }

    pub async fn at(
        address: SocketAddr,
        session: &str,
        token: &str,
        last_event_id: Option<&str>,
    ) -> reqwest::Result<Self> {
        let url = format!("http://{address}/api/projects/team-a/agentic-sessions/{session}/events");
        let mut request = http().get(url).bearer_auth(token);
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        let response = request.send().await?.error_for_status()?;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Ok(Self {
            body: response.bytes_stream().boxed(),
            text: String::new(),
            rest: Vec::new(),
        })
    }

    /// The next event; `None` at the end of the body.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let event = parse(event);
                self.text = rest.into();
                match event {
                    Some(event) => return Some(event),
                    None => continue,
                }
            }
            // Broken off is over as well.
            let chunk = soon("an event", self.body.next()).await?.ok()?;
            self.rest.extend_from_slice(&chunk);
            let whole = self.rest.utf8_chunks().next().map_or(0, |part| part.valid().len());
            let whole: Vec<u8> = self.rest.drain(..whole).collect();
            assert!(self.rest.len() < 4, "not UTF-8");
            self.text.push_str(std::str::from_utf8(&whole).unwrap());
        }
    }

    /// The next event of a name; others are passed over.
    pub async fn wait(&mut self, name: &str) -> Event {
        loop {
            let event = self
                .next()
                .await
                .unwrap_or_else(|| panic!("the stream ended before {name}"));
            if event.name == name {
                return event;
            }
        }
    }

    /// All events to the end.
    pub async fn rest(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// `None`: a comment.
fn parse(text: &str) -> Option<Event> {
    let mut event = Event::default();
    let mut data: Vec<&str> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with(':')) {
        match line.split_once(": ").unwrap() {
            ("id", id) => event.id = Some(id.to_owned()),
            ("event", name) => event.name = name.into(),
            ("data", line) => data.push(line),
            other => panic!("{other:?}"),
        }
    }
    event.data = data.join("\n");
    (!event.name.is_empty()).then_some(event)
}
