//! What a span is.

use jiff::Timestamp;
use protocol::{Outcome, Usage};
use serde_json::Value;

use super::text::CAP;

/// Id of a span.
pub type SpanId = [u8; 8];

/// What a span is, in Langfuse's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// The session, a turn, a sub-agent.
    Agent,
    /// A model call.
    Generation,
    /// A tool call.
    Tool,
    /// Something that happened at one time.
    Event,
}

/// How a span stands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Not at all.
    Default,
    /// Somebody should look.
    Warning,
    /// It failed.
    Error,
}

/// One complete span. It is made when it has ended and never changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Its id: the same for the same thing.
    pub id: SpanId,
    /// The span it belongs to.
    pub parent: Option<SpanId>,
    /// Its name: one of few.
    pub name: String,
    /// What it is.
    pub kind: SpanKind,
    /// When it began.
    pub start: Timestamp,
    /// When it ended.
    pub end: Timestamp,
    /// What went in.
    pub input: Option<String>,
    /// What came out.
    pub output: Option<String>,
    /// How it stands out.
    pub level: Level,
    /// Why.
    pub status: Option<String>,
    /// The model, of a generation.
    pub model: Option<String>,
    /// Tokens, of a generation.
    pub usage: Option<Usage>,
    /// When the first token came, of a generation.
    pub first_token: Option<Timestamp>,
    /// What else is known.
    pub metadata: Vec<(&'static str, Value)>,
}

impl Span {
    /// A span about which nothing else is known yet.
    pub fn new(
        kind: SpanKind,
        name: &str,
        id: SpanId,
        parent: Option<SpanId>,
        start: Timestamp,
        end: Timestamp,
    ) -> Self {
        Self {
            id,
            parent,
            name: name.to_owned(),
            kind,
            start,
            end: end.max(start),
            input: None,
            output: None,
            level: Level::Default,
            status: None,
            model: None,
            usage: None,
            first_token: None,
            metadata: Vec::new(),
        }
    }
}

/// What an outcome makes of a span.
pub fn judged(outcome: Outcome) -> (Level, Option<String>) {
    let level = match outcome {
        Outcome::Succeeded | Outcome::EndedByRequest | Outcome::Inactive => return (Level::Default, None),
        Outcome::Stopped | Outcome::StoppedByUser | Outcome::Running | Outcome::Superseded | Outcome::Lost => {
            return (Level::Warning, Some("interrupted".to_owned()));
        }
        _ => Level::Error,
    };
    let name = serde_json::to_value(outcome).ok();
    (level, name.and_then(|name| name.as_str().map(str::to_owned)))
}

/// Notes how long a text was that is cut.
pub fn note_length(metadata: &mut Vec<(&'static str, Value)>, key: &'static str, text: &str) {
    let length = text.chars().count();
    if length > CAP {
        metadata.retain(|(known, _)| *known != key);
        metadata.push((key, length.into()));
    }
}
