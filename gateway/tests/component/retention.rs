use std::collections::HashSet;

use gateway::{
    retention::{self, Limits},
    store::{Appended, EventLog, PageSize, Removed, sqlite::SqliteLog},
};
use protocol::Kind;
use serde_json::json;

use crate::{
    store::{admit, all, append},
    support::{
        Served,
        cluster::Cluster,
        end, record, records,
        runner::{Runner, hello},
        sse::Events,
    },
};

async fn seqs(log: &dyn EventLog) -> Vec<u64> {
    let page = PageSize {
        records: 9999,
        bytes: 1 << 30,
    };
    log.read("u", 0, page)
        .await
        .unwrap()
        .iter()
        .map(|record| record.seq)
        .collect()
}

#[tokio::test]
async fn the_oldest_records_go_first_and_end_records_and_what_is_not_acknowledged_stay() {
    for log in all(tempfile::tempdir().unwrap().path()).await {
        admit(&*log, "u", 0).await;
        let sent = [records(1, 3), vec![end(4)], records(5, 6), records(8, 9)].concat();
        append(&*log, "u", 1, "spool-1", &sent).await;
        let all = log.kept().await.unwrap().sessions[0].bytes;
        assert_eq!(all, sent.iter().map(|record| record.len() as u64).sum::<u64>());

        let Removed {
            records: count,
            bytes,
            more,
        } = log.trim("u", 1).await.unwrap();
        assert_eq!((count, bytes, more), (1, sent[0].len() as u64, false));
        assert_eq!(seqs(&*log).await, [2, 3, 4, 5, 6]);
        log.trim("u", u64::MAX).await.unwrap();
        assert_eq!(seqs(&*log).await, [4], "the end record");
        let progress = log.state("u").await.unwrap().progress;
        assert_eq!((progress.removed, progress.acked, progress.last), (6, 6, 9));
        let left = [&sent[3], &sent[6], &sent[7]].map(|record| record.len() as u64);
        assert_eq!(log.kept().await.unwrap().sessions[0].bytes, left.iter().sum::<u64>());
        assert_eq!(log.trim("u", u64::MAX).await.unwrap(), Removed::default());

        // What was removed and comes again is not taken for new, and what comes then is stored.
        let Appended::Stored(receipt) = append(&*log, "u", 1, "spool-1", &records(1, 3)).await else {
            panic!()
        };
        assert_eq!((receipt.new, receipt.equal, receipt.conflicts.len()), (0, 3, 0));
        append(&*log, "u", 1, "spool-1", &records(7, 7)).await;
        assert_eq!(seqs(&*log).await, [4, 7, 8, 9]);
    }
}

#[tokio::test]
async fn much_is_removed_in_steps_and_a_deleted_session_wholly() {
    let folder = tempfile::tempdir().unwrap();
    let log = SqliteLog::open(&folder.path().join("events.db")).unwrap();
    for session in ["u", "other"] {
        admit(&log, session, 0).await;
        append(&log, session, 1, "spool-1", &records(1, 2500)).await;
    }
    let mut steps = 1;
    while log.forget("u").await.unwrap().more {
        steps += 1;
    }
    assert_eq!(steps, 3);
    let kept = log.kept().await.unwrap();
    assert_eq!(kept.sessions.len(), 1);
    assert_eq!(kept.sessions[0].uid, "other");
    assert_eq!(log.state("u").await.unwrap().epoch, 0);
    assert_eq!(log.state("other").await.unwrap().progress.acked, 2500);
}

#[tokio::test]
async fn a_session_counts_as_deleted_from_when_it_was_first_missed_until_it_is_seen_again() {
    for log in all(tempfile::tempdir().unwrap().path()).await {
        admit(&*log, "u", 0).await;
        let gone = async || log.kept().await.unwrap().sessions[0].gone;
        let here = HashSet::from(["u".to_owned()]);
        log.note_present(HashSet::new(), 100).await.unwrap();
        log.note_present(HashSet::new(), 200).await.unwrap();
        assert_eq!(gone().await, Some(100));
        log.note_present(here, 300).await.unwrap();
        assert_eq!(gone().await, None);
    }
}

#[tokio::test]
async fn readers_are_told_which_records_were_removed_and_go_on_behind_them() {
    let folder = tempfile::tempdir().unwrap();
    let log = SqliteLog::open(&folder.path().join("events.db")).unwrap();
    let cluster = Cluster::start().await;
    let served = Served::on(cluster.client(), cluster, std::sync::Arc::new(log)).await;
    served.cluster.running("s", "u", "p1");
    served.cluster.runner("t1", Some("p1"));
    served.cluster.caller("token", "ann");
    served.cluster.allow("ann", &["get"], "team-a");
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    runner.deliver(&records(1, 9)).await;
    let limits = Limits {
        session: Some(record(9, Kind::Cli, "9").len() as u64 * 2),
        ..Limits::default()
    };
    retention::once(&served.gateway, &limits, 100).await.unwrap();

    let mut events = Events::of(&served, "s", "token", None).await;
    let gap = events.wait("gap").await;
    let to = gap.json()["to"].as_u64().unwrap();
    assert_eq!(gap.json(), json!({"from": 1, "to": to, "reason": "removed"}));
    assert!((6..9).contains(&to), "{to}");
    assert_eq!(events.next().await.unwrap().seq(), Some(to + 1));
    // A client that comes back with what the gap gave it is not told again.
    let mut events = Events::of(&served, "s", "token", gap.id.as_deref()).await;
    events.wait("phase").await;
    assert_eq!(events.next().await.unwrap().seq(), Some(to + 1));

    // All of them: the numbers are told although there is nothing behind.
    served.gateway.log.trim("u", u64::MAX).await.unwrap();
    let mut events = Events::of(&served, "s", "token", Some("u/3")).await;
    assert_eq!(
        events.wait("gap").await.json(),
        json!({"from": 4, "to": 9, "reason": "removed"})
    );
    runner.deliver(&records(10, 10)).await;
    assert_eq!(events.next().await.unwrap().seq(), Some(10));
}
