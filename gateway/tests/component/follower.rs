//! Readers of a log, without sockets.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use gateway::{
    follow::{Close, CloseReason, Follower, Item, Sources},
    live::{Channel, Live},
    room::Room,
    sessions::{Delivered, View},
    store::{
        Admission, Admitted, Appended, Batch, Epoch, EventLog, NewRecord, Receipt, StoredRecord, memory::MemoryLog,
        sqlite::SqliteLog,
    },
    watch::Seen,
};
use proptest::prelude::*;
use protocol::{Kind, RecordHead, record::checksum};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::support::{record, soon};

/// A session that is written and read.
struct World {
    log: Arc<dyn EventLog>,
    channel: Arc<Channel>,
    epoch: Epoch,
    view: View,
    seen: watch::Sender<Seen>,
}

impl World {
    async fn new(log: Arc<dyn EventLog>) -> Self {
        let admission = Admission {
            session: "u".to_owned(),
            namespace: "team-a".to_owned(),
            name: "s".to_owned(),
            pod: "p1".to_owned(),
            seen: 0,
            heard: 0,
        };
        let Admitted::Writer(state) = log.admit(admission).await.unwrap() else {
            panic!("nobody else asked")
        };
        let view = View {
            uid: "u".to_owned(),
            phase: crds::Phase::Running,
            ..View::default()
        };
        Self {
            channel: Live::default().channel("u"),
            log,
            epoch: state.epoch,
            seen: watch::channel(Some(view.clone())).0,
            view,
        }
    }

    fn follower(&self, cursor: u64) -> Follower {
        let sources = Sources {
            log: self.log.clone(),
            channel: self.channel.clone(),
            seen: self.seen.subscribe(),
            shutdown: CancellationToken::new(),
            room: Room::new(1 << 20, 1 << 20).of("reader"),
        };
        Follower::new(sources, self.view.clone(), cursor)
    }

    async fn store(&self, seqs: &[u64]) -> Receipt {
        let batch = Batch {
            answers: Vec::new(),
            session: "u".to_owned(),
            epoch: self.epoch,
            spool: "spool-1".to_owned(),
            records: seqs.iter().map(|seq| new_record(*seq)).collect(),
        };
        match self.log.append(batch).await.unwrap() {
            Appended::Stored(receipt) => receipt,
            Appended::Superseded => panic!("nobody else asked"),
        }
    }

    fn publish(&self, seqs: &[u64], receipt: &Receipt, length: usize) {
        let stored = |seq: &u64| StoredRecord {
            seq: *seq,
            kind: Kind::Cli,
            content: gateway::store::Content::Whole(bytes(*seq)),
        };
        self.channel
            .stored(|| seqs.iter().map(stored).collect(), length, receipt.progress);
    }
}

fn bytes(seq: u64) -> Bytes {
    record(seq, Kind::Cli, "x").into()
}

fn new_record(seq: u64) -> NewRecord {
    let bytes = bytes(seq);
    NewRecord {
        head: serde_json::from_slice::<RecordHead>(&bytes).unwrap(),
        checksum: checksum(&bytes),
        missing: None,
        bytes,
    }
}

async fn next(follower: &mut Follower) -> Item {
    soon("an item", follower.next()).await.unwrap()
}

fn seq(item: &Item) -> u64 {
    match item {
        Item::Record(record) => record.seq,
        other => panic!("not a record: {other:?}"),
    }
}

fn closed(reason: CloseReason, last: u64) -> Item {
    Item::Close(Close { reason, last })
}

#[tokio::test]
async fn a_reader_that_missed_the_news_of_a_record_behind_many_pieces_finds_it_in_the_store() {
    let world = World::new(Arc::new(MemoryLog::default())).await;
    let mut follower = world.follower(0);
    assert!(matches!(next(&mut follower).await, Item::Phase(_)));
    assert!(futures::FutureExt::now_or_never(follower.next()).is_none(), "it waits");
    let receipt = world.store(&[1]).await;
    world.publish(&[1], &receipt, 1);
    for _ in 0..1000 {
        world.channel.delta(Bytes::from_static(b"{}"));
    }
    assert_eq!(seq(&next(&mut follower).await), 1);
}

