//! What the records say has happened: folded from the spool at the start and kept up while records are written. Pure.

use std::collections::{HashMap, HashSet};

use protocol::record::{SessionBody, UsageBody, UserBody};
use protocol::{Kind, NanoUsd, Outcome, Record, Usage};
use serde::Deserialize;
use tokio::time::Instant;
use uuid::Uuid;

use crate::cli::Turn;
use crate::cli::wire::{self, Event};
use crate::lenient::lenient;

/// Bytes of an answer that are remembered; it is whole in its record.
const RESULT: usize = 16 << 10;

/// A user message that was *sent*: its record was on disk before it was written to the CLI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What was sent.
    pub body: UserBody,
    /// Turn that it opened or joined.
    pub turn: u32,
    /// The CLI took it up, but may not have it on disk.
    pub started: bool,
    /// A result names it.
    pub answered: bool,
    /// The CLI took it: never sent again.
    pub taken: bool,
}

/// How a turn ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The turn.
    pub turn: u32,
    /// How.
    pub outcome: Outcome,
    /// Run that it ended in.
    pub run: u32,
}

/// A turn that we stopped or were about to, or behind which the session was to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    /// The turn.
    pub turn: u32,
    /// Why.
    pub cause: Outcome,
    /// Run in which it was said.
    pub run: u32,
}

/// A command that was carried out or refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Why it was not carried out.
    pub error: Option<String>,
    /// Seq of the record that says so.
    pub seq: u64,
}

/// The session so far.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Last turn; 0: none yet.
    pub turn: u32,
    /// Run of the last attempt.
    pub run: u32,
    /// The last turn that ended.
    pub ended: Option<Ended>,
    /// The last word about stopping.
    pub stopping: Option<Stopping>,
    /// The CLI's conversation.
    pub conversation: Option<Uuid>,
    /// The first message of the session: what a new conversation begins with.
    pub first: Option<Message>,
    /// Messages of the last turn, and earlier ones that were not taken.
    pub messages: Vec<Message>,
    /// Commands that were carried out or refused, by id.
    pub commands: HashMap<String, Done>,
    /// The last turn as the CLI's stream shows it.
    pub stream: Turn,
    /// Version of the CLI that worked last.
    pub cli_version: Option<String>,
    /// The last result's text.
    pub result: String,
    /// Rounds.
    pub rounds: u64,
    /// Messages that the CLI that works now has taken up, or found in the transcript.
    present: HashSet<Uuid>,
    totals: Totals,
    told: Told,
    last_round: Option<String>,
}

/// Tokens as the CLI counts them: of conversations before, and of the one that goes on.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    before: Usage,
    now: Usage,
}

/// Tokens and cost, as metered.
#[derive(Clone, Debug, Default)]
struct Totals {
    usage: Usage,
    cost: NanoUsd,
    unpriced: bool,
    /// Responses that have begun and not ended.
    open: HashMap<String, UsageBody>,
}

impl History {
    /// Whether the last turn has begun and not ended.
    pub fn open_turn(&self) -> bool {
        self.turn > 0 && self.ended.as_ref().is_none_or(|ended| ended.turn < self.turn)
    }

    /// Why the last turn was stopped, or was about to be.
    pub fn stopped(&self) -> Option<Outcome> {
        self.stopping
            .as_ref()
            .filter(|stopping| stopping.turn >= self.turn)
            .map(|stopping| stopping.cause)
    }

    /// Messages that were sent and not seen to be taken.
    pub fn untaken(&self) -> impl Iterator<Item = &Message> {
        self.messages
            .iter()
            .filter(|message| !message.taken && !message.answered)
    }

    /// Messages that wait for the CLI to take them up.
    pub fn queued(&self) -> usize {
        self.untaken()
            .filter(|message| !self.present.contains(&message.body.uuid))
            .count()
    }

    /// Another CLI goes on; of what was sent and not seen to be taken it has what `arrived` before.
    pub fn goes_on(&mut self, arrived: &[Uuid]) {
        self.present = arrived.iter().copied().collect();
    }

    /// Tokens of the session.
    pub fn usage(&self) -> Usage {
        let mut usage = self.totals.usage;
        for open in self.totals.open.values() {
            usage += open.usage;
        }
        usage
    }

    /// Tokens of the session as the CLI counts them; it knows nothing of what the agent's tools ask of the model API.
    pub fn told(&self) -> Usage {
        let mut usage = self.told.before;
        usage += self.told.now;
        usage
    }

