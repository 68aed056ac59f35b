//! From an OTLP span to a Langfuse observation, by the rules of Langfuse's server.

use std::collections::BTreeMap;

use jiff::Timestamp;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::{Map, Value, json};

/// Types that Langfuse knows; anything else becomes a span.
const TYPES: &[&str] = &[
    "span",
    "generation",
    "event",
    "embedding",
    "agent",
    "tool",
    "chain",
    "retriever",
    "guardrail",
    "evaluator",
];

/// What Langfuse keeps of a span.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    /// Trace id, hexadecimal.
    pub trace: String,
    /// Span id, hexadecimal.
    pub id: String,
    /// Id of the parent span.
    pub parent: Option<String>,
    /// Type in capitals, such as `GENERATION`.
    pub kind: String,
    /// Name of the span, or of the tool.
    pub name: String,
    /// Start, nanoseconds since 1970.
    pub start: u64,
    /// End, nanoseconds since 1970.
    pub end: u64,
    /// `DEFAULT`, `DEBUG`, `WARNING` or `ERROR`.
    pub level: String,
    /// Message beside the level.
    pub status_message: Option<String>,
    /// Name of the model.
    pub model: Option<String>,
    /// When the first token came, RFC 3339.
    pub completion_start: Option<String>,
    /// Tokens by bucket; non-negative integers only.
    pub usage: BTreeMap<String, u64>,
    /// Input, as sent.
    pub input: Option<String>,
    /// Output, as sent.
    pub output: Option<String>,
    /// Metadata by key.
    pub metadata: Map<String, Value>,
    /// What the span says of its whole trace.
    pub of_trace: TraceWide,
    /// Whether it counts as a root although it has a parent.
    pub app_root: bool,
}

/// Attributes that each span repeats for its trace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TraceWide {
    /// Name of the trace.
    pub name: Option<String>,
    /// Session.
    pub session: Option<String>,
    /// User.
    pub user: Option<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Environment; `default` where none is given.
    pub environment: String,
    /// Release.
    pub release: Option<String>,
    /// Trace metadata by key.
    pub metadata: Map<String, Value>,
}

/// Maps a span. The error says what makes Langfuse refuse the whole export.
pub fn observation(span: &Span, resource: &[KeyValue]) -> Result<Observation, String> {
    if span.trace_id.len() != 16 || span.span_id.len() != 8 || !matches!(span.parent_span_id.len(), 0 | 8) {
        return Err(format!("span {:?} has a malformed id", span.name));
    }
    let attributes = Attributes(&span.attributes);
    let explicit = attributes
        .text("langfuse.observation.type")
        .filter(|kind| TYPES.contains(&kind.as_str()));
    let model = [
        "langfuse.observation.model.name",
        "gen_ai.response.model",
        "gen_ai.request.model",
    ];
    let model = model.into_iter().find_map(|name| attributes.text(name));
    let guessed = if model.is_some() { "generation" } else { "span" };
    let failed = span.status.as_ref().is_some_and(|status| status.code == 2);
    Ok(Observation {
        trace: hex::encode(&span.trace_id),
        id: hex::encode(&span.span_id),
        parent: Some(hex::encode(&span.parent_span_id)).filter(|id| !id.is_empty()),
        kind: explicit.unwrap_or_else(|| guessed.to_owned()).to_uppercase(),
        name: attributes.text("gen_ai.tool.name").unwrap_or_else(|| span.name.clone()),
        start: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
        level: attributes
            .text("langfuse.observation.level")
            .unwrap_or_else(|| if failed { "ERROR" } else { "DEFAULT" }.to_owned()),
        status_message: attributes
            .text("langfuse.observation.status_message")
            .or_else(|| span.status.as_ref().map(|status| status.message.clone()))
            .filter(|message| !message.is_empty()),
        model,
        completion_start: attributes.text("langfuse.observation.completion_start_time"),
        usage: usage(attributes.text("langfuse.observation.usage_details").as_deref()),
        input: attributes.text("langfuse.observation.input"),
        output: attributes.text("langfuse.observation.output"),
        metadata: attributes.below("langfuse.observation.metadata"),
        of_trace: trace_wide(attributes, Attributes(resource)),
        app_root: attributes.value("langfuse.internal.is_app_root") == Some(json!(true)),
    })
}

