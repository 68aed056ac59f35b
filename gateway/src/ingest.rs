//! The runner's WebSocket: records in, acknowledgements out once they are stored.

mod frames;
mod gate;
mod orders;
mod peer;
pub(crate) mod upgrade;

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Extension, Path, Request, State},
    response::Response,
};
use bytes::Bytes;
use protocol::frame::{self, Ack, GatewayFrame, Hello, MAX_CHUNK, Role, RunnerFrame, Welcome, close};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use frames::Frame;
use peer::Peer;

use crate::{
    Gateway,
    api::ApiError,
    auth::{
        self,
        runner::{self, Refusal},
    },
    files::{Attached, Reply},
    live::Channel,
    server::Place,
    sessions::{Target, View},
    store::{
        Admission, Admitted, Appended, Batch, Content, NewRecord, State as LogState, StoreError, StoredRecord,
        news::News,
    },
    watch::Seen,
};

/// Name of what runners speak, for one that asks for it.
const RECORDS: &str = "records.agentic.v1";
/// How long the first frame may take.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// How often the peer is asked whether it lives.
const PING_EVERY: Duration = Duration::from_secs(10);
/// Silence after which it does not: found within 30 s.
const SILENCE: Duration = Duration::from_secs(25);
/// Pods that may be admitted before this one while it tries.
const ADMISSION_TRIES: usize = 8;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Protocol(String),
    #[error("a newer pod writes this session")]
    Superseded,
    #[error("the session is gone")]
    Gone,
    #[error("the gateway is being stopped: connect again")]
    Shutdown,
    #[error("the records could not be stored: try again")]
    Store(#[from] StoreError),
    #[error("the peer left")]
    Left,
    #[error("the peer is silent")]
    Silent,
}

impl End {
    fn code(&self) -> u16 {
        match self {
            Self::Refused(refusal) => refusal.code(),
            Self::Protocol(_) => close::PROTOCOL,
            Self::Superseded => close::SUPERSEDED,
            Self::Gone => close::GONE,
            // RFC 6455: going away.
            Self::Shutdown => 1001,
            // RFC 6455: internal error.
            Self::Store(_) => 1011,
            Self::Left | Self::Silent => 1000,
        }
    }
}

/// `GET /api/projects/{project}/sessions/{session}/ws`. A refusal is an accepted upgrade followed by its close code.
pub async fn connect(
    State(gateway): State<Arc<Gateway>>,
    Path((project, session)): Path<(String, String)>,
    place: Option<Extension<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let token = auth::bearer(request.headers()).map(str::to_owned);
    let (response, upgrade) = upgrade::accept(request, RECORDS)?;
    let held = (gateway.tasks.token(), place);
    tokio::spawn(async move {
        let _held = held;
        let Ok(upgraded) = upgrade.await else { return };
        let connected = gateway.metrics.connected();
        let mut peer = Peer::new(upgraded, gate::Rooms::of(&gateway, &project)).await;
        let end = match Target::new(&project, &session) {
            Some(target) => serve(&gateway, &target, token.as_deref(), &mut peer).await,
            None => End::Gone,
        };
        drop(connected);
        gateway.metrics.closed(end.code());
        match &end {
            End::Store(cause) => tracing::error!(session, namespace = project, %cause, "runner disconnected"),
            end => {
                tracing::info!(session, namespace = project, code = end.code(), cause = %end.to_string().escape_debug(), "runner disconnected");
            }
        }
        peer.close(&end).await;
    });
    Ok(response)
}

