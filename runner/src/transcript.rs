//! stdout: a transcript for people (`kubectl logs -f`), or the records themselves for machines.

use std::fmt::Write as _;
use std::sync::Arc;

use protocol::record::{GapBody, LogBody, LogLevel, SessionBody, UsageBody, UserBody};
use protocol::{Kind, NanoUsd, Outcome, Record};
use serde::Deserialize;
use serde_json::Value;

use crate::cli::wire::{is_light, or_default};
use crate::lenient::lenient;
use crate::outlet::Outlet;

/// Longest part of a tool's arguments or answer that is shown, characters.
const SHORT: usize = 200;
/// Lines of a tool's answer that are shown.
const LINES: usize = 5;

/// What stdout is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// People.
    #[default]
    Text,
    /// Machines: one record a line.
    Json,
    /// Nobody.
    Quiet,
}

impl Format {
    /// Opens stdout; says in its own words what of it is not shown.
    pub fn open(self) -> Option<Arc<Outlet>> {
        let missing = match self {
            Self::Json => |lines| format!("{{\"notShown\":{lines}}}\n"),
            Self::Text => {
                |lines| format!("! {lines} lines are not shown: nobody read them in time; the records are complete\n")
            }
            Self::Quiet => return None,
        };
        Some(Arc::new(Outlet::to(std::io::stdout(), missing)))
    }
}

/// Writes records to stdout.
#[derive(Default)]
pub struct Transcript {
    format: Format,
    stdout: Option<Arc<Outlet>>,
    cost: NanoUsd,
    unpriced: bool,
    /// Rounds of the session of which results have told.
    told: u64,
}

impl Transcript {
    /// A transcript in `format`.
    pub fn new(format: Format, stdout: Option<Arc<Outlet>>) -> Self {
        Self {
            format,
            stdout,
            ..Self::default()
        }
    }

    /// Nothing will be told of the first `rounds` of the session, which others have told of.
    pub fn begin_behind(&mut self, rounds: u64) {
        self.told = rounds;
    }

    /// Shows a record, with which the session has had so many `rounds`; never waits for whoever reads. What is not read is
    /// nobody's loss: the records are in the spool.
    pub fn show(&mut self, record: &Record, rounds: u64) {
        let Some(stdout) = self.stdout.clone() else { return };
        let text = match self.format {
            Format::Json => serde_json::to_string(record)
                .map(|line| line + "\n")
                .unwrap_or_default(),
            Format::Text => self.text(record, rounds),
            Format::Quiet => return,
        };
        if !text.is_empty() {
            stdout.say(text.as_bytes());
        }
    }

    /// What people see of a record.
    fn text(&mut self, record: &Record, rounds: u64) -> String {
        let body = record.body.get();
        match record.kind {
            Kind::User => parse(body, |user: UserBody| paragraph("> ", &user.text)),
            Kind::Cli if !is_light(body) => format!("! a line of {} bytes is not shown\n", body.len()),
            Kind::Cli => parse(body, |line: Line| self.line(&line, rounds)),
            Kind::Usage => {
                parse(body, |usage: UsageBody| self.meter(&usage));
                String::new()
            }
            Kind::Log => parse(body, |log: LogBody| {
                let mark = match log.level {
                    LogLevel::Info => "- ",
                    LogLevel::Warning => "! ",
                    LogLevel::Error => "!! ",
                };
                paragraph(mark, &log.message)
            }),
            Kind::Session => parse(body, |event: SessionBody| session(&event)),
            Kind::Gap => parse(body, |gap: GapBody| gap_line(&gap)),
            Kind::Git | Kind::End => String::new(),
        }
    }

    fn meter(&mut self, usage: &UsageBody) {
        if usage.open {
            return;
        }
        match usage.cost_usd {
            Some(cost) => self.cost = self.cost + cost,
            None => self.unpriced = true,
        }
    }

    fn line(&mut self, line: &Line, rounds: u64) -> String {
        match line.kind.as_str() {
            "assistant" => line.message.content.blocks().map(spoken).collect(),
            "user" => line.message.content.blocks().map(answered).collect(),
            // The CLI counts what the model API refused, too.
            "result" => {
                let rounds = rounds.saturating_sub(std::mem::replace(&mut self.told, rounds));
                self.result(line, rounds)
            }
            _ => String::new(),
        }
    }

    fn result(&self, line: &Line, rounds: u64) -> String {
        let cost = if self.unpriced {
            String::new()
        } else {
            format!(", ${}", self.cost)
        };
        let aborted = line
            .terminal_reason
            .as_deref()
            .is_some_and(|reason| reason.starts_with("aborted"));
        let word = match (aborted, line.is_error) {
            (true, _) => "interrupted",
            (false, true) => "failed",
            (false, false) => "done",
        };
        let mut text = format!(
            "= {word}: {rounds} round{} in {}.{} s{cost}\n",
            if rounds == 1 { "" } else { "s" },
            line.duration_ms / 1_000,
            line.duration_ms % 1_000 / 100,
        );
        if line.is_error && !aborted {
            let why = line.result.clone().unwrap_or_else(|| line.errors.join("\n"));
            text += &paragraph("  ", &why);
        }
        text
    }
}

