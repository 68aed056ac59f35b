//! A runner, as far as its WebSocket goes.

use std::net::SocketAddr;

use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{self, GatewayFrame, Hello, Role, Welcome};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Error, Message, client::IntoClientRequest as _, protocol::WebSocketConfig},
};

use super::soon;

pub struct Runner {
    pub socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

pub fn hello(session: &str, uid: &str, pod: &str) -> Hello {
    Hello {
        protocol: frame::VERSION,
        role: Role::Run,
        uid: uid.to_owned(),
        name: session.to_owned(),
        attempt: 1,
        pod_uid: pod.to_owned(),
        spool: "spool-1".to_owned(),
        next_seq: 1,
        cli_version: None,
    }
}

impl Runner {
    pub async fn open(address: SocketAddr, session: &str, token: Option<&str>) -> Self {
        Self::try_open(address, session, token).await.unwrap()
    }

    pub async fn open_in(address: SocketAddr, namespace: &str, session: &str, token: Option<&str>) -> Self {
        Self::try_open_in(address, namespace, session, token).await.unwrap()
    }

    pub async fn try_open(address: SocketAddr, session: &str, token: Option<&str>) -> Result<Self, Error> {
        Self::try_open_in(address, "team-a", session, token).await
    }

    async fn try_open_in(
        address: SocketAddr,
        namespace: &str,
        session: &str,
        token: Option<&str>,
    ) -> Result<Self, Error> {
        let mut request =
            format!("ws://{address}/api/projects/{namespace}/sessions/{session}/ws").into_client_request()?;
        if let Some(token) = token {
            request
                .headers_mut()
                .insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let (socket, _) = tokio_tungstenite::connect_async_with_config(request, Some(config), true).await?;
        Ok(Self { socket })
    }

    /// Connected and welcomed.
    pub async fn admitted(address: SocketAddr, hello: &Hello, token: &str) -> (Self, Welcome) {
        let mut runner = Self::open(address, &hello.name, Some(token)).await;
        runner.hello(hello).await;
        let GatewayFrame::Welcome(welcome) = runner.frame().await else {
            panic!("welcome comes first")
        };
        (runner, welcome)
    }

    pub async fn hello(&mut self, hello: &Hello) {
        self.text(format!(r#"{{"hello":{}}}"#, serde_json::to_string(hello).unwrap()))
            .await;
    }

    pub async fn text(&mut self, text: String) {
        self.socket.send(Message::text(text)).await.unwrap();
    }

    pub async fn send(&mut self, records: &[String]) {
        self.text(format!(r#"{{"records":[{}]}}"#, records.join(","))).await;
    }

    /// Sends records and returns the ack's seq.
    pub async fn deliver(&mut self, records: &[String]) -> u64 {
        self.send(records).await;
        match self.frame().await {
            GatewayFrame::Ack(ack) => ack.seq,
            other => panic!("not an ack: {other:?}"),
        }
    }

    pub async fn frame(&mut self) -> GatewayFrame {
        match self.next().await {
            Ok(frame) => frame,
            Err(code) => panic!("closed with {code:?}"),
        }
    }

    /// The next frame, or how the connection was closed.
    pub async fn next(&mut self) -> Result<GatewayFrame, Option<u16>> {
        loop {
            match soon("a frame", self.socket.next()).await {
                Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Close(close))) => return Err(close.map(|close| close.code.into())),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Err(None),
            }
        }
    }

    /// The code with which the gateway closes, whatever it sends before.
    pub async fn closed(&mut self) -> u16 {
        loop {
            if let Err(code) = self.next().await {
                return code.expect("a close frame");
            }
        }
    }
}
