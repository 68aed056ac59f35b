mod gatekeeper;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{GatewayFrame, Role, Welcome};
use protocol::{Kind, Outcome};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::*;
use crate::history::History;
use crate::journal::Journal;
use crate::redact::Vault;
use crate::spool::Spool;
use crate::transcript::{Format, Transcript};
use gatekeeper::{Log, gateway, serve, slow_way, way};

const DEADLINE: Duration = Duration::from_mins(1);

struct Runner {
    journal: Journal,
    uplink: Uplink,
    dir: tempfile::TempDir,
}

fn hello(spool: &str) -> Hello {
    Hello {
        protocol: 1,
        role: Role::Run,
        uid: "u".into(),
        name: "n".into(),
        attempt: 1,
        pod_uid: "p".into(),
        spool: spool.to_owned(),
        next_seq: 1,
        cli_version: None,
    }
}

fn runner(url: &str, records: u32) -> Runner {
    let dir = tempfile::tempdir().unwrap();
    let token_file = dir.path().join("token");
    std::fs::write(&token_file, "fake-token\n").unwrap();
    let spool = Spool::open(&dir.path().join("spool"), |_| ()).unwrap();
    let vault = Vault::default();
    let quiet = Transcript::new(Format::Quiet, None);
    let mut journal = Journal::new(spool, History::default(), vault, None, quiet, 1);
    let gateway = Gateway {
        url: url.to_owned(),
        token_file: Some(token_file),
    };
    let spool = journal.spool();
    let uplink = Uplink::start(gateway, hello(spool.id()), spool.readers(), spool.progress(), None);
    for n in 0..records {
        journal
            .record(Kind::Cli, &serde_json::json!({ "type": "n", "n": n }))
            .unwrap();
    }
    Runner { journal, uplink, dir }
}

impl Runner {
    /// Writes `more` records while it serves the uplink, then waits until all is acknowledged.
    async fn deliver(&mut self, more: u32) {
        let work = async {
            for n in 0..more {
                self.journal
                    .record(Kind::Cli, &serde_json::json!({ "type": "more", "n": n }))
                    .unwrap();
                tokio::select! {
                    Some(request) = self.uplink.request() => self.journal.append_again(request).await.unwrap(),
                    () = tokio::task::yield_now() => {}
                }
            }
            loop {
                let last = self.journal.spool().next_seq() - 1;
                tokio::select! {
                    acked = self.uplink.acknowledged(last) => { assert!(acked); return; }
                    Some(request) = self.uplink.request() => self.journal.append_again(request).await.unwrap(),
                }
            }
        };
        timeout(DEADLINE, work).await.expect("all records are acknowledged");
    }

    fn spooled(&self) -> Vec<String> {
        let spool = self.journal.spool();
        let last = spool.next_seq() - 1;
        let read = spool.readers()(1).read(last, usize::MAX).unwrap();
        read.into_iter().map(|stored| stored.bytes.get().to_owned()).collect()
    }
}

#[tokio::test]
async fn over_drops_at_random_no_record_is_lost_or_doubled() {
    let gatekeeper = gateway(Log::default(), 4, vec![]).await;
    let mut runner = runner(&gatekeeper.url, 300);
    runner.deliver(300).await;
    let log = gatekeeper.log.lock().unwrap();
    assert_eq!(log.records.values().cloned().collect::<Vec<_>>(), runner.spooled());
    assert!(
        log.connections > 3,
        "{} connections: nothing was dropped",
        log.connections
    );
    assert!(log.tokens.iter().all(|token| token == "Bearer fake-token"));
}

#[tokio::test]
async fn a_connection_on_which_everything_is_lost_is_found_within_thirty_seconds() {
    let (idle, busy) = tokio::join!(lost_on_the_way(false), lost_on_the_way(true));
    for (what, took) in [("idle", idle), ("busy", busy)] {
        assert!(took <= Duration::from_secs(30), "{what}: {took:?}");
    }
}

/// A record that takes longer than silence may: while it leaves, nothing can be heard.
fn long_record(runner: &mut Runner) {
    let line = serde_json::json!({ "type": "long", "text": "x".repeat(14 << 20) });
    runner.journal.record(Kind::Cli, &line).unwrap();
}

