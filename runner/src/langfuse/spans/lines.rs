//! Lines of the CLI.

use protocol::Record;
use serde_json::{Value, json};

use super::{
    super::{
        line::{Line, Message},
        span::{Level, Span, SpanId, SpanKind, note_length},
        text::{self, STATUS_CAP},
    },
    Call, MAX_CLOSED, MAX_ID, Tracer,
};

impl Tracer {
    pub(super) fn line(&mut self, record: &Record, line: &Line<'_>) {
        match (line.kind.as_str(), line.subtype.as_deref()) {
            ("assistant", _) => {
                if let Some(message) = line.message() {
                    self.assistant(record, line, message);
                }
            }
            ("user", _) if !line.is_replay => {
                if let Some(message) = line.message() {
                    self.tool_results(record, line, &message);
                }
            }
            ("result", _) => self.result(record, line),
            ("system", Some("init")) => {
                let version = line.claude_code_version.clone();
                let root = self.open_root(record.ts);
                if let Some(version) = version.filter(|_| root.metadata.iter().all(|(key, _)| *key != "cli_version")) {
                    root.metadata.push(("cli_version", version.into()));
                }
            }
            ("system", Some("task_started")) => self.task_started(line),
            ("system", Some("task_notification")) => self.task_ended(record, line),
            ("system", Some("api_retry")) => {
                let status = line
                    .error_status
                    .map_or("network".to_owned(), |status| status.to_string());
                let text = format!("attempt {}: {status}", line.attempt.unwrap_or(0));
                self.event(record, line, "api-retry", Level::Warning, Some(text), None);
            }
            ("system", Some("permission_denied")) => {
                let tool = line.tool_name.clone();
                self.event(record, line, "permission-denied", Level::Warning, tool, None);
            }
            ("system", Some("compact_boundary")) => self.event(record, line, "compact", Level::Default, None, None),
            _ => {}
        }
    }

    pub(super) fn assistant(&mut self, record: &Record, line: &Line<'_>, message: Message) {
        let text = text::of_content(&message.content);
        if message.model == "<synthetic>" || message.id.is_empty() || message.id.len() > MAX_ID {
            // The CLI's own words: an error of the API, or what a local command printed.
            let shown = self.shown(&text);
            if line.is_api_error_message {
                if let Some(turn) = &mut self.turn {
                    turn.span.status = Some(text::cut(&shown, STATUS_CAP));
                }
                self.event(record, line, "api-error", Level::Error, Some(shown), None);
            } else {
                self.event(record, line, "local-message", Level::Default, None, Some(shown));
            }
            return;
        }
        let parent = self.parent(record, line);
        let before = self.lanes.get(&line.parent_tool_use_id).and_then(|lane| lane.last);
        let began = before.unwrap_or(record.ts);
        let talk = self.lane(line.parent_tool_use_id.clone(), record.ts);
        let mut call = match talk.call.take() {
            Some(call) if call.message_id == message.id => call,
            earlier => {
                let input = talk.heard();
                self.closed.extend(earlier);
                Call {
                    message_id: message.id,
                    model: message.model,
                    parent,
                    start: began,
                    end: record.ts,
                    input,
                    texts: Vec::new(),
                    tool_calls: Vec::new(),
                    size: 0,
                }
            }
        };
        call.end = record.ts;
        for block in message.content.as_array().into_iter().flatten() {
            match block["type"].as_str() {
                Some("text") => {
                    let shown = self.shown(block["text"].as_str().unwrap_or_default());
                    if call.takes(shown.len()) {
                        call.texts.push(shown);
                    }
                }
                Some("tool_use") => {
                    let arguments = self.arguments(&block["input"]);
                    let (id, name) = (block["id"].as_str(), block["name"].as_str().unwrap_or("tool"));
                    let name = &text::cut(name, STATUS_CAP);
                    if call.takes(arguments.len() + name.len()) {
                        call.tool_calls.push(json!({
                            "id": id, "type": "function", "function": {"name": name, "arguments": &arguments},
                        }));
                    }
                    self.tool_started(record.ts, parent, id.unwrap_or_default(), name, arguments);
                }
                _ => {}
            }
        }
        self.lane(line.parent_tool_use_id.clone(), record.ts).call = Some(call);
        if self.closed.len() > MAX_CLOSED {
            self.close_calls();
        }
    }