#[tokio::test]
async fn what_was_stored_last_is_given_before_the_end_though_no_news_of_it_came() {
    let world = World::new(Arc::new(MemoryLog::default())).await;
    let mut follower = world.follower(0);
    assert!(matches!(next(&mut follower).await, Item::Phase(_)));
    assert!(futures::FutureExt::now_or_never(follower.next()).is_none(), "it waits");
    world.store(&[1, 2]).await;
    world.seen.send_replace(Some(View {
        phase: crds::Phase::Completed,
        delivered: Delivered::Final,
        ..world.view.clone()
    }));
    assert!(matches!(next(&mut follower).await, Item::Phase(_)));
    assert_eq!(seq(&next(&mut follower).await), 1);
    assert_eq!(seq(&next(&mut follower).await), 2);
    assert_eq!(next(&mut follower).await, closed(CloseReason::Ended, 2));
    assert_eq!(soon("the end", follower.next()).await, None);
}

#[tokio::test]
async fn another_session_of_that_name_is_the_end_even_if_nobody_saw_the_deletion() {
    let world = World::new(Arc::new(MemoryLog::default())).await;
    let mut follower = world.follower(0);
    assert!(matches!(next(&mut follower).await, Item::Phase(_)));
    world.seen.send_replace(Some(View {
        uid: "another".to_owned(),
        phase: crds::Phase::Pending,
        ..View::default()
    }));
    assert_eq!(next(&mut follower).await, closed(CloseReason::Deleted, 0));
}

/// Reads until `last`; what comes must follow.
async fn read_all(mut follower: Follower, mut expected: u64, slow: bool, last: u64) {
    while expected <= last {
        match next(&mut follower).await {
            Item::Record(record) => {
                assert_eq!(record.seq, expected, "a gap or a duplicate");
                assert_eq!(record.whole(), Some(&bytes(expected)));
                expected += 1;
                if slow {
                    tokio::task::yield_now().await;
                }
            }
            Item::Phase(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(follower.close(CloseReason::Ended), closed(CloseReason::Ended, last));
}

#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is tried with each")]
struct Write {
    records: u64,
    /// The second half is stored first.
    with_hole: bool,
    /// All of it is sent once more.
    again: bool,
    /// News of it comes after that of the next one that is not late.
    late: bool,
    /// Too long to be passed along.
    long: bool,
}

fn write() -> impl Strategy<Value = Write> {
    (1..40_u64, any::<[bool; 4]>()).prop_map(|(records, [with_hole, again, late, long])| Write {
        records,
        with_hole,
        again,
        late,
        long,
    })
}

#[derive(Clone, Debug)]
struct Read {
    /// Comes before this write.
    at: usize,
    cursor: u64,
    slow: bool,
}

fn reader() -> impl Strategy<Value = Read> {
    (0..60_usize, 0..300_u64, any::<bool>()).prop_map(|(at, cursor, slow)| Read { at, cursor, slow })
}

async fn write_and_read(log: Arc<dyn EventLog>, writes: Vec<Write>, readers: Vec<Read>) {
    let world = World::new(log).await;
    let last: u64 = writes.iter().map(|write| write.records).sum();
    let count = writes.len();
    let mut tasks = tokio::task::JoinSet::new();
    let (mut next, mut late) = (1, Vec::new());
    for (number, write) in writes.into_iter().enumerate() {
        for Read { cursor, slow, .. } in readers.iter().filter(|reader| reader.at % count == number) {
            let cursor = (*cursor).min(last);
            tasks.spawn(read_all(world.follower(cursor), cursor + 1, *slow, last));
        }
        let seqs: Vec<u64> = (next..next + write.records).collect();
        next += write.records;
        let (first, second) = seqs.split_at(if write.with_hole { seqs.len() / 2 } else { seqs.len() });
        let mut parts = vec![second, first];
        parts.extend(write.again.then_some(&seqs[..]));
        let mut news = Vec::new();
        for part in parts {
            let length = if write.long { usize::MAX } else { 1 };
            news.push((part.to_vec(), world.store(part).await, length));
        }
        if write.late {
            late.extend(news);
        } else {
            for (part, receipt, length) in news.into_iter().chain(late.drain(..)) {
                world.publish(&part, &receipt, length);
            }
        }
        tokio::task::yield_now().await;
    }
    for (part, receipt, length) in late {
        world.publish(&part, &receipt, length);
    }
    let read = async {
        while let Some(read) = tasks.join_next().await {
            read.unwrap();
        }
    };
    soon("all readers reading all", read).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn readers_see_every_record_once_and_in_order_whenever_they_come(
        writes in prop::collection::vec(write(), 1..60),
        readers in prop::collection::vec(reader(), 1..12),
        on_disk in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let log: Arc<dyn EventLog> = if on_disk {
            Arc::new(SqliteLog::open(&folder.path().join("events.db")).unwrap())
        } else {
            Arc::new(MemoryLog::default())
        };
        runtime.block_on(write_and_read(log, writes, readers));
        runtime.shutdown_timeout(Duration::from_secs(5));
    }
}
