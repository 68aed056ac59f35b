//! Records as the tasks of the task API: a task is what follows a client's message until its turn is over.

mod by_itself;
mod event;

use std::collections::{BTreeSet, HashMap, VecDeque};

use crds::Phase;
use jiff::Timestamp;
use protocol::{
    Kind, NanoUsd, Outcome, Reason, Record, Usage,
    identity::PROMPT_COMMAND,
    record::{EndBody, SessionBody, UsageBody, UserBody},
};
use serde::Serialize;
use serde_json::json;

use super::{
    line::{Line, Part, Response, file},
    typed,
};
use crate::commands::own_id;
use event::ToolUse;
pub use event::{Event, EventType, tokens};

/// What an interrupt at a task's `max_turns` is called in its id.
pub const MAX_TURNS: &str = "max-turns";
/// What an interrupt at a task's `timeout` is called in its id.
pub const TIMEOUT: &str = "timeout";
/// Files named in progress, at most.
const MAX_FILES: usize = 256;
/// Longest name of a file.
const MAX_PATH: usize = 4096;
/// Open questions of an agent that are known, at most.
const MAX_QUESTIONS: usize = 64;
/// Bytes of answers that a session's earlier tasks keep together; the older ones are read again from the log.
const MAX_ANSWERS: usize = 256 << 10;
/// Responses whose usage may still be corrected, at most.
const MAX_METERED: usize = 512;
/// Longest id of a response.
const MAX_MESSAGE_ID: usize = 256;
/// Tools that change a file, and whether it is a notebook.
const WRITES: [(&str, bool); 4] = [
    ("Write", false),
    ("Edit", false),
    ("MultiEdit", false),
    ("NotebookEdit", true),
];

/// Where a task is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It waits or is worked on.
    #[default]
    Running,
    /// It is done.
    Completed,
    /// It ended without being done.
    Failed,
    /// Somebody interrupted it.
    Interrupted,
}

impl Status {
    /// The status in metrics and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A task, as far as its session's records tell of it.
#[derive(Clone, Debug, Default)]
pub struct Task {
    /// The command that brought it: the client's id of it, or `prompt`.
    pub command: String,
    /// Its turn; of one that was gone on with, the newest.
    pub turn: u32,
    /// When the agent was given it.
    pub begun: Timestamp,
    /// When it was over.
    pub ended: Option<Timestamp>,
    /// Where it is.
    pub status: Status,
    /// Why it was not done, one word.
    pub reason: Option<String>,
    /// Why it was not done, for people.
    pub message: Option<String>,
    /// What the agent answered last.
    pub result: Option<String>,
    /// Its answer is not kept any more: the log has it.
    pub answer_left: bool,
    /// Responses of the model in the main conversation.
    pub rounds: u64,
    /// A tool answered since the last of them: another follows.
    pub goes_on: bool,
    /// Files that the agent wrote.
    pub files: BTreeSet<String>,
    /// What its finished responses used.
    pub usage: Usage,
    /// What they cost; `None` as long as nothing with a price was used.
    pub cost: Option<NanoUsd>,
    /// Questions of the agent, by the CLI's id, that have no answer.
    pub questions: BTreeSet<String>,
    /// The turn in which the CLI goes on by itself though the task is over, such as with a command that ran in the background.
    pub by_itself: Option<u32>,
    /// Responses of the model in such turns.
    pub rounds_by_itself: u64,
    /// Why the gateway interrupted it.
    stopped_for: Option<Reason>,
    last_message: String,
    metered: HashMap<String, (Usage, Option<NanoUsd>)>,
    /// The same by age.
    metered_order: VecDeque<String>,
}

impl Task {
    /// Whether nothing more will come of it.
    pub fn is_over(&self) -> bool {
        self.status != Status::Running
    }

    /// The last event.
    pub fn last(&self) -> Event {
        let (begun, ended) = (self.begun, self.ended.unwrap_or(self.begun));
        let mut data = json!({
            "status": self.status, "result": self.result, "turns": self.rounds, "tokens": tokens(&self.usage),
            "tokens_used": self.usage.total(), "files": self.files,
            "duration_ms": ended.duration_since(begun).as_millis().max(0) as u64,
        });
        if let Some(cost) = self.cost {
            data["cost_usd"] = cost.to_string().into();
        }
        if self.status == Status::Completed {
            return Event::new(EventType::Complete, data);
        }
        data["error"] = json!(self.reason);
        data["message"] = json!(self.message);
        Event::new(EventType::Error, data)
    }