fn parse<'a, T: Deserialize<'a>, R: Default>(body: &'a str, then: impl FnOnce(T) -> R) -> R {
    serde_json::from_str(body).map(then).unwrap_or_default()
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Line {
    #[serde(rename = "type", deserialize_with = "or_default")]
    kind: String,
    #[serde(deserialize_with = "or_default")]
    message: Message,
    #[serde(deserialize_with = "or_default")]
    is_error: bool,
    terminal_reason: Option<String>,
    #[serde(deserialize_with = "lenient")]
    duration_ms: u64,
    #[serde(deserialize_with = "lenient")]
    result: Option<String>,
    #[serde(deserialize_with = "lenient")]
    errors: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Message {
    content: Content,
}

/// A list of blocks, or something of no interest here (a replayed message is plain text, and shown from its record).
#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Blocks(Vec<Block>),
    Other(serde::de::IgnoredAny),
}

impl Default for Content {
    fn default() -> Self {
        Self::Other(serde::de::IgnoredAny)
    }
}

impl Content {
    fn blocks(&self) -> impl Iterator<Item = &Block> {
        match self {
            Self::Blocks(blocks) => blocks.iter(),
            Self::Other(_) => [].iter(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Block {
    #[serde(rename = "type", deserialize_with = "or_default")]
    kind: String,
    #[serde(deserialize_with = "or_default")]
    text: String,
    #[serde(deserialize_with = "or_default")]
    name: String,
    input: Value,
    content: Value,
    #[serde(deserialize_with = "or_default")]
    is_error: bool,
}

fn spoken(block: &Block) -> String {
    match block.kind.as_str() {
        "text" => paragraph("", &block.text),
        "tool_use" => paragraph("* ", &format!("{} {}", block.name, arguments(&block.input))),
        _ => String::new(),
    }
}

fn answered(block: &Block) -> String {
    if block.kind != "tool_result" {
        return String::new();
    }
    let text = match &block.content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .filter_map(|part| part["text"].as_str())
            .collect::<Vec<_>>()
            .join("\n"),
        _ => String::new(),
    };
    let mark = if block.is_error { "  ! " } else { "  | " };
    let lines: Vec<_> = text.lines().collect();
    let mut shown: String = lines
        .iter()
        .take(LINES)
        .map(|line| paragraph(mark, &short(line)))
        .collect();
    if lines.len() > LINES {
        let _ = writeln!(shown, "{mark}… {} more lines", lines.len() - LINES);
    }
    shown
}

/// The arguments of a tool call on one line: the one that says most alone, else all of them.
fn arguments(input: &Value) -> String {
    let telling = [
        "command",
        "file_path",
        "path",
        "url",
        "query",
        "pattern",
        "prompt",
        "description",
    ];
    let text = telling
        .iter()
        .find_map(|name| input[*name].as_str())
        .map_or_else(|| input.to_string(), |text| text.replace('\n', "; "));
    short(&text)
}

fn session(event: &SessionBody) -> String {
    match event {
        SessionBody::CliStarted { resumed: true, .. } => "- the earlier conversation goes on\n".to_owned(),
        SessionBody::Stopping { cause, .. } => format!("- stopping: {}\n", words(*cause)),
        SessionBody::AgentRestarted { out_of_memory: true } => {
            "! the agent ran out of memory and was started again\n".to_owned()
        }
        SessionBody::AgentRestarted { out_of_memory: false } => "! the agent was started again\n".to_owned(),
        _ => String::new(),
    }
}

/// An outcome for people.
pub fn words(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Stopped => "told to stop",
        Outcome::Timeout => "the session's timeout is reached",
        Outcome::InvalidCredentials => "the model API refused the credential",
        Outcome::Superseded => "another pod drives the session",
        Outcome::VolumeUnavailable => "the volume cannot be written to",
        Outcome::DiskFull => "the volume is full",
        Outcome::AgentLost => "the agent was lost",
        _ => "the session ends",
    }
}

fn gap_line(gap: &GapBody) -> String {
    match (gap.from, gap.to, gap.length) {
        (_, _, Some(length)) => format!("! a line of {length} bytes was too long to be kept\n"),
        (Some(from), Some(to), _) => format!("! records {from} to {to} are missing\n"),
        _ => "! records are missing\n".to_owned(),
    }
}

fn short(text: &str) -> String {
    match text.char_indices().nth(SHORT) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// `text` with `mark` before each line, ending in a newline, nothing in it that a terminal would obey.
fn paragraph(mark: &str, text: &str) -> String {
    let mut shown = String::with_capacity(text.len() + mark.len() + 1);
    for line in text.trim_end().split('\n') {
        shown.push_str(mark);
        escape(&mut shown, line);
        shown.push('\n');
    }
    shown
}

/// Escapes control characters but tab, C1 included: a terminal obeys those too.
fn escape(shown: &mut String, line: &str) {
    for c in line.chars() {
        if c.is_control() && c != '\t' {
            let _ = write!(shown, "{}", c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;
    use serde_json::value::{RawValue, to_raw_value};

    use super::*;

    fn record(kind: Kind, body: Box<RawValue>) -> Record {
        Record {
            seq: 1,
            attempt: 1,
            turn: 1,
            ts: jiff::Timestamp::UNIX_EPOCH,
            kind,
            was: None,
            body,
        }
    }

    fn shown(kind: Kind, body: &Value) -> String {
        Transcript::default().text(&record(kind, to_raw_value(body).unwrap()), 2)
    }

    #[rstest]
    #[case(Kind::User, json!({"command": "prompt", "uuid": "6fa459ea-ee8a-3ca4-894e-db77e160355e", "text": "do it\nnow"}), "> do it\n> now\n")]
    #[case(Kind::Cli, json!({"type": "assistant", "message": {"content": [{"type": "text", "text": "Hello"}]}}), "Hello\n")]
    #[case(Kind::Cli, json!({"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Bash", "input": {"command": "ls", "description": "x"}}]}}), "* Bash ls\n")]
    #[case(Kind::Cli, json!({"type": "user", "message": {"content": [{"type": "tool_result", "content": "a\nb", "is_error": false}]}}), "  | a\n  | b\n")]
    #[case(Kind::Cli, json!({"type": "user", "message": {"content": [{"type": "tool_result", "content": [{"type": "text", "text": "no"}], "is_error": true}]}}), "  ! no\n")]
    #[case::a_replay_is_not_shown_twice(Kind::Cli, json!({"type": "user", "message": {"content": "do it"}, "isReplay": true}), "")]
    #[case(Kind::Cli, json!({"type": "result", "num_turns": 2, "duration_ms": 1250, "is_error": false}), "= done: 2 rounds in 1.2 s, $0.00\n")]
    #[case(Kind::Cli, json!({"type": "result", "num_turns": 1, "is_error": true, "result": "API Error"}), "= failed: 2 rounds in 0.0 s, $0.00\n  API Error\n")]
    #[case::null_is_absent(Kind::Cli, json!({"type": "result", "message": null, "duration_ms": null, "is_error": null, "errors": null}), "= done: 2 rounds in 0.0 s, $0.00\n")]
    #[case::null_is_absent(Kind::Cli, json!({"type": "assistant", "message": {"content": [{"type": "text", "text": "Hello", "name": null, "is_error": null}]}}), "Hello\n")]
    #[case::a_terminal_obeys_nothing(Kind::Cli, json!({"type": "assistant", "message": {"content": [{"type": "text", "text": "\u{1b}[2Jx\r\u{9b}y\tz"}]}}), "\\u{1b}[2Jx\\u{d}\\u{9b}y\tz\n")]
    #[case(Kind::Gap, json!({"from": 3, "to": 5}), "! records 3 to 5 are missing\n")]
    fn a_record_reads_like_a_transcript(#[case] kind: Kind, #[case] body: Value, #[case] expected: &str) {
        assert_eq!(shown(kind, &body), expected);
    }

    #[test]
    fn a_result_tells_of_the_rounds_since_the_last_one_and_not_of_refused_ones() {
        let result = to_raw_value(&json!({"type": "result", "num_turns": 2})).unwrap();
        let record = record(Kind::Cli, result);
        let mut transcript = Transcript::default();
        transcript.begin_behind(5);
        let told = [5, 6, 8].map(|rounds| transcript.text(&record, rounds));
        assert_eq!(
            told,
            ["0 rounds", "1 round", "2 rounds"].map(|rounds| format!("= done: {rounds} in 0.0 s, $0.00\n"))
        );
    }

    #[test]
    fn no_tree_is_made_of_a_line_of_nothing_but_brackets() {
        let hostile = format!(
            r#"{{"type":"assistant","message":{{"content":[{{}}{}]}}}}"#,
            ",{}".repeat(50_000)
        );
        let record = record(Kind::Cli, RawValue::from_string(hostile).unwrap());
        let text = Transcript::default().text(&record, 0);
        assert!(
            text.starts_with("! a line of 150") && text.ends_with(" bytes is not shown\n"),
            "{text}"
        );
        assert_eq!(
            crate::cli::wire::event(record.body.get()),
            Some(crate::cli::Event::Other)
        );
    }

    #[test]
    fn a_long_answer_is_cut() {
        let long = (0..20).map(|n| format!("line {n}")).collect::<Vec<_>>().join("\n");
        let body = json!({"type": "user", "message": {"content": [{"type": "tool_result", "content": long}]}});
        let text = shown(Kind::Cli, &body);
        assert!(text.ends_with("  | line 4\n  | … 15 more lines\n"), "{text}");
    }
}
