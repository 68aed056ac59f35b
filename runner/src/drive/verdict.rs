//! When a turn or the session is over, and how it ended.

use protocol::Outcome;
use protocol::record::LogLevel;
use tokio::time::Instant;

use super::converse::{Converse, Episode, Gone};
use super::{Attempt, End};
use crate::agent::Exit;
use crate::cli::outcome;
use crate::cli::turn::resume_refused;
use crate::plan::stays;
use crate::proxy::Proxy;

/// What to do when a limit of the session's is reached.
const RAISE: &str = "its work is kept: raise spec.limits and set the annotation ambient-code.io/start-requested-at to a new value for another run";

impl Converse<'_> {
    /// Why the session must be stopped now, if it must.
    pub(super) fn must_stop(&mut self) -> Option<End> {
        if *self.attempt.stop.borrow() {
            return Some(End::new(Outcome::Stopped, "told to stop"));
        }
        if let Some(end) = self.ending.take() {
            return Some(end);
        }
        if Instant::now() >= self.attempt.deadline {
            return Some(timed_out());
        }
        if let Some(proxy) = &self.attempt.proxy {
            if *proxy.beyond_limits().borrow() {
                return Some(budget_exceeded(proxy));
            }
            if proxy.witness().credential_refused {
                return Some(invalid_credentials());
            }
        }
        self.no_more_rounds().or_else(|| self.inactive())
    }

    /// The limit of rounds is reached, and another round follows or has begun.
    fn no_more_rounds(&self) -> Option<End> {
        let most = u64::from(self.attempt.live.now().max_turns?);
        let rounds = self.attempt.journal.history().rounds;
        if rounds > most || self.round.over {
            return self.attempt.rounds_used_up();
        }
        None
    }

    fn inactive(&mut self) -> Option<End> {
        let working = self.attempt.journal.history().open_turn() && self.questions.is_empty();
        if !self.attempt.interactive || working {
            self.attempt.active = Instant::now();
            return None;
        }
        let most = self.attempt.live.inactivity()?;
        (self.attempt.active.elapsed() >= most).then(|| {
            let waited = most.as_secs();
            End::new(
                Outcome::Inactive,
                format!(
                    "nobody said anything for {waited} s (inactivityTimeout); the conversation goes on in another run"
                ),
            )
        })
    }

    /// Records how the turn ended; returns the end of the session, if that is it.
    pub(super) fn conclude(&mut self) -> Result<Option<End>, End> {
        let turn = match self.interrupting.take() {
            Some((turn, _)) => turn,
            None => self.attempt.journal.history().turn,
        };
        let end = self.verdict();
        self.attempt.turn_ended(turn, end.outcome)?;
        self.questions.clear();
        if !self.attempt.interactive || !stays(end.outcome) {
            return Ok(Some(end));
        }
        self.turn.next();
        self.attempt.losses = 0;
        self.attempt.active = Instant::now();
        self.publish();
        Ok(None)
    }

    /// How the turn ended, which nobody but a user stopped.
    fn verdict(&self) -> End {
        let witness = self.attempt.proxy.as_ref().map(Proxy::witness).unwrap_or_default();
        let Some(result) = self.turn.result() else {
            return self.unexplained();
        };
        let outcome = match &result.startup_failure_reason {
            Some(_) => Outcome::ConfigError,
            None => outcome(result, &witness),
        };
        let said = result.result.clone().unwrap_or_else(|| result.errors.join("; "));
        match outcome {
            Outcome::Succeeded => End::new(outcome, ""),
            Outcome::StoppedByUser => End::new(outcome, "the turn was interrupted"),
            Outcome::InvalidCredentials => invalid_credentials(),
            _ => End::new(outcome, said),
        }
    }

    fn unexplained(&self) -> End {
        End::new(
            Outcome::AgentError,
            format!("the CLI ended without a result: {}", self.stderr.trim()),
        )
    }

    /// The process is gone without our doing.
    pub(super) fn gone(mut self, gone: Gone) -> Result<Episode, End> {
        let exit = match gone {
            Gone::Exit(exit) => exit,
            Gone::Lost(why) => {
                return Ok(Episode::AgentLost {
                    out_of_memory: false,
                    why,
                });
            }
            Gone::NotStarted(why) => return Ok(Episode::Ended(End::new(Outcome::ConfigError, why))),
        };
        if resume_refused(&self.turn) && self.resumed {
            return Ok(Episode::ResumeRefused);
        }
        if let Some(end) = self.must_stop() {
            if self.attempt.journal.history().open_turn() {
                let turn = self.attempt.journal.history().turn;
                self.attempt.turn_ended(turn, end.outcome)?;
            }
            return Ok(Episode::Ended(end));
        }
        if let Some(result) = self.turn.result()
            && result.startup_failure_reason.as_deref() == Some("config_file_invalid")
        {
            return Ok(Episode::Misconfigured(result.errors.join("; ")));
        }
        if self.turn.result().is_some()
            && let Some(end) = self.conclude()?
        {
            return Ok(Episode::Ended(end));
        }
        if !self.wrote && exit.oom_kills == 0 && exit.signal.is_none() {
            // It would end the same way again: a flag that it does not know, a file that it cannot read.
            let end = self.unexplained();
            let turn = self.attempt.journal.history().turn;
            self.attempt.turn_ended(turn, end.outcome)?;
            return Ok(Episode::Ended(end));
        }
        let why = match exit {
            Exit { oom_kills: 1.., .. } => "a process of the agent was killed for memory".to_owned(),
            Exit {
                signal: Some(signal), ..
            } => format!("the CLI was killed by signal {signal}"),
            Exit { code, .. } => format!("the CLI ended with code {} in mid-turn", code.unwrap_or(-1)),
        };
        self.attempt.journal.log(LogLevel::Warning, why.clone())?;
        Ok(Episode::AgentLost {
            out_of_memory: exit.oom_kills > 0,
            why,
        })
    }
}

impl Attempt {
    /// The end of a session that has had all its rounds.
    pub(super) fn rounds_used_up(&self) -> Option<End> {
        let most = self.live.now().max_turns?;
        let rounds = self.journal.history().rounds;
        (rounds >= u64::from(most)).then(|| {
            End::new(
                Outcome::MaxTurns,
                format!("the session has had {rounds} rounds, and maxTurns is {most}; {RAISE}"),
            )
        })
    }
}

/// The end of a session that has used up its dollars or tokens.
fn budget_exceeded(proxy: &Proxy) -> End {
    let (limits, spent) = (proxy.limits(), proxy.spent());
    let mut used = Vec::new();
    if let Some(limit) = limits.cost.filter(|limit| spent.cost >= *limit) {
        used.push(format!("{} of maxCostUSD {limit}", spent.cost));
    }
    if let Some(limit) = limits.tokens.filter(|limit| spent.tokens >= *limit) {
        used.push(format!("{} of maxTokens {limit}", spent.tokens));
    }
    End::new(
        Outcome::BudgetExceeded,
        format!("the session has used {}; {RAISE}", used.join(" and ")),
    )
}

/// The end of a run that used up its time.
pub(super) fn timed_out() -> End {
    End::new(
        Outcome::Timeout,
        "the session's timeout is reached; its work is kept: set the annotation ambient-code.io/start-requested-at to a new value for another run",
    )
}

fn invalid_credentials() -> End {
    let [own, other] = protocol::names::RUNNER_SECRETS;
    End::new(
        Outcome::InvalidCredentials,
        format!(
            "the model API refused the credential: check ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN in the Secret {own} or {other}"
        ),
    )
}
