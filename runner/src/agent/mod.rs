//! Where the CLI runs: behind a shim, in the agent container or beside the runner. Everything that comes from there is
//! the agent's word and treated as hostile.

pub mod frame;
pub mod local;
pub mod remote;
pub mod shim;
mod words;

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::SplitStream;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::{Duration, timeout};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

pub use frame::{FromShim, Hello, ToShim};
use words::Words;

/// A process to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawn {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables on top of the container's own; ours win.
    pub env: Vec<(String, String)>,
    /// Variables that are set only when the container has none of that name.
    pub env_default: Vec<(String, String)>,
    /// Working folder.
    pub cwd: String,
}

/// How the process ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Processes that the kernel killed for memory while it ran.
    pub oom_kills: u64,
}

/// Why the agent cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No shim.
    #[error("failed to reach the agent container on {path}")]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// What the last try said.
        source: std::io::Error,
    },
    /// The shim could not be started as a child process.
    #[error("failed to start the agent's shim")]
    Launch(#[source] std::io::Error),
    /// It is gone, or speaks what it must not.
    #[error("the connection to the agent container broke: {0}")]
    Lost(String),
}

/// Where agents come from.
#[derive(Clone, Debug)]
pub enum Place {
    /// The agent container's shim listens here.
    Container(PathBuf),
    /// A child process of ours.
    Child,
}

/// A connection to a shim.
pub struct Agent {
    /// The connection itself, for who must end it from outside the runtime.
    line: Arc<OwnedFd>,
    hello: Hello,
    frames: SplitStream<Framed<UnixStream, LengthDelimitedCodec>>,
    words: Words,
    child: Option<tokio::process::Child>,
}

/// How long a shim may take to greet.
const GREETING: Duration = Duration::from_secs(10);

impl Agent {
    /// Reaches the agent; waits for it as long as a container may take to start.
    pub async fn open(place: &Place) -> Result<Self, AgentError> {
        match place {
            Place::Container(path) => remote::connect(path).await,
            Place::Child => local::launch().await,
        }
    }

    async fn greet(stream: UnixStream, child: Option<tokio::process::Child>) -> Result<Self, AgentError> {
        let line = stream.as_fd().try_clone_to_owned().map_err(AgentError::Launch)?;
        let (sink, mut frames) = Framed::new(stream, frame::codec()).split();
        let first = timeout(GREETING, frames.next())
            .await
            .map_err(|_| AgentError::Lost("it did not greet in time".to_owned()))?;
        match decode(first)? {
            FromShim::Hello(hello) => Ok(Self {
                line: Arc::new(line),
                hello,
                frames,
                words: Words::carried_by(sink),
                child,
            }),
            other => Err(AgentError::Lost(format!("it began with {}", other.name()))),
        }
    }

    /// The connection, as long as there is one.
    pub fn line(&self) -> Weak<OwnedFd> {
        Arc::downgrade(&self.line)
    }

    /// What the shim said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The next thing that happens. May be dropped while it waits.
    pub async fn next(&mut self) -> Result<FromShim, AgentError> {
        tokio::select! {
            // What it said before it was lost counts.
            biased;
            frame = self.frames.next() => decode(frame),
            lost = self.words.lost() => Err(lost),
        }
    }

    /// Tells the shim something; never waits for it. What it does not take in time, or at all, loses the connection.
    pub fn send(&self, message: &ToShim) -> Result<(), AgentError> {
        message.encode().into_iter().try_for_each(|frame| self.words.say(frame))
    }

    /// Has everything that is left running killed, so that another process can be started; returns whether that went well.
    /// Where it did not, a child's shim is put down with all that is below it.
    pub async fn clear(&mut self, patience: Duration) -> bool {
        let cleared = async {
            self.send(&ToShim::KillAll)?;
            while self.next().await? != FromShim::Killed {}
            Ok::<_, AgentError>(())
        };
        let cleared = matches!(timeout(patience, cleared).await, Ok(Ok(())));
        if !cleared && let Some(child) = &mut self.child {
            local::put_down(child).await;
        }
        cleared
    }

    /// Has everything that the agent runs killed; waits at most `patience`, and returns whether that sufficed. A child's
    /// shim ends with it. A container's stays until we are gone, because the kubelet would start the container again.
    pub async fn kill(&mut self, patience: Duration) -> bool {
        let word = if self.child.is_some() {
            ToShim::Quit
        } else {
            ToShim::KillAll
        };
        let killed = async {
            if self.send(&word).is_ok() {
                while !matches!(self.next().await, Ok(FromShim::Killed) | Err(_)) {}
            }
            if let Some(child) = &mut self.child {
                let _ = child.wait().await;
            }
        };
        let ended = timeout(patience, killed).await.is_ok();
        if !ended {
            tracing::warn!("the agent's processes did not end in time");
            if let Some(child) = &mut self.child {
                local::put_down(child).await;
                return true;
            }
        }
        ended
    }
}

fn decode(frame: Option<std::io::Result<bytes::BytesMut>>) -> Result<FromShim, AgentError> {
    let frame: Bytes = match frame {
        None => return Err(AgentError::Lost("it was closed".to_owned())),
        Some(Err(error)) => return Err(AgentError::Lost(error.to_string())),
        Some(Ok(frame)) => frame.freeze(),
    };
    FromShim::decode(frame).map_err(|error| AgentError::Lost(error.to_string()))
}
