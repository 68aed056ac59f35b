use std::{process::Stdio, time::Duration};

use futures::StreamExt as _;
use gateway::store::{EventLog as _, PageSize, sqlite::SqliteLog};
use protocol::frame::GatewayFrame;
use rand::{Rng as _, SeedableRng as _};
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    cluster::Cluster,
    process::Process,
    records,
    runner::{Runner, hello},
    soon,
    sse::http,
};

/// `GATEWAY_KILLS=200` for the long run.
fn kills() -> u64 {
    std::env::var("GATEWAY_KILLS").map_or(8, |kills| kills.parse().unwrap())
}

/// `GATEWAY_KILL_SEED` repeats a run, as far as chance goes.
fn seed() -> u64 {
    std::env::var("GATEWAY_KILL_SEED").map_or(20_260_102, |seed| seed.parse().unwrap())
}

/// Sends until the connection breaks; the last seq that was acknowledged.
async fn send_until_killed(process: &mut Process, session: &str, acked: u64, after: Duration) -> u64 {
    let hello = hello(session, "u", "p1");
    let (mut runner, welcome) = Runner::admitted(process.address, &hello, "t1").await;
    assert!(
        welcome.acked_seq >= acked,
        "acknowledged {acked}, then {} was left",
        welcome.acked_seq
    );
    let mut acked = welcome.acked_seq;
    let mut next = acked + 1;
    let kill = tokio::time::sleep(after);
    tokio::pin!(kill);
    loop {
        let batch = records(next, next + 2).join(",");
        let sent = futures::SinkExt::send(&mut runner.socket, Message::text(format!(r#"{{"records":[{batch}]}}"#)));
        tokio::select! {
            () = &mut kill => {
                process.child.start_kill().unwrap();
                kill.as_mut().reset(tokio::time::Instant::now() + Duration::from_hours(1));
            }
            sent = sent => {
                if sent.is_err() {
                    return acked;
                }
                next += 3;
            }
        }
        // Whatever was acknowledged before the death counts.
        while let Some(message) = futures::FutureExt::now_or_never(runner.socket.next()) {
            match message {
                Some(Ok(Message::Text(text))) => {
                    if let GatewayFrame::Ack(ack) = serde_json::from_str(&text).unwrap() {
                        acked = ack.seq;
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return acked,
            }
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn no_acknowledged_record_is_lost_when_the_gateway_is_killed_while_it_stores() {
    let cluster = Cluster::start().await;
    cluster.running("s", "u", "p1");
    cluster.runner("t1", Some("p1"));
    let folder = tempfile::tempdir().unwrap();
    let (seed, kills) = (seed(), kills());
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut acked = 0;
    for round in 0..kills {
        let mut process = Process::start(&cluster, folder.path()).await;
        let begun = acked;
        let after = Duration::from_micros(random.random_range(20_000..300_000));
        let killed = Box::pin(send_until_killed(&mut process, "s", acked, after));
        acked = soon("the kill", killed).await;
        assert!(acked >= begun, "round {round}");
        soon("the end of the process", process.child.wait()).await.unwrap();
    }
    let log = SqliteLog::open(&folder.path().join("events.db")).unwrap();
    let page = PageSize {
        records: 1000,
        bytes: 1 << 20,
    };
    let mut last = 0;
    loop {
        let stored = log.read("u", last, page).await.unwrap();
        if stored.is_empty() {
            break;
        }
        let sent = records(last + 1, last + stored.len() as u64);
        assert!(
            stored.iter().map(|record| record.whole().unwrap()).eq(&sent),
            "after {last}"
        );
        last += stored.len() as u64;
    }
    eprintln!("seed {seed}: {kills} kills, {acked} records acknowledged, {last} stored, none of them lost or changed");
    assert!(last >= acked && acked >= kills, "{acked} acknowledged, {last} stored");
    let check: String = rusqlite::Connection::open(folder.path().join("events.db"))
        .unwrap()
        .pragma_query_value(None, "integrity_check", |row| row.get(0))
        .unwrap();
    assert_eq!(check, "ok");
}

#[tokio::test]
async fn the_process_ends_on_sigterm_with_all_told_and_serves_metrics_apart() {
    let cluster = Cluster::start().await;
    cluster.running("s", "u", "p1");
    cluster.runner("t1", Some("p1"));
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(&cluster, folder.path()).await;
    let (mut runner, _) = Runner::admitted(process.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(runner.deliver(&records(1, 4)).await, 4);
    let metrics = http()
        .get(format!("http://{}/metrics", process.metrics))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(
        metrics.contains(r#"agentic_gateway_records_total{result="new"} 4"#),
        "{metrics}"
    );
    assert_eq!(
        http()
            .get(format!("http://{}/metrics", process.address))
            .send()
            .await
            .unwrap()
            .status(),
        404
    );
    let pid = process.child.id().unwrap().to_string();
    let told = tokio::process::Command::new("kill")
        .args(["-TERM", &pid])
        .stdout(Stdio::null())
        .status()
        .await
        .unwrap();
    assert!(told.success());
    assert_eq!(runner.closed().await, 1001);
    let ended = soon("the end of the process", process.child.wait()).await.unwrap();
    assert!(ended.success(), "{ended:?}");
    // A clean end leaves nothing but the log itself.
    assert!(!folder.path().join("events.db-wal").exists());
}
