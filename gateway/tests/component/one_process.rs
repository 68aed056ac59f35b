//! The file of the event log and the processes that want it.

use std::{net::TcpListener, path::Path};

use gateway::store::{StoreError, sqlite::SqliteLog};
use serde_json::Value;

use crate::support::{
    cluster::Cluster,
    process::Process,
    records,
    runner::{Runner, hello},
    soon,
    sse::http,
};

fn cluster_with_a_session(cluster: &Cluster) {
    cluster.running("s", "u", "p1");
    cluster.runner("t1", Some("p1"));
}

#[test]
fn a_log_that_somebody_has_is_not_opened_by_another_until_it_is_let_go_of() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    let first = SqliteLog::open(&file).unwrap();
    let Err(StoreError::InUse { path }) = SqliteLog::open(&file) else {
        panic!("two have it");
    };
    assert_eq!(path, file);
    drop(first);
    SqliteLog::open(&file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_takes_anothers_place_says_that_it_waits_and_goes_on_with_its_log() {
    let cluster = Cluster::start().await;
    cluster_with_a_session(&cluster);
    let folder = tempfile::tempdir().unwrap();
    let mut old = Process::start(&cluster, folder.path()).await;
    let (mut runner, _) = Runner::admitted(old.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(runner.deliver(&records(1, 4)).await, 4);

    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = [format!("--listen=127.0.0.1:{port}")];
    let new = Process::start_with(&[], &cluster, folder.path(), &listen);
    let mut new = std::pin::pin!(new);
    let ask = async |path: &str| loop {
        // Nobody listens yet.
        if let Ok(answer) = http().get(format!("http://127.0.0.1:{port}{path}")).send().await {
            return (answer.status().as_u16(), answer.json::<Value>().await.unwrap());
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let waiting = async {
        let (code, health) = ask("/health").await;
        assert_eq!((code, &health["status"]), (200, &"waiting".into()), "a rollout goes on");
        let (code, refusal) = ask("/api/projects/team-a/agentic-sessions").await;
        assert_eq!(code, 503);
        assert!(
            refusal["message"].as_str().unwrap().contains("another gateway"),
            "{refusal}"
        );
    };
    tokio::select! {
        _ = &mut new => panic!("two have the log"),
        () = soon("its word", waiting) => {}
    }
    assert_eq!(runner.deliver(&records(5, 6)).await, 6, "the old one works on");
    old.terminate();
    assert_eq!(runner.closed().await, 1001);
    soon("the end of the old one", old.child.wait()).await.unwrap();
    let new = soon("the new one", new).await;
    assert!(new.log.lock().unwrap().contains("another gateway has the event log"));
    let (mut runner, welcome) = Runner::admitted(new.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(welcome.acked_seq, 6);
    assert_eq!(runner.deliver(&records(7, 7)).await, 7);
}

async fn status(process: &Process) -> String {
    let health = http()
        .get(format!("http://{}/health", process.address))
        .send()
        .await
        .unwrap();
    assert_eq!(health.status(), 200, "who reads can go on");
    health.json::<Value>().await.unwrap()["status"]
        .as_str()
        .unwrap()
        .to_owned()
}

async fn metric(process: &Process, name: &str) -> String {
    let metrics = http()
        .get(format!("http://{}/metrics", process.metrics))
        .send()
        .await
        .unwrap();
    let metrics = metrics.text().await.unwrap();
    let line = metrics.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("{metrics}")).to_owned()
}

#[test]
fn a_full_volume_is_left_by_lowering_what_is_kept() {
    const TEST: &str = "one_process::a_full_volume_is_left_by_lowering_what_is_kept";
    let Some(disk) = xtask::small_disk(TEST, "32m").unwrap() else {
        return;
    };
    tokio::runtime::Runtime::new().unwrap().block_on(fill(&disk));
}

async fn fill(disk: &Path) {
    let cluster = Cluster::start().await;
    cluster_with_a_session(&cluster);
    let mut process = Process::start(&cluster, disk).await;
    let (mut runner, _) = Runner::admitted(process.address, &hello("s", "u", "p1"), "t1").await;
    let mut acked = 0;
    let full = loop {
        runner.send(&records(acked + 1, acked + 500)).await;
        match runner.next().await {
            Ok(protocol::frame::GatewayFrame::Ack(ack)) => acked = ack.seq,
            Ok(other) => panic!("{other:?}"),
            Err(code) => break code,
        }
        assert!(acked < 1_000_000, "it never fills");
    };
    assert_eq!(full, Some(1011));
    assert_eq!(status(&process).await, "full");
    assert_eq!(metric(&process, "agentic_gateway_log_full").await, "1");
    process.terminate();
    soon("its end", process.child.wait()).await.unwrap();

    // As operations.md says.
    let process = Process::start_with(&[], &cluster, disk, &["--retention-size=4Mi".to_owned()]).await;
    let stored = async {
        loop {
            let (mut runner, welcome) = Runner::admitted(process.address, &hello("s", "u", "p1"), "t1").await;
            assert_eq!(welcome.acked_seq, acked, "nothing that was acknowledged is lost");
            runner.send(&records(acked + 1, acked + 500)).await;
            if let Ok(protocol::frame::GatewayFrame::Ack(ack)) = runner.next().await {
                return ack.seq;
            }
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    assert_eq!(Box::pin(soon("room", stored)).await, acked + 500);
    assert_eq!(status(&process).await, "healthy");
    assert_eq!(metric(&process, "agentic_gateway_log_full").await, "0");
    let removed = async {
        while metric(&process, "agentic_gateway_removed_records_total").await == "0" {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    Box::pin(soon("the removal", removed)).await;
}
