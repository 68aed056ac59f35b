//! What an attempt begins with, by what earlier ones have recorded.

use protocol::Outcome;
use protocol::record::{LogLevel, SessionBody, UserBody};
use uuid::Uuid;

use super::{Attempt, End, LOST_CONVERSATION};
use crate::cli::command::Conversation;
use crate::cli::outcome;
use crate::config::Config;
use crate::plan::{Plan, plan};
use crate::proxy::Witness;
use crate::workspace::transcripts::{self, Arrived};

/// What the CLI is told once it runs.
pub(super) enum Say {
    /// The session's prompt, for the first time.
    Prompt,
    /// Messages that are recorded already.
    Again(Vec<UserBody>),
    /// That it shall go on.
    Continuation,
    /// Nothing, as long as it goes on by itself.
    NothingYet,
    /// Nothing: it waits for messages.
    Nothing,
}

/// How an attempt goes on.
pub(super) enum Opening {
    /// The CLI is started.
    Work(Conversation, Say),
    /// There is nothing for it to do.
    Finish(End),
}

impl Attempt {
    /// What the CLI is to be started for, if it is.
    pub(super) async fn opening(&mut self, config: &Config) -> Result<Opening, End> {
        self.conclude_what_is_recorded()?;
        let arrived = self.arrived(config).await?;
        self.conclude_what_was_cleared(&arrived)?;
        let plan = self.plan(config.run, &arrived);
        let resumed = |id, interrupted| Conversation::Resumed { id, interrupted };
        let fresh = || Conversation::New(Uuid::new_v4());
        let (conversation, say) = match plan {
            Plan::Finish(Outcome::Succeeded) => return Ok(Opening::Finish(End::new(Outcome::Succeeded, ""))),
            Plan::Finish(outcome @ Outcome::StoppedByUser) => {
                return Ok(Opening::Finish(End::new(outcome, "the turn was interrupted")));
            }
            Plan::Finish(outcome) => {
                let said = self.journal.history().result.clone();
                return Ok(Opening::Finish(End::new(outcome, said)));
            }
            Plan::Wait { conversation } => {
                let conversation = conversation.map_or_else(fresh, |id| resumed(id, false));
                return Ok(Opening::Work(conversation, Say::Nothing));
            }
            Plan::Begin { again } if again.is_empty() && config.prompt.trim().is_empty() => {
                if !self.interactive {
                    // The CLI would wait for a task, and we for its answer.
                    let end = End::new(Outcome::ConfigError, "there is no task: the prompt is empty");
                    return Ok(Opening::Finish(end));
                }
                return Ok(Opening::Work(fresh(), Say::Nothing));
            }
            Plan::Begin { again } if again.is_empty() => (fresh(), Say::Prompt),
            Plan::Begin { again } => {
                if self.journal.history().conversation.is_some() {
                    self.journal.log(LogLevel::Warning, LOST_CONVERSATION)?;
                }
                (fresh(), Say::Again(again))
            }
            Plan::Resume {
                conversation: id,
                interrupted,
                again,
            } if again.is_empty() => (resumed(id, interrupted), Say::NothingYet),
            Plan::Resume {
                conversation: id,
                interrupted,
                again,
            } => (resumed(id, interrupted), Say::Again(again)),
            Plan::Continue { conversation: id } => (resumed(id, false), Say::Continuation),
        };
        Ok(match self.rounds_used_up() {
            Some(end) => Opening::Finish(end),
            None => Opening::Work(conversation, say),
        })
    }

    /// Writes that a turn is over whose result, or whose stop, is recorded, for a runner that died in between.
    fn conclude_what_is_recorded(&mut self) -> Result<(), End> {
        let history = self.journal.history();
        if !history.open_turn() {
            return Ok(());
        }
        let turn = history.turn;
        // The next message was taken up already.
        let goes_on = history.untaken().any(|message| message.started);
        let ended = match (history.stopped(), history.stream.concluded()) {
            (Some(cause), _) => Some(cause),
            (None, Some(result)) if !goes_on => Some(outcome(result, &Witness::default())),
            _ => None,
        };
        ended.map_or(Ok(()), |outcome| self.turn_ended(turn, outcome))
    }

    /// What the transcripts have of the messages that were sent and not seen to be taken.
    async fn arrived(&mut self, config: &Config) -> Result<Arrived, End> {
        let messages: Vec<Uuid> = self
            .journal
            .history()
            .untaken()
            .map(|message| message.body.uuid)
            .collect();
        if messages.is_empty() {
            return Ok(Arrived::default());
        }
        let folder = config.folders.transcripts.clone();
        let search = tokio::task::spawn_blocking(move || transcripts::arrived(&folder, &messages));
        Ok(self.meanwhile(true, search).await?.unwrap_or_default())
    }

    /// Writes that the conversation was cleared while nobody listened: what was sent last is in the transcript of another
    /// one. Without a message since, the turn is over with it.
    fn conclude_what_was_cleared(&mut self, arrived: &Arrived) -> Result<(), End> {
        let history = self.journal.history();
        let Some(last) = history.untaken().last().map(|message| message.body.clone()) else {
            return Ok(());
        };
        let found = arrived.get(&last.uuid).copied().flatten();
        let (Some(cli_session_id), Some(known)) = (found, history.conversation) else {
            return Ok(());
        };
        let (turn, open) = (history.turn, history.open_turn() && history.stopped().is_none());
        if cli_session_id != known {
            self.journal
                .session(&SessionBody::ConversationReset { cli_session_id })?;
        }
        // It stands in the transcript of the conversation that it began.
        if open && last.text.trim_start().starts_with("/clear") {
            self.journal.session(&SessionBody::Taken { uuids: vec![last.uuid] })?;
            self.turn_ended(turn, Outcome::Succeeded)?;
        }
        Ok(())
    }

    fn plan(&mut self, run: u32, arrived: &Arrived) -> Plan {
        let mut present = Vec::new();
        let plan = plan(self.journal.history(), run, self.interactive, |uuid| {
            let held = arrived.contains_key(uuid);
            present.extend(held.then_some(*uuid));
            held
        });
        self.journal.goes_on(&present);
        plan
    }
}