#[tokio::test]
async fn a_long_record_arrives_over_a_slow_connection_at_the_first_try() {
    let gatekeeper = gateway(Log::default(), 0, vec![]).await;
    let way = slow_way(&gatekeeper.url, None);
    let mut runner = runner(&way.url, 0);
    long_record(&mut runner);
    let begun = Instant::now();
    runner.deliver(1).await;
    assert!(begun.elapsed() > Duration::from_secs(25), "{:?}", begun.elapsed());
    assert_eq!(way.came.lock().unwrap().len(), 1);
    let log = gatekeeper.log.lock().unwrap();
    assert_eq!(log.records.values().cloned().collect::<Vec<_>>(), runner.spooled());
}

/// Who went would come again behind all others that wait.
#[tokio::test]
async fn a_long_record_waits_for_its_turn_at_a_gateway_that_says_that_it_is_there() {
    let busy = Log {
        busy: Some(Duration::from_secs(35)),
        ..Log::default()
    };
    let gatekeeper = gateway(busy, 0, vec![]).await;
    let mut runner = runner(&gatekeeper.url, 0);
    long_record(&mut runner);
    runner.deliver(0).await;
    let log = gatekeeper.log.lock().unwrap();
    assert_eq!(log.connections, 1);
    assert_eq!(log.records.values().cloned().collect::<Vec<_>>(), runner.spooled());
}

#[tokio::test]
async fn a_connection_that_is_lost_in_the_middle_of_a_long_record_is_found_within_thirty_seconds() {
    let gatekeeper = gateway(Log::default(), 0, vec![]).await;
    let way = slow_way(&gatekeeper.url, Some(1 << 20));
    let mut runner = runner(&way.url, 0);
    long_record(&mut runner);
    let again = async {
        while way.came.lock().unwrap().len() < 2 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, again).await.expect("it comes again");
    let came = way.came.lock().unwrap().clone();
    // It was lost about three seconds after it began.
    assert!(came[1] - came[0] < Duration::from_secs(33), "{:?}", came[1] - came[0]);
}

