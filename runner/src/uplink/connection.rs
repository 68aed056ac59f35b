//! One connection to the gateway.

use futures::{FutureExt as _, SinkExt as _, StreamExt as _};
use protocol::frame::{
    Ack, EndSession, GatewayFrame, Hello, Interrupt, MAX_BATCH, MAX_MESSAGE, PermissionResponse, RunnerFrame,
    UserMessage, Welcome,
};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout, timeout_at};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::error::UrlError;
use tokio_tungstenite::tungstenite::http::header::AUTHORIZATION;
use tokio_tungstenite::tungstenite::http::{HeaderValue, Request as HttpRequest};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, client_async_tls_with_config};

use super::line::{Line, Taken};
use super::{Link, Request};
use crate::command::{Command, Order};
use crate::files::Files;
use crate::spool::{Reader, SpoolError};

/// How long connecting and being welcomed may take.
const OPENING: Duration = Duration::from_secs(15);
/// How long a frame may take to begin to leave, though nothing is heard meanwhile.
const SENDING: Duration = Duration::from_secs(10);
/// How often it is looked whether something has come, while a frame leaves.
const LOOK: Duration = Duration::from_secs(5);
/// How often the other end is asked whether it is there.
const PING: Duration = Duration::from_secs(10);
/// Silence after which it is not, unless it still takes of what it is sent: found within 30 s.
const SILENCE: Duration = Duration::from_secs(20);

