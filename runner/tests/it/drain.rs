//! `runner drain`: what a dead attempt left is delivered, once.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{Ack, GatewayFrame, Hello, Role, RunnerFrame, Welcome};
use protocol::record::EndBody;
use protocol::report::Delivery;
use protocol::{Kind, Outcome, Record, Report};
use runner::config::Gateway;
use runner::drain::{DrainConfig, drain};
use runner::spool::{Spool, raw};
use runner::workspace::Guard;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Duration;
use tokio_tungstenite::tungstenite::Message;

const UID: &str = "6fa459ea-ee8a-3ca4-894e-db77e160355e";

#[derive(Default)]
struct Kept {
    records: Vec<String>,
    hellos: Vec<Hello>,
}

/// A gateway that keeps everything up to seq `deaf`.
async fn gateway(deaf: u64) -> (Gateway, Arc<Mutex<Kept>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let kept = Arc::new(Mutex::new(Kept::default()));
    let shared = Arc::clone(&kept);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
            while let Some(Ok(message)) = socket.next().await {
                let Message::Text(text) = message else { continue };
                let answer = answer(&mut shared.lock().unwrap(), &text, deaf);
                let text = serde_json::to_string(&answer).unwrap();
                socket.send(Message::Text(text.into())).await.unwrap();
            }
        }
    });
    let gateway = Gateway { url, token_file: None };
    (gateway, kept)
}

fn answer(kept: &mut Kept, text: &str, deaf: u64) -> GatewayFrame {
    match serde_json::from_str(text).unwrap() {
        RunnerFrame::Hello(hello) => {
            let spool = kept.hellos.last().map(|hello| hello.spool.clone());
            kept.hellos.push(hello);
            GatewayFrame::Welcome(Welcome {
                acked_seq: kept.records.len() as u64,
                spool,
            })
        }
        RunnerFrame::Records(records) => {
            kept.records
                .extend(records.iter().map(|record| record.get().to_owned()));
            let seq = (kept.records.len() as u64).min(deaf);
            GatewayFrame::Ack(Ack { seq })
        }
        other => panic!("nothing that a drain says: {other:?}"),
    }
}

/// What an attempt leaves that dies after `records` records.
pub fn left_behind(folder: &Path, attempt: u32, records: u32) {
    let mut spool = Spool::open(&folder.join("spool"), |_| ()).unwrap();
    for n in 0..records {
        let body = raw(Kind::Cli, &serde_json::json!({ "type": "assistant", "n": n })).unwrap();
        spool.append(attempt, 1, Kind::Cli, body).unwrap();
    }
}

struct Claim {
    dir: tempfile::TempDir,
}

impl Claim {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn config(&self, gateway: Gateway) -> DrainConfig {
        DrainConfig {
            uid: UID.into(),
            name: "hello".into(),
            pod_uid: "drain-pod".into(),
            attempt: 2,
            gateway,
            state: self.state(),
            report: self.dir.path().join("report"),
            patience: Duration::from_secs(20),
        }
    }

    fn report(&self) -> Report {
        Report::from_message(&std::fs::read_to_string(self.dir.path().join("report")).unwrap()).unwrap()
    }

    async fn drain(&self, config: DrainConfig) -> Outcome {
        let (_stop, told) = watch::channel(false);
        let outcome = drain(&config, told).await;
        assert_eq!(self.report().outcome, outcome);
        outcome
    }

    /// Drains that run out of patience, one more patient than the other, until one has come so far: to this last record, and this
    /// acknowledgement. How long that takes is the machine's affair.
    async fn left_undelivered(&self, gateway: &Gateway, far: (u64, u64)) -> Report {
        for millis in [300, 3_000, 20_000] {
            let config = DrainConfig {
                patience: Duration::from_millis(millis),
                ..self.config(gateway.clone())
            };
            assert_eq!(self.drain(config).await, Outcome::Undelivered);
            let report = self.report();
            if (report.last_seq, report.acked_seq) == far {
                return report;
            }
        }
        panic!("not as far as {far:?}: {:?}", self.report());
    }
}

#[tokio::test]
async fn the_records_of_a_dead_attempt_are_closed_and_delivered_once() {
    let claim = Claim::new();
    left_behind(&claim.state(), 2, 40);
    let (gateway, kept) = gateway(u64::MAX).await;
    assert_eq!(claim.drain(claim.config(gateway.clone())).await, Outcome::Succeeded);
    let report = claim.report();
    assert_eq!(
        (report.last_seq, report.acked_seq, report.events, report.attempt),
        (41, 41, Delivery::Delivered, 2)
    );
    // Again, because the first one's report was lost: nothing more is written.
    assert_eq!(claim.drain(claim.config(gateway)).await, Outcome::Succeeded);
    assert_eq!(claim.report().last_seq, 41);
    let kept = kept.lock().unwrap();
    assert!(
        kept.hellos
            .iter()
            .all(|hello| hello.role == Role::Drain && hello.attempt == 2)
    );
    let records: Vec<Record> = kept
        .records
        .iter()
        .map(|text| serde_json::from_str(text).unwrap())
        .collect();
    assert!(records.iter().map(|record| record.seq).eq(1..=41));
    let end: EndBody = serde_json::from_str(records[40].body.get()).unwrap();
    assert_eq!((end.outcome, end.last_seq), (Outcome::Lost, 40));
    let bytes = kept.records[..40].concat();
    assert_eq!(end.sha256, hex::encode(Sha256::digest(&bytes)));
    assert_eq!(end.bytes, bytes.len() as u64);
}

