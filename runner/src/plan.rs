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
    /// The earlier conversation, in which a turn is open or messages wait.
    Resume {
        /// The conversation.
        conversation: Uuid,
        /// The CLI goes on with a turn that was cut.
        interrupted: bool,
        /// Messages that were sent but never arrived.
        again: Vec<UserBody>,
    },
    /// The earlier conversation, whose turn was stopped: a continuation message opens the next one.
    Continue {
        /// The conversation.
        conversation: Uuid,
    },
    /// An interactive session that rests: nothing is said until somebody says something.
    Wait {
        /// The conversation; absent before the first.
        conversation: Option<Uuid>,
    },
    /// No CLI: the work ended in this run, and only what comes after it is left to do.
    Finish(Outcome),
}

/// Decides. `arrived` says whether the CLI's transcripts know a message; it is asked only for messages that were sent and
/// not seen to be taken.
pub fn plan(history: &History, run: u32, interactive: bool, mut arrived: impl FnMut(&Uuid) -> bool) -> Plan {
    if let Some(outcome) = finished(history, run, interactive) {
        return Plan::Finish(outcome);
    }
    let Some(first) = &history.first else {
        return Plan::Begin { again: Vec::new() };
    };
    let lost: Vec<UserBody> = history
        .untaken()
        .filter(|message| !arrived(&message.body.uuid))
        .map(|message| message.body.clone())
        .collect();
    let first_lost = lost.iter().any(|body| body.uuid == first.body.uuid);
    let conversation = match history.conversation {
        Some(conversation) if !first_lost => conversation,
        // The conversation's first message never arrived, so there is no conversation.
        _ if first_lost => return Plan::Begin { again: lost },
        _ => {
            return Plan::Begin {
                again: vec![first.body.clone()],
            };
        }
    };
    let cut = history.open_turn() && history.stopped().is_none();
    // A turn whose only messages never arrived has not begun.
    let begun = history
        .messages
        .iter()
        .any(|message| message.turn == history.turn && !lost.contains(&message.body));
    if cut || !lost.is_empty() {
        return Plan::Resume {
            conversation,
            interrupted: cut && (begun || lost.is_empty()),
            again: lost,
        };
    }
    if interactive && rests(history) {
        return Plan::Wait {
            conversation: Some(conversation),
        };
    }
    Plan::Continue { conversation }
}

/// Messages with which a new conversation begins when the earlier one is lost: those of the open turn that people or the
/// session's author wrote, and those that were never taken; for a one-shot the session's first one when there is none.
pub fn messages_again(history: &History, interactive: bool) -> Vec<UserBody> {
    let own = |message: &&Message| !message.body.command.starts_with("continue/");
    let open = history.open_turn() && history.stopped().is_none_or(|cause| !users(cause));
    let mut again: Vec<UserBody> = history
        .messages
        .iter()
        .filter(own)
        .filter(|message| open || !message.taken || !interactive)
        .map(|message| message.body.clone())
        .collect();
    if again.is_empty() && !(interactive && rests(history)) {
        again.extend(history.first.iter().map(|message| message.body.clone()));
    }
    again
}

/// How the work ended, when it ended in this run.
fn finished(history: &History, run: u32, interactive: bool) -> Option<Outcome> {
    let last = |turn: u32, its: u32| turn >= history.turn && its == run;
    let ended = history
        .ended
        .as_ref()
        .filter(|ended| last(ended.turn, ended.run) && history.turn > 0)
        .map(|ended| ended.outcome);
    // Said before it is done, for those who die in between.
    let stopping = history
        .stopping
        .as_ref()
        .filter(|stopping| last(stopping.turn, stopping.run))
        .map(|stopping| stopping.cause);
    let is_final = |outcome: &Outcome| is_final(*outcome) && !(interactive && stays(*outcome));
    ended.filter(is_final).or(stopping.filter(is_final))
}

