//! A reader of one session: first what is stored, then what happens, without gap or duplicate, until the session's end.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    live::{Channel, Event},
    room::Tenant,
    sessions::{Delivered, View},
    store::{EventLog, PageSize, Progress, StoreError, StoredRecord},
    watch::Seen,
};

/// How long after its end a session's records are waited for.
pub const PATIENCE: SignedDuration = SignedDuration::from_secs(30);
/// Bytes of a page, as there is room.
const PAGES: [usize; 2] = [256 << 10, 32 << 10];
/// Bytes of a page for which there is no room: no number of readers keeps another from reading.
const LEAST_PAGE: usize = 4 << 10;
/// Bytes of records that are short: more of them than make a page are not looked for.
const SHORT: usize = 512;

/// What a reader is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A record; seqs follow each other without gap.
    Record(StoredRecord),
    /// A piece of a message while it is written.
    Delta(Bytes),
    /// The session's phase or its reason is another.
    Phase(View),
    /// The session is over, and records are missing behind this one.
    Gap(Gap),
    /// The records of these seqs were removed to make room.
    Removed {
        /// The first.
        from: u64,
        /// The last.
        to: u64,
    },
    /// The last item.
    Close(Close),
}

/// What a reader does not get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Seq of the last record that it got.
    pub known: u64,
    /// Seq of the last record that there was, if that is known.
    pub last: Option<u64>,
}

/// Why a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Close {
    /// Why.
    pub reason: CloseReason,
    /// Seq of the last record given.
    pub last: u64,
}

/// See [`Close::reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The session is over.
    Ended,
    /// The session is deleted.
    Deleted,
    /// This gateway is being stopped: connect again.
    Shutdown,
    /// The event log cannot be read: connect again later.
    Unavailable,
    /// The caller may no longer read the session.
    Forbidden,
}

impl CloseReason {
    /// The reason as clients see it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Deleted => "deleted",
            Self::Shutdown => "shutdown",
            Self::Unavailable => "unavailable",
            Self::Forbidden => "forbidden",
        }
    }
}

/// What a follower reads from.
pub struct Sources {
    /// The log.
    pub log: Arc<dyn EventLog>,
    /// The session's channel.
    pub channel: Arc<Channel>,
    /// What the cluster says of the session.
    pub seen: watch::Receiver<Seen>,
    /// Cancelled when the gateway stops.
    pub shutdown: CancellationToken,
    /// Memory for what was read and not taken yet.
    pub room: Tenant,
}

/// See the module.
pub struct Follower {
    sources: Sources,
    session: String,
    cursor: u64,
    events: broadcast::Receiver<Event>,
    /// Records to give out, following the cursor.
    ready: VecDeque<StoredRecord>,
    progress: Progress,
    /// `progress` is to be read from the store.
    stale: bool,
    /// The store has nothing behind the reader, not even what was there once.
    nothing_left: bool,
    view: View,
    /// Of the view that the reader was told.
    told: Option<View>,
    /// When the end was first seen, for a status that does not say.
    ended: Option<Timestamp>,
    closing: Option<Close>,
    done: bool,
}

enum Presence {
    Here,
    Deleted,
}

impl Follower {
    /// Follows the session of `view` behind the record `cursor`.
    pub fn new(sources: Sources, view: View, cursor: u64) -> Self {
        Self {
            // Attached before the store is read: what is stored in between comes twice, and never not at all.
            events: sources.channel.subscribe(),
            session: view.uid.clone(),
            cursor,
            ready: VecDeque::new(),
            progress: Progress::default(),
            stale: true,
            nothing_left: false,
            view,
            told: None,
            ended: None,
            closing: None,
            done: false,
            sources,
        }
    }

