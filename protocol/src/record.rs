//! Records: the entries of a session's event log.

use base64::Engine as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{NanoUsd, Outcome, Usage};

/// Longest record, bytes. What is longer becomes a [`Kind::Gap`] with its length.
pub const MAX_RECORD: usize = 64 << 20;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A message of the CLI, untouched but for redaction; a line that is no JSON object is [`NotJson`].
    Cli,
    /// A message given to the CLI: [`UserBody`].
    User,
    /// A metered model response: [`UsageBody`].
    Usage,
    /// What the runner knows of the session: [`SessionBody`].
    Session,
    /// For people: [`LogBody`].
    Log,
    /// What became of a repository: [`GitBody`].
    Git,
    /// Records that are not there: [`GapBody`].
    Gap,
    /// The last record of an attempt: [`EndBody`].
    End,
}

impl Kind {
    /// The kind as it stands in a record and as an SSE event name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cli => "cli",
            Self::User => "user",
            Self::Usage => "usage",
            Self::Session => "session",
            Self::Log => "log",
            Self::Git => "git",
            Self::Gap => "gap",
            Self::End => "end",
        }
    }
}

/// One entry of the event log. Serialised once, when it is spooled; those bytes are sent and stored verbatim.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Position in the session's one line of numbers, from 1, across attempts.
    pub seq: u64,
    /// Attempt that wrote it.
    pub attempt: u32,
    /// Turn that it belongs to, counted through the session; 0 before the first.
    pub turn: u32,
    /// When it was spooled.
    pub ts: Timestamp,
    /// What it is.
    pub kind: Kind,
    /// The seq it had before it was appended again behind a gap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub was: Option<u64>,
    /// What it says, by kind.
    pub body: Box<RawValue>,
}

/// The fields of a record that a store needs, read without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordHead {
    /// See [`Record::seq`].
    pub seq: u64,
    /// See [`Record::attempt`].
    pub attempt: u32,
    /// See [`Record::turn`].
    pub turn: u32,
    /// See [`Record::ts`].
    pub ts: Timestamp,
    /// See [`Record::kind`].
    pub kind: Kind,
}

/// Checksum of a record: CRC32C over its bytes as they travel.
pub fn checksum(record: &[u8]) -> u32 {
    crc32c::crc32c(record)
}

/// Body of [`Kind::Cli`] for a line that is not a JSON object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NotJson {
    /// The line, when it is UTF-8.
    Text(String),
    /// The line otherwise.
    Base64(String),
}

impl NotJson {
    /// Wraps a line.
    pub fn new(line: &[u8]) -> Self {
        std::str::from_utf8(line).map_or_else(
            |_| Self::Base64(base64::engine::general_purpose::STANDARD.encode(line)),
            |text| Self::Text(text.to_owned()),
        )
    }
}

/// Body of [`Kind::User`]: the message was *sent*; this record was on disk before the message was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UserBody {
    /// Command that sent it: [`crate::identity::PROMPT_COMMAND`], a client's id, or a continuation's.
    pub command: String,
    /// The message's UUID in the CLI's stream and transcript.
    pub uuid: Uuid,
    /// The message.
    pub text: String,
}

