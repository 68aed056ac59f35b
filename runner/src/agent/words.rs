//! What the runner says to a shim: through a task of its own, so that a shim that does not listen holds up nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::SinkExt as _;
use futures::stream::SplitSink;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Duration, timeout};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::AgentError;

/// Bytes that may wait for the shim; a single word may be longer.
const MAX_WAITING: usize = 16 << 20;
/// How long a frame may take. The shim reads at once whatever its process does, so this is for a container that has next
/// to no processor time.
const TAKEN: Duration = Duration::from_secs(30);

/// Frames on their way to the shim.
pub(super) struct Words {
    queue: mpsc::UnboundedSender<Bytes>,
    waiting: Arc<AtomicUsize>,
}

impl Words {
    pub(super) fn carried_by(sink: SplitSink<Framed<UnixStream, LengthDelimitedCodec>, Bytes>) -> Self {
        let (queue, frames) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        tokio::spawn(carry(sink, frames, Arc::clone(&waiting)));
        Self { queue, waiting }
    }

    /// Takes a frame, unless too much waits already.
    pub(super) fn say(&self, frame: Bytes) -> Result<(), AgentError> {
        let length = frame.len();
        let before = self.waiting.fetch_add(length, Ordering::Relaxed);
        if before > MAX_WAITING {
            self.waiting.fetch_sub(length, Ordering::Relaxed);
            return Err(AgentError::Lost(format!("{before} bytes wait for it to read them")));
        }
        self.queue.send(frame).map_err(|_| deaf())
    }

    /// Waits until nothing more can be said.
    pub(super) async fn lost(&self) -> AgentError {
        self.queue.closed().await;
        deaf()
    }
}

fn deaf() -> AgentError {
    AgentError::Lost("it does not take what it is told".to_owned())
}

async fn carry(
    mut sink: SplitSink<Framed<UnixStream, LengthDelimitedCodec>, Bytes>,
    mut frames: mpsc::UnboundedReceiver<Bytes>,
    waiting: Arc<AtomicUsize>,
) {
    while let Some(frame) = frames.recv().await {
        let length = frame.len();
        if !matches!(timeout(TAKEN, sink.send(frame)).await, Ok(Ok(()))) {
            return;
        }
        waiting.fetch_sub(length, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;
    use crate::agent::frame::codec;

    fn pair() -> (Words, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (sink, _) = Framed::new(ours, codec()).split();
        (Words::carried_by(sink), theirs)
    }

    #[tokio::test(start_paused = true)]
    async fn a_shim_that_does_not_read_is_lost_after_a_while() {
        let (words, _theirs) = pair();
        let frame = Bytes::from(vec![0; 1 << 20]);
        words.say(frame.clone()).unwrap();
        words.lost().await;
        assert!(words.say(frame).is_err());
    }

    #[tokio::test]
    async fn what_waits_for_a_shim_is_bounded() {
        let (words, _theirs) = pair();
        let frame = Bytes::from(vec![0; 1 << 20]);
        let taken = (0..1_000).take_while(|_| words.say(frame.clone()).is_ok()).count();
        assert_eq!(taken, (MAX_WAITING >> 20) + 1);
    }
}
