//! Spans as an OTLP request, with the attributes that Langfuse reads.

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span as OtlpSpan, Status, span, status::StatusCode},
};
use prost::Message as _;
use serde_json::{Map, Value};

use super::{
    LangfuseConfig,
    span::{Level, Span, SpanKind},
    text::cut,
};

/// Most characters of what Langfuse files a trace under.
const NAME_CAP: usize = 200;

/// What every span of a session says: Langfuse has no other place for it.
#[derive(Clone, Debug)]
pub struct Trace {
    id: [u8; 16],
    attributes: Vec<KeyValue>,
}

impl Trace {
    /// The trace of a session.
    pub fn new(config: &LangfuseConfig) -> Self {
        let name = cut(&config.session_name, NAME_CAP);
        let mut tags = vec![format!("namespace:{}", config.namespace)];
        tags.extend(config.tags.iter().cloned());
        let mut attributes = vec![
            text("langfuse.trace.name", name.clone()),
            text("langfuse.session.id", name),
            attribute("langfuse.trace.tags", list(tags)),
            text("langfuse.trace.metadata.namespace", config.namespace.clone()),
            text("langfuse.trace.metadata.session_uid", config.session_uid.clone()),
        ];
        if let Some(user) = &config.user {
            let id = if user.user_id.is_empty() {
                &user.display_name
            } else {
                &user.user_id
            };
            if !id.is_empty() {
                attributes.push(text("langfuse.user.id", cut(id, NAME_CAP)));
            }
            if !user.groups.is_empty() {
                attributes.push(text("langfuse.trace.metadata.user_groups", user.groups.join(", ")));
            }
        }
        Self {
            id: protocol::identity::trace_id_bytes(&config.session_uid),
            attributes,
        }
    }

    /// The request that carries these spans: protobuf, gzip.
    pub fn encoded(&self, spans: &[Span]) -> Vec<u8> {
        let bytes = self.request(spans).encode_to_vec();
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        // Writing to memory does not fail.
        let _ = gzip.write_all(&bytes);
        gzip.finish().unwrap_or_default()
    }

    fn request(&self, spans: &[Span]) -> ExportTraceServiceRequest {
        let scope = InstrumentationScope {
            name: "agentic-runner".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        let resource = Resource {
            attributes: vec![
                text("service.name", "agentic-runner".to_owned()),
                text("service.version", env!("CARGO_PKG_VERSION").to_owned()),
            ],
            ..Default::default()
        };
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(resource),
                scope_spans: vec![ScopeSpans {
                    scope: Some(scope),
                    spans: spans.iter().map(|span| self.span(span)).collect(),
                    ..Default::default()
                }],
                ..Default::default()
            }],
        }
    }

    fn span(&self, span: &Span) -> OtlpSpan {
        let mut attributes = self.attributes.clone();
        attributes.extend(own(span));
        OtlpSpan {
            trace_id: self.id.to_vec(),
            span_id: span.id.to_vec(),
            parent_span_id: span.parent.map(|id| id.to_vec()).unwrap_or_default(),
            name: span.name.clone(),
            kind: span::SpanKind::Internal.into(),
            start_time_unix_nano: nanos(span.start),
            end_time_unix_nano: nanos(span.end),
            attributes,
            status: (span.level == Level::Error).then(|| Status {
                message: span.status.clone().unwrap_or_default(),
                code: StatusCode::Error.into(),
            }),
            ..Default::default()
        }
    }
}

/// What one span says of itself.
fn own(span: &Span) -> Vec<KeyValue> {
    let kind = match span.kind {
        SpanKind::Agent => "agent",
        SpanKind::Generation => "generation",
        SpanKind::Tool => "tool",
        SpanKind::Event => "event",
    };
    let level = match span.level {
        Level::Default => "DEFAULT",
        Level::Warning => "WARNING",
        Level::Error => "ERROR",
    };
    let mut attributes = vec![
        text("langfuse.observation.type", kind.to_owned()),
        text("langfuse.observation.level", level.to_owned()),
    ];
    let usage = span.usage.map(|usage| {
        serde_json::json!({
            "input": usage.input_tokens,
            "output": usage.output_tokens,
            "cache_read_input_tokens": usage.cache_read_input_tokens,
            "cache_creation_input_tokens": usage.cache_creation_input_tokens,
        })
        .to_string()
    });
    let metadata: Map<String, Value> = span
        .metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()))
        .collect();
    let optional = [
        ("langfuse.observation.input", span.input.clone()),
        ("langfuse.observation.output", span.output.clone()),
        ("langfuse.observation.status_message", span.status.clone()),
        ("langfuse.observation.model.name", span.model.clone()),
        ("langfuse.observation.usage_details", usage),
        (
            "langfuse.observation.completion_start_time",
            // Outside of the span it would read as a negative time.
            span.first_token
                .map(|at| format!("{:.3}", at.clamp(span.start, span.end))),
        ),
        (
            "langfuse.observation.metadata",
            (!metadata.is_empty()).then(|| Value::from(metadata).to_string()),
        ),
    ];
    attributes.extend(
        optional
            .into_iter()
            .filter_map(|(key, value)| value.map(|value| text(key, value))),
    );
    attributes
}

fn nanos(at: Timestamp) -> u64 {
    u64::try_from(at.as_nanosecond()).unwrap_or(0)
}

fn text(key: &str, value: String) -> KeyValue {
    attribute(key, any_value::Value::StringValue(value))
}

fn list(values: Vec<String>) -> any_value::Value {
    any_value::Value::ArrayValue(ArrayValue {
        values: values
            .into_iter()
            .map(|value| AnyValue {
                value: Some(any_value::Value::StringValue(value)),
            })
            .collect(),
    })
}

fn attribute(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..Default::default()
    }
}