    /// Cost of the session; `None` when a model without a price answered.
    pub fn cost(&self) -> Option<NanoUsd> {
        let open: Option<NanoUsd> = self.totals.open.values().map(|open| open.cost_usd).sum();
        if self.totals.unpriced {
            None
        } else {
            open.map(|open| self.totals.cost + open)
        }
    }

    /// What the priced part of the session has cost.
    pub fn cost_so_far(&self) -> NanoUsd {
        let open = self.totals.open.values().filter_map(|open| open.cost_usd);
        self.totals.cost + open.sum()
    }

    /// Takes the next record. What was appended again was seen under its first seq.
    pub fn observe(&mut self, record: &Record) {
        if record.was.is_some() {
            return;
        }
        let body = record.body.get();
        match record.kind {
            Kind::User => parsed(body, |body| self.sent(record.turn, record.seq, body)),
            Kind::Session => parsed(body, |body| self.session(record.seq, body)),
            Kind::Usage => parsed(body, |body| self.totals.add(body)),
            Kind::Cli => self.cli(body),
            Kind::Log | Kind::Git | Kind::Gap | Kind::End => {}
        }
    }

    fn turn_begins(&mut self, turn: u32) {
        if turn > self.turn {
            self.turn = turn;
            self.messages.retain(|message| !message.taken && !message.answered);
            self.stream.next();
        }
    }

    fn sent(&mut self, turn: u32, seq: u64, body: UserBody) {
        self.turn_begins(turn);
        self.commands.insert(body.command.clone(), Done { error: None, seq });
        let message = Message {
            body,
            turn,
            started: false,
            answered: false,
            taken: false,
        };
        self.first.get_or_insert_with(|| message.clone());
        self.messages.push(message);
    }

    fn session(&mut self, seq: u64, body: SessionBody) {
        match body {
            SessionBody::AttemptStarted { run, .. } => self.run = run,
            SessionBody::CliStarted { cli_session_id, .. } | SessionBody::ConversationReset { cli_session_id } => {
                self.conversation = Some(cli_session_id);
            }
            SessionBody::Taken { uuids } => {
                for message in self.messages.iter_mut().chain(&mut self.first) {
                    message.taken |= uuids.contains(&message.body.uuid);
                }
            }
            SessionBody::Stopping { turn, cause } => {
                let run = self.run;
                self.stopping = Some(Stopping { turn, cause, run });
            }
            SessionBody::TurnStarted { turn } => self.turn_begins(turn),
            SessionBody::CommandDone { id, error } => {
                self.commands.insert(id, Done { error, seq });
            }
            SessionBody::TurnEnded { turn, outcome } => {
                if turn < self.turn {
                    // The next turn was opened while this one was stopped: its lines come from now on.
                    self.stream.next();
                }
                self.ended = Some(Ended {
                    turn,
                    outcome,
                    run: self.run,
                });
            }
            SessionBody::AgentRestarted { .. } | SessionBody::PermissionAnswered { .. } => {}
        }
    }

    fn cli(&mut self, line: &str) {
        let Some(event) = wire::event(line) else { return };
        self.stream.observe(&event, Instant::now());
        match event {
            Event::Started(uuid) => {
                for message in self.messages.iter_mut().filter(|message| message.body.uuid == uuid) {
                    message.started = true;
                    self.present.insert(uuid);
                }
            }
            Event::Assistant {
                message_id, main: true, ..
            } if self.last_round != message_id => {
                self.rounds += 1;
                self.last_round = message_id;
            }
            Event::Result(result) => {
                let answered = |message: &&mut Message| result.user_message_uuids.contains(&message.body.uuid);
                for message in self.messages.iter_mut().chain(&mut self.first).filter(answered) {
                    message.answered = true;
                }
                // A CLI that refuses to start has not asked the conversation what it has used.
                if !result.nothing_done()
                    && wire::is_light(line)
                    && let Ok(counted) = serde_json::from_str::<Counted>(line)
                {
                    self.told.conversation(counted.total());
                }
                // A turn that failed has errors and no answer: the last answer stays.
                if let Some(answer) = result.result {
                    self.result = beginning(answer);
                }
            }
            Event::Init {
                version: Some(version), ..
            } => self.cli_version = Some(version),
            _ => {}
        }
    }
}

/// As much of an answer as anybody is told.
fn beginning(mut answer: String) -> String {
    let end = (0..=RESULT.min(answer.len())).rfind(|at| answer.is_char_boundary(*at));
    answer.truncate(end.unwrap_or_default());
    answer.shrink_to_fit();
    answer
}

/// What a result says of all models together, cumulative over the conversation.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Counted {
    model_usage: HashMap<String, Option<Counts>>,
}

