//! What a session is doing, for people who ask on the control socket.

use protocol::spec::LiveLimits;
use protocol::{NanoUsd, Usage};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// Where a session stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The agent is being started.
    #[default]
    Starting,
    /// A turn runs.
    Working,
    /// A turn waits for the answer to a question.
    Asking,
    /// Waits for a message.
    Idle,
    /// Ends: what is left to do is done and delivered.
    Ending,
}

/// An open permission question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    /// The CLI's id of the question.
    pub request_id: String,
    /// The tool that it is about.
    pub tool: String,
}

/// Live figures of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Name of the session.
    pub session: String,
    /// Run.
    pub run: u32,
    /// Attempt.
    pub attempt: u32,
    /// What it does.
    pub phase: Phase,
    /// Whether it takes messages.
    pub interactive: bool,
    /// Last turn; 0: none yet.
    pub turn: u32,
    /// Rounds of the session.
    pub rounds: u64,
    /// Tokens of the session.
    pub usage: Usage,
    /// Cost of the session; absent when a model without a price answered.
    #[serde(rename = "costUSD")]
    pub cost_usd: Option<NanoUsd>,
    /// Limits as they are now.
    pub limits: LiveLimits,
    /// Running time of the run, seconds.
    pub used_seconds: u64,
    /// Messages that wait to be taken up.
    pub queued: usize,
    /// Background tasks of the agent.
    pub background_tasks: usize,
    /// Open permission questions.
    pub questions: Vec<Question>,
    /// Last record.
    pub last_seq: u64,
    /// Records that the gateway has not acknowledged; absent without a gateway.
    pub unacked: Option<u64>,
}

impl Status {
    /// The figures as people read them.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<10} {value}");
        };
        let phase = match self.phase {
            Phase::Starting => "starting the agent",
            Phase::Working => "working",
            Phase::Asking => "waits for an answer",
            Phase::Idle => "waits for a message",
            Phase::Ending => "ending",
        };
        let LiveLimits {
            timeout,
            inactivity_timeout,
            max_turns,
            max_cost_usd,
            max_tokens,
        } = self.limits;
        line(
            "session",
            format!("{}, run {}, attempt {}", self.session, self.run, self.attempt),
        );
        line("phase", phase.to_owned());
        line("turn", self.turn.to_string());
        line("rounds", of(self.rounds, max_turns));
        line("tokens", of(self.usage.total(), max_tokens));
        let cost = self.cost_usd.map_or("no price".to_owned(), |cost| format!("${cost}"));
        line(
            "cost",
            max_cost_usd.map_or_else(|| cost.clone(), |most| format!("{cost} of ${most}")),
        );
        line(
            "time",
            of(
                format!("{} s", self.used_seconds),
                timeout.map(|most| format!("{most} s")),
            ),
        );
        if let Some(seconds) = inactivity_timeout.filter(|seconds| self.interactive && *seconds > 0) {
            line("idle", format!("ends after {seconds} s without a message"));
        }
        line(
            "queue",
            format!("{} messages, {} background tasks", self.queued, self.background_tasks),
        );
        let unacked = self.unacked.map_or_else(
            || "no gateway".to_owned(),
            |unacked| format!("{unacked} not acknowledged"),
        );
        line("records", format!("{}, {unacked}", self.last_seq));
        for question in &self.questions {
            line(
                "question",
                format!("{}: may it run {}?", question.request_id, question.tool),
            );
        }
        text
    }
}

fn of(value: impl std::fmt::Display, most: Option<impl std::fmt::Display>) -> String {
    most.map_or_else(|| value.to_string(), |most| format!("{value} of {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_figures_and_limits_on_lines_of_their_own() {
        let status = Status {
            session: "hello".into(),
            run: 2,
            attempt: 3,
            phase: Phase::Asking,
            interactive: true,
            turn: 4,
            rounds: 7,
            cost_usd: Some("0.5".parse().unwrap()),
            limits: LiveLimits {
                timeout: Some(60),
                inactivity_timeout: Some(30),
                max_turns: Some(10),
                max_cost_usd: Some("2".parse().unwrap()),
                max_tokens: None,
            },
            used_seconds: 12,
            questions: vec![Question {
                request_id: "r-1".into(),
                tool: "Bash".into(),
            }],
            last_seq: 40,
            unacked: Some(2),
            ..Status::default()
        };
        insta::assert_snapshot!(status.text(), @"
        session    hello, run 2, attempt 3
        phase      waits for an answer
        turn       4
        rounds     7 of 10
        tokens     0
        cost       $0.50 of $2.00
        time       12 s of 60 s
        idle       ends after 30 s without a message
        queue      0 messages, 0 background tasks
        records    40, 2 not acknowledged
        question   r-1: may it run Bash?
        ");
    }
}
