//! `runner send|interrupt|answer|end|status`: the other end of the control socket.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use protocol::frame::CommandResult;
use protocol::names::path;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::{Reply, Request};
use crate::config::CONTROL;

/// What people say to a running session.
#[derive(Clone, Debug, Subcommand)]
pub enum Word {
    /// Send a message to the agent of an interactive session.
    Send {
        /// The message.
        #[arg(allow_hyphen_values = true)]
        text: String,
        /// Id of the message: given again with the same id, it is sent once.
        #[arg(long)]
        id: Option<String>,
        /// Which session.
        #[command(flatten)]
        at: At,
    },
    /// Stop the turn that runs; an interactive session then waits for a message.
    Interrupt {
        /// Stop it only if it is this turn.
        #[arg(long)]
        turn: Option<u32>,
        /// Which session.
        #[command(flatten)]
        at: At,
    },
    /// Answer a permission question of an interactive session.
    Answer {
        /// Whether the tool may run.
        verdict: Verdict,
        /// The question; not needed when only one is open.
        #[arg(long)]
        question: Option<String>,
        /// Told to the agent with a denial.
        #[arg(long, default_value = "The user does not want this.", allow_hyphen_values = true)]
        message: String,
        /// Which session.
        #[command(flatten)]
        at: At,
    },
    /// End an interactive session.
    End {
        /// Which session.
        #[command(flatten)]
        at: At,
    },
    /// Show what the session does, what it has used, and what it may use.
    Status {
        /// For machines: one JSON object.
        #[arg(long)]
        json: bool,
        /// Which session.
        #[command(flatten)]
        at: At,
    },
}

/// An answer to a permission question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verdict {
    /// The tool runs.
    Allow,
    /// It does not.
    Deny,
}

/// Which session.
#[derive(Args, Clone, Debug)]
pub struct At {
    /// State folder of a session without Kubernetes; in a pod it is not needed.
    #[arg(long)]
    state: Option<PathBuf>,
}

impl At {
    fn socket(&self) -> PathBuf {
        self.state
            .as_ref()
            .map_or_else(|| path::CONTROL_SOCKET.into(), |state| state.join(CONTROL))
    }
}

/// Why nothing came of it.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "failed to reach the session on {path}: it does not run here, has not started yet, or has ended; without Kubernetes its --state is needed"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The runner went away.
    #[error("failed to hear an answer: the runner ended or broke off; `runner status` says whether it still runs")]
    Lost,
    /// It was not carried out.
    #[error("{0}")]
    Refused(String),
}

/// Says it and returns what is to be shown.
pub async fn say(word: Word) -> Result<String, ClientError> {
    let (request, at, json) = match word {
        Word::Send { text, id, at } => (Request::Send { text, id }, at, false),
        Word::Interrupt { turn, at } => (Request::Interrupt { turn }, at, false),
        Word::Answer {
            verdict,
            question: request_id,
            message,
            at,
        } => {
            let allow = verdict == Verdict::Allow;
            (
                Request::Answer {
                    request_id,
                    allow,
                    message,
                },
                at,
                false,
            )
        }
        Word::End { at } => (Request::End, at, false),
        Word::Status { json, at } => (Request::Status, at, json),
    };
    match ask(&at.socket(), &request).await? {
        Reply::Refused(why) => Err(ClientError::Refused(why)),
        Reply::Done(CommandResult { id, seq, .. }) => {
            let seq = seq.map_or_else(String::new, |seq| format!(", record {seq}"));
            Ok(format!("done: {id}{seq}\n"))
        }
        // A struct of strings and numbers always serialises.
        Reply::Status(status) if json => Ok(serde_json::to_string(&status).unwrap_or_default() + "\n"),
        Reply::Status(status) => Ok(status.text()),
    }
}

/// Asks the session behind a socket.
pub async fn ask(path: &Path, request: &Request) -> Result<Reply, ClientError> {
    let mut stream = UnixStream::connect(path).await.map_err(|source| ClientError::Connect {
        path: path.to_owned(),
        source,
    })?;
    let mut line = serde_json::to_vec(request).map_err(|_| ClientError::Lost)?;
    line.push(b'\n');
    stream.write_all(&line).await.map_err(|_| ClientError::Lost)?;
    let answer = BufReader::new(stream).lines().next_line().await;
    let answer = answer.ok().flatten().ok_or(ClientError::Lost)?;
    serde_json::from_str(&answer).map_err(|_| ClientError::Lost)
}
