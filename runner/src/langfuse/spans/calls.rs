//! Model calls and their numbers.

use jiff::Timestamp;
use protocol::{Record, record::UsageBody};
use serde_json::json;

use super::{
    super::{
        span::{Level, Span, SpanId, SpanKind},
        text,
    },
    MAX_METERED, Metered, Tracer,
};

impl Tracer {
    pub(super) fn usage(&mut self, record: &Record, body: UsageBody) {
        if self.metered.contains(&body.message_id) {
            return;
        }
        let parent = self.open_turn(record.turn, body.started_at);
        let metered = Metered {
            parent,
            body,
            aged: false,
        };
        self.usage.insert(metered.body.message_id.clone(), metered);
    }

    /// Makes the generations of calls that are over.
    pub(super) fn close_calls(&mut self) {
        for call in std::mem::take(&mut self.closed) {
            let metered = self.usage.remove(&call.message_id).map(|metered| metered.body);
            let output = json!({"role": "assistant", "content": call.texts.join("\n"), "tool_calls": call.tool_calls});
            let mut span = self.generation(
                &call.message_id,
                call.parent,
                call.start,
                call.end,
                &call.model,
                metered,
            );
            span.input = Some(text::json(&call.input.into()));
            span.output = Some(text::json(&output));
            self.ended.push(span);
        }
    }

    /// The generation of a metered response that the CLI never showed: a summary, a title, a response that was cut.
    pub(super) fn unseen(&mut self, message_id: &str) {
        if let Some(Metered { body, parent, .. }) = self.usage.remove(message_id) {
            let end = body.ended_at.unwrap_or(body.started_at);
            let model = body.model.clone();
            let span = self.generation(message_id, parent, body.started_at, end, &model, Some(body));
            self.ended.push(span);
        }
    }

    pub(super) fn generation(
        &mut self,
        message_id: &str,
        parent: SpanId,
        start: Timestamp,
        end: Timestamp,
        model: &str,
        metered: Option<UsageBody>,
    ) -> Span {
        let id = self.id("generation", message_id);
        if self.metered.len() >= MAX_METERED {
            self.metered.clear();
        }
        self.metered.insert(message_id.to_owned());
        let mut span = Span::new(SpanKind::Generation, "llm-call", id, Some(parent), start, end);
        // A suffix such as `[1m]` would keep Langfuse from finding the price.
        span.model = model
            .split('[')
            .next()
            .filter(|model| !model.is_empty())
            .map(str::to_owned);
        span.metadata = vec![("message_id", message_id.into())];
        if let Some(body) = metered {
            span.start = body.started_at;
            span.end = body.ended_at.unwrap_or(end).max(body.started_at);
            span.first_token = body.first_token_at;
            span.usage = Some(body.usage);
            if body.estimated || body.open {
                span.metadata.push(("estimated", true.into()));
                (span.level, span.status) = (Level::Warning, Some("the response was cut".to_owned()));
            }
        }
        span
    }
}