async fn serve(gateway: &Gateway, target: &Target, token: Option<&str>, peer: &mut Peer) -> End {
    let mut connection = match admit(gateway, target, token, peer).await {
        Ok(connection) => connection,
        Err(end) => return end,
    };
    match connection.run(gateway, peer).await {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

/// A pod that is its session's writer.
struct Connection {
    session: String,
    pod: String,
    spool: String,
    state: LogState,
    channel: Arc<Channel>,
    seen: tokio::sync::watch::Receiver<Seen>,
    heard: Instant,
    /// It drives an agent.
    takes_orders: bool,
    /// Number of the last command that was sent.
    sent: u64,
}

async fn admit(gateway: &Gateway, target: &Target, token: Option<&str>, peer: &mut Peer) -> Result<Connection, End> {
    let named = gateway.watched.view(target).and_then(|view| view.pod);
    let pod = runner::pod(&gateway.client, token, named.as_deref()).await?;
    // Told before the hello, so that a pod whose time has not come need not wait for its own silence.
    runner::session(&gateway.sessions, target, &pod).await?;
    let hello = tokio::select! {
        hello = timeout(HELLO_WITHIN, peer.hello()) => hello.map_err(|_| End::Protocol("hello must be sent first".to_owned()))??,
        () = gateway.shutdown.cancelled() => return Err(End::Shutdown),
    };
    check(&hello, target, &pod)?;
    let (view, state) = become_writer(gateway, target, &pod, &hello.uid).await?;
    peer.admitted();
    let channel = gateway.live.channel(&view.uid);
    channel.admitted(state.epoch);
    tracing::info!(
        session = target.name(),
        namespace = target.namespace(),
        attempt = hello.attempt,
        acked = state.progress.acked,
        "runner connected"
    );
    Ok(Connection {
        session: hello.uid,
        pod,
        spool: hello.spool,
        channel,
        seen: gateway.watched.follow(target, view),
        state,
        heard: Instant::now(),
        takes_orders: hello.role == Role::Run,
        sent: 0,
    })
}

fn check(hello: &Hello, target: &Target, pod: &str) -> Result<(), End> {
    let wrong = |what: &str| Err(End::Protocol(format!("hello: {what}")));
    if hello.protocol != frame::VERSION {
        return wrong(&format!(
            "protocol {} is not spoken here, {} is",
            hello.protocol,
            frame::VERSION
        ));
    }
    if hello.name != target.name() {
        return wrong("name is not the session of this address");
    }
    if hello.pod_uid != pod {
        return wrong("podUid is not the pod of the token");
    }
    if !(1..=128).contains(&hello.spool.len()) || !hello.spool.bytes().all(|byte| byte.is_ascii_graphic()) {
        return wrong("spool must have 1 to 128 printable characters");
    }
    if !hello.uid.bytes().all(|byte| byte.is_ascii_graphic()) {
        return wrong("uid is not that of a session");
    }
    Ok(())
}

/// See [`Admission`] for the order of the steps.
async fn become_writer(gateway: &Gateway, target: &Target, pod: &str, uid: &str) -> Result<(View, LogState), End> {
    for _ in 0..ADMISSION_TRIES {
        let heard = gateway.live.known(uid).map_or(0, |channel| channel.newest());
        let seen = gateway.log.state(uid).await?.epoch;
        if seen < heard {
            tracing::warn!(session_uid = uid, seen, heard, "{}", crate::news::OLDER);
        }
        let view = runner::session(&gateway.sessions, target, pod).await?;
        if view.uid != uid {
            return Err(End::Gone);
        }
        let admission = Admission {
            session: uid.to_owned(),
            namespace: target.namespace().to_owned(),
            name: target.name().to_owned(),
            pod: pod.to_owned(),
            seen,
            heard,
        };
        if let Admitted::Writer(state) = gateway.log.admit(admission).await? {
            return Ok((view, state));
        }
    }
    Err(Refusal::NotThisPod.into())
}

impl Connection {
    async fn run(&mut self, gateway: &Gateway, peer: &mut Peer) -> Result<std::convert::Infallible, End> {
        peer.send(&GatewayFrame::Welcome(Welcome {
            acked_seq: self.state.progress.acked,
            spool: self.state.spool.clone(),
        }))
        .await?;
        let channel = self.channel.clone();
        let superseded = channel.superseded(self.state.epoch);
        tokio::pin!(superseded);
        // Asked for before the store is read: what is kept in between is told twice, and sent once.
        let mut commands = channel.commands();
        commands.mark_changed();
        let mut files = self
            .takes_orders
            .then(|| Attached::new(channel.clone(), self.state.epoch));
        let mut ping = interval(PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = gateway.shutdown.cancelled() => return Err(End::Shutdown),
                () = &mut superseded => return Err(End::Superseded),
                changed = self.seen.changed() => self.still_writer(changed.is_ok())?,
                _ = ping.tick() => {
                    let heard = peer.came().map_or(self.heard, |came| came.max(self.heard));
                    if (heard.elapsed() > SILENCE && !peer.is_held()) || peer.is_stuck() {
                        return Err(End::Silent);
                    }
                    peer.message(Message::Ping(Bytes::new())).await?;
                }
                _ = commands.changed(), if self.takes_orders => self.order(gateway, peer).await?,
                order = orders::next(&mut files) => peer.send(&order.frame).await?,
                message = peer.receive() => {
                    let message = message?;
                    self.heard = Instant::now();
                    if let Some(text) = message {
                        self.frame(gateway, peer, text).await?;
                        peer.handled().await?;
                        self.heard = Instant::now();
                    }
                }
            }
        }
    }

    /// What the watch says now. The pod of an ended run stays its writer until another is named.
    fn still_writer(&mut self, watched: bool) -> Result<(), End> {
        match &*self.seen.borrow_and_update() {
            Some(view) if view.uid == self.session => match &view.pod {
                Some(pod) if *pod != self.pod => Err(End::Superseded),
                _ if watched => Ok(()),
                _ => Err(End::Gone),
            },
            _ => Err(End::Gone),
        }
    }

    async fn frame(&mut self, gateway: &Gateway, peer: &mut Peer, text: Utf8Bytes) -> Result<(), End> {
        let frame = match frames::parse(&text)? {
            Frame::Records(records) => {
                drop(text);
                return self.records(gateway, peer, records).await;
            }
            Frame::Other(frame) => frame,
        };
        match frame {
            // Live readers can do without it: the whole record follows.
            RunnerFrame::Delta(delta) if delta.get().len() > MAX_CHUNK => Ok(()),
            RunnerFrame::Delta(delta) => {
                let delta = Bytes::from(Box::<str>::from(delta).into_boxed_bytes());
                let session = self.session.clone();
                self.channel.delta(delta.clone());
                gateway.log.tell(News::Delta { session, delta });
                Ok(())
            }
            RunnerFrame::Hello(_) => Err(End::Protocol("hello may be sent only once".to_owned())),
            RunnerFrame::CommandResult(result) => self.answered(gateway, result).await,
            // What waits for readers, who may be slow, is bounded by number alone.
            RunnerFrame::FileChunk(chunk) if chunk.data.len() > MAX_CHUNK.div_ceil(3) * 4 => Err(End::Protocol(
                format!("a piece of a file has at most {MAX_CHUNK} bytes"),
            )),
            RunnerFrame::FileChunk(chunk) => {
                // Nobody: the client has left.
                self.channel.files.reply(Reply::Chunk(chunk));
                Ok(())
            }
            RunnerFrame::Records(_) => Err(End::Protocol("records must be the frame's first key".to_owned())),
        }
    }

    async fn records(&mut self, gateway: &Gateway, peer: &mut Peer, records: Vec<NewRecord>) -> Result<(), End> {
        let mut more = self.store(gateway, peer, records).await?;
        // What a record let the log go on over is passed piece by piece, so that other sessions have their turn.
        while more {
            more = self.store(gateway, peer, Vec::new()).await?;
        }
        Ok(())
    }

    async fn store(&mut self, gateway: &Gateway, peer: &mut Peer, records: Vec<NewRecord>) -> Result<bool, End> {
        let length = records.iter().map(|record| record.bytes.len()).sum();
        let begun = Instant::now();
        let batch = Batch {
            session: self.session.clone(),
            epoch: self.state.epoch,
            spool: self.spool.clone(),
            answers: orders::answers(&records),
            records: records.clone(),
        };
        let appended = gateway.log.append(batch).await;
        gateway.metrics.log_is_full(gateway.log.is_full());
        let Appended::Stored(receipt) = appended? else {
            return Err(End::Superseded);
        };
        gateway.metrics.stored(&receipt, length, begun.elapsed());
        // Before anything that can fail: readers must hear of what is stored.
        let stored = || published(records, &receipt.conflicts);
        self.channel.stored(stored, length, receipt.progress);
        for &seq in &receipt.conflicts {
            tracing::warn!(
                session_uid = self.session,
                seq,
                "a record with other bytes is stored already"
            );
            peer.send(&GatewayFrame::Conflict(Ack { seq })).await?;
        }
        let seq = receipt.progress.acked;
        peer.send(&GatewayFrame::Ack(Ack { seq })).await?;
        Ok(receipt.more)
    }
}

fn published(records: Vec<NewRecord>, conflicts: &[u64]) -> Vec<StoredRecord> {
    records
        .into_iter()
        .filter(|record| !conflicts.contains(&record.head.seq))
        .map(|record| StoredRecord {
            seq: record.head.seq,
            kind: record.head.kind,
            content: Content::Whole(record.bytes),
        })
        .collect()
}
