//! The control socket: how people in the runner's container speak to a running session. One JSON object a line, one answer
//! a line. The socket is in the runner's private folder, which the agent does not see.

pub mod client;

use std::io;
use std::path::{Path, PathBuf};

use protocol::frame::CommandResult;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::command::{Command, Order};
use crate::status::Status;

/// Longest request, bytes: the longest message and its envelope.
const MAX_REQUEST: u64 = 16 << 20;
/// Commands that wait; who comes then waits with them.
const QUEUE: usize = 16;

/// What is asked on the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// A message for the agent.
    Send {
        /// The message.
        text: String,
        /// Given again with the same id, it is sent once; a new one when absent.
        id: Option<String>,
    },
    /// Stop a turn; the one that runs when absent.
    Interrupt {
        /// The turn.
        turn: Option<u32>,
    },
    /// Answer a permission question.
    Answer {
        /// The question; the only open one when absent.
        request_id: Option<String>,
        /// Whether the tool may run.
        allow: bool,
        /// Told to the agent with a denial.
        message: String,
    },
    /// End the session.
    End,
    /// Tell the figures.
    Status,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It was carried out, and that is on disk.
    Done(CommandResult),
    /// It was not.
    Refused(String),
    /// The figures.
    Status(Box<Status>),
}

/// The running socket; gone when it is dropped.
pub struct Control {
    commands: mpsc::Receiver<Command>,
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Control {
    /// Listens. A socket that a dead runner left is replaced.
    pub fn listen(path: &Path, status: watch::Receiver<Status>) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let (sender, commands) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let asked = Asked {
                            commands: sender.clone(),
                            status: status.clone(),
                        };
                        tokio::spawn(asked.serve(stream));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection to the control socket was lost");
                        // Out of file descriptors, most likely: it must not turn in circles.
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(Self {
            commands,
            path: path.to_owned(),
            task,
        })
    }

    /// The next command. May be dropped while it waits.
    pub async fn command(&mut self) -> Option<Command> {
        self.commands.recv().await
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One connection.
struct Asked {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
}

impl Asked {
    async fn serve(self, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read.take(MAX_REQUEST)).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let reply = match serde_json::from_str(&line) {
                Ok(request) => self.reply(request).await,
                Err(error) => Reply::Refused(format!("failed to read the request: {error}")),
            };
            // Structs of strings and numbers always serialise.
            let mut text = serde_json::to_vec(&reply).unwrap_or_default();
            text.push(b'\n');
            if write.write_all(&text).await.is_err() {
                return;
            }
            lines.get_mut().get_mut().set_limit(MAX_REQUEST);
        }
    }

    async fn reply(&self, request: Request) -> Reply {
        let (id, order) = match self.order(request) {
            Ok(order) => order,
            Err(reply) => return reply,
        };
        let (answer, mut answered) = mpsc::unbounded_channel();
        let command = Command { id, order, answer };
        if self.commands.send(command).await.is_err() {
            return Reply::Refused("the session is ending".to_owned());
        }
        match answered.recv().await {
            Some(CommandResult { error: Some(error), .. }) => Reply::Refused(error),
            Some(result) => Reply::Done(result),
            None => Reply::Refused("the session ended before it took the command".to_owned()),
        }
    }

    /// The order that is meant, with an id; or the answer, where nothing is to be ordered.
    fn order(&self, request: Request) -> Result<(String, Order), Reply> {
        let status = self.status.borrow().clone();
        let new = || format!("local/{}", Uuid::new_v4());
        Ok(match request {
            Request::Status => return Err(Reply::Status(Box::new(status))),
            Request::Send { text, id } => (id.unwrap_or_else(new), Order::UserMessage(text)),
            Request::Interrupt { turn } => (new(), Order::Interrupt(turn.unwrap_or(status.turn))),
            Request::End => (new(), Order::EndSession),
            Request::Answer {
                request_id,
                allow,
                message,
            } => {
                let request_id = match (request_id, status.questions.as_slice()) {
                    (Some(id), _) => id,
                    (None, [question]) => question.request_id.clone(),
                    (None, []) => return Err(Reply::Refused("no question is open".to_owned())),
                    (None, _) => {
                        return Err(Reply::Refused(
                            "several questions are open: name one, as `runner status` shows them".to_owned(),
                        ));
                    }
                };
                let response = if allow {
                    serde_json::json!({ "behavior": "allow" })
                } else {
                    serde_json::json!({ "behavior": "deny", "message": message })
                };
                let response = response.to_string();
                (new(), Order::PermissionResponse { request_id, response })
            }
        })
    }
}
