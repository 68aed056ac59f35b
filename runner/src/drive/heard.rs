//! What the CLI says: recorded, and what follows from it.

use protocol::Outcome;
use protocol::record::{LogLevel, SessionBody};
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::converse::{Converse, Gone, Step};
use super::{Attempt, End};
use crate::agent::{AgentError, FromShim, ToShim};
use crate::cli::wire::{self, State};
use crate::cli::{Event, RawLine, TESTED_VERSION, stdin};
use crate::status::Question;

/// How far the CLI's stdout may run ahead of its transcript.
const TRANSCRIBED: Duration = Duration::from_secs(1);
/// Permission questions that are open at the same time; the CLI asks one for each tool that it wants to use.
const MAX_QUESTIONS: usize = 64;
/// Bytes of a question's id; the CLI's are UUIDs.
const MAX_REQUEST_ID: usize = 256;
/// How much of stderr is kept for a message.
const STDERR_TAIL: usize = 2_000;

/// The tool calls of the last round.
#[derive(Default)]
pub(super) struct Round {
    message: Option<String>,
    calls: usize,
    /// All its calls are answered, so that the next round follows.
    pub(super) over: bool,
}

impl Round {
    fn observe(&mut self, event: &Event) {
        match event {
            Event::Assistant {
                message_id,
                main: true,
                calls,
                ..
            } => {
                if self.message != *message_id {
                    *self = Self {
                        message: message_id.clone(),
                        ..Self::default()
                    };
                }
                self.calls += calls;
            }
            Event::ToolResults(results) if self.calls > 0 => {
                self.calls = self.calls.saturating_sub(*results);
                self.over = self.calls == 0;
            }
            _ => {}
        }
    }
}

/// Keeps the end, from a whole word on: of a credential that is cut nobody would know that it is one.
fn keep_end(stderr: &mut String) {
    let from = stderr.ceil_char_boundary(stderr.len().saturating_sub(STDERR_TAIL));
    if from > 0 {
        let end = stderr[from..].find(['"', ' ', '\n']);
        stderr.drain(..end.map_or(stderr.len(), |end| from + end));
    }
}

impl Converse<'_> {
    pub(super) fn heard(&mut self, from: Result<FromShim, AgentError>) -> Result<Step, End> {
        match from {
            Ok(FromShim::Stdout(bytes)) => {
                let cut = &mut self.cut;
                self.lines.push(&bytes, |line| cut.push_back(line));
            }
            Ok(FromShim::Stderr(bytes)) => self.stderr(&bytes),
            Ok(FromShim::Exit(exit)) => {
                if let Some(line) = self.lines.finish() {
                    self.line(line)?;
                }
                return Ok(Step::Gone(Gone::Exit(exit)));
            }
            Ok(FromShim::SpawnFailed(why)) => return Ok(Step::Gone(Gone::NotStarted(why))),
            Ok(FromShim::Hello(_) | FromShim::Killed) => {}
            Err(error) => return Ok(Step::Gone(Gone::Lost(error.to_string()))),
        }
        Ok(Step::Went)
    }

    fn stderr(&mut self, bytes: &[u8]) {
        self.stderr += &String::from_utf8_lossy(bytes);
        keep_end(&mut self.stderr);
    }

    pub(super) fn line(&mut self, line: RawLine) -> Result<(), End> {
        self.wrote = true;
        let bytes = match line {
            RawLine::Whole(bytes) => bytes,
            RawLine::TooLong(length) => {
                self.attempt.journal.too_long(length)?;
                return Ok(());
            }
        };
        let event = std::str::from_utf8(&bytes).ok().and_then(wire::event);
        match event {
            Some(Event::Live) => self.attempt.live(&bytes),
            // Answers to us, and the echo of our own.
            Some(Event::ControlResponse) => {}
            event => {
                self.turn_of_its_own(event.as_ref())?;
                self.attempt.journal.cli(&bytes)?;
                if let Some(event) = event {
                    self.turn.observe(&event, Instant::now());
                    self.round.observe(&event);
                    self.react(event)?;
                }
            }
        }
        Ok(())
    }

    /// The CLI begins to work though no turn is open: with messages that were left in its queue, or because a background
    /// task is done.
    fn turn_of_its_own(&mut self, event: Option<&Event>) -> Result<(), End> {
        let begins = matches!(event, Some(Event::Started(_) | Event::StateChanged(State::Running)));
        let history = self.attempt.journal.history();
        if begins && !history.open_turn() && !self.closing {
            let turn = history.turn + 1;
            self.attempt.journal.session(&SessionBody::TurnStarted { turn })?;
        }
        Ok(())
    }

    fn react(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Assistant {
                answers, main: true, ..
            } => {
                self.given
                    .extend(answers.into_iter().map(|uuid| (Instant::now(), uuid)));
            }
            Event::Result(result) => {
                let mut uuids = result.user_message_uuids;
                uuids.extend(self.given.drain(..).map(|(_, uuid)| uuid));
                self.taken(&uuids)?;
            }
            Event::ConversationReset(Some(id)) => self.conversation(id)?,
            Event::Init { session_id, version } => {
                // After `/clear` this is the one that can be resumed.
                if let Some(id) = session_id {
                    self.conversation(id)?;
                }
                if let Some(version) = version {
                    self.attempt.met(version)?;
                }
            }
            Event::ControlRequest {
                request_id,
                subtype,
                tool,
            } => self.asked(request_id, &subtype, &tool),
            Event::Withdrawn(request_id) => self.questions.retain(|question| question.request_id != request_id),
            _ => {}
        }
        Ok(())
    }

    /// The conversation that is to be resumed from now on is on disk before anything else is said in it: with the record of
    /// what is said.
    fn conversation(&mut self, cli_session_id: Uuid) -> Result<(), End> {
        if self.attempt.journal.history().conversation == Some(cli_session_id) {
            return Ok(());
        }
        let reset = SessionBody::ConversationReset { cli_session_id };
        self.attempt.journal.session(&reset)?;
        Ok(())
    }

    /// A question goes to people where there are any. The CLI's line is recorded; so they know of it.
    fn asked(&mut self, request_id: String, subtype: &str, tool: &str) {
        if request_id.len() > MAX_REQUEST_ID {
            // Not the CLI's: what is made of it would be as long.
            return;
        }
        let people = self.attempt.interactive && self.questions.len() < MAX_QUESTIONS;
        if people && subtype == "can_use_tool" {
            let tool = tool.chars().take(MAX_REQUEST_ID).collect();
            self.questions.push(Question { request_id, tool });
            self.publish();
            return;
        }
        let refusal = stdin::refusal(&request_id, subtype);
        // If the agent is lost, the next step says so.
        let _ = self.tell(&ToShim::Stdin(refusal.into()));
    }

    /// What the model was given a while ago is in the transcript by now; what it was given just now may not be, and then the
    /// transcripts are to be asked for it.
    pub(super) fn given_for_long(&mut self) -> Result<(), End> {
        let (long, since): (Vec<_>, Vec<_>) = self.given.drain(..).partition(|(at, _)| at.elapsed() >= TRANSCRIBED);
        self.given = since;
        let uuids: Vec<Uuid> = long.into_iter().map(|(_, uuid)| uuid).collect();
        self.taken(&uuids)
    }

    fn taken(&mut self, uuids: &[Uuid]) -> Result<(), End> {
        let messages = &self.attempt.journal.history().messages;
        let news: Vec<Uuid> = messages
            .iter()
            .filter(|message| !message.taken && uuids.contains(&message.body.uuid))
            .map(|message| message.body.uuid)
            .collect();
        if !news.is_empty() {
            self.attempt.journal.session(&SessionBody::Taken { uuids: news })?;
        }
        Ok(())
    }
}

