//! What happens now, for those who watch: one channel a session, alive while somebody holds it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use tokio::sync::{broadcast, watch};

use crate::{
    files::Files,
    room::{Room, Tenant},
    store::{Epoch, Progress, StoredRecord},
};

/// Memory for what readers are behind.
const ROOM: usize = 16 << 20;
/// The same for one session's.
const SHARE: usize = 2 << 20;
/// Events that a reader may be behind before it is told to catch up from the store.
const BACKLOG: usize = 128;
/// Records of a batch longer than this, or for which there is no room, are not passed along: readers take them from the
/// store. A reader that does not read keeps what is in its backlog in memory.
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
    room: Tenant,
    /// The way to the runner for files.
    pub files: Files,
}

impl Channel {
    fn new(room: Tenant) -> Self {
        Self {
            room,
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
            let room = (bytes <= INLINE).then(|| self.room.try_take(bytes)).flatten();
            let records = room.map_or_else(Arc::default, |room| {
                let records = records().into_iter();
                records.map(|record| record.in_room(&room)).collect()
            });
            // Fails when the last reader has just left.
            let _ = self.events.send(Event::Stored { records, progress });
        }
    }

    /// Passes a piece of a message along; one for which there is no room is dropped, its message comes as a record.
    pub fn delta(&self, delta: Bytes) {
        if delta.len() <= INLINE
            && self.events.receiver_count() > 0
            && let Some(room) = self.room.try_take(delta.len())
        {
            let _ = self.events.send(Event::Delta(room.hold(delta)));
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

    /// The newest admission that was heard of.
    pub fn newest(&self) -> Epoch {
        *self.epoch.borrow()
    }

    /// An older copy of the log was put back, in which this is the newest admission: whoever was admitted by the other log is
    /// no writer of this one.
    pub fn went_back(&self, epoch: Epoch) {
        self.epoch.send_replace(epoch);
    }

    /// Returns when the writer of `epoch`, whose admission was told, is none any more.
    pub async fn superseded(&self, epoch: Epoch) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.epoch.subscribe().wait_for(|newest| *newest != epoch).await;
    }
}

/// The channels of all sessions that somebody watches or writes.
#[derive(Debug)]
pub struct Live {
    channels: Mutex<Channels>,
    room: Room,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            channels: Mutex::default(),
            room: Room::new(ROOM, SHARE),
        }
    }
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
        let channel = Arc::new(Channel::new(self.room.of(session)));
        channels.by_session.insert(session.to_owned(), Arc::downgrade(&channel));
        channel
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Content;

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
        channel.went_back(3);
        channel.superseded(7).await;
    }

    #[tokio::test]
    async fn what_a_reader_does_not_take_is_bounded_and_then_left_to_the_store() {
        let live = Live::default();
        let channel = live.channel("a");
        let mut slow = channel.subscribe();
        let record = |seq| StoredRecord {
            seq,
            kind: protocol::Kind::Cli,
            content: Content::Whole(Bytes::from(vec![b'x'; INLINE])),
        };
        let progress = |acked| Progress {
            acked,
            ..Progress::default()
        };
        let fit = (SHARE / INLINE) as u64;
        for seq in 1..=fit + 1 {
            channel.stored(|| vec![record(seq)], INLINE, progress(seq));
        }
        let mut inline = Vec::new();
        for _ in 0..=fit {
            let Ok(Event::Stored { records, progress }) = slow.recv().await else {
                panic!()
            };
            inline.push((progress.acked, records.len()));
        }
        let mut expected: Vec<_> = (1..=fit).map(|seq| (seq, 1)).collect();
        expected.push((fit + 1, 0));
        assert_eq!(inline, expected);
        channel.stored(|| vec![record(99)], INLINE, progress(99));
        assert!(
            matches!(slow.recv().await, Ok(Event::Stored { records, .. }) if records.len() == 1),
            "there is room again"
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