fn trace_wide(span: Attributes<'_>, resource: Attributes<'_>) -> TraceWide {
    let first = |names: &[&str]| {
        names
            .iter()
            .find_map(|name| span.text(name).or_else(|| resource.text(name)))
    };
    let tags = match span.value("langfuse.trace.tags") {
        Some(Value::Array(tags)) => tags.iter().filter_map(|tag| tag.as_str().map(str::to_owned)).collect(),
        Some(Value::String(tags)) => tags.split(',').map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    TraceWide {
        name: span.text("langfuse.trace.name"),
        // Session and user are read from the span alone.
        session: ["langfuse.session.id", "session.id"]
            .into_iter()
            .find_map(|name| span.text(name)),
        user: ["langfuse.user.id", "user.id"]
            .into_iter()
            .find_map(|name| span.text(name)),
        tags,
        environment: environment(first(&["langfuse.environment", "deployment.environment.name"])),
        release: first(&["langfuse.release"]),
        metadata: span.below("langfuse.trace.metadata"),
    }
}

fn environment(given: Option<String>) -> String {
    let given = given.unwrap_or_default().to_lowercase();
    let valid = |text: &str| {
        !text.is_empty()
            && text
                .chars()
                .all(|letter| matches!(letter, 'a'..='z' | '0'..='9' | '-' | '_'))
            && !text.starts_with("langfuse")
    };
    if valid(&given) {
        given.chars().take(40).collect()
    } else {
        "default".to_owned()
    }
}

fn usage(given: Option<&str>) -> BTreeMap<String, u64> {
    let Some(Value::Object(buckets)) = given.and_then(|text| serde_json::from_str(text).ok()) else {
        return BTreeMap::new();
    };
    let number = |value: &Value| {
        value
            .as_u64()
            .or_else(|| value.as_str().and_then(|text| text.parse().ok()))
    };
    buckets
        .iter()
        .filter_map(|(name, value)| Some((name.clone(), number(value)?)))
        .collect()
}

#[derive(Clone, Copy)]
struct Attributes<'a>(&'a [KeyValue]);

impl Attributes<'_> {
    fn value(self, name: &str) -> Option<Value> {
        self.0
            .iter()
            .find(|attribute| attribute.key == name)
            .and_then(|attribute| plain(attribute.value.as_ref()))
    }

    fn text(self, name: &str) -> Option<String> {
        match self.value(name)? {
            Value::String(text) => Some(text),
            other => Some(other.to_string()),
        }
    }

    /// `<name>.<key>` attributes and the object in `<name>`.
    fn below(self, name: &str) -> Map<String, Value> {
        let mut found = Map::new();
        if let Some(Value::Object(whole)) = self.text(name).and_then(|text| serde_json::from_str(&text).ok()) {
            found.extend(whole);
        }
        for attribute in self.0 {
            let key = attribute.key.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'));
            if let (Some(key), Some(value)) = (key, plain(attribute.value.as_ref())) {
                found.insert(key.to_owned(), value);
            }
        }
        found
    }
}

fn plain(value: Option<&AnyValue>) -> Option<Value> {
    match value?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(json!(text)),
        any_value::Value::BoolValue(truth) => Some(json!(truth)),
        any_value::Value::IntValue(number) => Some(json!(number)),
        any_value::Value::DoubleValue(number) => Some(json!(number)),
        any_value::Value::ArrayValue(list) => Some(
            list.values
                .iter()
                .map(|value| plain(Some(value)).unwrap_or_default())
                .collect(),
        ),
        _ => None,
    }
}

impl Observation {
    fn time(nanoseconds: u64) -> Option<String> {
        Timestamp::from_nanosecond(i128::from(nanoseconds))
            .ok()
            .map(|time| time.to_string())
    }

    /// Start, RFC 3339.
    pub fn start_time(&self) -> Option<String> {
        Self::time(self.start)
    }

    /// Tokens of all buckets, unless the sender gave a `total`, which Langfuse believes.
    pub fn total_usage(&self) -> u64 {
        self.usage
            .get("total")
            .copied()
            .unwrap_or_else(|| self.usage.values().sum())
    }

    /// What both API versions say alike.
    fn common(&self) -> Value {
        json!({
            "id": self.id, "traceId": self.trace, "parentObservationId": self.parent, "type": self.kind,
            "name": self.name, "startTime": self.start_time(), "endTime": Self::time(self.end), "level": self.level,
            "statusMessage": self.status_message, "completionStartTime": self.completion_start,
            "usageDetails": self.usage, "metadata": self.metadata, "environment": self.of_trace.environment,
        })
    }

    /// As `GET /api/public/observations` gives it: input and output are parsed.
    pub fn v1(&self) -> Value {
        let mut found = self.common();
        let parsed = |text: &Option<String>| {
            text.as_ref()
                .map(|text| serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone())))
        };
        found["input"] = parsed(&self.input).into();
        found["output"] = parsed(&self.output).into();
        found["model"] = self.model.clone().into();
        let side = |word: &str| -> u64 {
            self.usage
                .iter()
                .filter(|(name, _)| name.contains(word))
                .map(|(_, tokens)| tokens)
                .sum()
        };
        found["usage"] = json!({
            "input": side("input"), "output": side("output"), "total": self.total_usage(), "unit": "TOKENS",
        });
        found
    }

    /// As `GET /api/public/v2/observations` gives it: input and output are the strings that were sent.
    pub fn v2(&self) -> Value {
        let mut found = self.common();
        found["input"] = self.input.clone().into();
        found["output"] = self.output.clone().into();
        found["providedModelName"] = self.model.clone().into();
        found["traceName"] = self.of_trace.name.clone().into();
        found["sessionId"] = self.of_trace.session.clone().into();
        found["userId"] = self.of_trace.user.clone().into();
        found["tags"] = self.of_trace.tags.clone().into();
        found["isRootObservation"] = (self.parent.is_none() || self.app_root).into();
        found
    }
}
