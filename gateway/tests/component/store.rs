use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use gateway::store::{
    Admission, Admitted, Appended, Batch, Content, Epoch, EventLog, Missing, NewRecord, PageSize, Receipt, State,
    StoreError, StoredRecord,
    commands::{Accepted, Answer, NewCommand},
    memory::MemoryLog,
    postgres::PostgresLog,
    sqlite::SqliteLog,
};
use proptest::prelude::*;
use protocol::{Kind, RecordHead, record::checksum};

use crate::support::{end, postgres::database, record, records};

fn parsed(text: &str) -> NewRecord {
    let bytes = Bytes::from(text.to_owned());
    NewRecord {
        head: serde_json::from_slice::<RecordHead>(&bytes).unwrap(),
        checksum: checksum(&bytes),
        missing: None,
        bytes,
    }
}

pub(crate) async fn admit(log: &dyn EventLog, session: &str, seen: Epoch) -> Admitted {
    let admission = Admission {
        session: session.to_owned(),
        namespace: "team-a".to_owned(),
        name: "s".to_owned(),
        pod: format!("pod-{seen}"),
        seen,
        heard: 0,
    };
    log.admit(admission).await.unwrap()
}

pub(crate) async fn append(
    log: &dyn EventLog,
    session: &str,
    epoch: Epoch,
    spool: &str,
    records: &[String],
) -> Appended {
    let batch = Batch {
        answers: Vec::new(),
        session: session.to_owned(),
        epoch,
        spool: spool.to_owned(),
        records: records.iter().map(|record| parsed(record)).collect(),
    };
    log.append(batch).await.unwrap()
}

async fn read(log: &dyn EventLog, session: &str, after: u64) -> Vec<StoredRecord> {
    let page = PageSize {
        records: 1000,
        bytes: 1 << 30,
    };
    log.read(session, after, page).await.unwrap()
}

#[tokio::test]
async fn records_outlive_the_log_that_stored_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    let sent = [records(1, 9), vec![end(10)]].concat();
    {
        let log = SqliteLog::open(&file).unwrap();
        admit(&log, "u", 0).await;
        append(&log, "u", 1, "spool-1", &sent).await;
    }
    let log = SqliteLog::open(&file).unwrap();
    let stored = read(&log, "u", 0).await;
    assert_eq!(
        stored
            .iter()
            .map(|record| record.whole().unwrap().clone())
            .collect::<Vec<_>>(),
        sent
    );
    assert_eq!(stored[9].kind, Kind::End);
    let state = log.state("u").await.unwrap();
    assert_eq!((state.epoch, state.spool.as_deref()), (1, Some("spool-1")));
    assert_eq!(
        (state.progress.acked, state.progress.last, state.progress.ended),
        (10, 10, 1)
    );
}

#[tokio::test]
async fn of_two_pods_that_saw_the_same_state_one_is_admitted() {
    for log in all(tempfile::tempdir().unwrap().path()).await {
        assert!(matches!(
            admit(&*log, "u", 0).await,
            Admitted::Writer(State { epoch: 1, .. })
        ));
        assert_eq!(admit(&*log, "u", 0).await, Admitted::Outdated);
        assert!(matches!(
            admit(&*log, "u", 1).await,
            Admitted::Writer(State { epoch: 2, .. })
        ));
        assert_eq!(
            append(&*log, "u", 1, "spool-1", &records(1, 1)).await,
            Appended::Superseded
        );
        assert_eq!(
            append(&*log, "never admitted", 0, "spool-1", &records(1, 1)).await,
            Appended::Superseded
        );
        assert_eq!(log.state("u").await.unwrap().progress.last, 0);
    }
}

#[tokio::test]
async fn conflicting_records_are_kept_beside_the_stored_ones_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    let log = SqliteLog::open(&file).unwrap();
    admit(&log, "u", 0).await;
    append(&log, "u", 1, "spool-1", &records(1, 2)).await;
    let other = record(2, Kind::Cli, "other");
    for _ in 0..2 {
        let Appended::Stored(receipt) = append(&log, "u", 1, "spool-1", std::slice::from_ref(&other)).await else {
            panic!()
        };
        assert_eq!((receipt.new, receipt.equal, receipt.conflicts), (0, 0, vec![2]));
    }
    let kept: Vec<Vec<u8>> = rusqlite::Connection::open(&file)
        .unwrap()
        .prepare("SELECT bytes FROM conflicts")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(kept, [other.into_bytes()]);
}