    /// UID of the session that is followed.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// Whether there is a next item without a wait.
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty() || (!self.stale && self.progress.acked <= self.cursor && !self.events.is_empty())
    }

    /// Ends the stream early.
    pub fn close(&mut self, reason: CloseReason) -> Item {
        self.done = true;
        Item::Close(Close {
            reason,
            last: self.cursor,
        })
    }

    /// The next item; `None` after [`Item::Close`]. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Item> {
        if self.done {
            return None;
        }
        Some(match self.advance().await {
            Ok(item) => item,
            Err(error) => {
                tracing::error!(session = self.session, %error, "stream ended");
                self.close(CloseReason::Unavailable)
            }
        })
    }

    async fn advance(&mut self) -> Result<Item, StoreError> {
        loop {
            if let Some(item) = self.removed() {
                return Ok(item);
            }
            if let Some(record) = self.ready.pop_front() {
                self.cursor = record.seq;
                return Ok(Item::Record(record));
            }
            if let Some(close) = self.closing {
                self.done = true;
                return Ok(Item::Close(close));
            }
            if self.sources.shutdown.is_cancelled() {
                return Ok(self.close(CloseReason::Shutdown));
            }
            let presence = self.look();
            if let Some(item) = self.phase() {
                return Ok(item);
            }
            if self.catch_up().await? {
                continue;
            }
            let verdict = match presence {
                Presence::Deleted => Verdict::Close(CloseReason::Deleted),
                Presence::Here => verdict(&self.view, self.progress, self.cursor, self.ended, Timestamp::now()),
            };
            match verdict {
                Verdict::Open => {
                    if let Some(item) = self.wait(None).await {
                        return Ok(item);
                    }
                }
                Verdict::Until(time) => {
                    if let Some(item) = self.wait(Some(time)).await {
                        return Ok(item);
                    }
                }
                // What was stored last may not have been heard of yet.
                Verdict::Close(_) | Verdict::Gap(_) if self.look_again().await? => {}
                Verdict::Close(reason) => return Ok(self.close(reason)),
                Verdict::Gap(last) => {
                    let known = self.cursor;
                    self.closing = Some(Close {
                        reason: CloseReason::Ended,
                        last: known,
                    });
                    return Ok(Item::Gap(Gap { known, last }));
                }
            }
        }
    }

    fn look(&mut self) -> Presence {
        match &*self.sources.seen.borrow_and_update() {
            Some(view) if view.uid == self.session => self.view = view.clone(),
            _ => return Presence::Deleted,
        }
        if !self.view.phase.is_terminal() {
            self.ended = None;
        } else if self.ended.is_none() {
            self.ended = Some(self.view.ended.unwrap_or_else(Timestamp::now));
        }
        Presence::Here
    }

    fn phase(&mut self) -> Option<Item> {
        let same = |told: &View| told.phase == self.view.phase && told.reason == self.view.reason;
        if self.told.as_ref().is_some_and(same) {
            return None;
        }
        self.told = Some(self.view.clone());
        Some(Item::Phase(self.view.clone()))
    }

    /// Takes a page from the store if it is ahead of the reader.
    async fn catch_up(&mut self) -> Result<bool, StoreError> {
        if self.stale {
            self.progress = self.sources.log.state(&self.session).await?.progress;
            self.stale = false;
        }
        if self.progress.acked <= self.cursor {
            return Ok(false);
        }
        let (bytes, room) = self.sources.room.length(&PAGES, 1, LEAST_PAGE);
        let records = bytes / SHORT;
        let page = self
            .sources
            .log
            .read(&self.session, self.cursor, PageSize { records, bytes })
            .await?;
        if page.first().is_none_or(|record| record.seq > self.cursor + 1) {
            // Perhaps removed just now.
            self.progress = self.sources.log.state(&self.session).await?.progress.max(self.progress);
        }
        if page.is_empty() && self.progress.removed > self.cursor {
            self.nothing_left = true;
            return Ok(true);
        }
        if page.is_empty() {
            // The log is shorter than it was said to be (restored from a copy): wait for more.
            self.progress.acked = self.cursor;
        }
        match room {
            Some(room) => self.ready.extend(page.into_iter().map(|record| record.in_room(&room))),
            None => self.ready.extend(page),
        }
        Ok(!self.ready.is_empty())
    }

    /// What was removed between the reader and its next record, or the end.
    fn removed(&mut self) -> Option<Item> {
        let from = self.cursor + 1;
        let to = match self.ready.front() {
            Some(record) => self.progress.removed.min(record.seq - 1),
            // Between pages only: what is behind the reader is not known yet.
            None if self.nothing_left => self.progress.removed,
            None => return None,
        };
        self.nothing_left = false;
        if to < from {
            return None;
        }
        self.cursor = to;
        Some(Item::Removed { from, to })
    }

    async fn look_again(&mut self) -> Result<bool, StoreError> {
        self.stale = true;
        self.catch_up().await
    }

    async fn wait(&mut self, until: Option<Timestamp>) -> Option<Item> {
        let patience = until.map_or(Duration::MAX, |time| {
            time.duration_since(Timestamp::now())
                .try_into()
                .unwrap_or(Duration::ZERO)
        });
        tokio::select! {
            event = self.events.recv() => match event {
                Ok(Event::Stored { records, progress }) => self.stored(&records, progress),
                Ok(Event::Delta(delta)) => return Some(Item::Delta(delta)),
                // Too slow: catch up from the store.
                Err(_) => self.stale = true,
            },
            _ = self.sources.seen.changed() => {}
            () = self.sources.shutdown.cancelled() => {}
            () = tokio::time::sleep(patience) => {}
        }
        None
    }

    fn stored(&mut self, records: &[StoredRecord], progress: Progress) {
        // Two writers' batches may be told in the other order.
        self.progress = self.progress.max(progress);
        let mut next = self.cursor + 1;
        for record in records.iter().filter(|record| record.seq <= progress.acked) {
            if record.seq == next {
                next += 1;
                self.ready.push_back(record.clone());
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Open,
    Until(Timestamp),
    Gap(Option<u64>),
    Close(CloseReason),
}

/// Whether a reader that has all that is stored has had everything.
fn verdict(view: &View, progress: Progress, cursor: u64, ended: Option<Timestamp>, now: Timestamp) -> Verdict {
    let Some(ended) = ended else { return Verdict::Open };
    let over = ended.checked_add(PATIENCE).unwrap_or(Timestamp::MAX);
    let complete = progress.ended >= view.attempt && cursor >= progress.last;
    match view.delivered {
        // They had come, and the log has them no more: it was lost, or an older copy was put back.
        Delivered::Final if view.acked > progress.acked.max(cursor) => Verdict::Gap(Some(view.acked)),
        Delivered::Final => Verdict::Close(CloseReason::Ended),
        Delivered::Unknown if complete || now >= over => Verdict::Close(CloseReason::Ended),
        Delivered::No if now >= over => Verdict::Gap(None),
        Delivered::Unknown | Delivered::No => Verdict::Until(over),
    }
}

#[cfg(test)]
mod tests {
    use crds::Phase;
    use rstest::rstest;

    use super::*;

    const END: &str = "2026-01-02T03:04:05Z";

    #[rstest]
    #[case::running(Phase::Running, Delivered::Unknown, 0, 1, "Open")]
    #[case::all_delivered(Phase::Completed, Delivered::Final, 0, 1, "Close(Ended)")]
    #[case::end_record_seen(Phase::Completed, Delivered::Unknown, 2, 1, "Close(Ended)")]
    #[case::end_record_of_an_earlier_attempt(Phase::Failed, Delivered::Unknown, 1, 1, "Until(2026-01-02T03:04:35Z)")]
    #[case::waited_for_the_end_record(Phase::Stopped, Delivered::Unknown, 1, 31, "Close(Ended)")]
    #[case::end_record_but_not_all_delivered(Phase::Completed, Delivered::No, 2, 1, "Until(2026-01-02T03:04:35Z)")]
    #[case::waited_for_what_is_missing(Phase::Completed, Delivered::No, 2, 31, "Gap(None)")]
    fn a_stream_ends_when_all_has_come_or_has_been_waited_for(
        #[case] phase: Phase,
        #[case] delivered: Delivered,
        #[case] attempt_ended: u32,
        #[case] seconds_later: i64,
        #[case] expected: &str,
    ) {
        let end: Timestamp = END.parse().unwrap();
        let view = View {
            phase,
            delivered,
            attempt: 2,
            ..View::default()
        };
        let progress = Progress {
            acked: 5,
            last: 5,
            ended: attempt_ended,
            removed: 0,
        };
        let ended = phase.is_terminal().then_some(end);
        let now = end + SignedDuration::from_secs(seconds_later);
        assert_eq!(format!("{:?}", verdict(&view, progress, 5, ended, now)), expected);
    }

    #[test]
    fn what_the_log_had_and_has_no_more_is_missing() {
        let now = Timestamp::now();
        let view = View {
            phase: Phase::Completed,
            delivered: Delivered::Final,
            acked: 9,
            ..View::default()
        };
        let of = |acked, cursor| {
            let progress = Progress {
                acked,
                last: acked,
                ..Progress::default()
            };
            verdict(&view, progress, cursor, Some(now), now)
        };
        assert_eq!(of(7, 7), Verdict::Gap(Some(9)));
        assert_eq!(of(9, 9), Verdict::Close(CloseReason::Ended));
        assert_eq!(of(7, 9), Verdict::Close(CloseReason::Ended), "this reader has them");
    }

    #[test]
    fn an_end_record_behind_a_hole_is_not_the_end() {
        let now = Timestamp::now();
        let view = View {
            phase: Phase::Completed,
            ..View::default()
        };
        let progress = Progress {
            acked: 5,
            last: 7,
            ended: 1,
            removed: 0,
        };
        assert!(matches!(verdict(&view, progress, 5, Some(now), now), Verdict::Until(_)));
    }
}
