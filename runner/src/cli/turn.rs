//! When a turn is over, and how it ended. Pure.

use protocol::Outcome;
use tokio::time::{Duration, Instant};

use super::wire::{Event, ResultLine, State};
use crate::proxy::Witness;

/// How long a one-shot waits for background tasks after the CLI is idle.
const BACKGROUND_GRACE: Duration = Duration::from_mins(1);

/// A turn as the stream shows it. A `result` is not its end: messages may wait, the CLI may start turns by itself when a
/// background task is done, and subagents may still run.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    result: Option<ResultLine>,
    idle_since: Option<Instant>,
    tasks: usize,
    began: bool,
    /// Something began after the result.
    goes_on: bool,
}

impl Turn {
    /// Takes the next event.
    pub fn observe(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Result(result) => {
                self.result = Some(result.as_ref().clone());
                self.goes_on = false;
            }
            Event::StateChanged(State::Idle) => self.idle_since = Some(now),
            Event::StateChanged(_) => {
                self.idle_since = None;
                self.began = true;
                self.goes_on = true;
            }
            Event::Init { .. } => {
                self.began = true;
                self.goes_on = true;
            }
            Event::BackgroundTasks(tasks) => self.tasks = *tasks,
            _ => {}
        }
    }

    /// The CLI has begun to work on something.
    pub fn began(&self) -> bool {
        self.began
    }

    /// The last result.
    pub fn result(&self) -> Option<&ResultLine> {
        self.result.as_ref()
    }

    /// The next turn begins; what runs in the background goes on.
    pub fn next(&mut self) {
        *self = Self {
            tasks: self.tasks,
            ..Self::default()
        };
    }

    /// A user interrupts it: a result from before says nothing of that, as when sub-agents are at work behind it. One that the
    /// CLI has become idle with stands.
    pub fn interrupted(&mut self) {
        if self.idle_since.is_none() {
            self.result = None;
        }
    }

    /// Background tasks that run.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// The result came and nothing has begun since: what there is to say if the CLI died then.
    pub fn concluded(&self) -> Option<&ResultLine> {
        self.result
            .as_ref()
            .filter(|result| !self.goes_on && self.tasks == 0 && result.queued_turn_count == 0)
            .filter(|result| !result.nothing_done())
    }

    /// When the turn is over if nothing more happens; `None`: something must happen first.
    pub fn over_at(&self) -> Option<Instant> {
        let result = self.result.as_ref()?;
        let idle_since = self.idle_since?;
        if result.queued_turn_count > 0 {
            return None;
        }
        Some(if self.tasks == 0 {
            idle_since
        } else {
            idle_since + BACKGROUND_GRACE
        })
    }
}

impl ResultLine {
    /// It is no turn's: the CLI ended before it did anything.
    pub fn nothing_done(&self) -> bool {
        self.subtype == "error_during_execution" && self.num_turns == 0 && self.terminal_reason.is_none()
    }
}

/// The CLI answered a `--resume` with a refusal instead of a turn. One that could not start has not looked for the conversation.
pub fn resume_refused(turn: &Turn) -> bool {
    let refused = |result: &ResultLine| result.nothing_done() && result.startup_failure_reason.is_none();
    !turn.began() && turn.result().is_some_and(refused)
}

/// How a turn ended that nobody stopped. What the API answered is the proxy's word, not the CLI's.
pub fn outcome(result: &ResultLine, witness: &Witness) -> Outcome {
    match (result.subtype.as_str(), result.terminal_reason.as_deref()) {
        ("error_max_turns", _) => Outcome::MaxTurns,
        ("error_max_budget_usd", _) => Outcome::BudgetExceeded,
        _ if witness.credential_refused && result.is_error => Outcome::InvalidCredentials,
        (_, Some("api_error" | "image_error")) => api_outcome(result, witness),
        (_, Some(reason)) if reason.starts_with("aborted") => Outcome::StoppedByUser,
        _ if result.is_error => Outcome::AgentError,
        _ => Outcome::Succeeded,
    }
}