#[tokio::test]
async fn a_failed_commit_is_an_error_for_all_and_stores_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    let log = SqliteLog::open(&file).unwrap();
    admit(&log, "u", 0).await;
    // As a full disk would: no page can be added.
    let breaker = rusqlite::Connection::open(&file).unwrap();
    breaker
        .execute_batch("CREATE TRIGGER full BEFORE INSERT ON records WHEN new.turn = 1 AND (new.key & 0xffffffff) = 2 BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        .unwrap();
    let batch = Batch {
        answers: Vec::new(),
        session: "u".to_owned(),
        epoch: 1,
        spool: "spool-1".to_owned(),
        records: records(1, 3).iter().map(|record| parsed(record)).collect(),
    };
    assert!(matches!(log.append(batch.clone()).await, Err(StoreError::Write(_))));
    assert_eq!(read(&log, "u", 0).await, []);
    breaker.execute_batch("DROP TRIGGER full").unwrap();
    assert!(matches!(
        log.append(batch).await,
        Ok(Appended::Stored(Receipt { new: 3, .. }))
    ));
}

#[test]
fn a_log_of_a_newer_gateway_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    drop(SqliteLog::open(&file).unwrap());
    let newer = rusqlite::Connection::open(&file).unwrap();
    newer
        .execute_batch("INSERT INTO refinery_schema_history SELECT 99, 'tomorrow', applied_on, '7' FROM refinery_schema_history LIMIT 1")
        .unwrap();
    let Err(StoreError::TooNew { found, .. }) = SqliteLog::open(&file) else {
        panic!()
    };
    assert!(found.contains("99"), "{found}");
}

#[tokio::test]
async fn a_log_of_the_first_layout_is_brought_up_to_date_with_all_that_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    let old = rusqlite::Connection::open(&file).unwrap();
    old.execute_batch(include_str!("../../src/store/sqlite/migrations/V1__records.sql"))
        .unwrap();
    old.execute_batch(
        "INSERT INTO sessions (id, uid, namespace, name, writer, epoch, spool, acked, last, created)
         VALUES (7, 'u', 'team-a', 's', 'p1', 3, 'spool-1', 1, 1, 1);
         INSERT INTO records VALUES ((7 << 32) + 1, 'log', 1, 1, 0, 1, x'7b7d');
         PRAGMA user_version = 1",
    )
    .unwrap();
    drop(old);
    for _ in 0..2 {
        let log = SqliteLog::open(&file).unwrap();
        assert_eq!(read(&log, "u", 0).await[0].whole().unwrap(), "{}");
        assert_eq!(log.state("u").await.unwrap().epoch, 3);
        assert_eq!(log.kept().await.unwrap().sessions[0].bytes, 2);
    }
}

#[tokio::test]
async fn a_page_has_at_least_one_record_and_no_more_than_its_bounds() {
    for log in all(tempfile::tempdir().unwrap().path()).await {
        admit(&*log, "u", 0).await;
        append(&*log, "u", 1, "spool-1", &records(1, 9)).await;
        let length = records(1, 1)[0].len();
        for (count, bytes, expected) in [
            (4, 1 << 20, 4),
            (9, length, 1),
            (9, 2 * length + 1, 2),
            (9, 2 * length, 2),
        ] {
            let page = PageSize { records: count, bytes };
            assert_eq!(log.read("u", 0, page).await.unwrap().len(), expected, "{page:?}");
        }
    }
}

#[tokio::test]
async fn a_record_longer_than_a_page_is_named_and_read_in_pieces() {
    for log in all(tempfile::tempdir().unwrap().path()).await {
        admit(&*log, "u", 0).await;
        let long = record(2, Kind::Cli, &"0123456789".repeat(300_000));
        let sent = [records(1, 1), vec![long.clone()], records(3, 3)].concat();
        append(&*log, "u", 1, "spool-1", &sent).await;
        let page = PageSize {
            records: 9,
            bytes: 1 << 20,
        };
        let read = log.read("u", 0, page).await.unwrap();
        assert_eq!(read.len(), 3);
        assert_eq!(read[1].content, Content::Long(long.len()));
        assert_eq!(read[2].whole().unwrap(), sent[2].as_bytes());
        let mut pieces = Vec::new();
        loop {
            let piece = log.piece("u", 2, pieces.len(), 1_000_001).await.unwrap();
            if piece.is_empty() {
                break;
            }
            pieces.extend_from_slice(&piece);
        }
        assert!(pieces == long.as_bytes());
        assert_eq!(log.piece("u", 9, 0, 9).await.unwrap(), "", "no such record");
        assert_eq!(log.piece("nobody", 1, 0, 9).await.unwrap(), "");
        // A resend is known by its checksum, and other bytes by theirs.
        let Appended::Stored(receipt) = append(&*log, "u", 1, "spool-1", &sent[1..2]).await else {
            panic!()
        };
        assert_eq!((receipt.new, receipt.equal), (0, 1));
    }
}