/// Greatest seq that a log is believed to end at: behind a greater one there would be no room for records, and readers of JSON
/// would not tell their numbers apart.
const MAX_ACKED: u64 = 1 << 53;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("failed to read the gateway's token")]
    Token(#[source] std::io::Error),
    #[error("failed to use WEBSOCKET_URL: {0}")]
    Address(tungstenite::Error),
    #[error("{0}")]
    Socket(#[from] tungstenite::Error),
    #[error("failed to connect: {0}")]
    Connect(#[from] std::io::Error),
    #[error("the gateway does not answer")]
    Silent,
    #[error("closed with {0}")]
    Closed(u16),
    #[error("the gateway broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("{0}")]
    Spool(#[from] SpoolError),
    /// The runner itself is ending.
    #[error("the runner is ending")]
    Owner,
}

type Socket = WebSocketStream<MaybeTlsStream<Line>>;

/// See the module.
pub(super) struct Connection<'a> {
    link: &'a mut Link,
    socket: Socket,
    heard: Instant,
    taken: Taken,
    ping: Interval,
    files: Files,
}

impl<'a> Connection<'a> {
    /// Connects; the token is read anew each time, because the kubelet renews it.
    pub(super) async fn open(link: &'a mut Link) -> Result<Self, Lost> {
        let request = upgrade(link)?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        let connect = async {
            let (host, port) = address(&request)?;
            let stream = Line::open(&host, port).await?;
            let taken = stream.taken();
            let (socket, _) = client_async_tls_with_config(request, stream, Some(config), None).await?;
            Ok::<_, Lost>((socket, taken))
        };
        let (socket, taken) = timeout(OPENING, connect).await.map_err(|_| Lost::Silent)??;
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            files: Files::new(link.files.clone()),
            link,
            socket,
            heard: Instant::now(),
            taken,
            ping,
        })
    }

    /// Serves until the connection is lost.
    pub(super) async fn serve(&mut self, welcomed: &mut bool) -> Lost {
        match self.try_serve(welcomed).await {
            Ok(never) => match never {},
            Err(lost) => lost,
        }
    }

    async fn try_serve(&mut self, welcomed: &mut bool) -> Result<std::convert::Infallible, Lost> {
        let next_seq = self.link.progress.borrow().durable + 1;
        let hello = Hello {
            next_seq,
            cli_version: self.link.cli_version.borrow().clone(),
            ..self.link.hello.clone()
        };
        self.send(&RunnerFrame::Hello(hello)).await?;
        crate::kill_point::pass("hello");
        let welcome = timeout(OPENING, self.welcome()).await.map_err(|_| Lost::Silent)??;
        *welcomed = true;
        let mut reader = self.place(&welcome).await?;
        // What was said while there was no connection is in the records by now.
        while self.link.deltas.try_recv().is_ok() {}
        loop {
            let durable = self.link.progress.borrow_and_update().durable;
            let batch = reader.read(durable, MAX_BATCH)?;
            if batch.is_empty() {
                self.wait().await?;
                continue;
            }
            let records = batch.into_iter().map(|stored| stored.bytes).collect();
            self.send(&RunnerFrame::Records(records)).await?;
            crate::kill_point::pass("records");
            while let Some(message) = self.socket.next().now_or_never() {
                self.take(message).await?;
            }
            self.is_it_there().await?;
        }
    }

    /// What [`Self::wait`] does of itself, for a time in which there is much to say.
    async fn is_it_there(&mut self) -> Result<(), Lost> {
        if self.silent_at() < Instant::now() {
            return Err(Lost::Silent);
        }
        match self.ping.tick().now_or_never() {
            Some(_) => self.message(Message::Ping(tungstenite::Bytes::new())).await,
            None => Ok(()),
        }
    }

    /// Waits for something to happen in either direction.
    async fn wait(&mut self) -> Result<(), Lost> {
        let silent_at = self.silent_at();
        tokio::select! {
            // In this order: files are never ahead of records.
            biased;
            message = self.socket.next() => self.take(message).await,
            () = sleep_until(silent_at) => Err(Lost::Silent),
            _ = self.ping.tick() => self.message(Message::Ping(tungstenite::Bytes::new())).await,
            changed = self.link.progress.changed() => changed.map_err(|_| Lost::Owner),
            Some(result) = self.link.results.1.recv() => {
                self.send(&RunnerFrame::CommandResult(result)).await?;
                crate::kill_point::pass("answered");
                Ok(())
            }
            Some(delta) = self.link.deltas.recv() => self.send(&RunnerFrame::Delta(delta)).await,
            frame = self.files.next() => self.send(&frame).await,
        }
    }

    async fn welcome(&mut self) -> Result<Welcome, Lost> {
        loop {
            let message = self.socket.next().await;
            match self.text(message)? {
                None => {}
                Some(text) => match serde_json::from_str(&text) {
                    Ok(GatewayFrame::Welcome(welcome)) => return Ok(welcome),
                    _ => return Err(Lost::Protocol("something else than a welcome")),
                },
            }
        }
    }

    /// Where to send from. What the gateway says replaces what we remember, also downwards.
    async fn place(&mut self, welcome: &Welcome) -> Result<Reader, Lost> {
        let Welcome {
            acked_seq: after,
            spool,
        } = welcome;
        if *after > MAX_ACKED {
            return Err(Lost::Protocol("its log ends behind all that can be written"));
        }
        let ours = match spool {
            Some(spool) => *spool == self.link.hello.spool,
            None => *after == 0,
        };
        let durable = self.link.progress.borrow().durable;
        if ours && *after <= durable {
            self.acked(*after);
            return Ok((self.link.open)(after + 1));
        }
        self.acked(0);
        let gap = match self.link.appended_again {
            Some((behind, gap)) if behind == *after => gap,
            _ => self.append_all_again(*after).await?,
        };
        Ok((self.link.open)(gap))
    }

    async fn append_all_again(&mut self, after: u64) -> Result<u64, Lost> {
        tracing::warn!(
            after,
            "the gateway's log holds nothing of this spool; all records are appended again behind it"
        );
        let (done, gap) = oneshot::channel();
        let request = Request::AppendAllAgain { after, done };
        self.link.requests.send(request).await.map_err(|_| Lost::Owner)?;
        let gap = gap.await.map_err(|_| Lost::Owner)?;
        self.link.appended_again = Some((after, gap));
        Ok(gap)
    }

    fn acked(&self, acked: u64) {
        self.link
            .status
            .send_if_modified(|status| std::mem::replace(&mut status.acked, acked) != acked);
    }

    /// Takes what came.
    async fn take(&mut self, message: Option<Result<Message, tungstenite::Error>>) -> Result<(), Lost> {
        let Some(text) = self.text(message)? else { return Ok(()) };
        match serde_json::from_str(&text) {
            Ok(frame) => self.frame(frame).await,
            Err(error) => {
                tracing::warn!(%error, "a frame of the gateway was not understood");
                Ok(())
            }
        }
    }

    fn text(&mut self, message: Option<Result<Message, tungstenite::Error>>) -> Result<Option<Utf8Bytes>, Lost> {
        self.heard = Instant::now();
        match message {
            Some(Ok(Message::Text(text))) => Ok(Some(text)),
            Some(Ok(Message::Close(frame))) => Err(Lost::Closed(frame.map_or(1005, |frame| frame.code.into()))),
            Some(Ok(_)) => Ok(None),
            Some(Err(error)) => Err(error.into()),
            None => Err(Lost::Closed(1006)),
        }
    }

    async fn frame(&mut self, frame: GatewayFrame) -> Result<(), Lost> {
        match frame {
            GatewayFrame::Ack(Ack { seq }) => {
                if seq > self.link.progress.borrow().durable {
                    return Err(Lost::Protocol("an acknowledgement of what was not sent"));
                }
                self.acked(seq);
                crate::kill_point::pass("acked");
                Ok(())
            }
            GatewayFrame::Conflict(Ack { seq }) => self.conflict(seq).await,
            GatewayFrame::Welcome(_) => Err(Lost::Protocol("a second welcome")),
            GatewayFrame::UserMessage(UserMessage { id, text }) => self.command(id, Order::UserMessage(text)),
            GatewayFrame::Interrupt(Interrupt { id, turn }) => self.command(id, Order::Interrupt(turn)),
            GatewayFrame::EndSession(EndSession { id }) => self.command(id, Order::EndSession),
            GatewayFrame::PermissionResponse(PermissionResponse {
                id,
                request_id,
                response,
            }) => {
                let response = response.get().to_owned();
                self.command(id, Order::PermissionResponse { request_id, response })
            }
            GatewayFrame::FileRequest(request) => match self.files.request(request) {
                Some(refusal) => self.send(&refusal).await,
                None => Ok(()),
            },
            GatewayFrame::FileChunk(chunk) => {
                self.files.chunk(chunk).await;
                Ok(())
            }
        }
    }

    /// Hands a command on. Its answer comes back when its effect is on disk, over this connection or a later one.
    fn command(&self, id: String, order: Order) -> Result<(), Lost> {
        let answer = self.link.results.0.clone();
        let command = Request::Command(Command { id, order, answer });
        match self.link.requests.try_send(command) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(Lost::Owner),
            // The gateway asks again on the next connection, and what was carried out is known by then.
            Err(TrySendError::Full(_)) => Err(Lost::Protocol("more commands than the session can take at once")),
        }
    }

    /// Another record has this seq in the gateway's log: ours gets a new one, once.
    async fn conflict(&mut self, seq: u64) -> Result<(), Lost> {
        let Some(record) = (self.link.open)(seq).record(seq)? else {
            return Ok(());
        };
        if record.was.is_some() {
            tracing::error!(
                seq,
                "a record that was appended again is refused again; it stays in the spool"
            );
            return Ok(());
        }
        tracing::warn!(
            seq,
            "another record has this seq in the gateway's log; ours is appended again"
        );
        self.link
            .requests
            .send(Request::AppendAgain(Box::new(record)))
            .await
            .map_err(|_| Lost::Owner)
    }

    async fn send(&mut self, frame: &RunnerFrame) -> Result<(), Lost> {
        let text = serde_json::to_string(frame).map_err(|_| Lost::Protocol("a frame that cannot be written"))?;
        self.message(Message::Text(text.into())).await
    }

    /// Sends, for as long as it gets on.
    async fn message(&mut self, message: Message) -> Result<(), Lost> {
        let (heard, taken, begun) = (self.heard, self.taken.clone(), Instant::now());
        let until = || silent_at(heard, &taken).max(begun + SENDING);
        let sending = self.socket.send(message);
        tokio::pin!(sending);
        loop {
            // What has come shows when the connection is written to.
            let look = Instant::now() + LOOK;
            match timeout_at(look.min(until()), &mut sending).await {
                Ok(sent) => return sent.map_err(Lost::from),
                Err(_) if Instant::now() < until() => {}
                Err(_) => return Err(Lost::Silent),
            }
        }
    }

    fn silent_at(&self) -> Instant {
        silent_at(self.heard, &self.taken)
    }
}

