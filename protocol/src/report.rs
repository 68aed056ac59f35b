//! The termination report: what a runner leaves for the operator in the container's termination message.

use serde::{Deserialize, Serialize};

use crate::{NanoUsd, Outcome, Usage};

/// Bytes of a report, always: the containers of a pod share 12 KiB of termination messages, and the file is a bind mount
/// that must be overwritten in place by a single write.
pub const SIZE: usize = 2_048;

/// What became of something that is sent elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Delivery {
    /// Not configured.
    #[default]
    Off,
    /// All of it arrived.
    Delivered,
    /// Some of it did not.
    Failed,
}

/// What a runner leaves behind. Numbers come first, text last, so that what is cut is text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// How the attempt ended; [`Outcome::Running`] in a report written between turns.
    pub outcome: Outcome,
    /// Attempt that wrote it.
    pub attempt: u32,
    /// Rounds of the session so far.
    #[serde(default)]
    pub turns: u64,
    /// Tokens of the session so far.
    #[serde(default)]
    pub usage: Usage,
    /// Cost of the session so far; absent when a model without a price was used.
    #[serde(default, rename = "costUSD", skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<NanoUsd>,
    /// Last seq spooled; 0: the runner ended before it could read the session's records, and its numbers say nothing.
    #[serde(default)]
    pub last_seq: u64,
    /// Last seq that the gateway acknowledged.
    #[serde(default)]
    pub acked_seq: u64,
    /// Whether the records arrived at the gateway.
    #[serde(default)]
    pub events: Delivery,
    /// Whether the trace arrived.
    #[serde(default)]
    pub traces: Delivery,
    /// Seconds that the model API asked to wait before another try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<u64>,
    /// What became of the repositories, in the order of the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repos: Vec<RepoReport>,
    /// Id of the CLI's conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sdk_session_id: Option<String>,
    /// Id of the trace, when tracing is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// For people: what happened and what to do; at most [`MAX_MESSAGE`] bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The agent's last answer, cut to what is left of [`SIZE`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub result: String,
}

/// What became of a repository; what is not here the session's spec says. Eight of the longest fit a report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RepoReport {
    /// Position in the spec's list.
    pub index: usize,
    /// Branch that was pushed, when the spec names none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub branch: String,
    /// Commit of the workspace: as it was cloned, or as it was pushed.
    pub commit: String,
    /// Whether `commit` was pushed.
    pub pushed: bool,
}

/// Most bytes of [`Report::message`].
pub const MAX_MESSAGE: usize = 512;

/// A termination message that is not a report.
#[derive(Debug, thiserror::Error)]
#[error("failed to read the termination report")]
pub struct NotAReport(#[source] serde_json::Error);

impl Report {
    /// Whether the runner came to read the session's records, so that its numbers are those of the volume.
    pub fn has_read(&self) -> bool {
        self.last_seq > 0
    }

    /// A report that says nothing but its outcome.
    pub fn new(outcome: Outcome, attempt: u32) -> Self {
        Self {
            outcome,
            attempt,
            turns: 0,
            usage: Usage::default(),
            cost_usd: None,
            last_seq: 0,
            acked_seq: 0,
            events: Delivery::Off,
            traces: Delivery::Off,
            retry_after: None,
            repos: Vec::new(),
            sdk_session_id: None,
            trace_id: None,
            message: String::new(),
            result: String::new(),
        }
    }

    /// The report as it is written: exactly [`SIZE`] bytes, text cut on a character's border, padded with spaces.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut report = self.clone();
        fitting(&self.message, MAX_MESSAGE).clone_into(&mut report.message);
        report.result = String::new();
        let without = encoded(&report).len();
        // What `,"result":""` itself takes.
        let room = SIZE.saturating_sub(without + 12);
        fitting(&self.result, room).clone_into(&mut report.result);
        let mut bytes = encoded(&report);
        bytes.resize(SIZE, b' ');
        bytes
    }

    /// Reads what a runner wrote; the padding is trimmed.
    pub fn from_message(message: &str) -> Result<Self, NotAReport> {
        serde_json::from_str(message.trim()).map_err(NotAReport)
    }
}

fn encoded(report: &Report) -> Vec<u8> {
    // A struct of numbers and strings always serialises.
    serde_json::to_vec(report).unwrap_or_default()
}

/// The longest beginning of `text` whose JSON form, without quotes, has at most `room` bytes.
fn fitting(text: &str, room: usize) -> &str {
    let mut used = 0;
    for (at, c) in text.char_indices() {
        used += json_len(c);
        if used > room {
            return &text[..at];
        }
    }
    text
}

/// Bytes that `serde_json` writes for a character.
fn json_len(c: char) -> usize {
    match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        c if (c as u32) < 0x20 => 6,
        c => c.len_utf8(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn report(message: &str, result: &str) -> Report {
        Report {
            turns: 3,
            cost_usd: Some(NanoUsd(1_234_567_890)),
            last_seq: u64::MAX,
            acked_seq: u64::MAX,
            sdk_session_id: Some("6fa459ea-ee8a-3ca4-894e-db77e160355e".into()),
            trace_id: Some("0".repeat(32)),
            message: message.into(),
            result: result.into(),
            ..Report::new(Outcome::Succeeded, 12)
        }
    }

    #[test]
    fn a_short_report_comes_back_whole() {
        let written = report("all fine", "hello\nworld");
        let bytes = written.to_bytes();
        assert_eq!(bytes.len(), SIZE);
        assert_eq!(
            Report::from_message(std::str::from_utf8(&bytes).unwrap()).unwrap(),
            written
        );
    }

    #[test]
    fn a_report_of_a_newer_runner_is_read_all_the_same() {
        let text = r#"{"outcome":"timeout","attempt":1,"news":[1,2]}   "#;
        assert_eq!(Report::from_message(text).unwrap(), Report::new(Outcome::Timeout, 1));
    }

    proptest! {
        #[test]
        fn any_text_is_cut_to_the_size_and_its_beginning_is_kept(message in "\\PC{0,900}", result in "(?s).{0,3000}") {
            let bytes = report(&message, &result).to_bytes();
            prop_assert_eq!(bytes.len(), SIZE);
            let read = Report::from_message(std::str::from_utf8(&bytes).unwrap()).unwrap();
            prop_assert!(message.starts_with(&read.message) && result.starts_with(&read.result));
            prop_assert!(read.result.len() == result.len() || bytes.iter().rev().take_while(|b| **b == b' ').count() < 12);
        }
    }
}
