use std::time::Duration;

use futures::StreamExt as _;
use gateway::store::{EventLog, PageSize, sqlite::SqliteLog};
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

/// Sessions that are written to at once, so that what dies is a commit of many.
const SESSIONS: usize = 6;

/// Names of a session: its own, its uid, its pod and its token.
fn named(n: usize) -> [String; 4] {
    ["s", "u", "p", "t"].map(|what| format!("{what}{n}"))
}

/// Sends until the connection breaks; the last seq that was acknowledged.
async fn send_until_killed(mut runner: Runner, mut acked: u64) -> u64 {
    let mut next = acked + 1;
    loop {
        let batch = records(next, next + 2).join(",");
        let sent = Message::text(format!(r#"{{"records":[{batch}]}}"#));
        if futures::SinkExt::send(&mut runner.socket, sent).await.is_err() {
            return acked;
        }
        next += 3;
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

/// What a session's log has, each record as it was sent.
async fn stored(log: &dyn EventLog, uid: &str) -> u64 {
    let page = PageSize {
        records: 1000,
        bytes: 1 << 20,
    };
    let mut last = 0;
    loop {
        let stored = log.read(uid, last, page).await.unwrap();
        if stored.is_empty() {
            return last;
        }
        let sent = records(last + 1, last + stored.len() as u64);
        assert!(
            stored.iter().map(|record| record.whole().unwrap()).eq(&sent),
            "{uid} after {last}"
        );
        last += stored.len() as u64;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_record_is_lost_when_the_gateway_is_killed_while_it_stores() {
    let cluster = Cluster::start().await;
    for n in 0..SESSIONS {
        let [session, uid, pod, token] = named(n);
        cluster.running(&session, &uid, &pod);
        cluster.runner(&token, Some(&pod));
    }
    let folder = tempfile::tempdir().unwrap();
    let (seed, kills) = (seed(), kills());
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut acked = [0; SESSIONS];
    for round in 0..kills {
        let mut process = Process::start(&cluster, folder.path()).await;
        let mut senders = Vec::new();
        for (n, acked) in acked.iter().enumerate() {
            let [session, uid, pod, token] = named(n);
            let (runner, welcome) = Runner::admitted(process.address, &hello(&session, &uid, &pod), &token).await;
            assert!(
                welcome.acked_seq >= *acked,
                "round {round}: acknowledged {acked}, then {} was left",
                welcome.acked_seq
            );
            senders.push(tokio::spawn(send_until_killed(runner, welcome.acked_seq)));
        }
        tokio::time::sleep(Duration::from_micros(random.random_range(20_000..300_000))).await;
        process.child.start_kill().unwrap();
        for (sender, acked) in senders.into_iter().zip(&mut acked) {
            *acked = soon("the kill", sender).await.unwrap();
        }
        soon("the end of the process", process.child.wait()).await.unwrap();
    }
    let log = SqliteLog::open(&folder.path().join("events.db")).unwrap();
    let mut all = 0;
    for (n, acked) in acked.into_iter().enumerate() {
        let last = stored(&log, &format!("u{n}")).await;
        assert!(last >= acked && acked >= kills, "{acked} acknowledged, {last} stored");
        all += last;
    }
    let acked: u64 = acked.iter().sum();
    eprintln!(
        "seed {seed}: {kills} kills, {acked} records of {SESSIONS} sessions acknowledged, {all} stored, none of them lost or changed"
    );
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
    process.terminate();
    assert_eq!(runner.closed().await, 1001);
    let ended = soon("the end of the process", process.child.wait()).await.unwrap();
    assert!(ended.success(), "{ended:?}");
    // A clean end leaves nothing but the log itself.
    assert!(!folder.path().join("events.db-wal").exists());
}

/// Sends until it is told to go; what was acknowledged before.
async fn send_until_told_to_go(mut runner: Runner, begun: tokio::sync::mpsc::Sender<()>) -> u64 {
    let mut acked = 0;
    for seq in (1..).step_by(3) {
        let batch = records(seq, seq + 2).join(",");
        // Three frames ahead of the acknowledgements.
        let sent =
            futures::SinkExt::send(&mut runner.socket, Message::text(format!(r#"{{"records":[{batch}]}}"#))).await;
        while sent.is_err() || seq > acked + 9 {
            match runner.next().await {
                Ok(GatewayFrame::Ack(ack)) => acked = ack.seq,
                Ok(other) => panic!("{other:?}"),
                Err(code) => {
                    assert_eq!(code, Some(1001));
                    return acked;
                }
            }
        }
        if seq == 31 {
            begun.send(()).await.unwrap();
        }
    }
    acked
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_told_to_go_under_load_has_acknowledged_all_that_it_stored_and_stored_all_that_it_acknowledged()
 {
    const RUNNERS: usize = 24;
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(&cluster, folder.path()).await;
    let (begun, mut all) = tokio::sync::mpsc::channel(RUNNERS);
    let mut runners = Vec::new();
    for number in 0..RUNNERS {
        let (name, uid, pod, token) = (
            format!("s{number}"),
            format!("u{number}"),
            format!("p{number}"),
            format!("t{number}"),
        );
        cluster.running(&name, &uid, &pod);
        cluster.runner(&token, Some(&pod));
        let (runner, _) = Runner::admitted(process.address, &hello(&name, &uid, &pod), &token).await;
        runners.push(tokio::spawn(send_until_told_to_go(runner, begun.clone())));
    }
    for _ in 0..RUNNERS {
        soon("all runners being busy", all.recv()).await.unwrap();
    }
    process.terminate();
    let mut acknowledged = Vec::new();
    for runner in runners {
        acknowledged.push(soon("the close", runner).await.unwrap());
    }
    assert!(
        soon("the end of the process", process.child.wait())
            .await
            .unwrap()
            .success()
    );
    let log = SqliteLog::open(&folder.path().join("events.db")).unwrap();
    for (number, acked) in acknowledged.iter().enumerate() {
        let stored = log.state(&format!("u{number}")).await.unwrap().progress;
        assert_eq!((stored.acked, stored.last), (*acked, *acked), "session {number}");
    }
    let sum: u64 = acknowledged.iter().sum();
    eprintln!("{RUNNERS} runners: {sum} records acknowledged and stored, none in between");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_talkative_log_has_no_token_in_it() {
    const TOKENS: [&str; 3] = [
        "fake-token-of-a-caller",
        "fake-token-of-a-page",
        "fake-token-of-a-runner",
    ];
    let cluster = Cluster::start().await;
    cluster.running("s", "u", "p1");
    cluster.runner(TOKENS[2], Some("p1"));
    for token in &TOKENS[..2] {
        cluster.caller(token, "ann");
    }
    cluster.allow("ann", &["get", "list"], "team-a");
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start_under(&["env", "RUST_LOG=trace"], &cluster, folder.path()).await;
    let sessions = format!("http://{}/api/projects/team-a/agentic-sessions", process.address);
    let listed = http().get(&sessions).bearer_auth(TOKENS[0]).send().await.unwrap();
    assert_eq!(listed.status(), 200);
    let encoded = base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, TOKENS[1]);
    let upgrade = http()
        .get(format!("{sessions}/s/ws"))
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header(
            "sec-websocket-protocol",
            format!("events.agentic.v1, base64url.bearer.authorization.k8s.io.{encoded}"),
        );
    assert_eq!(upgrade.send().await.unwrap().status(), 101);
    let (mut runner, _) = Runner::admitted(process.address, &hello("s", "u", "p1"), TOKENS[2]).await;
    runner.deliver(&records(1, 1)).await;
    process.terminate();
    soon("the end of the process", process.child.wait()).await.unwrap();
    let log = process.log.lock().unwrap().clone();
    assert!(log.contains(r#""level":"TRACE""#), "it is as talkative as can be");
    for secret in TOKENS.iter().copied().chain([encoded.as_str()]) {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