/// When the other end is given up, if nothing comes from it and nothing is taken.
fn silent_at(heard: Instant, taken: &Taken) -> Instant {
    heard.max(taken.at()) + SILENCE
}

/// Host and port of the gateway.
fn address(request: &HttpRequest<()>) -> Result<(String, u16), Lost> {
    let uri = request.uri();
    let usual = match uri.scheme_str() {
        Some("wss") => Some(443),
        Some("ws") => Some(80),
        _ => None,
    };
    let unusable = |error| Lost::Address(tungstenite::Error::Url(error));
    let port = uri
        .port_u16()
        .or(usual)
        .ok_or_else(|| unusable(UrlError::UnsupportedUrlScheme))?;
    let host = uri.host().ok_or_else(|| unusable(UrlError::NoHostName))?;
    Ok((host.to_owned(), port))
}

fn upgrade(link: &Link) -> Result<HttpRequest<()>, Lost> {
    let mut request = link.gateway.url.as_str().into_client_request().map_err(Lost::Address)?;
    if let Some(path) = &link.gateway.token_file {
        let token = std::fs::read_to_string(path).map_err(Lost::Token)?;
        let mut bearer = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| Lost::Protocol("a token that cannot stand in a header"))?;
        bearer.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, bearer);
    }
    Ok(request)
}
