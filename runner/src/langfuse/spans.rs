//! Records to spans: a pure mapping. The same records give the same spans with the same ids.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use protocol::{
    Kind, Outcome, Record,
    record::{EndBody, SessionBody, UsageBody, UserBody},
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    line::{Line, Message},
    span::{Level, Span, SpanId, SpanKind, judged, note_length},
    text::{self, CAP, MASK, STATUS_CAP},
};

/// A model call, gathered from its lines.
struct Call {
    message_id: String,
    model: String,
    parent: SpanId,
    start: Timestamp,
    end: Timestamp,
    input: Vec<Value>,
    texts: Vec<String>,
    tool_calls: Vec<Value>,
}

/// A tool call, or the sub-agent that one started.
struct Tool {
    span: Span,
    /// It goes on after the tool's result.
    in_background: bool,
}

/// One conversation: the main one, or a sub-agent's.
#[derive(Default)]
struct Lane {
    /// Messages since the last call began.
    pending: Vec<Value>,
    call: Option<Call>,
    /// When something last happened: a call without numbers began then.
    last: Option<Timestamp>,
}

struct Turn {
    number: u32,
    span: Span,
    /// Its span is out; what comes still belongs below it.
    ended: bool,
}

/// A metered response that no line of the CLI has shown yet.
struct Metered {
    body: UsageBody,
    parent: SpanId,
    /// A turn has ended since.
    aged: bool,
}

/// Follows the records of a session.
pub struct Tracer {
    uid: String,
    run: u32,
    mask: bool,
    root: Option<Span>,
    /// What the run was asked first: shown again on the root of each of its attempts.
    asked: Option<String>,
    /// Run whose root is out already: another attempt of it has a root of its own.
    rooted_run: Option<u32>,
    turn: Option<Turn>,
    /// Last turn whose span is out.
    last_turn: u32,
    attempt: u32,
    /// By the tool call of a sub-agent; the main conversation has none.
    lanes: HashMap<Option<String>, Lane>,
    tools: HashMap<String, Tool>,
    closed: Vec<Call>,
    usage: HashMap<String, Metered>,
    /// Message ids whose generation is made.
    metered: HashSet<String>,
    /// Ended spans of the turn that is open.
    ended: Vec<Span>,
    /// Spans to send.
    ready: Vec<Span>,
}