    pub(super) fn tool_results(&mut self, record: &Record, line: &Line<'_>, message: &Message) {
        let Some(blocks) = message.content.as_array() else {
            let shown = self.shown(&text::of_content(&message.content));
            let size = shown.len();
            self.said(record, line, json!({"role": "user", "content": shown}), size);
            return;
        };
        for block in blocks {
            let content = text::of_content(&block["content"]);
            let id = block["tool_use_id"].as_str();
            let Some(id) = id.filter(|_| block["type"] == "tool_result") else {
                let shown = self.shown(block["text"].as_str().unwrap_or_default());
                let size = shown.len();
                self.said(record, line, json!({"role": "user", "content": shown}), size);
                continue;
            };
            let shown = self.shown(&content);
            let said = json!({"role": "tool", "tool_call_id": id, "content": &shown});
            self.said(record, line, said, shown.len() + id.len());
            if self.tools.get(id).is_some_and(|tool| !tool.in_background) {
                let failed = block["is_error"].as_bool().unwrap_or(false);
                let status = failed.then(|| text::cut(&shown, STATUS_CAP));
                self.tool_ended(id, record.ts, Some((shown, content.as_str())), status, Level::Error);
            }
        }
    }

    /// A message that the next call of its conversation reads.
    fn said(&mut self, record: &Record, line: &Line<'_>, message: Value, size: usize) {
        self.parent(record, line);
        self.lane(line.parent_tool_use_id.clone(), record.ts)
            .said(message, size);
    }

    pub(super) fn result(&mut self, record: &Record, line: &Line<'_>) {
        let said = line
            .result
            .clone()
            .or_else(|| line.errors.as_ref().map(text::of_content));
        let shown = said.as_deref().map(|said| self.shown(said));
        self.open_turn(record.turn, record.ts);
        let Some(turn) = self.turn.as_mut().filter(|turn| !turn.ended) else {
            return;
        };
        if line.is_error {
            turn.span.level = Level::Error;
            turn.span.status = shown.as_deref().map(|shown| text::cut(shown, STATUS_CAP));
        }
        if let Some(said) = said {
            note_length(&mut turn.span.metadata, "output_length", &said);
        }
        turn.span.output = shown.or(turn.span.output.take());
        let told = [
            ("num_turns", line.num_turns.clone()),
            ("total_cost_usd", line.total_cost_usd.clone()),
            ("stop_reason", line.stop_reason.clone().map(Value::from)),
            ("terminal_reason", line.terminal_reason.clone().map(Value::from)),
        ];
        for (key, value) in told {
            turn.span.metadata.retain(|(known, _)| *known != key);
            turn.span.metadata.extend(value.map(|value| (key, value)));
        }
    }

    pub(super) fn event(
        &mut self,
        record: &Record,
        line: &Line<'_>,
        name: &str,
        level: Level,
        status: Option<String>,
        output: Option<String>,
    ) {
        let parent = self.parent(record, line);
        let id = self.id("event", &record.seq.to_string());
        let mut span = Span::new(SpanKind::Event, name, id, Some(parent), record.ts, record.ts);
        span.level = level;
        span.status = status.map(|status| text::cut(&status, STATUS_CAP));
        span.output = output;
        self.ended.push(span);
    }

    /// The span below which a line belongs: its turn, or the sub-agent that speaks.
    pub(super) fn parent(&mut self, record: &Record, line: &Line<'_>) -> SpanId {
        let turn = self.open_turn(record.turn, record.ts);
        match &line.parent_tool_use_id {
            None => turn,
            Some(id) => {
                if let Some(tool) = self.tools.get_mut(id) {
                    // Whoever speaks inside a tool call makes it an agent.
                    tool.span.kind = SpanKind::Agent;
                }
                self.id("tool", id)
            }
        }
    }

    pub(super) fn arguments(&self, input: &Value) -> String {
        if self.mask {
            text::json(&text::masked(input))
        } else {
            text::json(input)
        }
    }
}