/// How long after the loss the runner came again; `busy`: while it always has something to send.
async fn lost_on_the_way(busy: bool) -> Duration {
    let gatekeeper = gateway(Log::default(), 0, vec![]).await;
    let way = way(&gatekeeper.url).await;
    let mut runner = runner(&way.url, 10);
    runner.deliver(0).await;
    way.broken.send_replace(true);
    let lost = Instant::now();
    let again = async {
        while way.came.lock().unwrap().len() < 2 {
            if busy {
                let (delta, n) = (r#"{"type":"delta"}"#, lost.elapsed().as_millis());
                runner.uplink.delta(RawValue::from_string(delta.into()).unwrap());
                runner
                    .journal
                    .record(Kind::Cli, &serde_json::json!({ "n": n }))
                    .unwrap();
                tokio::task::yield_now().await;
            }
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(DEADLINE, again).await.expect("it comes again");
    let took = lost.elapsed();
    runner.deliver(0).await;
    let log = gatekeeper.log.lock().unwrap();
    assert_eq!(log.records.values().cloned().collect::<Vec<_>>(), runner.spooled());
    took
}

#[tokio::test]
async fn a_gateway_that_takes_nothing_slows_nobody_and_gets_everything_later() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/ws", listener.local_addr().unwrap());
    let (go, may_read) = watch::channel(false);
    let log = Arc::new(Mutex::new(Log::default()));
    let shared = Arc::clone(&log);
    let serving = tokio::spawn(async move {
        let mut dice = StdRng::seed_from_u64(7);
        while let Ok((stream, _)) = listener.accept().await {
            if *may_read.borrow() {
                serve(stream, &shared, &mut dice, 0, None).await;
                continue;
            }
            // Welcomes, and reads no more.
            let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
            let _hello = socket.next().await;
            let welcome = GatewayFrame::Welcome(Welcome {
                acked_seq: 0,
                spool: None,
            });
            let text = serde_json::to_string(&welcome).unwrap();
            socket.send(Message::Text(text.into())).await.unwrap();
            may_read.clone().wait_for(|may| *may).await.unwrap();
        }
    });
    let mut runner = runner(&url, 1);
    let line = serde_json::json!({ "type": "n", "text": "x".repeat(16 << 10) });
    // More than all buffers on the way take.
    let written = async {
        let mut last = 0;
        for _ in 0..2_000 {
            last = runner.journal.record(Kind::Cli, &line).unwrap();
            runner.journal.spool().room().await.unwrap();
        }
        runner.journal.spool().durable(last).await.unwrap();
    };
    timeout(DEADLINE, written)
        .await
        .expect("the spool takes it as if nobody listened");
    assert_eq!((runner.uplink.acked(), log.lock().unwrap().records.len()), (0, 0));
    go.send_replace(true);
    runner.deliver(0).await;
    let log = log.lock().unwrap();
    assert_eq!(log.records.values().cloned().collect::<Vec<_>>(), runner.spooled());
    serving.abort();
}

#[tokio::test]
async fn the_token_is_read_again_for_each_connection() {
    let gatekeeper = gateway(Log::default(), 0, vec![]).await;
    let mut runner = runner(&gatekeeper.url, 1);
    runner.deliver(0).await;
    std::fs::write(runner.dir.path().join("token"), "fake-token-2\n").unwrap();
    gatekeeper.log.lock().unwrap().deaf = 1;
    runner.deliver(1).await;
    let log = gatekeeper.log.lock().unwrap();
    assert_eq!(log.tokens.first().unwrap(), "Bearer fake-token");
    assert_eq!(log.tokens.last().unwrap(), "Bearer fake-token-2");
}

#[tokio::test]
async fn a_refusal_is_tried_again_and_a_session_that_is_gone_is_not() {
    let gatekeeper = gateway(
        Log::default(),
        0,
        vec![close::NOT_THIS_POD, close::SUPERSEDED, close::PROTOCOL],
    )
    .await;
    runner(&gatekeeper.url, 5).deliver(0).await;
    assert_eq!(gatekeeper.log.lock().unwrap().connections, 4);

    let gatekeeper = gateway(Log::default(), 0, vec![close::GONE]).await;
    let runner = runner(&gatekeeper.url, 5);
    let acked = timeout(DEADLINE, runner.uplink.acknowledged(5))
        .await
        .expect("it is known at once");
    assert!(!acked);
    assert_eq!(gatekeeper.log.lock().unwrap().connections, 1);
}

/// A record of another spool, as the gateway may hold it.
fn foreign(seq: u64) -> (u64, String) {
    let record = protocol::Record {
        seq,
        attempt: 1,
        turn: 0,
        ts: jiff::Timestamp::UNIX_EPOCH,
        kind: Kind::Log,
        was: None,
        body: RawValue::from_string("{}".to_owned()).unwrap(),
    };
    (seq, serde_json::to_string(&record).unwrap())
}

fn parsed(records: &BTreeMap<u64, String>) -> Vec<protocol::Record> {
    records
        .values()
        .map(|record| serde_json::from_str(record).unwrap())
        .collect()
}

#[tokio::test]
async fn a_log_of_a_lost_spool_is_gone_on_with_behind_a_gap() {
    let log = Log {
        spool: Some("lost".into()),
        records: (1..=8).map(foreign).collect(),
        // Welcomed again in the same way, the runner does not append everything a second time.
        deaf: 2,
        ..Log::default()
    };
    let gatekeeper = gateway(log, 3, vec![]).await;
    let mut runner = runner(&gatekeeper.url, 3);
    runner.deliver(2).await;
    let log = gatekeeper.log.lock().unwrap();
    let records = parsed(&log.records);
    assert!(
        records[..8].iter().all(|record| record.kind == Kind::Log),
        "the old records stay"
    );
    assert!(records[8..].iter().any(|record| record.kind == Kind::Gap));
    let was: Vec<u64> = records.iter().filter_map(|record| record.was).collect();
    assert!(was.starts_with(&[1, 2, 3]), "{was:?}");
    assert_eq!(log.acked(), *log.records.keys().last().unwrap(), "no hole is left");
    let bodies = |wanted: &str| {
        records
            .iter()
            .filter(|record| record.body.get().contains(wanted))
            .count()
    };
    assert_eq!((bodies("\"n\""), bodies("more")), (5, 2), "each once");
    let gaps = runner
        .spooled()
        .iter()
        .filter(|record| record.contains("\"kind\":\"gap\""))
        .count();
    assert_eq!(gaps, 1, "done once, though asked three times");
}

#[tokio::test]
async fn appending_a_long_spool_again_waits_for_the_disk_and_leaves_others_their_time() {
    let mut runner = runner("ws://127.0.0.1:1/", 0);
    let line = serde_json::json!({ "text": "x".repeat(1 << 20) });
    let mut last = 0;
    for _ in 0..4 {
        last = runner.journal.record(Kind::Cli, &line).unwrap();
    }
    runner.journal.spool().durable(last).await.unwrap();
    let (done, mut gap) = oneshot::channel();
    let mut turns = 0;
    {
        let again = runner
            .journal
            .append_again(Request::AppendAllAgain { after: 100, done });
        tokio::pin!(again);
        while futures::poll!(&mut again).is_pending() {
            turns += 1;
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(gap.try_recv(), Ok(101));
    assert!(turns >= 4, "{turns}");
}

#[tokio::test]
async fn a_log_that_ends_where_no_log_can_is_not_believed() {
    let log = Log {
        lies: vec![u64::MAX, u64::MAX - 1, 1 << 60],
        ..Log::default()
    };
    let gatekeeper = gateway(log, 0, vec![]).await;
    let mut runner = runner(&gatekeeper.url, 3);
    runner.deliver(2).await;
    let log = gatekeeper.log.lock().unwrap();
    assert!(log.lies.is_empty());
    assert!(log.records.keys().copied().eq(1..=5), "{:?}", log.records.keys());
    assert_eq!(log.records.values().cloned().collect::<Vec<_>>(), runner.spooled());
}

#[tokio::test]
async fn a_log_that_forgot_its_end_is_filled_again_from_there() {
    let mut first = runner("ws://127.0.0.1:1/", 20);
    let own = first.journal.spool().id().to_owned();
    let seq = first.journal.end(Outcome::Lost).unwrap();
    first.journal.spool().durable(seq).await.unwrap();
    let kept = first
        .spooled()
        .into_iter()
        .take(6)
        .enumerate()
        .map(|(at, record)| (at as u64 + 1, record));
    let log = Log {
        spool: Some(own),
        records: kept.collect(),
        ..Log::default()
    };
    let gatekeeper = gateway(log, 0, vec![]).await;
    let gateway = Gateway {
        url: gatekeeper.url.clone(),
        token_file: None,
    };
    let spool = first.journal.spool();
    first.uplink = Uplink::start(gateway, hello(spool.id()), spool.readers(), spool.progress(), None);
    first.deliver(0).await;
    let log = gatekeeper.log.lock().unwrap();
    assert_eq!(log.records.values().cloned().collect::<Vec<_>>(), first.spooled());
}

#[tokio::test]
async fn a_seq_that_is_taken_costs_a_new_one_once() {
    let mut first = runner("ws://127.0.0.1:1/", 4);
    let own = first.journal.spool().id().to_owned();
    // Somebody wrote seq 3 into the log of our spool, but not 1 and 2.
    let log = Log {
        spool: Some(own),
        records: [foreign(3)].into_iter().collect(),
        ..Log::default()
    };
    let gatekeeper = gateway(log, 0, vec![]).await;
    let gateway = Gateway {
        url: gatekeeper.url.clone(),
        token_file: None,
    };
    let spool = first.journal.spool();
    first.uplink = Uplink::start(gateway, hello(spool.id()), spool.readers(), spool.progress(), None);
    let settled = async {
        loop {
            tokio::select! {
                acked = first.uplink.acknowledged(5) => { assert!(acked); return; }
                Some(request) = first.uplink.request() => first.journal.append_again(request).await.unwrap(),
            }
        }
    };
    timeout(DEADLINE, settled)
        .await
        .expect("the record arrives under a new seq");
    let log = gatekeeper.log.lock().unwrap();
    let records = parsed(&log.records);
    assert_eq!(
        records
            .iter()
            .map(|record| (record.seq, record.was))
            .collect::<Vec<_>>(),
        [(1, None), (2, None), (3, None), (4, None), (5, Some(3)),]
    );
}