    /// Ends it as its session ended.
    pub fn end_with_session(&mut self, phase: Phase, reason: Option<&str>, message: Option<&str>, at: Timestamp) {
        if self.is_over() {
            return;
        }
        let reason = reason.unwrap_or(phase.as_str());
        let status = match phase {
            Phase::Completed => Status::Completed,
            _ if reason == Reason::StoppedByUser.as_str() => Status::Interrupted,
            _ => Status::Failed,
        };
        let message = message.map_or_else(|| format!("the task's session is {phase}"), str::to_owned);
        self.end(status, reason, message, at);
    }

    /// Ends it as one that somebody stopped on purpose.
    pub fn end(&mut self, status: Status, reason: &str, message: String, at: Timestamp) {
        self.status = status;
        self.ended = Some(at);
        self.metered = HashMap::new();
        self.metered_order = VecDeque::new();
        self.questions.clear();
        let failed = status != Status::Completed;
        self.reason = failed.then(|| reason.to_owned());
        self.message = failed.then_some(message);
    }

    fn interrupted(&mut self, at: Timestamp) {
        let (status, reason, message) = match self.stopped_for {
            Some(reason @ Reason::MaxTurns) => (Status::Failed, reason, "the task reached its max_turns"),
            Some(reason) => (Status::Failed, reason, "the task reached its timeout"),
            None => (Status::Interrupted, Reason::StoppedByUser, "the task was interrupted"),
        };
        self.end(status, reason.as_str(), message.to_owned(), at);
    }

    fn spent(&mut self, body: UsageBody) -> Event {
        let mut id = body.message_id;
        id.truncate(id.floor_char_boundary(MAX_MESSAGE_ID));
        // What was said of this response before is replaced.
        match self.metered.insert(id.clone(), (body.usage, body.cost_usd)) {
            Some((usage, cost)) => {
                self.usage = self.usage.less(usage);
                self.cost = self.cost.map(|all| all.saturating_sub(cost.unwrap_or_default()));
            }
            None => self.metered_order.push_back(id),
        }
        if self.metered_order.len() > MAX_METERED
            && let Some(oldest) = self.metered_order.pop_front()
        {
            self.metered.remove(&oldest);
        }
        self.usage += body.usage;
        if let Some(cost) = body.cost_usd {
            self.cost = Some(self.cost.unwrap_or_default().saturating_add(cost));
        }
        let data = json!({
            "turns": self.rounds, "tokens": tokens(&self.usage), "tokens_used": self.usage.total(), "files": self.files,
        });
        Event::new(EventType::Progress, data)
    }

    fn cli(&mut self, line: Line<'_>) -> Vec<Event> {
        match line {
            Line::Assistant(response) => {
                self.count(&response);
                response.parts.into_iter().filter_map(|part| self.said(part)).collect()
            }
            Line::User { is_main, parts } => {
                let results: Vec<_> = parts.into_iter().filter_map(tool_result).collect();
                self.goes_on |= is_main && !results.is_empty();
                results
            }
            Line::Result { result, errors } => {
                self.result = result;
                self.message = errors.or_else(|| self.message.take());
                Vec::new()
            }
            Line::Question(id) => {
                if self.questions.len() < MAX_QUESTIONS {
                    self.questions.insert(id);
                }
                Vec::new()
            }
            Line::Withdrawn(id) => {
                self.questions.remove(&id);
                Vec::new()
            }
            Line::System | Line::Other => Vec::new(),
        }
    }

    /// A response of the model comes as several lines, which have its id.
    fn count(&mut self, response: &Response<'_>) {
        if response.counts && response.id != self.last_message {
            self.rounds += 1;
            self.goes_on = false;
            response.id.clone_into(&mut self.last_message);
        }
    }

    fn said(&mut self, part: Part<'_>) -> Option<Event> {
        match part {
            Part::Text(text) => Some(Event::new(
                EventType::Message,
                json!({"role": "assistant", "content": text}),
            )),
            Part::ToolUse { id, tool, input } => {
                let write = WRITES.iter().find(|(name, _)| *name == tool);
                let file = write.and_then(|(_, is_notebook)| file(input, *is_notebook));
                let file = file.filter(|file| file.len() <= MAX_PATH && self.files.len() < MAX_FILES);
                self.files.extend(file);
                Some(ToolUse::event(id, tool, input))
            }
            Part::ToolResult { .. } => None,
        }
    }

    fn session(&mut self, event: SessionBody, at: Timestamp) {
        match event {
            SessionBody::PermissionAnswered { request_id, .. } => {
                self.questions.remove(&request_id);
            }
            SessionBody::CliStarted { .. } => self.questions.clear(),
            // Comes before the end of the turn that it interrupts.
            SessionBody::CommandDone { id, error: None } => {
                let limits = [(MAX_TURNS, Reason::MaxTurns), (TIMEOUT, Reason::Timeout)];
                let limit = limits.iter().find(|(why, _)| id.starts_with(&own_id(why, "")));
                self.stopped_for = limit.map(|(_, reason)| *reason).or(self.stopped_for);
            }
            SessionBody::TurnEnded { outcome, .. } => self.ended(outcome, at),
            _ => {}
        }
    }

