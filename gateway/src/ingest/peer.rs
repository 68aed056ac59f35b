//! The other end of a runner's socket.

use std::time::Duration;

use futures::{FutureExt as _, SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use protocol::frame::{GatewayFrame, Hello, MAX_MESSAGE, RunnerFrame};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message, Utf8Bytes,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};

use super::{
    End,
    frames::{Frame, parse},
    gate::{Gate, Rooms},
};

/// How long a frame may take to leave.
const SEND_WITHIN: Duration = Duration::from_secs(10);
/// How long a close may take to be answered.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);
/// Longest frame before a pod is its session's writer: a hello.
const MAX_HELLO: usize = 16 << 10;
/// Longest frame of who is told to go.
const MAX_REFUSED: usize = 1 << 10;
/// What a connection costs at least. The library's own is 128 KiB.
const READ_BUFFER: usize = 16 << 10;

type Stream = Gate<TokioIo<Upgraded>>;

/// The other end of the socket.
pub(super) struct Peer {
    socket: Option<WebSocketStream<Stream>>,
}

impl Peer {
    pub(super) async fn new(upgraded: Upgraded, rooms: Rooms) -> Self {
        let gate = Gate::new(TokioIo::new(upgraded), rooms, MAX_HELLO);
        Self {
            socket: Some(socket(gate).await),
        }
    }

    fn gate(&mut self) -> Option<&mut Stream> {
        self.socket.as_mut().map(WebSocketStream::get_mut)
    }

    /// From now on records may come.
    pub(super) fn admitted(&mut self) {
        if let Some(gate) = self.gate() {
            gate.set_limit(MAX_MESSAGE);
        }
    }

    /// Whether the peer is silent because its frame waits for room here.
    pub(super) fn is_held(&mut self) -> bool {
        self.gate().is_some_and(|gate| gate.is_waiting())
    }

    /// Whether a frame for which there is room does not come.
    pub(super) fn is_stuck(&mut self) -> bool {
        self.gate().is_some_and(|gate| gate.is_stuck())
    }

    /// When a part of a frame came last, if one did: nothing else is heard while a long one comes.
    pub(super) fn came(&mut self) -> Option<Instant> {
        self.gate().and_then(|gate| gate.came())
    }

    pub(super) async fn hello(&mut self) -> Result<Hello, End> {
        loop {
            if let Some(text) = self.receive().await? {
                return match parse(&text)? {
                    Frame::Other(RunnerFrame::Hello(hello)) => Ok(hello),
                    _ => Err(End::Protocol("hello must be sent first".to_owned())),
                };
            }
        }
    }

    /// The next text; `None` for a sign of life without one. Nothing is lost when the future is dropped.
    pub(super) async fn receive(&mut self) -> Result<Option<Utf8Bytes>, End> {
        let Some(socket) = &mut self.socket else {
            return Err(End::Left);
        };
        match socket.next().await {
            Some(Ok(Message::Text(text))) => Ok(Some(text)),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Ok(None),
            Some(Ok(Message::Binary(_))) => Err(End::Protocol("frames are text".to_owned())),
            Some(Err(Error::Io(error))) if error.kind() == std::io::ErrorKind::InvalidData => {
                Err(End::Protocol(format!("{error} ({MAX_MESSAGE} bytes at most)")))
            }
            Some(Err(Error::Utf8(_))) => Err(End::Protocol("a frame is not UTF-8".to_owned())),
            Some(Ok(Message::Close(_)) | Err(_)) | None => Err(End::Left),
        }
    }

    /// To be called when a text and all that was made of it is let go of: gives back the memory of a long one.
    pub(super) async fn handled(&mut self) -> Result<(), End> {
        if !self.gate().is_some_and(Gate::release) {
            return Ok(());
        }
        // The old socket would keep the frame's memory. Nothing of the next frame is in it: the gate saw to that.
        self.within(|socket| socket.flush().boxed()).await?;
        if let Some(old) = self.socket.take() {
            self.socket = Some(socket(old.into_inner()).await);
        }
        Ok(())
    }

    pub(super) async fn send(&mut self, frame: &GatewayFrame) -> Result<(), End> {
        let text = serde_json::to_string(frame).map_err(|error| End::Protocol(error.to_string()))?;
        self.message(Message::Text(text.into())).await
    }

    pub(super) async fn message(&mut self, message: Message) -> Result<(), End> {
        self.within(|socket| socket.send(message).boxed()).await
    }

    async fn within<'a>(
        &'a mut self,
        send: impl FnOnce(&'a mut WebSocketStream<Stream>) -> futures::future::BoxFuture<'a, Result<(), Error>>,
    ) -> Result<(), End> {
        let Some(socket) = &mut self.socket else {
            return Err(End::Left);
        };
        match timeout(SEND_WITHIN, send(socket)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(End::Left),
        }
    }

    pub(super) async fn close(mut self, end: &End) {
        if matches!(end, End::Left) {
            return;
        }
        if let Some(gate) = self.gate() {
            gate.set_limit(MAX_REFUSED);
        }
        let mut reason = end.to_string();
        // A control frame has room for 125 bytes, two of them the code.
        reason.truncate(reason.floor_char_boundary(123));
        let close = CloseFrame {
            code: end.code().into(),
            reason: reason.into(),
        };
        let answered = async {
            self.message(Message::Close(Some(close))).await?;
            // To close a socket with unread bytes resets it, and the close frame may be lost.
            loop {
                match self.receive().await {
                    Ok(_) => {}
                    Err(End::Protocol(_)) => return self.discard().await,
                    Err(_) => return Ok(()),
                }
            }
        };
        let _ = timeout(CLOSE_WITHIN, answered).await;
    }

    /// Reads what still comes and keeps none of it.
    async fn discard(&mut self) -> Result<(), End> {
        if let Some(gate) = self.gate() {
            gate.discard().await;
        }
        Ok(())
    }
}

async fn socket(gate: Stream) -> WebSocketStream<Stream> {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(gate, Role::Server, Some(config)).await
}