#[tokio::test]
async fn a_gap_record_lets_acknowledgements_pass_what_will_never_come() {
    for log in all(tempfile::tempdir().unwrap().path()).await {
        admit(&*log, "u", 0).await;
        append(
            &*log,
            "u",
            1,
            "spool-1",
            &[records(1, 2), records(4, 4), records(9, 9)].concat(),
        )
        .await;
        let gap = NewRecord {
            missing: Some(Missing { first: 5, last: 7 }),
            ..parsed(&record(8, Kind::Gap, "gap"))
        };
        let batch = Batch {
            answers: Vec::new(),
            session: "u".to_owned(),
            epoch: 1,
            spool: "spool-2".to_owned(),
            records: vec![gap],
        };
        log.append(batch).await.unwrap();
        let acked = async || log.state("u").await.unwrap().progress.acked;
        assert_eq!(acked().await, 2, "seq 3 may still come");
        append(&*log, "u", 1, "spool-2", &records(3, 3)).await;
        assert_eq!(acked().await, 9);
        let seqs: Vec<_> = read(&*log, "u", 0).await.iter().map(|record| record.seq).collect();
        assert_eq!(seqs, [1, 2, 3, 4, 8, 9]);
    }
}

/// A record at `seq` that says that the one before it will never come.
fn gap(seq: u64) -> NewRecord {
    NewRecord {
        missing: Some(Missing {
            first: seq - 1,
            last: seq - 1,
        }),
        ..parsed(&record(seq, Kind::Gap, "gap"))
    }
}

#[tokio::test]
async fn however_many_gaps_are_declared_no_commit_passes_more_than_others_can_wait_for() {
    const GAPS: u64 = 12_000;
    for log in all(tempfile::tempdir().unwrap().path()).await {
        admit(&*log, "u", 0).await;
        let store = async |records: Vec<NewRecord>| {
            let batch = Batch {
                answers: Vec::new(),
                session: "u".to_owned(),
                epoch: 1,
                spool: "spool-1".to_owned(),
                records,
            };
            match log.append(batch).await.unwrap() {
                Appended::Stored(receipt) => receipt,
                Appended::Superseded => panic!(),
            }
        };
        let gaps: Vec<_> = (2..2 + GAPS).map(|n| gap(2 * n)).collect();
        for some in gaps.chunks(4000) {
            let receipt = store(some.to_vec()).await;
            assert_eq!(
                (receipt.progress.acked, receipt.more),
                (0, false),
                "seq 1 may still come"
            );
        }
        let mut receipt = store(vec![parsed(&records(1, 1)[0])]).await;
        assert_eq!(receipt.progress.acked, 1, "seq 2 may still come");
        receipt = store(vec![parsed(&records(2, 2)[0])]).await;
        let mut commits = 1;
        while receipt.more {
            assert!(receipt.progress.acked <= commits * 20_000, "{receipt:?}");
            receipt = store(Vec::new()).await;
            commits += 1;
        }
        assert_eq!(receipt.progress.acked, 2 * (GAPS + 1));
        assert!(commits > 1, "all at once");
        assert_eq!(log.state("u").await.unwrap().progress, receipt.progress);
    }
}

#[tokio::test]
async fn what_a_runner_says_with_nul_in_it_is_stored_like_anything_else() {
    for log in all(tempfile::tempdir().unwrap().path()).await {
        admit(&*log, "u", 0).await;
        let command = NewCommand {
            session: "u".to_owned(),
            namespace: "team-a".to_owned(),
            name: "s".to_owned(),
            id: "c".to_owned(),
            frame: "{}".to_owned(),
            asked: "{}".to_owned(),
        };
        assert!(matches!(log.keep(command).await.unwrap(), Accepted::New(_)));
        let refused = |why: &str| Answer::Refused(why.to_owned());
        let batch = Batch {
            answers: vec![
                ("none\0".to_owned(), refused("no")),
                ("c".to_owned(), refused("no\0t now")),
            ],
            session: "u".to_owned(),
            epoch: 1,
            spool: "spool\0".to_owned(),
            records: records(1, 2).iter().map(|record| parsed(record)).collect(),
        };
        let stored = log.append(batch).await.unwrap();
        assert!(matches!(stored, Appended::Stored(Receipt { new: 2, .. })), "{stored:?}");
        assert!(log.command("u", "none\0").await.unwrap().is_none());
        let answer = log.command("u", "c").await.unwrap().unwrap().answer;
        assert!(
            matches!(&answer, Answer::Refused(why) if why.starts_with("no") && why.ends_with("t now")),
            "{answer:?}"
        );
        assert!(!log.answer("u", "c\0", refused("\0")).await.unwrap());
    }
}