    fn ended(&mut self, outcome: Outcome, at: Timestamp) {
        match outcome {
            Outcome::Succeeded | Outcome::EndedByRequest => self.end(Status::Completed, "", String::new(), at),
            Outcome::StoppedByUser => self.interrupted(at),
            // Another attempt may go on with it.
            outcome if outcome.is_transient() => {}
            outcome => {
                if let Some(reason) = outcome.reason() {
                    let said = self.result.take().or_else(|| self.message.take());
                    let said = said.unwrap_or_else(|| format!("the task's session ended with {reason}"));
                    self.end(Status::Failed, reason.as_str(), said, at);
                }
            }
        }
    }
}

fn tool_result(part: Part<'_>) -> Option<Event> {
    let Part::ToolResult { id, text, is_error } = part else {
        return None;
    };
    let data = json!({"tool_use_id": id, "content": text, "is_error": is_error});
    Some(Event::new(EventType::ToolResult, data))
}

/// The tasks of a session.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tasks: Vec<Task>,
}

impl Tasks {
    /// All of them, oldest first.
    pub fn all(&self) -> &[Task] {
        &self.tasks
    }

    /// The task that a command brought.
    pub fn of(&self, command: &str) -> Option<&Task> {
        self.tasks.iter().find(|task| task.command == command)
    }

    /// Lets go of the answers of the oldest tasks, as far as all together are too long.
    fn leave_answers(&mut self) {
        let mut kept = 0;
        for task in self.tasks.iter_mut().rev() {
            let length = task.result.as_ref().map_or(0, String::len) + task.message.as_ref().map_or(0, String::len);
            kept += length;
            if kept > MAX_ANSWERS && length > 0 {
                kept -= length;
                task.answer_left |= task.result.take().is_some();
                if let Some(message) = &mut task.message {
                    message.truncate(message.floor_char_boundary(MAX_MESSAGE_ID));
                }
            }
        }
    }

    /// The task that is being worked on.
    pub fn open(&self) -> Option<&Task> {
        self.tasks.last().filter(|task| !task.is_over())
    }

    /// The task whose work is going on: see [`Self::open`] and [`Task::by_itself`].
    pub fn worked_on(&self) -> Option<&Task> {
        self.tasks
            .last()
            .filter(|task| !task.is_over() || task.by_itself.is_some())
    }

    /// Takes the session's next record. What it is in the newest task.
    pub fn take(&mut self, record: &Record) -> Vec<Event> {
        if record.kind == Kind::User {
            self.user(record);
            return Vec::new();
        }
        let Some(task) = self.tasks.last_mut() else {
            return Vec::new();
        };
        if task.is_over() {
            task.take_by_itself(record);
            return Vec::new();
        }
        match record.kind {
            Kind::Cli => task.cli(Line::of(record)),
            Kind::Usage => match typed::<UsageBody>(record) {
                Some(body) if !body.open => vec![task.spent(body)],
                _ => Vec::new(),
            },
            Kind::Session => {
                if let Some(event) = typed(record) {
                    task.session(event, record.ts);
                }
                if task.is_over() { vec![task.last()] } else { Vec::new() }
            }
            Kind::End => {
                if let Some(EndBody { outcome, .. }) = typed(record) {
                    task.ended(outcome, record.ts);
                }
                if task.is_over() { vec![task.last()] } else { Vec::new() }
            }
            _ => Vec::new(),
        }
    }

    fn user(&mut self, record: &Record) {
        let Ok(UserBody { command, .. }) = serde_json::from_str(record.body.get()) else {
            return;
        };
        // The runner's own words, with which it goes on after a stop, bring no task.
        let is_own = command.contains('/') || (command == PROMPT_COMMAND && !self.tasks.is_empty());
        if let Some(task) = self.tasks.last_mut()
            && (is_own || task.command == command)
        {
            task.turn = record.turn;
            return;
        }
        // A message that the CLI took while it worked is part of the work: what was asked before is done with it.
        if let Some(before) = self.tasks.last_mut().filter(|task| !task.is_over()) {
            let message = format!("the message {command} came before its turn was over");
            before.end(Status::Failed, "Superseded", message, record.ts);
        }
        self.leave_answers();
        self.tasks.push(Task {
            command,
            turn: record.turn,
            begun: record.ts,
            ..Task::default()
        });
    }
}
