//! Files of a workspace, asked for through the session's runner: a request lives as long as its client and its runner do.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use protocol::frame::{CommandResult, FileChunk, FileOperation, FileRequest, GatewayFrame};
use tokio::{sync::mpsc, time::timeout};

use crate::{live::Channel, room::Taken, store::Epoch};

/// How long a runner may take for its next frame, or for taking ours.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Requests of one session at once.
const MAX_REQUESTS: usize = 32;
/// Frames to a runner that may wait for its socket.
const OUTBOX: usize = 4;
/// Bytes of a runner's words, and of what the ends of pieces add to them, beyond what was asked for.
const WORDS: usize = 8 << 10;
/// Frames of one answer that may wait for its reader: a window of the smallest sensible chunks.
const REPLIES: usize = 64;

/// What a runner says to a request.
#[derive(Debug)]
pub enum Reply {
    /// A piece of the answer.
    Chunk(FileChunk),
    /// What became of a write.
    Result(CommandResult),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No runner is connected.
    #[error("no runner is connected")]
    NoRunner,
    /// Too many at once.
    #[error("the session has {MAX_REQUESTS} file requests under way: try again when one is done")]
    Busy,
    /// There is no room for it.
    #[error("other requests of yours hold all the memory that a caller may take here: try again when one is done")]
    NoRoom,
    /// It left before it answered.
    #[error("the session's runner left before it answered")]
    Left,
    /// It did not answer in time.
    #[error("the session's runner did not answer within {} s: try again", ANSWER_WITHIN.as_secs())]
    Silent,
    /// It answered that it cannot.
    #[error("{0}")]
    Refused(String),
    /// It answered what cannot be understood.
    #[error("the session's runner answered what cannot be understood: {0}")]
    Garbled(String),
}

/// The way to a session's runner.
#[derive(Debug, Default)]
pub struct Files {
    line: Mutex<Option<Line>>,
}

#[derive(Debug)]
struct Line {
    epoch: Epoch,
    outbox: mpsc::Sender<Order>,
    waiting: HashMap<String, Waiting>,
}

/// Who waits for replies, and for how many bytes of them.
#[derive(Debug)]
struct Waiting {
    reader: mpsc::Sender<Reply>,
    left: usize,
}

/// A frame for a runner, and the room that it takes until it has left.
#[derive(Debug)]
pub struct Order {
    /// The frame.
    pub frame: GatewayFrame,
    _room: Option<Taken>,
}

/// A runner's end of the line; requests under way end with it.
#[derive(Debug)]
pub struct Attached {
    channel: Arc<Channel>,
    epoch: Epoch,
    outbox: mpsc::Receiver<Order>,
}

/// A request under way.
#[derive(Debug)]
pub struct Conversation {
    channel: Arc<Channel>,
    id: String,
    outbox: mpsc::Sender<Order>,
    replies: mpsc::Receiver<Reply>,
}

impl Reply {
    fn id(&self) -> &str {
        match self {
            Self::Chunk(chunk) => &chunk.id,
            Self::Result(result) => &result.id,
        }
    }

    /// Bytes that it takes while it waits for its reader.
    fn length(&self) -> usize {
        let words = |error: &Option<String>| error.as_ref().map_or(0, String::len);
        match self {
            Self::Chunk(chunk) => chunk.data.len() + words(&chunk.error),
            Self::Result(result) => words(&result.error),
        }
    }
}

/// What is asked of a runner.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// What to do.
    pub op: FileOperation,
    /// With which path below the workspace.
    pub path: &'a str,
    /// From which byte on.
    pub offset: u64,
    /// With how many bytes.
    pub length: u64,
    /// Bytes of a file, or of what is said about it, that the answer has at most.
    pub most: usize,
}

impl Files {
    fn line(&self) -> MutexGuard<'_, Option<Line>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the session's runner is connected here.
    pub fn is_open(&self) -> bool {
        self.line().is_some()
    }

    /// Hands a reply to who waits for it. `Some`: nobody does.
    pub fn reply(&self, reply: Reply) -> Option<Reply> {
        let mut line = self.line();
        let Some(line) = &mut *line else { return Some(reply) };
        let Some(waiting) = line.waiting.get_mut(reply.id()) else {
            return Some(reply);
        };
        let id = reply.id().to_owned();
        let left = waiting.left.checked_sub(reply.length());
        // More than was asked for: the request ends.
        if left.is_none() || waiting.reader.try_send(reply).is_err() {
            line.waiting.remove(&id);
        } else if let Some(left) = left {
            waiting.left = left;
        }
        None
    }
}

impl Attached {
    /// Makes a connection the session's way to its runner.
    pub fn new(channel: Arc<Channel>, epoch: Epoch) -> Self {
        let (sender, outbox) = mpsc::channel(OUTBOX);
        *channel.files.line() = Some(Line {
            epoch,
            outbox: sender,
            waiting: HashMap::new(),
        });
        Self { channel, epoch, outbox }
    }

    /// The next frame for the runner. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Order {
        match self.outbox.recv().await {
            Some(order) => order,
            // A newer connection has the line: this one is about to be told so.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut line = self.channel.files.line();
        if line.as_ref().is_some_and(|line| line.epoch == self.epoch) {
            *line = None;
        }
    }
}

impl Conversation {
    /// Sends a request to the session's runner.
    pub async fn begin(channel: Arc<Channel>, question: Question<'_>) -> Result<Self, Error> {
        let Question {
            op,
            path,
            offset,
            length,
            most,
        } = question;
        // No client's id of a command has a slash.
        let id = format!("file/{}", uuid::Uuid::new_v4());
        let (sender, replies) = mpsc::channel(REPLIES);
        let outbox = {
            let mut line = channel.files.line();
            let line = line.as_mut().ok_or(Error::NoRunner)?;
            line.waiting.retain(|_, waiting| !waiting.reader.is_closed());
            if line.waiting.len() >= MAX_REQUESTS {
                return Err(Error::Busy);
            }
            let left = most.div_ceil(3) * 4 + WORDS;
            let waiting = Waiting { reader: sender, left };
            line.waiting.insert(id.clone(), waiting);
            line.outbox.clone()
        };
        let conversation = Self {
            channel,
            id: id.clone(),
            outbox,
            replies,
        };
        let path = path.to_owned();
        let request = FileRequest {
            id,
            op,
            path,
            offset,
            length,
        };
        conversation.send(GatewayFrame::FileRequest(request), None).await?;
        Ok(conversation)
    }

    async fn send(&self, frame: GatewayFrame, room: Option<Taken>) -> Result<(), Error> {
        let order = Order { frame, _room: room };
        match timeout(ANSWER_WITHIN, self.outbox.send(order)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Error::Left),
            Err(_) => Err(Error::Silent),
        }
    }

    /// Sends a piece of a file to write, which keeps its room until it has left.
    pub async fn chunk(&self, offset: u64, data: String, eof: bool, room: Option<Taken>) -> Result<(), Error> {
        let chunk = FileChunk {
            id: self.id.clone(),
            offset,
            data,
            eof,
            error: None,
        };
        self.send(GatewayFrame::FileChunk(chunk), room).await
    }

    /// The next reply.
    pub async fn reply(&mut self) -> Result<Reply, Error> {
        match timeout(ANSWER_WITHIN, self.replies.recv()).await {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(Error::Left),
            Err(_) => Err(Error::Silent),
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        if let Some(line) = &mut *self.channel.files.line() {
            line.waiting.remove(&self.id);
        }
    }
}
