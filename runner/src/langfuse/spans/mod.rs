//! Records to spans: a pure mapping. The same records give the same spans with the same ids.

mod calls;
mod lines;
#[cfg(test)]
mod tests;
mod tools;

use std::collections::{HashMap, HashSet, VecDeque};

use jiff::Timestamp;
use protocol::{
    Kind, Outcome, Record,
    record::{EndBody, SessionBody, UsageBody, UserBody},
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    line::Line,
    span::{Level, Span, SpanId, SpanKind, judged, note_length},
    text::{self, CAP, MASK},
};
use crate::cli::wire::is_light;

/// Most bytes of what was said that are kept of a conversation, and of a call: no span has room for more.
const MAX_SAID: usize = 128 << 10;
/// What an entry of a list takes beside its text, about.
const ENTRY: usize = 128;
/// Most conversations, open tool calls, and calls without their numbers that are followed at the same time. The CLI has some dozens;
/// the agent can write lines of any number of them.
const MAX_LANES: usize = 256;
const MAX_TOOLS: usize = 512;
const MAX_CLOSED: usize = 256;
/// Most ids of generations that are remembered.
const MAX_METERED: usize = 100_000;
/// Longest id of a message or a tool call; the API's have some thirty bytes.
const MAX_ID: usize = 256;

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
    /// Bytes of both.
    size: usize,
}

impl Call {
    /// Whether there is room for another part of the answer.
    fn takes(&mut self, size: usize) -> bool {
        self.size += size + ENTRY;
        self.size <= MAX_SAID
    }
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
    pending: VecDeque<(Value, usize)>,
    /// Bytes of them.
    size: usize,
    call: Option<Call>,
    /// When something last happened: a call without numbers began then.
    last: Option<Timestamp>,
}

impl Lane {
    /// Keeps the first message and the last ones.
    fn said(&mut self, message: Value, size: usize) {
        let size = size + ENTRY;
        self.pending.push_back((message, size));
        self.size += size;
        while self.size > MAX_SAID
            && self.pending.len() > 2
            && let Some((_, size)) = self.pending.remove(1)
        {
            self.size -= size;
        }
    }

    fn heard(&mut self) -> Vec<Value> {
        self.size = 0;
        self.pending.drain(..).map(|(message, _)| message).collect()
    }
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
    /// For lines of a conversation that is one too many.
    nobody: Lane,
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
            nobody: Lane::default(),
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
                if is_light(body)
                    && let Ok(line) = serde_json::from_str::<Line<'_>>(body)
                {
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
        main.heard();
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
        let size = shown.len();
        lane.said(json!({"role": "user", "content": shown}), size);
    }

    fn lane(&mut self, agent: Option<String>, now: Timestamp) -> &mut Lane {
        let known = agent.is_none() || self.lanes.len() < MAX_LANES || self.lanes.contains_key(&agent);
        let lane = if known {
            self.lanes.entry(agent).or_default()
        } else {
            self.nobody = Lane::default();
            &mut self.nobody
        };
        lane.last = Some(now);
        lane
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
}
