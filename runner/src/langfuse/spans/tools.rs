//! Tool calls, and the sub-agents that some of them start.

use jiff::Timestamp;
use protocol::Record;

use super::{
    super::{
        line::Line,
        span::{Level, Span, SpanId, SpanKind, note_length},
        text::{self, STATUS_CAP},
    },
    MAX_ID, MAX_TOOLS, Tool, Tracer,
};

impl Tracer {
    pub(super) fn tool_started(&mut self, now: Timestamp, parent: SpanId, id: &str, name: &str, arguments: String) {
        if self.tools.len() >= MAX_TOOLS || id.len() > MAX_ID {
            return;
        }
        let agent = matches!(name, "Agent" | "Task");
        let (kind, shown) = if agent {
            (SpanKind::Agent, "subagent")
        } else {
            (SpanKind::Tool, name)
        };
        let mut span = Span::new(kind, shown, self.id("tool", id), Some(parent), now, now);
        span.input = Some(arguments);
        span.metadata = vec![("tool_use_id", id.into())];
        let tool = Tool {
            span,
            in_background: false,
        };
        self.tools.insert(id.to_owned(), tool);
    }

    pub(super) fn tool_ended(
        &mut self,
        id: &str,
        now: Timestamp,
        output: Option<(String, &str)>,
        status: Option<String>,
        level: Level,
    ) {
        let Some(Tool { mut span, .. }) = self.tools.remove(id) else {
            return;
        };
        span.end = now.max(span.start);
        if let Some((shown, whole)) = output {
            note_length(&mut span.metadata, "output_length", whole);
            span.output = Some(shown);
        }
        if status.is_some() {
            (span.level, span.status) = (level, status);
        }
        if let Some(lane) = self.lanes.remove(&Some(id.to_owned())) {
            self.closed.extend(lane.call);
        }
        self.close_calls();
        self.ended.push(span);
    }

    pub(super) fn interrupt_tool(&mut self, id: &str, now: Timestamp) {
        self.tool_ended(id, now, None, Some("interrupted".to_owned()), Level::Warning);
    }

    pub(super) fn task_started(&mut self, line: &Line<'_>) {
        let Some(tool) = line.tool_use_id.as_ref().and_then(|id| self.tools.get_mut(id)) else {
            return;
        };
        if line.task_type.as_deref() == Some("local_agent") {
            tool.span.kind = SpanKind::Agent;
            tool.in_background = line.is_backgrounded;
            if let Some(kind) = &line.subagent_type {
                tool.span.metadata.retain(|(known, _)| *known != "subagent_type");
                let kind = text::cut(kind, STATUS_CAP);
                tool.span.metadata.push(("subagent_type", kind.into()));
            }
        }
    }

    pub(super) fn task_ended(&mut self, record: &Record, line: &Line<'_>) {
        let Some(id) = line.tool_use_id.clone() else { return };
        if self.tools.get(&id).is_some_and(|tool| tool.in_background) {
            let summary = line.summary.clone().unwrap_or_default();
            let status = line.status.clone().filter(|status| status != "completed");
            let shown = self.shown(&summary);
            self.tool_ended(&id, record.ts, Some((shown, &summary)), status, Level::Error);
        }
    }
}
