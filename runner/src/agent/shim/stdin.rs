//! stdin of the process: written by a task of its own, so that a process that does not read does not stop the shim.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::io::AsyncWriteExt as _;
use tokio::process::ChildStdin;
use tokio::sync::mpsc;

/// Bytes that may wait for the process to read them.
const MAX_UNREAD: usize = 32 << 20;

/// Closed when it is dropped and all that it took is written.
pub(super) struct Stdin {
    queue: mpsc::UnboundedSender<Bytes>,
    unread: Arc<AtomicUsize>,
}

impl Stdin {
    pub(super) fn of(mut stdin: ChildStdin) -> Self {
        let (queue, mut waiting) = mpsc::unbounded_channel::<Bytes>();
        let unread = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&unread);
        tokio::spawn(async move {
            while let Some(bytes) = waiting.recv().await {
                if stdin.write_all(&bytes).await.is_err() {
                    return;
                }
                left.fetch_sub(bytes.len(), Ordering::Relaxed);
            }
        });
        Self { queue, unread }
    }

    /// Takes bytes; `false`: too much is unread already, and these are lost.
    pub(super) fn take(&self, bytes: Bytes) -> bool {
        let length = bytes.len();
        if self.unread.fetch_add(length, Ordering::Relaxed) > MAX_UNREAD {
            return false;
        }
        // A process that closed its stdin does not want it.
        let _ = self.queue.send(bytes);
        true
    }
}