impl Tracer {
    /// A tracer for the session of this UID.
    pub fn new(session_uid: &str, run: u32, mask: bool) -> Self {
        Self {
            uid: session_uid.to_owned(),
            run,
            mask,
            root: None,
            asked: None,
            rooted_run: None,
            turn: None,
            last_turn: 0,
            attempt: 0,
            lanes: HashMap::new(),
            tools: HashMap::new(),
            closed: Vec::new(),
            usage: HashMap::new(),
            metered: HashSet::new(),
            ended: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Takes the next record. One whose body cannot be read is passed over.
    pub fn record(&mut self, record: &Record) {
        self.attempt = record.attempt;
        let body = record.body.get();
        match record.kind {
            Kind::Session => {
                if let Ok(session) = serde_json::from_str::<SessionBody>(body) {
                    self.session(record, &session);
                }
            }
            Kind::User => {
                if let Ok(user) = serde_json::from_str::<UserBody>(body) {
                    self.user(record, &user);
                }
            }
            Kind::Usage => {
                if let Ok(usage) = serde_json::from_str::<UsageBody>(body) {
                    self.usage(record, usage);
                }
            }
            Kind::Cli => {
                if let Ok(line) = serde_json::from_str::<Line<'_>>(body) {
                    self.line(record, &line);
                }
            }
            Kind::End => {
                // An attempt that was lost has sent nothing of its open turn: that goes on.
                if let Ok(end) = serde_json::from_str::<EndBody>(body)
                    && end.outcome != Outcome::Lost
                {
                    self.finish(record.ts, Some(end.outcome));
                }
            }
            Kind::Log | Kind::Git | Kind::Gap => {}
        }
    }

    /// Spans that are complete: those of finished turns.
    pub fn take_ready(&mut self) -> Vec<Span> {
        std::mem::take(&mut self.ready)
    }

    /// Ended spans of the open turn too, for when there are too many to keep.
    pub fn take_ended(&mut self) -> Vec<Span> {
        let mut spans = self.take_ready();
        spans.append(&mut self.ended);
        spans
    }

    /// How many ended spans are kept for the end of the turn.
    pub fn kept(&self) -> usize {
        self.ended.len()
    }

    /// Ends everything: what is open was interrupted.
    pub fn finish(&mut self, now: Timestamp, outcome: Option<Outcome>) {
        self.close_turn(
            now,
            outcome
                .filter(|outcome| *outcome != Outcome::Succeeded)
                .or(Some(Outcome::Stopped)),
        );
        let open: Vec<String> = self.tools.keys().cloned().collect();
        for id in open {
            self.interrupt_tool(&id, now);
        }
        self.close_calls();
        let left: Vec<String> = self.usage.keys().cloned().collect();
        for id in left {
            self.unseen(&id);
        }
        self.ready.append(&mut self.ended);
        if let Some(mut root) = self.root.take() {
            root.end = now.max(root.start);
            if let Some(outcome) = outcome {
                (root.level, root.status) = judged(outcome);
            }
            self.rooted_run = Some(self.run);
            self.ready.push(root);
        }
        self.turn = None;
        self.lanes.clear();
    }

    fn session(&mut self, record: &Record, session: &SessionBody) {
        match session {
            SessionBody::AttemptStarted { run, .. } => {
                if self.run != *run {
                    // The run before was lost: nobody has sent what it left open.
                    self.finish(record.ts, Some(Outcome::Lost));
                    self.run = *run;
                    self.asked = None;
                }
                self.open_root(record.ts);
            }
            SessionBody::TurnEnded { outcome, .. } => self.close_turn(record.ts, Some(*outcome)),
            _ => {}
        }
    }

    fn open_root(&mut self, now: Timestamp) -> &mut Span {
        let key = if self.rooted_run == Some(self.run) {
            format!("{}/{}", self.run, self.attempt)
        } else {
            self.run.to_string()
        };
        let id = self.id("session", &key);
        let (run, attempt, asked) = (self.run, self.attempt, self.asked.clone());
        self.root.get_or_insert_with(|| {
            let mut root = Span::new(SpanKind::Agent, "agent-session", id, None, now, now);
            root.input = asked;
            root.metadata = vec![("run", run.into()), ("attempt", attempt.into())];
            root
        })
    }

    /// The turn that a record belongs to, opened when it is not open.
    fn open_turn(&mut self, number: u32, now: Timestamp) -> SpanId {
        if let Some(turn) = &self.turn
            && turn.number == number
        {
            return turn.span.id;
        }
        self.close_turn(now, Some(Outcome::Stopped));
        let parent = self.open_root(now).id;
        let key = if number > self.last_turn {
            number.to_string()
        } else {
            // Its beginning was sent by an earlier attempt.
            format!("{number}/{}", self.attempt)
        };
        let id = self.id("turn", &key);
        let mut span = Span::new(SpanKind::Agent, "agent-turn", id, Some(parent), now, now);
        span.metadata = vec![("turn", number.into()), ("attempt", self.attempt.into())];
        self.turn = Some(Turn {
            number,
            span,
            ended: false,
        });
        id
    }

    fn close_turn(&mut self, now: Timestamp, outcome: Option<Outcome>) {
        let Some(turn) = self.turn.as_mut().filter(|turn| !turn.ended) else {
            return;
        };
        turn.ended = true;
        let mut span = turn.span.clone();
        span.end = now.max(span.start);
        if let Some(outcome) = outcome {
            let (level, status) = judged(outcome);
            span.level = level;
            span.status = if level == Level::Error {
                span.status.or(status)
            } else {
                status
            };
        }
        self.last_turn = turn.number;
        let main = self.lanes.entry(None).or_default();
        main.pending.clear();
        let call = main.call.take();
        self.closed.extend(call);
        // A sub-agent in the background outlives its turn; any other tool was interrupted.
        let open = self.tools.iter().filter(|(_, tool)| !tool.in_background);
        let open: Vec<String> = open
            .filter(|(_, tool)| tool.span.parent == Some(span.id))
            .map(|(id, _)| id.clone())
            .collect();
        for id in open {
            self.interrupt_tool(&id, now);
        }
        self.close_calls();
        let aged: Vec<String> = self
            .usage
            .iter_mut()
            .filter(|(_, metered)| !metered.body.open)
            .filter_map(|(id, metered)| std::mem::replace(&mut metered.aged, true).then(|| id.clone()))
            .collect();
        for id in aged {
            self.unseen(&id);
        }
        if let Some(root) = &mut self.root {
            root.output = span.output.clone().or(root.output.take());
        }
        self.ready.append(&mut self.ended);
        self.ready.push(span);
    }

    fn user(&mut self, record: &Record, user: &UserBody) {
        let shown = self.shown(&user.text);
        self.open_turn(record.turn, record.ts);
        if let Some(turn) = self.turn.as_mut().filter(|turn| turn.span.input.is_none()) {
            note_length(&mut turn.span.metadata, "input_length", &user.text);
            turn.span.input = Some(shown.clone());
        }
        let asked = self.asked.get_or_insert_with(|| shown.clone()).clone();
        self.open_root(record.ts).input = Some(asked);
        let lane = self.lane(None, record.ts);
        lane.pending.push(json!({"role": "user", "content": shown}));
    }

    fn usage(&mut self, record: &Record, body: UsageBody) {
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

    fn line(&mut self, record: &Record, line: &Line<'_>) {
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

    fn assistant(&mut self, record: &Record, line: &Line<'_>, message: Message) {
        let text = text::of_content(&message.content);
        if message.model == "<synthetic>" || message.id.is_empty() {
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
                let input = std::mem::take(&mut talk.pending);
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
                }
            }
        };
        call.end = record.ts;
        for block in message.content.as_array().into_iter().flatten() {
            match block["type"].as_str() {
                Some("text") => call.texts.push(self.shown(block["text"].as_str().unwrap_or_default())),
                Some("tool_use") => {
                    let arguments = self.arguments(&block["input"]);
                    let (id, name) = (block["id"].as_str(), block["name"].as_str().unwrap_or("tool"));
                    call.tool_calls.push(json!({
                        "id": id, "type": "function", "function": {"name": name, "arguments": &arguments},
                    }));
                    self.tool_started(record.ts, parent, id.unwrap_or_default(), name, arguments);
                }
                _ => {}
            }
        }
        self.lane(line.parent_tool_use_id.clone(), record.ts).call = Some(call);
    }

    fn tool_started(&mut self, now: Timestamp, parent: SpanId, id: &str, name: &str, arguments: String) {
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

    fn tool_results(&mut self, record: &Record, line: &Line<'_>, message: &Message) {
        let Some(blocks) = message.content.as_array() else {
            let shown = self.shown(&text::of_content(&message.content));
            self.said(record, line, &json!({"role": "user", "content": shown}));
            return;
        };
        for block in blocks {
            let content = text::of_content(&block["content"]);
            let id = block["tool_use_id"].as_str();
            let Some(id) = id.filter(|_| block["type"] == "tool_result") else {
                let shown = self.shown(block["text"].as_str().unwrap_or_default());
                self.said(record, line, &json!({"role": "user", "content": shown}));
                continue;
            };
            let shown = self.shown(&content);
            self.said(
                record,
                line,
                &json!({"role": "tool", "tool_call_id": id, "content": &shown}),
            );
            if self.tools.get(id).is_some_and(|tool| !tool.in_background) {
                let failed = block["is_error"].as_bool().unwrap_or(false);
                let status = failed.then(|| text::cut(&shown, STATUS_CAP));
                self.tool_ended(id, record.ts, Some((shown, content.as_str())), status, Level::Error);
            }
        }
    }

    /// A message that the next call of its conversation reads.
    fn said(&mut self, record: &Record, line: &Line<'_>, message: &Value) {
        self.parent(record, line);
        self.lane(line.parent_tool_use_id.clone(), record.ts)
            .pending
            .push(message.clone());
    }

    fn tool_ended(
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

    fn interrupt_tool(&mut self, id: &str, now: Timestamp) {
        self.tool_ended(id, now, None, Some("interrupted".to_owned()), Level::Warning);
    }

    fn task_started(&mut self, line: &Line<'_>) {
        let Some(tool) = line.tool_use_id.as_ref().and_then(|id| self.tools.get_mut(id)) else {
            return;
        };
        if line.task_type.as_deref() == Some("local_agent") {
            tool.span.kind = SpanKind::Agent;
            tool.in_background = line.is_backgrounded;
            if let Some(kind) = &line.subagent_type {
                tool.span.metadata.push(("subagent_type", kind.as_str().into()));
            }
        }
    }

    fn task_ended(&mut self, record: &Record, line: &Line<'_>) {
        let Some(id) = line.tool_use_id.clone() else { return };
        if self.tools.get(&id).is_some_and(|tool| tool.in_background) {
            let summary = line.summary.clone().unwrap_or_default();
            let status = line.status.clone().filter(|status| status != "completed");
            let shown = self.shown(&summary);
            self.tool_ended(&id, record.ts, Some((shown, &summary)), status, Level::Error);
        }
    }

    fn result(&mut self, record: &Record, line: &Line<'_>) {
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

    fn event(
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
    fn parent(&mut self, record: &Record, line: &Line<'_>) -> SpanId {
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

    fn lane(&mut self, agent: Option<String>, now: Timestamp) -> &mut Lane {
        let lane = self.lanes.entry(agent).or_default();
        lane.last = Some(now);
        lane
    }

    /// Makes the generations of calls that are over.
    fn close_calls(&mut self) {
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
    fn unseen(&mut self, message_id: &str) {
        if let Some(Metered { body, parent, .. }) = self.usage.remove(message_id) {
            let end = body.ended_at.unwrap_or(body.started_at);
            let model = body.model.clone();
            let span = self.generation(message_id, parent, body.started_at, end, &model, Some(body));
            self.ended.push(span);
        }
    }

    fn generation(
        &mut self,
        message_id: &str,
        parent: SpanId,
        start: Timestamp,
        end: Timestamp,
        model: &str,
        metered: Option<UsageBody>,
    ) -> Span {
        let id = self.id("generation", message_id);
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

    fn id(&self, kind: &str, key: &str) -> SpanId {
        let digest = Sha256::digest(format!("{}/{kind}/{key}", self.uid).as_bytes());
        let mut id = SpanId::default();
        id.copy_from_slice(&digest[..8]);
        id
    }

    fn shown(&self, text: &str) -> String {
        if self.mask && !text.is_empty() {
            MASK.to_owned()
        } else {
            text::cut(text, CAP)
        }
    }

    fn arguments(&self, input: &Value) -> String {
        if self.mask {
            text::json(&text::masked(input))
        } else {
            text::json(input)
        }
    }
}