impl Attempt {
    /// What is due by the clock: the limits, and the report.
    pub(super) fn tick(&mut self) {
        if self.live.read()
            && let Some(proxy) = &self.proxy
        {
            proxy.set_limits(self.live.budget());
        }
        self.deadline = self.deadline();
        self.report_totals();
    }

    /// Records how a turn ended.
    pub(super) fn turn_ended(&mut self, turn: u32, outcome: Outcome) -> Result<(), End> {
        // The numbers of the last response are told before its last bytes: they are here already.
        while let Ok(event) = self.metered.try_recv() {
            self.meter(event)?;
        }
        self.journal.audit()?;
        self.journal.session(&SessionBody::TurnEnded { turn, outcome })?;
        self.journal.turn_end();
        Ok(())
    }

    /// Says once what is to be said of the CLI's version.
    fn met(&mut self, version: String) -> Result<(), End> {
        if self.cli_version.as_ref() == Some(&version) {
            return Ok(());
        }
        if let Some(uplink) = &self.uplink {
            uplink.cli_version(&version);
        }
        if version != TESTED_VERSION {
            self.journal.log(
                LogLevel::Warning,
                format!("This runner is tested with Claude Code {TESTED_VERSION}; the agent's is {version}. It is used all the same."),
            )?;
        }
        self.cli_version = Some(version);
        Ok(())
    }

    fn live(&mut self, line: &[u8]) {
        let (Some(uplink), Ok(text)) = (&self.uplink, std::str::from_utf8(line)) else {
            return;
        };
        for line in self.journal.redacted_delta(text) {
            if let Ok(delta) = serde_json::value::RawValue::from_string(line) {
                uplink.delta(delta);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_stderr_begins_with_a_whole_word() {
        for filler in 1_900..2_100 {
            let mut stderr = format!(
                "failed with fake-credential-of-40-characters {}",
                "ä ".repeat(filler / 3)
            );
            keep_end(&mut stderr);
            assert!(stderr.len() <= STDERR_TAIL);
            assert!(
                !stderr.contains("characters") || stderr.contains("fake-credential-of-40-characters"),
                "{stderr}"
            );
        }
        let mut stderr = "short".to_owned();
        keep_end(&mut stderr);
        assert_eq!(stderr, "short");
    }
}
