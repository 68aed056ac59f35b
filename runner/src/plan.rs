//! What an attempt has to do, decided from what the records say. Pure: section "messages once" of the runner's contract.

use protocol::Outcome;
use protocol::record::UserBody;
use uuid::Uuid;

use crate::history::{History, Message};

/// What to do with the CLI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// A new conversation.
    Begin {
        /// Messages that are recorded as sent and have to be written again; empty: the prompt is still to be recorded.
        again: Vec<UserBody>,
    },
    /// The earlier conversation, in which a turn is open.
    Resume {
        /// The conversation.
        conversation: Uuid,
        /// Messages that were sent but never arrived. Empty: the CLI goes on by itself.
        again: Vec<UserBody>,
    },
    /// The earlier conversation, whose turn was stopped: a continuation message opens the next one.
    Continue {
        /// The conversation.
        conversation: Uuid,
    },
    /// No CLI: the turn ended in this run, and only what comes after it is left to do.
    Finish(Outcome),
}

/// Decides. `arrived` says whether the CLI's transcripts know a message; it is asked only for messages that were sent and
/// not seen to be taken.
pub fn plan(history: &History, run: u32, mut arrived: impl FnMut(&Uuid) -> bool) -> Plan {
    let Some(first) = &history.first else {
        return Plan::Begin { again: Vec::new() };
    };
    if let Some(ended) = &history.ended
        && ended.turn >= history.turn
        && ended.run == run
        && is_final(ended.outcome)
    {
        return Plan::Finish(ended.outcome);
    }
    let Some(conversation) = history.conversation else {
        return Plan::Begin {
            again: vec![first.body.clone()],
        };
    };
    let lost: Vec<UserBody> = history
        .messages
        .iter()
        .filter(|message| !message.taken && !arrived(&message.body.uuid))
        .map(|message| message.body.clone())
        .collect();
    let first_lost = lost.iter().any(|body| body.uuid == first.body.uuid);
    if first_lost {
        // The conversation's first message never arrived, so there is no conversation.
        return Plan::Begin { again: lost };
    }
    let stopped = history.stopping.as_ref().is_some_and(|(turn, _)| *turn >= history.turn);
    if history.open_turn() && (!stopped || !lost.is_empty()) {
        return Plan::Resume {
            conversation,
            again: lost,
        };
    }
    Plan::Continue { conversation }
}

/// Messages with which a new conversation begins when the earlier one is lost: those of the open turn that people or the
/// session's author wrote; the session's first one when there is none.
pub fn messages_again(history: &History) -> Vec<UserBody> {
    let own = |message: &&Message| !message.body.command.starts_with("continue/");
    let mut again: Vec<UserBody> = history
        .messages
        .iter()
        .filter(own)
        .map(|message| message.body.clone())
        .collect();
    if again.is_empty() {
        again.extend(history.first.iter().map(|message| message.body.clone()));
    }
    again
}

/// Another attempt of the same run does not go on after this.
fn is_final(outcome: Outcome) -> bool {
    !outcome.is_transient() && !matches!(outcome, Outcome::Stopped | Outcome::Superseded | Outcome::Lost)
}

#[cfg(test)]
mod tests {
    use protocol::record::SessionBody;
    use protocol::{Kind, Record};
    use rstest::rstest;

    use super::*;

    const PROMPT: Uuid = Uuid::from_u128(0xa);
    const NEXT: Uuid = Uuid::from_u128(0xb);
    const CONVERSATION: Uuid = Uuid::from_u128(0xc);

    fn user(uuid: Uuid, command: &str) -> (Kind, u32, String) {
        let turn = if uuid == PROMPT { 1 } else { 2 };
        let body = UserBody {
            command: command.into(),
            uuid,
            text: "t".into(),
        };
        (Kind::User, turn, serde_json::to_string(&body).unwrap())
    }

    fn session(body: &SessionBody) -> (Kind, u32, String) {
        (Kind::Session, 1, serde_json::to_string(body).unwrap())
    }

    fn attempt(run: u32) -> (Kind, u32, String) {
        session(&SessionBody::AttemptStarted {
            run,
            pod_uid: "p".into(),
            runner_version: "0".into(),
        })
    }

    fn cli() -> (Kind, u32, String) {
        session(&SessionBody::CliStarted {
            cli_session_id: CONVERSATION,
            resumed: false,
        })
    }

    fn taken(uuid: Uuid) -> (Kind, u32, String) {
        session(&SessionBody::Taken { uuids: vec![uuid] })
    }