/// Every kind of log, empty.
pub(crate) async fn all(folder: &Path) -> [Arc<dyn EventLog>; 3] {
    [
        Arc::new(MemoryLog::default()),
        Arc::new(SqliteLog::open(&folder.join("events.db")).unwrap()),
        Arc::new(PostgresLog::open(&database().as_str().into(), None).await.unwrap()),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Admit {
        session: u8,
        behind: u64,
    },
    Append {
        session: u8,
        behind: u64,
        spool: u8,
        seqs: Vec<u64>,
        /// How many seqs before it a record says to be missing.
        missing: Vec<u64>,
        text: u8,
    },
    Trim {
        session: u8,
        bytes: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let behind = prop_oneof![9 => Just(0_u64), 1 => 1..3_u64];
    prop_oneof![
        1 => (0..2_u8, behind.clone()).prop_map(|(session, behind)| Step::Admit { session, behind }),
        1 => (0..2_u8, 0..999_u64).prop_map(|(session, bytes)| Step::Trim { session, bytes }),
        6 => (0..2_u8, behind, 0..2_u8, prop::collection::btree_set(1..25_u64, 0..8), prop::collection::vec(0..6_u64, 8), prop_oneof![9 => Just(0_u8), 1 => Just(1)])
            .prop_map(|(session, behind, spool, seqs, missing, text)| Step::Append { session, behind, spool, seqs: seqs.into_iter().collect(), missing, text }),
    ]
}

/// One database for all cases below, whose sessions have names of their own.
static DATABASE: OnceLock<String> = OnceLock::new();

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn the_logs_on_disk_answer_as_the_log_in_memory(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let memory = MemoryLog::default();
            let file = SqliteLog::open(&folder.path().join("events.db")).unwrap();
            let database = PostgresLog::open(&DATABASE.get_or_init(database).as_str().into(), None).await.unwrap();
            let others: [&dyn EventLog; 2] = [&file, &database];
            let case = uuid::Uuid::new_v4();
            for step in steps {
                match step {
                    Step::Admit { session, behind } => {
                        let session = format!("{case}-{session}");
                        let seen = memory.state(&session).await.unwrap().epoch.saturating_sub(behind);
                        let answer = admit(&memory, &session, seen).await;
                        for log in others {
                            assert_eq!(answer, admit(log, &session, seen).await);
                        }
                    }
                    Step::Trim { session, bytes } => {
                        let session = format!("{case}-{session}");
                        let removed = memory.trim(&session, bytes).await.unwrap();
                        for log in others {
                            assert_eq!(removed, log.trim(&session, bytes).await.unwrap());
                        }
                    }
                    Step::Append { session, behind, spool, seqs, missing, text } => {
                        let (session, spool) = (format!("{case}-{session}"), format!("spool-{spool}"));
                        let epoch = memory.state(&session).await.unwrap().epoch.saturating_sub(behind);
                        let kind = |seq| if seq % 7 == 0 { Kind::End } else { Kind::Cli };
                        let records = seqs.iter().zip(missing).map(|(seq, missing)| {
                            let missing = missing.min(seq - 1);
                            NewRecord {
                                missing: (missing > 0).then(|| Missing { first: seq - missing, last: seq - 1 }),
                                ..parsed(&record(*seq, kind(*seq), &format!("{text}")))
                            }
                        });
                        let batch = Batch { answers: Vec::new(), session, epoch, spool, records: records.collect() };
                        let answer = memory.append(batch.clone()).await.unwrap();
                        for log in others {
                            assert_eq!(answer, log.append(batch.clone()).await.unwrap());
                        }
                    }
                }
                for session in ["0", "1", "2"].map(|session| format!("{case}-{session}")) {
                    let stored = read(&memory, &session, 3).await;
                    for log in others {
                        assert_eq!(memory.state(&session).await.unwrap(), log.state(&session).await.unwrap());
                        assert_eq!(stored, read(log, &session, 3).await);
                    }
                    assert!(stored.is_sorted_by(|a, b| a.seq < b.seq), "in order");
                }
            }
        });
    }
}