/// Body of [`Kind::Usage`]: a model response as the proxy metered it. A later record of the same message replaces an earlier one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UsageBody {
    /// The API's message id.
    pub message_id: String,
    /// The model that answered.
    pub model: String,
    /// Tokens of the response.
    #[serde(flatten)]
    pub usage: Usage,
    /// Price by our table; absent for a model without one.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "costUSD")]
    pub cost_usd: Option<NanoUsd>,
    /// The response has begun and not ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub open: bool,
    /// The stream was cut: output tokens are estimated from the bytes seen.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub estimated: bool,
    /// When the request was forwarded.
    pub started_at: Timestamp,
    /// When the first token came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_at: Option<Timestamp>,
    /// When the response ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// Body of [`Kind::Session`]: what the runner must know again after a restart, and clients like to see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum SessionBody {
    /// An attempt began.
    AttemptStarted {
        /// Run that the attempt belongs to.
        run: u32,
        /// The pod's UID; empty outside Kubernetes.
        pod_uid: String,
        /// Version of the runner.
        runner_version: String,
    },
    /// The CLI was started.
    CliStarted {
        /// Id of the CLI's conversation.
        cli_session_id: Uuid,
        /// An earlier conversation goes on.
        resumed: bool,
    },
    /// The CLI took these messages; they are never sent again.
    Taken {
        /// UUIDs of the messages.
        uuids: Vec<Uuid>,
    },
    /// The CLI began a new conversation (`/clear`).
    ConversationReset {
        /// Id of the new conversation.
        cli_session_id: Uuid,
    },
    /// We are about to stop this turn, or to end a session that waits behind it. On resume the turn is continued, unless a
    /// user interrupted it or ended the session.
    Stopping {
        /// The turn.
        turn: u32,
        /// Why.
        cause: Outcome,
    },
    /// The CLI began a turn by itself: with messages that an interrupt left in its queue, or because a background task was
    /// done. Every other turn begins with its first [`UserBody`].
    TurnStarted {
        /// The turn.
        turn: u32,
    },
    /// A permission question was answered; on disk before the CLI hears of it.
    ///
    /// The question itself is the CLI's own line, a [`Kind::Cli`] record with `type: control_request` and
    /// `request.subtype: can_use_tool`. It is open until this record with its `request_id`, the CLI's
    /// `control_cancel_request` with it, [`Self::TurnEnded`] or [`Self::CliStarted`].
    PermissionAnswered {
        /// The CLI's `request_id`.
        request_id: String,
        /// Whether the tool may run.
        allowed: bool,
    },
    /// A turn is over.
    TurnEnded {
        /// The turn.
        turn: u32,
        /// How it ended.
        outcome: Outcome,
    },
    /// The agent container was restarted.
    AgentRestarted {
        /// Whether memory was the cause.
        out_of_memory: bool,
    },
    /// A command of the gateway was carried out or refused; it is never carried out again. A user message has no such
    /// record: its own is its memory, with the command's id in [`UserBody::command`].
    CommandDone {
        /// The command's id.
        id: String,
        /// Why it was not carried out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
}

/// Body of [`Kind::Log`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogBody {
    /// `info`, `warning` or `error`.
    pub level: LogLevel,
    /// What happened and what to do.
    pub message: String,
}

/// How much a log record matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Good to know.
    Info,
    /// Somebody should look.
    Warning,
    /// Something did not work.
    Error,
}

/// Body of [`Kind::Git`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GitBody {
    /// The repository's name in the session.
    pub name: String,
    /// Where it was cloned from or pushed to, without credentials.
    pub url: String,
    /// Branch cloned or pushed.
    pub branch: String,
    /// Commit cloned or pushed.
    pub commit: String,
    /// `true`: pushed; `false`: cloned, or not pushed for `error`.
    pub pushed: bool,
    /// Why it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Body of [`Kind::Gap`]: records that are not in the log, or one line that was too long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GapBody {
    /// First missing seq.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
    /// Last missing seq.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u64>,
    /// Length of a line beyond [`MAX_RECORD`], bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
}

/// Body of [`Kind::End`]: closes an attempt; its sums run over the bytes of the attempt's earlier records in seq order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndBody {
    /// How the attempt ended.
    pub outcome: Outcome,
    /// Seq of the last record before this one.
    pub last_seq: u64,
    /// Bytes of the attempt's records before this one.
    pub bytes: u64,
    /// SHA-256 of those bytes, hex.
    pub sha256: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_from_a_record_without_looking_at_its_body() {
        let record = Record {
            seq: 7,
            attempt: 2,
            turn: 3,
            ts: "2026-01-02T03:04:05.678Z".parse().unwrap(),
            kind: Kind::Cli,
            was: None,
            body: RawValue::from_string(r#"{"type":"future", "n":1.50}"#.to_owned()).unwrap(),
        };
        let bytes = serde_json::to_vec(&record).unwrap();
        let head: RecordHead = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(
            (head.seq, head.attempt, head.turn, head.ts, head.kind),
            (7, 2, 3, record.ts, Kind::Cli)
        );
        let again: Record = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(again.body.get(), record.body.get(), "the body keeps its bytes");
    }

    #[test]
    fn a_line_that_is_not_utf8_keeps_its_bytes() {
        assert_eq!(NotJson::new(b"oops"), NotJson::Text("oops".into()));
        assert_eq!(NotJson::new(&[0xff, 0xfe]), NotJson::Base64("//4=".into()));
        assert_eq!(
            serde_json::to_string(&NotJson::new(b"oops")).unwrap(),
            r#"{"text":"oops"}"#
        );
    }
}