/// What a result says of one model.
#[expect(clippy::struct_field_names, reason = "the CLI's own fields")]
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Counts {
    #[serde(deserialize_with = "lenient")]
    input_tokens: u64,
    #[serde(deserialize_with = "lenient")]
    output_tokens: u64,
    #[serde(deserialize_with = "lenient")]
    cache_read_input_tokens: u64,
    #[serde(deserialize_with = "lenient")]
    cache_creation_input_tokens: u64,
}

impl Counted {
    fn total(&self) -> Usage {
        let mut total = Usage::default();
        for counts in self.model_usage.values().flatten() {
            let Counts {
                input_tokens,
                output_tokens,
                cache_read_input_tokens,
                cache_creation_input_tokens,
            } = *counts;
            total += Usage {
                input_tokens,
                output_tokens,
                cache_read_input_tokens,
                cache_creation_input_tokens,
            };
        }
        total
    }
}

impl Told {
    /// A new conversation counts from zero.
    fn conversation(&mut self, counted: Usage) {
        if counted.total() < self.now.total() {
            self.before += self.now;
        }
        self.now = counted;
    }
}

fn parsed<T: for<'de> Deserialize<'de>>(body: &str, then: impl FnOnce(T)) {
    match serde_json::from_str(body) {
        Ok(body) => then(body),
        Err(error) => tracing::warn!(%error, "a record of an unknown form was passed over"),
    }
}

impl Totals {
    fn add(&mut self, body: UsageBody) {
        self.open.remove(&body.message_id);
        if body.open {
            self.open.insert(body.message_id.clone(), body);
            return;
        }
        self.usage += body.usage;
        match body.cost_usd {
            Some(cost) => self.cost = self.cost + cost,
            None => self.unpriced = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Uuid = Uuid::from_u128(0xd);

    fn observed(bodies: &[(Kind, String)]) -> History {
        let mut history = History::default();
        for (at, (kind, body)) in bodies.iter().enumerate() {
            history.observe(&Record {
                seq: at as u64 + 1,
                attempt: 1,
                turn: 1,
                ts: jiff::Timestamp::UNIX_EPOCH,
                kind: *kind,
                was: None,
                body: serde_json::value::RawValue::from_string(body.clone()).unwrap(),
            });
        }
        history
    }

    #[test]
    fn what_a_dead_cli_took_up_waits_again_unless_it_is_in_the_transcript() {
        let user = UserBody {
            command: "c-1".into(),
            uuid: ASKED,
            text: "t".into(),
        };
        let started = format!(r#"{{"type":"command_lifecycle","command_uuid":"{ASKED}","state":"started"}}"#);
        let mut history = observed(&[
            (Kind::User, serde_json::to_string(&user).unwrap()),
            (Kind::Cli, started),
        ]);
        assert_eq!(history.queued(), 0);
        history.goes_on(&[]);
        assert_eq!(history.queued(), 1);
        history.goes_on(&[ASKED]);
        assert_eq!(history.queued(), 0);
    }

    fn answered(id: &str, model: &str, parent: &str) -> (Kind, String) {
        let line = format!(
            r#"{{"type":"assistant","message":{{"id":"{id}","model":"{model}","content":[]}},"parent_tool_use_id":{parent}}}"#
        );
        (Kind::Cli, line)
    }

    #[test]
    fn a_round_is_a_response_of_the_model_in_the_main_loop() {
        let history = observed(&[
            answered("m-1", "opus", "null"),
            answered("m-1", "opus", "null"),
            answered("s-1", "opus", "\"t\""),
            answered("refused", "<synthetic>", "null"),
            answered("m-2", "opus", "null"),
        ]);
        assert_eq!(history.rounds, 2);
    }

    #[test]
    fn tokens_of_a_conversation_are_cumulative_and_those_of_the_next_one_come_on_top() {
        let result = |tokens: u64| {
            let line = format!(
                r#"{{"type":"result","subtype":"success","is_error":false,"modelUsage":{{"a":{{"inputTokens":{tokens},"cacheReadInputTokens":null}},"c":null,"b":{{"outputTokens":1}}}}}}"#
            );
            (Kind::Cli, line)
        };
        let refused =
            r#"{"type":"result","subtype":"error_during_execution","is_error":true,"num_turns":0,"modelUsage":{}}"#;
        let refused = (Kind::Cli, refused.to_owned());
        let history = observed(&[result(10), refused, result(30), result(5), result(5)]);
        assert_eq!((history.told().input_tokens, history.told().output_tokens), (35, 2));
    }
}
