//! Frames of the runner's WebSocket: one JSON object per text message, its one key says which.
//!
//! Runner → gateway: [`RunnerFrame`]; gateway → runner: [`GatewayFrame`]. The token travels as `Authorization: Bearer`
//! on the upgrade; a refusal is an accepted upgrade followed by a [`close`] code.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Version of this protocol, sent in [`Hello::protocol`].
pub const VERSION: u32 = 1;
/// Limit of a WebSocket message and of a frame, bytes, on both ends: one record of the greatest length and its envelope.
pub const MAX_MESSAGE: usize = 72 << 20;
/// Most bytes of records in one `records` frame, unless a single record is longer.
pub const MAX_BATCH: usize = 1 << 20;

/// Longest id of a command, bytes.
pub const MAX_COMMAND_ID: usize = 128;

/// Close codes.
pub mod close {
    /// The peer broke the protocol.
    pub const PROTOCOL: u16 = 4400;
    /// Not, or not yet, this session's pod: try again.
    pub const NOT_THIS_POD: u16 = 4401;
    /// The token is refused.
    pub const FORBIDDEN: u16 = 4403;
    /// The session is gone: stop trying.
    pub const GONE: u16 = 4404;
    /// A newer pod took over.
    pub const SUPERSEDED: u16 = 4409;
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A runner that drives the agent.
    Run,
    /// A drain, which only delivers what is left.
    Drain,
}

/// First frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    /// [`VERSION`].
    pub protocol: u32,
    /// Who speaks.
    pub role: Role,
    /// UID of the session.
    pub uid: String,
    /// Name of the session.
    pub name: String,
    /// Attempt of the pod.
    pub attempt: u32,
    /// UID of the pod.
    pub pod_uid: String,
    /// Random id of the spool: tells the gateway's log of this spool from that of a lost one.
    pub spool: String,
    /// Seq that the next record will have.
    pub next_seq: u64,
    /// Version of the CLI, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cli_version: Option<String>,
}

/// From the runner to the gateway.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunnerFrame {
    /// First frame.
    Hello(Hello),
    /// Records in seq order, each as it was spooled.
    Records(Vec<Box<RawValue>>),
    /// A piece of a message while it is written: live only, no seq, not stored.
    Delta(Box<RawValue>),
    /// Answer to a command, after its effect is on disk.
    CommandResult(CommandResult),
    /// A piece of a file.
    FileChunk(FileChunk),
}

/// From the gateway to the runner.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GatewayFrame {
    /// Answer to `hello`.
    Welcome(Welcome),
    /// All records up to `seq` are stored.
    Ack(Ack),
    /// Another record with this seq is stored already.
    Conflict(Ack),
    /// A message for the agent.
    UserMessage(UserMessage),
    /// Stop the turn that it names; dropped if that turn is over.
    Interrupt(Interrupt),
    /// End an interactive session.
    EndSession(EndSession),
    /// Answer to a permission request of the agent.
    PermissionResponse(PermissionResponse),
    /// Read or write a file of the workspace.
    FileRequest(FileRequest),
    /// A piece of a file to write, after its request.
    FileChunk(FileChunk),
}

/// See [`GatewayFrame::Welcome`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Welcome {
    /// Last seq stored without a hole before it; 0: none. Replaces what the runner remembers, also downwards.
    pub acked_seq: u64,
    /// The spool whose records those are; absent when nothing is stored of this session. When it is not the runner's own,
    /// nothing of the runner's spool counts as acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spool: Option<String>,
}

/// A seq.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// See [`crate::Record::seq`].
    pub seq: u64,
}

/// See [`GatewayFrame::UserMessage`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserMessage {
    /// The command's id: the same for every try, no longer than [`MAX_COMMAND_ID`], and not `prompt` or `continue/…`.
    pub id: String,
    /// The message.
    pub text: String,
}

/// See [`GatewayFrame::Interrupt`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupt {
    /// The command's id.
    pub id: String,
    /// The turn to stop.
    pub turn: u32,
}

/// See [`GatewayFrame::EndSession`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndSession {
    /// The command's id.
    pub id: String,
}

/// See [`GatewayFrame::PermissionResponse`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PermissionResponse {
    /// The command's id.
    pub id: String,
    /// The CLI's request.
    pub request_id: String,
    /// The answer in the CLI's own form: `{"behavior":"allow","updatedInput"?}` or `{"behavior":"deny","message"}`.
    pub response: Box<RawValue>,
}

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileOperation {
    /// Entries of a folder: chunks of a JSON list of [`FileEntry`].
    List,
    /// Kind and size: a chunk of one [`FileEntry`].
    Stat,
    /// Bytes.
    Read,
    /// Replace: [`GatewayFrame::FileChunk`]s up to `eof` follow; the file changes as a whole or not at all, and then
    /// [`RunnerFrame::CommandResult`] answers.
    Write,
}

/// See [`GatewayFrame::FileRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRequest {
    /// The command's id.
    pub id: String,
    /// What to do.
    pub op: FileOperation,
    /// Path below the workspace.
    pub path: String,
    /// First byte.
    #[serde(default)]
    pub offset: u64,
    /// Bytes at most.
    #[serde(default)]
    pub length: u64,
}

/// A file as [`FileOperation::List`] and [`FileOperation::Stat`] describe it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileEntry {
    /// Its name, without its folder.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// When it was changed last.
    pub modified: jiff::Timestamp,
}

/// See [`FileEntry::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// A file with bytes.
    File,
    /// A folder.
    Folder,
    /// A symbolic link; it is not followed.
    Link,
    /// A socket, pipe or device; it cannot be read.
    Other,
}

/// Most bytes of a file in one [`FileChunk`], before base64.
pub const MAX_CHUNK: usize = 256 << 10;

/// See [`RunnerFrame::CommandResult`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandResult {
    /// The command's id.
    pub id: String,
    /// Why it was not carried out; absent when it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Seq of the record that holds its effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
}

/// See [`RunnerFrame::FileChunk`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChunk {
    /// The command's id.
    pub id: String,
    /// Position of the first byte.
    pub offset: u64,
    /// Bytes, base64.
    pub data: String,
    /// Nothing follows.
    #[serde(default)]
    pub eof: bool,
    /// Why there is nothing; begins with [`NOT_FOUND`] or [`REFUSED`] when that is why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How the error of a file request begins when there is no such file.
pub const NOT_FOUND: &str = "not found";
/// How it begins when the file is not one that is served.
pub const REFUSED: &str = "refused";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_records_frame_keeps_the_bytes_of_each_record() {
        let text = r#"{"records":[{"seq":1,  "x":1.0},{"seq":2}]}"#;
        let RunnerFrame::Records(records) = serde_json::from_str(text).unwrap() else {
            panic!("a records frame")
        };
        assert_eq!(records[0].get(), r#"{"seq":1,  "x":1.0}"#);
        assert_eq!(records.len(), 2);
    }

    #[test]
    fn frames_are_named_by_their_one_key() {
        let ack = serde_json::to_string(&GatewayFrame::Ack(Ack { seq: 9 })).unwrap();
        assert_eq!(ack, r#"{"ack":{"seq":9}}"#);
    }
}
