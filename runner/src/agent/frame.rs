//! What runner and shim say to each other over the Unix socket: frames of a bounded length, the first byte says which.

use bytes::{BufMut as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio_util::codec::LengthDelimitedCodec;

use super::{Exit, Spawn};

/// Longest frame.
pub const MAX_FRAME: usize = 1 << 20;
/// Longest piece of stdin, stdout or stderr in one frame.
pub const MAX_PIECE: usize = 64 << 10;

/// Cuts the stream into frames; a longer one is an error, nothing is reserved for it.
pub fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder().max_frame_length(MAX_FRAME).new_codec()
}

/// First word of a shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Random, per start of the shim: another one means that the agent was restarted.
    pub boot_id: String,
    /// Which of the tools that an agent needs are not there.
    pub missing: Vec<String>,
    /// Processes that the kernel has killed for memory in this container so far.
    pub oom_kills: u64,
}

/// From the runner to the shim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToShim {
    /// Start the process; there is one at a time.
    Spawn(Spawn),
    /// Bytes for its stdin.
    Stdin(Bytes),
    /// End of its stdin.
    CloseStdin,
    /// Signal for it.
    Signal(i32),
    /// Kill everything but the shim; answered by [`FromShim::Killed`].
    KillAll,
    /// Kill everything and end.
    Quit,
}

/// From the shim to the runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromShim {
    /// First frame.
    Hello(Hello),
    /// Bytes of stdout.
    Stdout(Bytes),
    /// Bytes of stderr.
    Stderr(Bytes),
    /// The process ended, and all it wrote was sent.
    Exit(Exit),
    /// The process could not be started.
    SpawnFailed(String),
    /// Nothing runs any more.
    Killed,
}

/// A frame that says nothing we know.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Of an unknown kind, or empty.
    #[error("failed to read a frame of kind {0:?}")]
    Kind(Option<u8>),
    /// Its content is not of its kind.
    #[error("failed to read the content of a frame")]
    Content(#[from] serde_json::Error),
}

mod kind {
    pub(super) const SPAWN: u8 = 1;
    pub(super) const STDIN: u8 = 2;
    pub(super) const CLOSE_STDIN: u8 = 3;
    pub(super) const SIGNAL: u8 = 4;
    pub(super) const KILL_ALL: u8 = 5;
    pub(super) const QUIT: u8 = 6;
    pub(super) const HELLO: u8 = 129;
    pub(super) const STDOUT: u8 = 130;
    pub(super) const STDERR: u8 = 131;
    pub(super) const EXIT: u8 = 132;
    pub(super) const SPAWN_FAILED: u8 = 133;
    pub(super) const KILLED: u8 = 134;
}

fn frame(kind: u8, content: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(content.len() + 1);
    frame.put_u8(kind);
    frame.put_slice(content);
    frame.freeze()
}

fn json(kind: u8, content: &impl Serialize) -> Bytes {
    // Structs of strings and numbers always serialise.
    frame(kind, &serde_json::to_vec(content).unwrap_or_default())
}

fn split(mut bytes: Bytes) -> Result<(u8, Bytes), FrameError> {
    if bytes.is_empty() {
        return Err(FrameError::Kind(None));
    }
    let content = bytes.split_off(1);
    Ok((bytes[0], content))
}

impl ToShim {
    /// The frames that say it.
    pub fn encode(&self) -> Vec<Bytes> {
        match self {
            Self::Spawn(spawn) => vec![json(kind::SPAWN, spawn)],
            Self::Stdin(bytes) => bytes.chunks(MAX_PIECE).map(|piece| frame(kind::STDIN, piece)).collect(),
            Self::CloseStdin => vec![frame(kind::CLOSE_STDIN, &[])],
            Self::Signal(signal) => vec![json(kind::SIGNAL, signal)],
            Self::KillAll => vec![frame(kind::KILL_ALL, &[])],
            Self::Quit => vec![frame(kind::QUIT, &[])],
        }
    }

    /// Reads a frame.
    pub fn decode(bytes: Bytes) -> Result<Self, FrameError> {
        let (kind, content) = split(bytes)?;
        Ok(match kind {
            kind::SPAWN => Self::Spawn(serde_json::from_slice(&content)?),
            kind::STDIN => Self::Stdin(content),
            kind::CLOSE_STDIN => Self::CloseStdin,
            kind::SIGNAL => Self::Signal(serde_json::from_slice(&content)?),
            kind::KILL_ALL => Self::KillAll,
            kind::QUIT => Self::Quit,
            other => return Err(FrameError::Kind(Some(other))),
        })
    }
}

impl FromShim {
    /// The frame that says it; pieces are at most [`MAX_PIECE`] long.
    pub fn encode(&self) -> Bytes {
        match self {
            Self::Hello(hello) => json(kind::HELLO, hello),
            Self::Stdout(bytes) => frame(kind::STDOUT, bytes),
            Self::Stderr(bytes) => frame(kind::STDERR, bytes),
            Self::Exit(exit) => json(kind::EXIT, exit),
            Self::SpawnFailed(why) => frame(kind::SPAWN_FAILED, why.as_bytes()),
            Self::Killed => frame(kind::KILLED, &[]),
        }
    }

    /// Reads a frame.
    pub fn decode(bytes: Bytes) -> Result<Self, FrameError> {
        let (kind, content) = split(bytes)?;
        Ok(match kind {
            kind::HELLO => Self::Hello(serde_json::from_slice(&content)?),
            kind::STDOUT => Self::Stdout(content),
            kind::STDERR => Self::Stderr(content),
            kind::EXIT => Self::Exit(serde_json::from_slice(&content)?),
            kind::SPAWN_FAILED => Self::SpawnFailed(String::from_utf8_lossy(&content).into_owned()),
            kind::KILLED => Self::Killed,
            other => return Err(FrameError::Kind(Some(other))),
        })
    }

    /// What it is, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "a greeting",
            Self::Stdout(_) => "stdout",
            Self::Stderr(_) => "stderr",
            Self::Exit(_) => "an exit",
            Self::SpawnFailed(_) => "a failed start",
            Self::Killed => "a kill",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_said_is_what_is_heard() {
        let spawn = Spawn {
            argv: vec!["a".into(), String::new()],
            env: vec![("N".into(), "v=1".into())],
            env_default: vec![("PATH".into(), "/bin".into())],
            cwd: "/w".into(),
        };
        for message in [
            ToShim::Spawn(spawn),
            ToShim::CloseStdin,
            ToShim::Signal(15),
            ToShim::KillAll,
            ToShim::Quit,
        ] {
            assert_eq!(ToShim::decode(message.encode().remove(0)).unwrap(), message);
        }
        let exit = Exit {
            code: None,
            signal: Some(9),
            oom_kills: 1,
        };
        let hello = Hello {
            boot_id: "b".into(),
            missing: vec!["git".into()],
            oom_kills: 0,
        };
        for message in [
            FromShim::Hello(hello),
            FromShim::Stdout(Bytes::from_static(b"out")),
            FromShim::Stderr(Bytes::from_static(b"err")),
            FromShim::Exit(exit),
            FromShim::SpawnFailed("no".into()),
            FromShim::Killed,
        ] {
            assert_eq!(FromShim::decode(message.encode()).unwrap(), message);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = FromShim::decode(bytes.clone().into());
            let _ = ToShim::decode(bytes.into());
        }
    }
}
