//! Messages as their authors wrote them. The records hold them without what looks like a secret; a message that is given
//! to the agent again must not be altered by that.
//!
//! The prompt comes from the session's spec, always. Of what people said later the words are kept in memory only: neither
//! the records, which leave the pod, nor another file on the volume may hold what redaction takes out. So a message that no
//! transcript knows when the runner dies has its recorded form as the only copy; that it is given in this form is said.

use std::collections::HashMap;

use protocol::identity::PROMPT_COMMAND;
use protocol::record::{LogLevel, UserBody};
use uuid::Uuid;

use super::{Attempt, End};
use crate::config::Config;

/// What redaction leaves in the place of what it takes out.
const MARK: &str = "[redacted";
/// Messages that are remembered; who sends more of them before they are taken gets the recorded form.
const MOST: usize = 64;

/// The words of messages that redaction altered.
#[derive(Default)]
pub(super) struct Written(HashMap<Uuid, String>);

impl Attempt {
    /// Remembers the words of a message that is about to be sent, when the record does not hold them.
    pub(super) fn remember(&mut self, body: &UserBody) {
        let taken: Vec<Uuid> = {
            let untaken = |uuid: &Uuid| {
                self.journal
                    .history()
                    .untaken()
                    .any(|message| message.body.uuid == *uuid)
            };
            self.written.0.keys().copied().filter(|uuid| !untaken(uuid)).collect()
        };
        for uuid in taken {
            self.written.0.remove(&uuid);
        }
        if self.written.0.len() < MOST && self.journal.recorded(body).is_some_and(|text| text != body.text) {
            self.written.0.insert(body.uuid, body.text.clone());
        }
    }

    /// Messages that are recorded, in their authors' words.
    pub(super) fn as_written(&mut self, config: &Config, messages: Vec<UserBody>) -> Result<Vec<UserBody>, End> {
        messages
            .into_iter()
            .map(|recorded| self.one_as_written(config, recorded))
            .collect()
    }

    fn one_as_written(&mut self, config: &Config, recorded: UserBody) -> Result<UserBody, End> {
        let prompt = (recorded.command == PROMPT_COMMAND).then_some(&config.prompt);
        let words = self.written.0.get(&recorded.uuid).or(prompt);
        if let Some(words) = words {
            let body = UserBody {
                text: words.clone(),
                ..recorded.clone()
            };
            // Another task than the one that this conversation began with is not told under its name.
            if self.journal.recorded(&body).as_ref() == Some(&recorded.text) {
                return Ok(body);
            }
        }
        if recorded.text.contains(MARK) {
            let said =
                "A message is given to the agent again without what looks like a secret in it: its words are not kept.";
            self.journal.log(LogLevel::Warning, said)?;
        }
        Ok(recorded)
    }
}
