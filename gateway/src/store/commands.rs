//! Commands to runners: kept before their sender is told so, until each has its one answer.

use futures::future::BoxFuture;
use jiff::Timestamp;
use protocol::frame::GatewayFrame;

use super::StoreError;

/// Unanswered commands of a session at most.
pub const MAX_PENDING: usize = 64;
/// How long an answered command can be asked for, seconds.
pub const KEPT_SECONDS: i64 = 7 * 24 * 3600;

/// A command to be kept.
#[derive(Clone, Debug)]
pub struct NewCommand {
    /// UID of the session.
    pub session: String,
    /// Namespace of the session.
    pub namespace: String,
    /// Name of the session.
    pub name: String,
    /// The command's id, the session's own.
    pub id: String,
    /// The frame as runners get it, JSON.
    pub frame: String,
    /// What its sender asked for, JSON: an equal one is the same command.
    pub asked: String,
}

/// What became of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// Not yet known.
    #[default]
    Pending,
    /// Carried out; its effect is the record of this seq, when known.
    Done(Option<u64>),
    /// Not carried out, the runner says.
    Refused(String),
    /// Not carried out: the run ended before.
    Expired(String),
}

impl Answer {
    /// As stored and shown.
    pub fn state(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Done(_) => "done",
            Self::Refused(_) => "refused",
            Self::Expired(_) => "expired",
        }
    }

    /// Why it was not carried out.
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Refused(error) | Self::Expired(error) => Some(error),
            Self::Pending | Self::Done(_) => None,
        }
    }

    /// The record of its effect.
    pub fn seq(&self) -> Option<u64> {
        match self {
            Self::Done(seq) => *seq,
            _ => None,
        }
    }

    /// What was stored.
    pub(super) fn of(state: &str, error: Option<String>, seq: Option<u64>) -> Self {
        match state {
            "done" => Self::Done(seq),
            "refused" => Self::Refused(error.unwrap_or_default()),
            "expired" => Self::Expired(error.unwrap_or_default()),
            _ => Self::Pending,
        }
    }
}

/// A kept command.
#[derive(Clone, Debug)]
pub struct Command {
    /// Its place in the order of all commands.
    pub number: u64,
    /// See [`NewCommand::id`].
    pub id: String,
    /// See [`NewCommand::frame`].
    pub frame: String,
    /// See [`NewCommand::asked`].
    pub asked: String,
    /// When it was kept.
    pub created: Timestamp,
    /// What became of it.
    pub answer: Answer,
}

impl Command {
    /// The frame for the runner.
    pub fn frame(&self) -> Result<GatewayFrame, serde_json::Error> {
        serde_json::from_str(&self.frame)
    }
}

/// Answer to a new command.
#[derive(Clone, Debug)]
pub enum Accepted {
    /// It is on disk.
    New(Command),
    /// It was there already.
    Same(Command),
    /// Another command has this id.
    Other,
    /// The session has [`MAX_PENDING`] commands without an answer.
    Full,
}

/// A session with commands that have no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// UID of the session.
    pub session: String,
    /// Namespace of the session.
    pub namespace: String,
    /// Name of the session.
    pub name: String,
}

/// A durable store of commands. Answers that come as records are taken in the transaction that stores those, see
/// [`super::Batch::answers`].
pub trait CommandLog: Send + Sync + 'static {
    /// Keeps a command; when it answers `New` it survives the death of the process and of the machine.
    fn keep(&self, command: NewCommand) -> BoxFuture<'static, Result<Accepted, StoreError>>;
    /// A command.
    fn command(&self, session: &str, id: &str) -> BoxFuture<'static, Result<Option<Command>, StoreError>>;
    /// Commands without an answer behind the number `after`, in order.
    fn pending(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Vec<Command>, StoreError>>;
    /// The first of them.
    fn next(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Option<Command>, StoreError>>;
    /// Sessions that have some.
    fn waiting(&self) -> BoxFuture<'static, Result<Vec<Waiting>, StoreError>>;
    /// Answers a command; the first answer stays. `false`: it had one, or there is no such command.
    fn answer(&self, session: &str, id: &str, answer: Answer) -> BoxFuture<'static, Result<bool, StoreError>>;
    /// Forgets commands answered longer than [`KEPT_SECONDS`] ago.
    fn forget_answered(&self, now: Timestamp) -> BoxFuture<'static, Result<(), StoreError>>;
    /// Turn of the newest stored record; 0: none.
    fn turn(&self, session: &str) -> BoxFuture<'static, Result<u32, StoreError>>;
}
