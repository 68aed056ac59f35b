//! Gateways and ways to them that break.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{Ack, GatewayFrame, RunnerFrame, Welcome};
use protocol::record::GapBody;
use protocol::{Kind, RecordHead};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, sleep_until};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};

/// A gateway that stores, and breaks in all the ways a network does.
#[derive(Default)]
pub(super) struct Log {
    pub(super) spool: Option<String>,
    pub(super) records: BTreeMap<u64, String>,
    /// Seqs that came again with other bytes.
    pub(super) conflicts: Vec<u64>,
    pub(super) tokens: Vec<String>,
    pub(super) connections: u32,
    /// So many connections are cut when their first records come.
    pub(super) deaf: u32,
    /// Ends of the log that are told instead of its own, each once, as those of another spool.
    pub(super) lies: Vec<u64>,
    /// For so long the first connection reads nothing behind its hello, and only says that it is there: as a gateway does where
    /// a long record waits for its turn.
    pub(super) busy: Option<Duration>,
}

impl Log {
    /// Last seq without a hole before it; a gap covers what it says.
    pub(super) fn acked(&self) -> u64 {
        let (mut acked, mut covered) = (0, 0);
        for (&seq, record) in &self.records {
            let head: RecordHead = serde_json::from_str(record).unwrap();
            if head.kind == Kind::Gap {
                let record: protocol::Record = serde_json::from_str(record).unwrap();
                let gap: GapBody = serde_json::from_str(record.body.get()).unwrap();
                if gap.from == Some(acked + 1) {
                    covered = gap.to.unwrap_or(0);
                }
            }
            if seq != acked.max(covered) + 1 {
                break;
            }
            acked = seq;
        }
        acked
    }

    pub(super) fn store(&mut self, spool: &str, record: String) {
        let head: RecordHead = serde_json::from_str(&record).unwrap();
        self.spool = Some(spool.to_owned());
        match self.records.get(&head.seq) {
            None => {
                self.records.insert(head.seq, record);
            }
            Some(stored) if *stored == record => {}
            Some(_) => self.conflicts.push(head.seq),
        }
    }
}