fn api_outcome(result: &ResultLine, witness: &Witness) -> Outcome {
    let refused = witness.last_status.filter(|status| !(200..300).contains(status));
    let by_the_cli = match result.api_error_status {
        // What the administrator must look at, the agent must not be able to say.
        Some(401 | 403) if refused.is_none() && witness.last_status.is_some() => return Outcome::AgentError,
        // The witness is gone with an earlier runner; the next request tells.
        Some(401 | 403) => None,
        status => status,
    };
    match refused.or(by_the_cli) {
        // No answer, or a stream that broke after a good beginning.
        None | Some(Witness::UNREACHABLE | 408 | 500..) => Outcome::ModelUnavailable,
        Some(401 | 403) => Outcome::InvalidCredentials,
        Some(429) => Outcome::RateLimited,
        Some(_) => Outcome::AgentError,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn result(terminal_reason: &str, is_error: bool, status: Option<u16>) -> ResultLine {
        ResultLine {
            subtype: "success".into(),
            is_error,
            terminal_reason: Some(terminal_reason.into()),
            api_error_status: status,
            ..ResultLine::default()
        }
    }

    fn saw(status: u16) -> Witness {
        Witness {
            last_status: Some(status),
            ..Witness::default()
        }
    }

    #[rstest]
    #[case(result("completed", false, None), saw(200), Outcome::Succeeded)]
    #[case(result("completed", true, None), saw(200), Outcome::AgentError)]
    #[case(result("api_error", true, Some(400)), saw(400), Outcome::AgentError)]
    #[case(result("api_error", true, Some(404)), saw(404), Outcome::AgentError)]
    #[case(result("api_error", true, Some(429)), saw(429), Outcome::RateLimited)]
    #[case(result("api_error", true, Some(500)), saw(500), Outcome::ModelUnavailable)]
    #[case(result("api_error", true, Some(529)), saw(529), Outcome::ModelUnavailable)]
    #[case::the_proxy_knows_better(result("api_error", true, Some(400)), saw(529), Outcome::ModelUnavailable)]
    #[case::the_connection_was_refused(
        result("api_error", true, Some(502)),
        saw(Witness::UNREACHABLE),
        Outcome::ModelUnavailable
    )]
    #[case::cut_after_a_good_beginning(result("api_error", true, None), saw(200), Outcome::ModelUnavailable)]
    #[case::refused_by_the_clis_word(result("api_error", true, Some(401)), saw(200), Outcome::AgentError)]
    #[case::forbidden_by_the_clis_word(result("api_error", true, Some(403)), saw(200), Outcome::AgentError)]
    #[case::refused_by_the_clis_word_and_no_witness(
        result("api_error", true, Some(401)),
        Witness::default(),
        Outcome::ModelUnavailable
    )]
    #[case::refused_and_seen(result("api_error", true, Some(500)), saw(403), Outcome::InvalidCredentials)]
    #[case::refused_key(result("api_error", true, Some(401)), Witness { credential_refused: true, ..saw(401) }, Outcome::InvalidCredentials)]
    #[case::refused_key_but_done(result("completed", false, None), Witness { credential_refused: true, ..saw(401) }, Outcome::Succeeded)]
    #[case::interrupted(result("aborted_tools", true, None), saw(200), Outcome::StoppedByUser)]
    fn a_result_and_the_witness_give_the_outcome(
        #[case] result: ResultLine,
        #[case] witness: Witness,
        #[case] expected: Outcome,
    ) {
        assert_eq!(outcome(&result, &witness), expected);
    }

    #[rstest]
    #[case("error_max_turns", Outcome::MaxTurns)]
    #[case("error_max_budget_usd", Outcome::BudgetExceeded)]
    fn a_limit_that_the_cli_itself_met_is_told_as_one(#[case] subtype: &str, #[case] expected: Outcome) {
        let result = ResultLine {
            subtype: subtype.into(),
            is_error: true,
            ..ResultLine::default()
        };
        assert_eq!(outcome(&result, &saw(200)), expected);
    }

    #[tokio::test]
    async fn a_result_concludes_until_something_begins_or_waits_or_runs() {
        let (mut turn, now) = (Turn::default(), Instant::now());
        assert!(turn.concluded().is_none());
        turn.observe(&done(), now);
        assert!(turn.concluded().is_some());
        turn.observe(&Event::BackgroundTasks(2), now);
        assert!(turn.concluded().is_none());
        turn.next();
        assert_eq!((turn.tasks(), turn.result()), (2, None), "what runs goes on");
        turn.observe(&Event::BackgroundTasks(0), now);
        turn.observe(&done(), now);
        turn.observe(&Event::StateChanged(State::Running), now);
        assert!(turn.concluded().is_none(), "it went on");
        let queued = ResultLine {
            queued_turn_count: 1,
            ..result("completed", false, None)
        };
        turn.observe(&Event::Result(Box::new(queued)), now);
        assert!(turn.concluded().is_none(), "a message waits");
    }

    fn done() -> Event {
        Event::Result(Box::new(result("completed", false, None)))
    }

    #[tokio::test]
    async fn a_result_alone_is_not_the_end() {
        let (mut turn, now) = (Turn::default(), Instant::now());
        turn.observe(&done(), now);
        assert_eq!(turn.over_at(), None);
        turn.observe(&Event::StateChanged(State::Idle), now);
        assert_eq!(turn.over_at(), Some(now));
        turn.observe(&Event::StateChanged(State::Running), now);
        assert_eq!(turn.over_at(), None, "the CLI went on by itself");
    }

    #[tokio::test]
    async fn background_tasks_hold_the_end_for_a_minute_and_queued_messages_hold_it_for_good() {
        let (mut turn, now) = (Turn::default(), Instant::now());
        turn.observe(&Event::BackgroundTasks(1), now);
        turn.observe(&done(), now);
        turn.observe(&Event::StateChanged(State::Idle), now);
        assert_eq!(turn.over_at(), Some(now + BACKGROUND_GRACE));
        turn.observe(&Event::BackgroundTasks(0), now);
        assert_eq!(turn.over_at(), Some(now));
        let queued = ResultLine {
            queued_turn_count: 1,
            ..result("completed", false, None)
        };
        turn.observe(&Event::Result(Box::new(queued)), now);
        assert_eq!(turn.over_at(), None);
    }

    #[tokio::test]
    async fn a_refused_resume_is_told_from_a_turn_that_failed() {
        let now = Instant::now();
        let refusal = ResultLine {
            subtype: "error_during_execution".into(),
            is_error: true,
            ..ResultLine::default()
        };
        let mut turn = Turn::default();
        turn.observe(&Event::Result(Box::new(refusal.clone())), now);
        assert!(resume_refused(&turn));
        assert!(turn.concluded().is_none(), "whoever comes next tries again");
        let mut turn = Turn::default();
        let unreadable = ResultLine {
            startup_failure_reason: Some("config_file_invalid".into()),
            ..refusal.clone()
        };
        turn.observe(&Event::Result(Box::new(unreadable)), now);
        assert!(!resume_refused(&turn), "the conversation is there all the same");
        assert!(turn.concluded().is_none());
        let mut turn = Turn::default();
        turn.observe(
            &Event::Init {
                session_id: None,
                version: None,
            },
            now,
        );
        turn.observe(&Event::Result(Box::new(refusal)), now);
        assert!(!resume_refused(&turn));
    }
}