/// Nobody waits for an answer: the last turn was left as it is by a user, or ended by itself.
fn rests(history: &History) -> bool {
    let ended =
        |ended: &crate::history::Ended| ended.turn >= history.turn && (stays(ended.outcome) || users(ended.outcome));
    history.stopped().is_some_and(users)
        || history.turn == 0
        || !history.open_turn() && history.ended.as_ref().is_some_and(ended)
}

/// A user's own decision, which is not to be gone on with.
fn users(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::StoppedByUser | Outcome::EndedByRequest)
}

/// Whether an interactive session waits for the next message after a turn that ended so.
pub fn stays(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Succeeded | Outcome::StoppedByUser | Outcome::AgentError
    )
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
    #[case::cut_in_mid_turn([begun(), vec![taken(PROMPT)]].concat(), Plan::Resume { conversation: CONVERSATION, interrupted: true, again: vec![] })]
    #[case::told_to_stop([begun(), vec![taken(PROMPT), stopping(1, Outcome::Stopped)]].concat(), Plan::Continue { conversation: CONVERSATION })]
    #[case::model_was_unavailable([begun(), vec![taken(PROMPT), ended(1, Outcome::ModelUnavailable)]].concat(), Plan::Continue { conversation: CONVERSATION })]
    #[case::done([begun(), vec![taken(PROMPT), ended(1, Outcome::Succeeded)]].concat(), Plan::Finish(Outcome::Succeeded))]
    #[case::failed_for_good([begun(), vec![taken(PROMPT), ended(1, Outcome::AgentError)]].concat(), Plan::Finish(Outcome::AgentError))]
    #[case::interrupted_by_a_user([begun(), vec![taken(PROMPT), ended(1, Outcome::StoppedByUser)]].concat(), Plan::Finish(Outcome::StoppedByUser))]
    #[case::a_lost_continuation([begun(), vec![taken(PROMPT), stopping(1, Outcome::Stopped), user(NEXT, "continue/1/2/1")]].concat(), Plan::Resume { conversation: CONVERSATION, interrupted: false, again: vec![body(NEXT, "continue/1/2/1")] })]
    #[case::stopped_before_the_prompt_arrived([begun(), vec![stopping(1, Outcome::Stopped)]].concat(), Plan::Begin { again: vec![body(PROMPT, "prompt")] })]
    fn in_the_same_run(#[case] records: Vec<(Kind, u32, String)>, #[case] expected: Plan) {
        assert_eq!(plan(&history(records), 1, false, |_| false), expected);
    }

    const ASKED: Uuid = Uuid::from_u128(0xd);

    fn said(turn: u32, uuid: Uuid) -> (Kind, u32, String) {
        (Kind::User, turn, serde_json::to_string(&body(uuid, "c-1")).unwrap())
    }

    fn wait() -> Plan {
        Plan::Wait {
            conversation: Some(CONVERSATION),
        }
    }

    fn resume(interrupted: bool, again: Vec<UserBody>) -> Plan {
        Plan::Resume {
            conversation: CONVERSATION,
            interrupted,
            again,
        }
    }

    #[rstest]
    #[case::idle(vec![ended(1, Outcome::Succeeded)], wait())]
    #[case::interrupted_by_a_user(vec![stopping(1, Outcome::StoppedByUser), ended(1, Outcome::StoppedByUser)], wait())]
    #[case::died_while_a_user_interrupted(vec![stopping(1, Outcome::StoppedByUser)], wait())]
    #[case::refused_by_the_api(vec![ended(1, Outcome::AgentError)], wait())]
    #[case::told_to_stop_while_idle(vec![ended(1, Outcome::Succeeded), stopping(1, Outcome::Stopped)], wait())]
    #[case::told_to_stop_in_mid_turn(vec![stopping(1, Outcome::Stopped), ended(1, Outcome::Stopped)], Plan::Continue { conversation: CONVERSATION })]
    #[case::model_was_unavailable(vec![ended(1, Outcome::ModelUnavailable)], Plan::Continue { conversation: CONVERSATION })]
    #[case::ended_by_request_while_idle(vec![ended(1, Outcome::Succeeded), stopping(1, Outcome::EndedByRequest)], Plan::Finish(Outcome::EndedByRequest))]
    #[case::ended_by_request_in_mid_turn(vec![stopping(1, Outcome::EndedByRequest)], Plan::Finish(Outcome::EndedByRequest))]
    #[case::inactive(vec![ended(1, Outcome::Succeeded), stopping(1, Outcome::Inactive)], Plan::Finish(Outcome::Inactive))]
    #[case::limit(vec![stopping(1, Outcome::MaxTurns), ended(1, Outcome::MaxTurns)], Plan::Finish(Outcome::MaxTurns))]
    #[case::a_message_that_was_to_be_folded_in(vec![said(1, ASKED)], resume(true, vec![body(ASKED, "c-1")]))]
    #[case::a_message_that_was_to_open_a_turn(vec![ended(1, Outcome::Succeeded), said(2, ASKED)], resume(false, vec![body(ASKED, "c-1")]))]
    #[case::a_message_behind_a_stop(vec![said(1, ASKED), stopping(1, Outcome::Stopped), ended(1, Outcome::Stopped)], resume(false, vec![body(ASKED, "c-1")]))]
    #[case::a_message_behind_an_interrupt(vec![said(1, ASKED), stopping(1, Outcome::StoppedByUser), ended(1, Outcome::StoppedByUser)], resume(false, vec![body(ASKED, "c-1")]))]
    fn an_interactive_session_in_the_same_run(#[case] then: Vec<(Kind, u32, String)>, #[case] expected: Plan) {
        let records = [begun(), vec![taken(PROMPT)], then].concat();
        assert_eq!(plan(&history(records), 1, true, |_| false), expected);
    }

    #[rstest]
    #[case::idle(vec![ended(1, Outcome::Succeeded), stopping(1, Outcome::Inactive)], wait())]
    #[case::ended_by_request(vec![stopping(1, Outcome::EndedByRequest), ended(1, Outcome::EndedByRequest)], wait())]
    #[case::inactive_behind_a_question(vec![stopping(1, Outcome::Inactive), ended(1, Outcome::Inactive)], Plan::Continue { conversation: CONVERSATION })]
    #[case::limit_that_was_raised(vec![stopping(1, Outcome::MaxTurns), ended(1, Outcome::MaxTurns)], Plan::Continue { conversation: CONVERSATION })]
    fn an_interactive_session_in_the_next_run(#[case] then: Vec<(Kind, u32, String)>, #[case] expected: Plan) {
        let records = [begun(), vec![taken(PROMPT)], then, vec![attempt(2)]].concat();
        assert_eq!(plan(&history(records), 2, true, |_| false), expected);
    }

    #[test]
    fn a_resting_session_whose_conversation_is_lost_says_nothing() {
        let records = [begun(), vec![taken(PROMPT), ended(1, Outcome::Succeeded)]].concat();
        assert_eq!(messages_again(&history(records), true), []);
    }

    #[test]
    fn a_message_that_the_transcript_knows_is_not_sent_again() {
        let expected = Plan::Resume {
            conversation: CONVERSATION,
            interrupted: true,
            again: vec![],
        };
        assert_eq!(plan(&history(begun()), 1, false, |uuid| *uuid == PROMPT), expected);
    }

    #[test]
    fn a_message_that_was_taken_is_not_even_looked_for() {
        let records = [begun(), vec![taken(PROMPT)]].concat();
        plan(&history(records), 1, false, |_| {
            panic!("the agent can write the transcripts")
        });
    }

    #[rstest]
    #[case(Outcome::Succeeded)]
    #[case(Outcome::Timeout)]
    #[case(Outcome::StoppedByUser)]
    fn a_new_run_goes_on_where_the_last_one_ended(#[case] outcome: Outcome) {
        let records = [begun(), vec![taken(PROMPT), ended(1, outcome), attempt(2)]].concat();
        assert_eq!(
            plan(&history(records), 2, false, |_| false),
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
        assert_eq!(
            messages_again(&history(records.concat()), false),
            [body(PROMPT, "prompt")]
        );
    }
}