pub(super) struct Gatekeeper {
    pub(super) url: String,
    pub(super) log: Arc<Mutex<Log>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Gatekeeper {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// `breaks`: the chance, in percent, that a connection is cut at each of its steps.
pub(super) async fn gateway(log: Log, breaks: u32, refusals: Vec<u16>) -> Gatekeeper {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/ws", listener.local_addr().unwrap());
    let log = Arc::new(Mutex::new(log));
    let shared = Arc::clone(&log);
    let serving = tokio::spawn(async move {
        let mut dice = StdRng::seed_from_u64(7);
        let mut refusals = refusals.into_iter();
        while let Ok((stream, _)) = listener.accept().await {
            // One at a time: a runner has one connection.
            serve(stream, &shared, &mut dice, breaks, refusals.next()).await;
        }
    });
    Gatekeeper { url, log, serving }
}

pub(super) async fn serve(
    stream: tokio::net::TcpStream,
    log: &Mutex<Log>,
    dice: &mut StdRng,
    breaks: u32,
    refusal: Option<u16>,
) -> Option<()> {
    let mut token = String::new();
    #[allow(clippy::result_large_err, reason = "the signature is the library's")]
    let see = |request: &tokio_tungstenite::tungstenite::handshake::server::Request, response| {
        let value = request
            .headers()
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        token = value.unwrap_or_default().to_owned();
        Ok(response)
    };
    let mut socket = tokio_tungstenite::accept_hdr_async(stream, see).await.ok()?;
    {
        let mut log = log.lock().unwrap();
        log.connections += 1;
        log.tokens.push(token);
    }
    if let Some(code) = refusal {
        let frame = CloseFrame {
            code: CloseCode::from(code),
            reason: "".into(),
        };
        let _ = socket.close(Some(frame)).await;
        while socket.next().await.is_some_and(|message| message.is_ok()) {}
        return None;
    }
    let mut spool = String::new();
    let mut cut = || dice.random_ratio(breaks, 100);
    while let Some(Ok(message)) = socket.next().await {
        let Message::Text(text) = message else { continue };
        if cut() {
            return None;
        }
        let answers = match serde_json::from_str(&text).unwrap() {
            RunnerFrame::Hello(hello) => {
                spool = hello.spool;
                let mut log = log.lock().unwrap();
                let lie = log.lies.pop();
                vec![GatewayFrame::Welcome(Welcome {
                    acked_seq: lie.unwrap_or_else(|| log.acked()),
                    spool: lie.map(|_| "other".to_owned()).or_else(|| log.spool.clone()),
                })]
            }
            RunnerFrame::Records(records) => {
                let mut log = log.lock().unwrap();
                if log.deaf > 0 {
                    log.deaf -= 1;
                    return None;
                }
                for record in records {
                    if cut() {
                        return None;
                    }
                    log.store(&spool, record.get().to_owned());
                }
                let conflicts = std::mem::take(&mut log.conflicts);
                let mut answers: Vec<_> = conflicts
                    .into_iter()
                    .map(|seq| GatewayFrame::Conflict(Ack { seq }))
                    .collect();
                answers.push(GatewayFrame::Ack(Ack { seq: log.acked() }));
                answers
            }
            _ => vec![],
        };
        for answer in answers {
            if cut() {
                return None;
            }
            socket
                .send(Message::Text(serde_json::to_string(&answer).unwrap().into()))
                .await
                .ok()?;
        }
        let busy = log.lock().unwrap().busy.take();
        let until = Instant::now() + busy.unwrap_or_default();
        while Instant::now() < until {
            sleep(Duration::from_secs(10)).await;
            socket.send(Message::Ping(vec![].into())).await.ok()?;
        }
    }
    None
}

/// A way to the gateway on which, from a moment on, everything that is sent is lost, but nothing is said of it. Who comes
/// later gets through.
pub(super) struct Way {
    pub(super) url: String,
    /// True: what is under way is lost.
    pub(super) broken: watch::Sender<bool>,
    /// When somebody came.
    pub(super) came: Arc<Mutex<Vec<Instant>>>,
}

pub(super) async fn way(to: &str) -> Way {
    let to = to.trim_start_matches("ws://").split('/').next().unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/ws", listener.local_addr().unwrap());
    let (broken, is_broken) = watch::channel(false);
    let came = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&came);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let whole = *is_broken.borrow();
            shared.lock().unwrap().push(Instant::now());
            let (to, mut broken) = (to.clone(), is_broken.clone());
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
                let pass = tokio::io::copy_bidirectional(&mut near, &mut far);
                tokio::select! {
                    _ = pass => return,
                    _ = broken.wait_for(|broken| *broken && !whole) => {}
                }
                // Taken, and lost.
                let mut lost = tokio::io::sink();
                let _ = tokio::io::copy(&mut near, &mut lost).await;
            });
        }
    });
    Way { url, broken, came }
}

/// Bytes a second on a slow way.
const SLOW: usize = 400 << 10;

/// A slow way to the gateway. `stalls`: after so many bytes the first connection passes nothing more, and nothing is said of it.
pub(super) fn slow_way(to: &str, stalls: Option<usize>) -> Way {
    let to = to.trim_start_matches("ws://").split('/').next().unwrap().to_owned();
    let socket = TcpSocket::new_v4().unwrap();
    // What is buffered on the way shows nothing of how slow it is.
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(8).unwrap();
    let url = format!("ws://{}/ws", listener.local_addr().unwrap());
    let came = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&came);
    tokio::spawn(async move {
        let mut stalls = stalls;
        while let Ok((near, _)) = listener.accept().await {
            shared.lock().unwrap().push(Instant::now());
            let (to, mut left) = (to.clone(), stalls.take());
            tokio::spawn(async move {
                let far = tokio::net::TcpStream::connect(to).await.unwrap();
                let (mut from_near, mut to_near) = near.into_split();
                let (mut from_far, mut to_far) = far.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from_far, &mut to_near).await });
                let mut piece = vec![0; SLOW / 20];
                let (begun, mut passed) = (Instant::now(), 0);
                while let Ok(count @ 1..) = from_near.read(&mut piece).await {
                    if let Some(left) = &mut left {
                        *left = left.saturating_sub(count);
                        if *left == 0 {
                            std::future::pending::<()>().await;
                        }
                    }
                    if to_far.write_all(&piece[..count]).await.is_err() {
                        return;
                    }
                    passed += count;
                    sleep_until(begun + Duration::from_secs_f64(passed as f64 / SLOW as f64)).await;
                }
            });
        }
    });
    let (broken, _) = watch::channel(false);
    Way { url, broken, came }
}
