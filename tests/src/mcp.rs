//! An MCP server over https, by an authority of its own, that asks for a credential and writes down what it was asked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use futures::{StreamExt as _, stream};
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Id of the one session that the server knows.
pub const SESSION: &str = "mock-mcp-session";

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Method and path.
    pub line: String,
    /// Headers.
    pub headers: HeaderMap,
    /// Body; null when it was none.
    pub body: Value,
}

/// The running server; ends when it is dropped.
pub struct McpServer {
    /// Where it listens, on loopback.
    pub address: SocketAddr,
    /// Its authority's certificate.
    pub ca: String,
    shared: Arc<Shared>,
    serving: tokio::task::JoinHandle<()>,
}

struct Shared {
    authorization: Mutex<String>,
    asked: Mutex<Vec<Asked>>,
    go_on: watch::Sender<bool>,
}

impl Drop for McpServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl McpServer {
    /// Starts a server that wants to see this in `Authorization`.
    pub async fn start(authorization: &str) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let (acceptor, ca) = crate::git::tls(address)?;
        let shared = Arc::new(Shared {
            authorization: Mutex::new(authorization.to_owned()),
            asked: Mutex::default(),
            go_on: watch::Sender::new(true),
        });
        let app = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            let _ = axum::serve(Tls { listener, acceptor }, app).await;
        });
        Ok(Self {
            address,
            ca,
            shared,
            serving,
        })
    }

    /// The address for a session; `localhost`, so that there is a name to resolve.
    pub fn url(&self) -> String {
        format!("https://localhost:{}/team/mcp", self.address.port())
    }

    /// Wants to see another credential from now on.
    pub fn rotate(&self, authorization: &str) {
        authorization.clone_into(&mut self.shared.authorization.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether answers to tool calls come to their ends, or stop in the middle until they may.
    pub fn go_on(&self, go_on: bool) {
        self.shared.go_on.send_replace(go_on);
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Accepts connections and the TLS in them.
struct Tls {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            if let Ok((stream, address)) = self.listener.accept().await
                && stream.set_nodelay(true).is_ok()
                && let Ok(stream) = self.acceptor.accept(stream).await
            {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let request: Value = serde_json::from_slice(&body).unwrap_or_default();
    let shown = headers
        .get("authorization")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    shared.asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked {
        line: format!("{method} {uri}"),
        headers,
        body: request.clone(),
    });
    if shown != *shared.authorization.lock().unwrap_or_else(PoisonError::into_inner) {
        let challenge = [("www-authenticate", "Bearer resource_metadata=\"https://mcp.example/\"")];
        return (StatusCode::UNAUTHORIZED, challenge, "who are you?").into_response();
    }
    if uri.path() == "/team/elsewhere" {
        return (StatusCode::TEMPORARY_REDIRECT, [("location", "/team/mcp")]).into_response();
    }
    if uri.path() == "/team/silent" {
        return std::future::pending().await;
    }
    if method != Method::POST {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let result = match request["method"].as_str() {
        Some("initialize") => json!({
            "protocolVersion": request["params"]["protocolVersion"],
            "capabilities": { "tools": {} },
            "serverInfo": { "name": "mock", "version": "1" },
        }),
        Some("tools/list") => json!({ "tools": [{
            "name": "echo", "description": "Says it again.",
            "inputSchema": { "type": "object", "properties": { "text": { "type": "string" } } },
        }] }),
        Some("tools/call") => {
            let text = format!(
                "{}, says {shown}",
                request["params"]["arguments"]["text"].as_str().unwrap_or_default()
            );
            json!({ "content": [{ "type": "text", "text": text }] })
        }
        _ => return StatusCode::ACCEPTED.into_response(),
    };
    let reply = json!({ "jsonrpc": "2.0", "id": request["id"], "result": result });
    let session = ("mcp-session-id", SESSION);
    if request["method"] == "tools/call" {
        let first = stream::once(async { Ok::<_, Infallible>(Bytes::from(": first\n\n")) });
        let rest = stream::once(async move {
            let _ = shared.go_on.subscribe().wait_for(|go_on| *go_on).await;
            Ok(Bytes::from(format!("event: message\ndata: {reply}\n\n")))
        });
        let body = Body::from_stream(first.chain(rest));
        return ([session, ("content-type", "text/event-stream")], body).into_response();
    }
    ([session, ("content-type", "application/json")], reply.to_string()).into_response()
}
