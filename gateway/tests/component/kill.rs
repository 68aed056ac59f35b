use std::{process::Stdio, time::Duration};

use futures::StreamExt as _;
use protocol::frame::GatewayFrame;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    cluster::Cluster,
    process::Process,
    records,
    runner::{Runner, hello},
    soon,
    sse::http,
};

/// Rounds of kill and restart.
const ROUNDS: u64 = 6;

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
    let mut acked = 0;
    for round in 0..ROUNDS {
        let mut process = Process::start(&cluster, folder.path()).await;
        let begun = acked;
        acked = soon(
            "the kill",
            Box::pin(send_until_killed(
                &mut process,
                "s",
                acked,
                Duration::from_millis(40 + 37 * round),
            )),
        )
        .await;
        assert!(acked > begun, "nothing was stored in round {round}");
        soon("the end of the process", process.child.wait()).await.unwrap();
    }
    let process = Process::start(&cluster, folder.path()).await;
    cluster.caller("token", "ann");
    cluster.allow("ann", &["get"], "team-a");
    let url = format!(
        "http://{}/api/projects/team-a/agentic-sessions/s/events",
        process.address
    );
    let mut body = http()
        .get(url)
        .bearer_auth("token")
        .send()
        .await
        .unwrap()
        .bytes_stream();
    let (mut text, wanted) = (String::new(), format!("id: u/{acked}\n"));
    while !text.contains(&wanted) {
        text.push_str(std::str::from_utf8(&soon("the records", body.next()).await.unwrap().unwrap()).unwrap());
    }
    let data: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: {\"seq\""))
        .collect();
    for (line, record) in data.iter().zip(records(1, acked)) {
        assert_eq!(format!("{{\"seq\"{line}"), record);
    }
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