#[tokio::test]
async fn a_gateway_that_does_not_answer_leaves_the_records_for_the_next_drain() {
    let claim = Claim::new();
    left_behind(&claim.state(), 2, 5);
    let nobody = Gateway {
        url: "ws://127.0.0.1:1/".into(),
        token_file: None,
    };
    let report = claim.left_undelivered(&nobody, (6, 0)).await;
    assert_eq!(report.events, Delivery::Failed);
    assert!(report.message.contains("failed to deliver"), "{}", report.message);
    assert_eq!(report.outcome.exit_code(), 75);

    let (half, _) = gateway(3).await;
    claim.left_undelivered(&half, (6, 3)).await;

    let (whole, kept) = gateway(u64::MAX).await;
    assert_eq!(claim.drain(claim.config(whole)).await, Outcome::Succeeded);
    assert_eq!(kept.lock().unwrap().records.len(), 6);
}

/// Has the records in this folder come as from a slow volume: a twelfth of them every `pause`.
pub fn slow_volume(folder: &Path, pause: Duration) -> std::thread::JoinHandle<()> {
    let spool = folder.join("spool");
    let (segment, read) = (spool.join(format!("{:020}.spool", 1)), spool.join("read"));
    std::fs::rename(&segment, &read).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&segment)
            .status()
            .unwrap()
            .success()
    );
    std::thread::spawn(move || {
        let bytes = std::fs::read(&read).unwrap();
        let mut pipe = std::fs::File::options().write(true).open(&segment).unwrap();
        // Whoever writes to the spool next finds a file.
        std::fs::rename(&read, &segment).unwrap();
        for piece in bytes.chunks(bytes.len() / 12) {
            // Whoever reads it may have been told to stop.
            if std::io::Write::write_all(&mut pipe, piece).is_err() {
                return;
            }
            std::thread::sleep(pause);
        }
    })
}

/// As many as a volume gives in a minute that is slower than the lease is long.
#[tokio::test]
async fn records_that_take_longer_to_read_than_the_lease_holds_are_delivered_all_the_same() {
    let claim = Claim::new();
    left_behind(&claim.state(), 2, 12);
    let slow = slow_volume(&claim.state(), Duration::from_secs(3));
    let (gateway, kept) = gateway(u64::MAX).await;
    let config = DrainConfig {
        patience: Duration::from_mins(2),
        ..claim.config(gateway)
    };
    assert_eq!(claim.drain(config).await, Outcome::Succeeded);
    slow.join().unwrap();
    assert_eq!(kept.lock().unwrap().records.len(), 13);
}

#[tokio::test]
async fn a_claim_with_a_newer_attempt_is_left_alone() {
    let claim = Claim::new();
    std::fs::create_dir_all(claim.state()).unwrap();
    Guard::take(&claim.state(), 3, "agent-pod")
        .await
        .unwrap()
        .release()
        .unwrap();
    left_behind(&claim.state(), 3, 5);
    let (gateway, kept) = gateway(u64::MAX).await;
    assert_eq!(claim.drain(claim.config(gateway)).await, Outcome::Superseded);
    assert!(kept.lock().unwrap().hellos.is_empty());
    let mut records = 0;
    Spool::open(&claim.state().join("spool"), |_| records += 1).unwrap();
    assert_eq!(records, 5, "no end was written");
}

#[tokio::test]
async fn an_attempt_that_left_nothing_is_delivered_at_once() {
    let claim = Claim::new();
    let (gateway, kept) = gateway(u64::MAX).await;
    assert_eq!(claim.drain(claim.config(gateway)).await, Outcome::Succeeded);
    assert_eq!(
        (claim.report().last_seq, claim.report().events),
        (0, Delivery::Delivered)
    );
    assert!(kept.lock().unwrap().hellos.is_empty());
}

#[tokio::test]
async fn told_to_stop_it_says_how_far_it_came() {
    let claim = Claim::new();
    left_behind(&claim.state(), 2, 5);
    let (gateway, kept) = gateway(2).await;
    let (stop, told) = watch::channel(false);
    let config = claim.config(gateway);
    let draining = tokio::spawn(async move { drain(&config, told).await });
    crate::common::eventually("records arrive", || !kept.lock().unwrap().records.is_empty()).await;
    stop.send_replace(true);
    assert_eq!(draining.await.unwrap(), Outcome::Undelivered);
    assert_eq!(claim.report().last_seq, 6);
    assert!(claim.report().message.contains("told to stop"));
}