    fn stopping(turn: u32, cause: Outcome) -> (Kind, u32, String) {
        session(&SessionBody::Stopping { turn, cause })
    }

    fn ended(turn: u32, outcome: Outcome) -> (Kind, u32, String) {
        session(&SessionBody::TurnEnded { turn, outcome })
    }

    fn history(records: Vec<(Kind, u32, String)>) -> History {
        let mut history = History::default();
        for (at, (kind, turn, body)) in records.into_iter().enumerate() {
            history.observe(&Record {
                seq: at as u64 + 1,
                attempt: 1,
                turn,
                ts: jiff::Timestamp::UNIX_EPOCH,
                kind,
                was: None,
                body: serde_json::value::RawValue::from_string(body).unwrap(),
            });
        }
        history
    }

    fn body(uuid: Uuid, command: &str) -> UserBody {
        UserBody {
            command: command.into(),
            uuid,
            text: "t".into(),
        }
    }

    fn begun() -> Vec<(Kind, u32, String)> {
        vec![attempt(1), cli(), user(PROMPT, "prompt")]
    }

    #[rstest]
    #[case::nothing_sent(vec![attempt(1)], Plan::Begin { again: vec![] })]
    #[case::sent_and_found_nowhere(begun(), Plan::Begin { again: vec![body(PROMPT, "prompt")] })]
    #[case::cut_in_mid_turn([begun(), vec![taken(PROMPT)]].concat(), Plan::Resume { conversation: CONVERSATION, again: vec![] })]
    #[case::told_to_stop([begun(), vec![taken(PROMPT), stopping(1, Outcome::Stopped)]].concat(), Plan::Continue { conversation: CONVERSATION })]
    #[case::model_was_unavailable([begun(), vec![taken(PROMPT), ended(1, Outcome::ModelUnavailable)]].concat(), Plan::Continue { conversation: CONVERSATION })]
    #[case::done([begun(), vec![taken(PROMPT), ended(1, Outcome::Succeeded)]].concat(), Plan::Finish(Outcome::Succeeded))]
    #[case::failed_for_good([begun(), vec![taken(PROMPT), ended(1, Outcome::AgentError)]].concat(), Plan::Finish(Outcome::AgentError))]
    #[case::interrupted_by_a_user([begun(), vec![taken(PROMPT), ended(1, Outcome::StoppedByUser)]].concat(), Plan::Finish(Outcome::StoppedByUser))]
    #[case::a_lost_continuation([begun(), vec![taken(PROMPT), stopping(1, Outcome::Stopped), user(NEXT, "continue/1/2/1")]].concat(), Plan::Resume { conversation: CONVERSATION, again: vec![body(NEXT, "continue/1/2/1")] })]
    #[case::stopped_before_the_prompt_arrived([begun(), vec![stopping(1, Outcome::Stopped)]].concat(), Plan::Begin { again: vec![body(PROMPT, "prompt")] })]
    fn in_the_same_run(#[case] records: Vec<(Kind, u32, String)>, #[case] expected: Plan) {
        assert_eq!(plan(&history(records), 1, |_| false), expected);
    }

    #[test]
    fn a_message_that_the_transcript_knows_is_not_sent_again() {
        let expected = Plan::Resume {
            conversation: CONVERSATION,
            again: vec![],
        };
        assert_eq!(plan(&history(begun()), 1, |uuid| *uuid == PROMPT), expected);
    }

    #[test]
    fn a_message_that_was_taken_is_not_even_looked_for() {
        let records = [begun(), vec![taken(PROMPT)]].concat();
        plan(&history(records), 1, |_| panic!("the agent can write the transcripts"));
    }

    #[rstest]
    #[case(Outcome::Succeeded)]
    #[case(Outcome::Timeout)]
    #[case(Outcome::StoppedByUser)]
    fn a_new_run_goes_on_where_the_last_one_ended(#[case] outcome: Outcome) {
        let records = [begun(), vec![taken(PROMPT), ended(1, outcome), attempt(2)]].concat();
        assert_eq!(
            plan(&history(records), 2, |_| false),
            Plan::Continue {
                conversation: CONVERSATION
            }
        );
    }

    #[test]
    fn a_lost_conversation_begins_again_with_what_the_author_wrote() {
        let records = [
            begun(),
            vec![
                taken(PROMPT),
                stopping(1, Outcome::Stopped),
                user(NEXT, "continue/1/2/1"),
            ],
        ];
        assert_eq!(messages_again(&history(records.concat())), [body(PROMPT, "prompt")]);
    }
}
