//! A log that is not the one the runner spoke with last, and a runner whose spool is not the one the log knows.

use std::path::Path;

use gateway::store::PageSize;
use protocol::{
    Kind,
    frame::{GatewayFrame, Hello, close},
};
use serde_json::json;

use crate::support::{
    Served,
    cluster::Cluster,
    end, opened, record, records,
    runner::{Runner, hello},
    soon,
    sse::Events,
};

async fn served(file: &Path) -> Served {
    let cluster = Cluster::start().await;
    let log = opened(file).await;
    let served = Served::on(cluster.client(), cluster, log).await;
    served.cluster.running("s", "u", "p1");
    served.cluster.runner("t1", Some("p1"));
    served.cluster.caller("token", "ann");
    served.cluster.allow("ann", &["get"], "team-a");
    served
}

async fn stored(served: &Served) -> Vec<String> {
    let page = PageSize {
        records: 1000,
        bytes: 1 << 30,
    };
    let read = served.gateway.log.read("u", 0, page).await.unwrap();
    read.iter()
        .map(|record| String::from_utf8(record.whole().unwrap().to_vec()).unwrap())
        .collect()
}

#[tokio::test]
async fn an_older_copy_of_the_log_gets_again_what_it_has_not_and_readers_get_no_gap() {
    let folder = tempfile::tempdir().unwrap();
    let (file, copy) = (folder.path().join("events.db"), folder.path().join("copy.db"));
    {
        let served = served(&file).await;
        let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
        runner.deliver(&records(1, 10)).await;
        rusqlite::Connection::open(&file)
            .unwrap()
            .execute("VACUUM INTO ?1", [copy.to_str().unwrap()])
            .unwrap();
        assert_eq!(runner.deliver(&records(11, 20)).await, 20);
        drop(runner);
        soon("the stop", served.stop()).await;
    }
    let served = served(&copy).await;
    // A client of the newer log comes first: it waits for what it has not seen, and is not shown anything else.
    let mut client = Events::of(&served, "s", "token", Some("u/15")).await;
    client.wait("phase").await;
    let (mut runner, welcome) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!((welcome.acked_seq, welcome.spool.as_deref()), (10, Some("spool-1")));
    assert_eq!(runner.deliver(&records(11, 20)).await, 20);
    for seq in 16..=20 {
        assert_eq!(client.next().await.unwrap().seq(), Some(seq));
    }
    assert_eq!(stored(&served).await, records(1, 20));
}

#[tokio::test]
async fn readers_of_a_session_that_is_over_are_told_what_the_log_had_and_has_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let served = served(&folder.path().join("events.db")).await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    runner.deliver(&records(1, 3)).await;
    drop(runner);
    // As after a restore: status has what was acknowledged by the log that is gone.
    let delivered = json!([{"type": "EventsDelivered", "status": "True", "reason": "Delivered", "message": "", "lastTransitionTime": "2026-01-02T03:04:05Z"}]);
    let status = json!({"phase": "Completed", "attempt": 1, "completionTime": "2026-01-02T03:04:05Z", "ackedSeq": 9, "conditions": delivered});
    served.cluster.set("team-a", "s", "u", &status);
    let events = Events::of(&served, "s", "token", None).await.rest().await;
    let [.., gap, close] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(gap.json(), json!({"known": 3, "final": 9, "cursor": "u/3"}));
    assert_eq!(close.json(), json!({"reason": "ended", "lastSeq": 3}));
}

#[tokio::test]
async fn a_log_that_is_lost_gets_everything_again() {
    let folder = tempfile::tempdir().unwrap();
    let served = served(&folder.path().join("events.db")).await;
    let returning = Hello {
        next_seq: 21,
        ..hello("s", "u", "p1")
    };
    let (mut runner, welcome) = Runner::admitted(served.address, &returning, "t1").await;
    assert_eq!((welcome.acked_seq, welcome.spool), (0, None));
    assert_eq!(runner.deliver(&records(1, 20)).await, 20);
}

#[tokio::test]
async fn a_spool_that_the_log_does_not_know_is_told_whose_records_are_there_and_what_it_had_before_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let served = served(&folder.path().join("events.db")).await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    runner.deliver(&records(1, 5)).await;
    drop(runner);
    let other = Hello {
        spool: "spool-2".to_owned(),
        next_seq: 3,
        ..hello("s", "u", "p1")
    };
    let (mut runner, welcome) = Runner::admitted(served.address, &other, "t1").await;
    assert_eq!((welcome.acked_seq, welcome.spool.as_deref()), (5, Some("spool-1")));
    // One that did not look at the answer: what was stored stays, and it is told.
    runner.send(&[record(2, Kind::Cli, "of spool-2")]).await;
    assert!(matches!(runner.frame().await, GatewayFrame::Conflict(conflict) if conflict.seq == 2));
    assert!(matches!(runner.frame().await, GatewayFrame::Ack(ack) if ack.seq == 5));
    // One that did: its own records behind a gap.
    let gap = r#"{"seq":6,"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05Z","kind":"gap","body":{}}"#;
    let again = [vec![gap.to_owned(), record(7, Kind::Cli, "of spool-2")], vec![end(8)]].concat();
    assert_eq!(runner.deliver(&again).await, 8);
    assert_eq!(stored(&served).await, [records(1, 5), again].concat());
}

#[tokio::test]
async fn a_writer_that_was_replaced_comes_back_and_is_refused_with_what_it_still_has() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    {
        let served = served(&file).await;
        let (mut first, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
        first.deliver(&records(1, 3)).await;
        served.cluster.running("s", "u", "p2");
        served.cluster.runner("t2", Some("p2"));
        let (mut second, _) = Runner::admitted(served.address, &hello("s", "u", "p2"), "t2").await;
        second.deliver(&records(4, 6)).await;
        soon("the stop", served.stop()).await;
    }
    // Also by a gateway that knows of it from its log alone: this cluster still names the first.
    let served = served(&file).await;
    let (mut first, welcome) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(
        welcome.acked_seq, 6,
        "it hears how far the log goes, and overwrites nothing of it"
    );
    first.send(&[record(4, Kind::Cli, "late")]).await;
    assert!(matches!(first.frame().await, GatewayFrame::Conflict(conflict) if conflict.seq == 4));
    served.cluster.running("s", "u", "p2");
    assert_eq!(first.closed().await, close::SUPERSEDED);
    assert_eq!(stored(&served).await, records(1, 6));
}
