//! What the mock was asked, so that tests can look at every request.

use std::sync::{Mutex, MutexGuard, PoisonError};

use http::{HeaderMap, Method, Uri};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::refuse::{self, KeyPrint};
use super::script;

/// Requests kept at most; older ones are dropped.
const KEPT: usize = 10_000;

/// A request and how it ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Logged {
    /// Number of the request, from 1.
    pub id: u64,
    /// When it came, RFC 3339.
    pub at: String,
    /// HTTP method.
    pub method: String,
    /// Path, without the query.
    pub path: String,
    /// Query.
    pub query: Option<String>,
    /// The CLI's session id, from its header.
    pub session: Option<String>,
    /// Value of `anthropic-beta`.
    pub beta: Option<String>,
    /// Every credential that the request carried.
    pub keys: Vec<KeyPrint>,
    /// The body but for its bulk, which is `system` and `tools`.
    pub body: Value,
    /// Names of the tools.
    #[serde(default)]
    pub tools: Vec<String>,
    /// The end of the system prompt.
    #[serde(default)]
    pub system_end: String,
    /// Size of the whole body in bytes.
    pub bytes: usize,
    /// Step of the script that was asked for; none without a script.
    pub step: Option<usize>,
    /// Status of the answer; none before it began.
    pub status: Option<u16>,
    /// How the answer ended; none while it goes on.
    pub end: Option<End>,
}

impl Logged {
    /// The messages of the conversation; none where the request had none.
    pub fn messages(&self) -> &[Value] {
        self.body["messages"].as_array().map(Vec::as_slice).unwrap_or_default()
    }

    /// How many user messages have `marker` in one of their texts.
    pub fn user_messages_with(&self, marker: &str) -> usize {
        let users = self.messages().iter().filter(|message| message["role"] == "user");
        users
            .filter(|message| script::texts(message).iter().any(|text| text.contains(marker)))
            .count()
    }

    /// Whether it asks the model for a message.
    pub fn asks_for_message(&self) -> bool {
        let vertex = self.path.ends_with("awPredict") && !self.path.contains("count-tokens");
        self.method == "POST" && (self.path.ends_with("/messages") || vertex)
    }
}

/// The last characters of a system prompt, which is text or blocks of it.
fn end_of(system: &Value) -> String {
    const KEPT: usize = 500;
    let last = system.as_array().and_then(|blocks| blocks.last());
    let text = system
        .as_str()
        .or_else(|| last.and_then(|block| block["text"].as_str()))
        .unwrap_or_default();
    let from = text.chars().count().saturating_sub(KEPT);
    text.chars().skip(from).collect()
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It was sent whole.
    Complete,
    /// It was cut or broken off as the script says.
    Cut,
    /// The client went away before.
    ClientGone,
}

/// The requests so far.
#[derive(Debug)]
pub struct Log {
    entries: Mutex<(u64, Vec<Logged>)>,
    changes: watch::Sender<()>,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
            changes: watch::Sender::new(()),
        }
    }
}

impl Log {
    /// Notes a request; returns its number.
    pub fn begin(&self, method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> u64 {
        let header = |name: &str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let mut parsed: Value = serde_json::from_slice(body).unwrap_or_default();
        let tools = parsed["tools"].as_array().into_iter().flatten();
        let tools = tools
            .filter_map(|tool| Some(tool["name"].as_str()?.to_owned()))
            .collect();
        let system_end = end_of(&parsed["system"]);
        if let Some(fields) = parsed.as_object_mut() {
            fields.remove("system");
            fields.remove("tools");
        }
        let mut entries = self.lock();
        entries.0 += 1;
        let id = entries.0;
        if entries.1.len() == KEPT {
            entries.1.remove(0);
        }
        entries.1.push(Logged {
            id,
            at: jiff::Timestamp::now().to_string(),
            method: method.to_string(),
            path: uri.path().to_owned(),
            query: uri.query().map(str::to_owned),
            session: header("x-claude-code-session-id"),
            beta: header("anthropic-beta"),
            keys: refuse::prints(headers),
            body: parsed,
            tools,
            system_end,
            bytes: body.len(),
            step: None,
            status: None,
            end: None,
        });
        drop(entries);
        self.changes.send_replace(());
        id
    }

    /// Changes the entry `id`, if it is still there.
    pub fn change(&self, id: u64, change: impl FnOnce(&mut Logged)) {
        if let Some(entry) = self.lock().1.iter_mut().find(|entry| entry.id == id) {
            change(entry);
        }
        self.changes.send_replace(());
    }

    /// All entries, oldest first.
    pub fn all(&self) -> Vec<Logged> {
        self.lock().1.clone()
    }

    /// Forgets all entries.
    pub fn clear(&self) {
        self.lock().1.clear();
    }

    /// Tells of every change from now on.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, (u64, Vec<Logged>)> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
