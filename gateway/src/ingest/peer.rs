//! The other end of a runner's socket.

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket};
use protocol::frame::{GatewayFrame, Hello, MAX_MESSAGE, RunnerFrame};
use tokio::time::timeout;

use super::{End, parse};

/// How long a frame may take to leave.
const SEND_WITHIN: Duration = Duration::from_secs(10);
/// How long a close may take to be answered.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// The other end of the socket.
pub(super) struct Peer {
    pub(super) socket: WebSocket,
}

impl Peer {
    pub(super) async fn hello(&mut self) -> Result<Hello, End> {
        loop {
            if let Some(text) = self.receive().await? {
                return match parse(&text)? {
                    RunnerFrame::Hello(hello) => Ok(hello),
                    _ => Err(End::Protocol("hello must be sent first".to_owned())),
                };
            }
        }
    }

    /// The next text; `None` for a sign of life without one. Nothing is lost when the future is dropped.
    pub(super) async fn receive(&mut self) -> Result<Option<Utf8Bytes>, End> {
        match self.socket.recv().await {
            Some(Ok(Message::Text(text))) => Ok(Some(text)),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(None),
            Some(Ok(Message::Binary(_))) => Err(End::Protocol("frames are text".to_owned())),
            Some(Err(error)) if is_too_long(&error) => {
                Err(End::Protocol(format!("messages have at most {MAX_MESSAGE} bytes")))
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => Err(End::Left),
        }
    }

    pub(super) async fn send(&mut self, frame: &GatewayFrame) -> Result<(), End> {
        let text = serde_json::to_string(frame).map_err(|error| End::Protocol(error.to_string()))?;
        self.message(Message::Text(text.into())).await
    }

    pub(super) async fn message(&mut self, message: Message) -> Result<(), End> {
        match timeout(SEND_WITHIN, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(End::Left),
        }
    }

    pub(super) async fn close(mut self, end: &End) {
        if matches!(end, End::Left) {
            return;
        }
        let mut reason = end.to_string();
        // A control frame has room for 125 bytes, two of them the code.
        reason.truncate(reason.floor_char_boundary(123));
        let close = CloseFrame {
            code: end.code(),
            reason: reason.into(),
        };
        let answered = async {
            self.message(Message::Close(Some(close))).await?;
            // To close a socket with unread bytes resets it, and the close frame may be lost.
            while self.receive().await.is_ok() {}
            Ok::<_, End>(())
        };
        let _ = timeout(CLOSE_WITHIN, answered).await;
    }
}

fn is_too_long(error: &axum::Error) -> bool {
    // axum hides the type of its WebSocket library, whose message this is.
    error.to_string().contains("too long")
}
