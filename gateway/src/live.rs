//! What happens now, for those who watch: one channel a session, alive while somebody holds it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use tokio::sync::{broadcast, watch};

use crate::{
    files::Files,
    store::{Epoch, Progress, StoredRecord},
};

/// Events that a reader may be behind before it is told to catch up from the store.
const BACKLOG: usize = 128;
/// Records of a batch longer than this are not passed along: readers take them from the store. Bounds what a reader that
/// does not read keeps in memory: [`BACKLOG`] times this.
const INLINE: usize = 64 << 10;

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Records were stored.
    Stored {
        /// The new ones, or none when they are long: [`Progress`] says that there are some.
        records: Arc<[StoredRecord]>,
        /// How far the log goes.
        progress: Progress,
    },
    /// A piece of a message while it is written.
    Delta(Bytes),
}

/// A session's channel.
#[derive(Debug)]
pub struct Channel {
    events: broadcast::Sender<Event>,
    epoch: watch::Sender<Epoch>,
    commands: watch::Sender<()>,
    /// The way to the runner for files.
    pub files: Files,
}

impl Channel {
    fn new() -> Self {
        Self {
            events: broadcast::channel(BACKLOG).0,
            epoch: watch::channel(0).0,
            commands: watch::channel(()).0,
            files: Files::default(),
        }
    }

    /// Everything that happens from now on. A receiver that is too slow gets `Lagged`, and nobody waits for it.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Tells readers of stored records. To be called after each commit, whatever becomes of the writer.
    pub fn stored(&self, records: impl FnOnce() -> Vec<StoredRecord>, bytes: usize, progress: Progress) {
        if self.events.receiver_count() > 0 {
            let records = if bytes <= INLINE {
                records().into()
            } else {
                Arc::default()
            };
            // Fails when the last reader has just left.
            let _ = self.events.send(Event::Stored { records, progress });
        }
    }

    /// Passes a piece of a message along; one too long is dropped, its message comes as a record.
    pub fn delta(&self, delta: Bytes) {
        if delta.len() <= INLINE {
            let _ = self.events.send(Event::Delta(delta));
        }
    }

    /// Tells the session's runner that there are commands.
    pub fn commanded(&self) {
        self.commands.send_replace(());
    }

    /// Changes when there are new commands.
    pub fn commands(&self) -> watch::Receiver<()> {
        self.commands.subscribe()
    }

    /// Tells older writers that this one was admitted.
    pub fn admitted(&self, epoch: Epoch) {
        self.epoch.send_if_modified(|newest| {
            let newer = epoch > *newest;
            *newest = epoch.max(*newest);
            newer
        });
    }

    /// Returns when a writer newer than `epoch` was admitted.
    pub async fn superseded(&self, epoch: Epoch) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.epoch.subscribe().wait_for(|newest| *newest > epoch).await;
    }
}

/// The channels of all sessions that somebody watches or writes.
#[derive(Debug, Default)]
pub struct Live {
    channels: Mutex<Channels>,
}

#[derive(Debug, Default)]
struct Channels {
    by_session: HashMap<String, Weak<Channel>>,
    sweep_at: usize,
}

impl Live {
    /// The channel of a session, if somebody watches or writes it.
    pub fn known(&self, session: &str) -> Option<Arc<Channel>> {
        let channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.by_session.get(session).and_then(Weak::upgrade)
    }

    /// All of them.
    pub fn all(&self) -> Vec<(String, Arc<Channel>)> {
        let channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let living = channels.by_session.iter();
        living
            .filter_map(|(session, channel)| Some((session.clone(), channel.upgrade()?)))
            .collect()
    }

    /// The channel of a session (by UID).
    pub fn channel(&self, session: &str) -> Arc<Channel> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.by_session.get(session).and_then(Weak::upgrade) {
            return channel;
        }
        if channels.by_session.len() >= channels.sweep_at {
            channels.by_session.retain(|_, channel| channel.strong_count() > 0);
            channels.sweep_at = 64.max(channels.by_session.len() * 2);
        }
        let channel = Arc::new(Channel::new());
        channels.by_session.insert(session.to_owned(), Arc::downgrade(&channel));
        channel
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_older_writer_hears_of_a_newer_one_even_when_it_listens_late() {
        let live = Live::default();
        let channel = live.channel("a");
        live.channel("a").admitted(7);
        channel.superseded(6).await;
        channel.admitted(5);
        assert!(
            futures::FutureExt::now_or_never(channel.superseded(7)).is_none(),
            "the newest is not superseded by an older"
        );
    }

    #[test]
    fn channels_that_nobody_holds_are_forgotten() {
        let live = Live::default();
        for n in 0..1000 {
            live.channel(&n.to_string());
        }
        assert!(live.channels.lock().unwrap().by_session.len() <= 65);
    }
}
