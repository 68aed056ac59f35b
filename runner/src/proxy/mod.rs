//! The proxy on loopback through which the agent reaches the model API: it holds the key, meters, and is the witness of
//! what the API answered.
//!
//! The agent knows the proxy's address and a token that is worth nothing elsewhere. [`route`] says what is forwarded,
//! [`forward`] does it, [`stream`] passes a streamed answer on while [`meter`] reads it.

mod answer;
mod asked;
mod client;
mod credential;
mod forward;
mod google;
mod headers;
pub mod mcp;
mod meter;
mod route;
mod server;
mod sse;
mod stream;
#[cfg(test)]
mod tests;
mod witness;

use std::{net::SocketAddr, sync::Arc};

use protocol::{price::Prices, record::UsageBody};
use secrecy::SecretString;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    client::http_client,
    credential::{Credential, CredentialError},
    route::Vertex,
    witness::Witness,
};
use self::{forward::Shared, mcp::Servers, witness::Seen};
use crate::limits::{Amount, Gate, Ledger, Limits};

/// The model API and its credential.
#[derive(Clone)]
pub struct Upstream {
    /// Base URL without a trailing slash, such as `https://api.anthropic.com`.
    pub base_url: String,
    /// What it is reached with.
    pub credential: Credential,
    /// It is Vertex AI: other paths, which name the model.
    pub vertex: Option<Vertex>,
    /// Certificates of authorities beside the public ones, PEM.
    pub authorities: Option<Vec<u8>>,
}

/// What a proxy needs to know.
pub struct ProxyConfig {
    /// Where requests go.
    pub upstream: Upstream,
    /// What the agent must show, as `x-api-key` or bearer; made per run.
    pub token: SecretString,
    /// The prices that hold.
    pub prices: Prices,
    /// MCP servers that are reached by http.
    pub mcp: Servers,
}

/// One metered response, told when it opens (`body.open`) and when it ends.
pub struct Metered {
    /// What goes into the `usage` record.
    pub body: UsageBody,
    /// Present for an opening: the proxy sends nothing more of this response to the agent until it is answered, which
    /// means that the record is on disk. Dropped instead of answered: the spool is gone; the proxy cuts the response.
    pub durable: Option<oneshot::Sender<()>>,
}

/// Why there is no proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// No port.
    #[error("failed to listen on loopback for the agent's model calls")]
    Listen(#[source] std::io::Error),
    /// The base URL is none.
    #[error(
        "failed to use ANTHROPIC_BASE_URL {0:?}: it must be an http or https URL such as https://api.anthropic.com"
    )]
    BaseUrl(String),
    /// The HTTP client cannot be made, for want of root certificates for instance.
    #[error("failed to make an HTTP client for the model API")]
    Client(#[source] reqwest::Error),
    /// The credential cannot be used.
    #[error(transparent)]
    Credential(CredentialError),
}

/// A running proxy. Dropping it ends it.
pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and serves until dropped.
    pub async fn start(config: ProxyConfig, events: mpsc::Sender<Metered>) -> Result<Self, ProxyError> {
        let ProxyConfig {
            upstream,
            token,
            prices,
            mcp,
        } = config;
        let base =
            client::base_url(&upstream.base_url).ok_or_else(|| ProxyError::BaseUrl(upstream.base_url.clone()))?;
        let client = client::model_client(&base, upstream.authorities.as_deref()).map_err(ProxyError::Client)?;
        upstream
            .credential
            .check(&client)
            .await
            .map_err(ProxyError::Credential)?;
        let shared = Arc::new(Shared {
            client,
            base_url: base.as_str().trim_end_matches('/').to_owned(),
            credential: upstream.credential,
            vertex: upstream.vertex,
            mcp,
            token,
            events,
            seen: Seen::default(),
            gate: Gate::new(Ledger::default()),
            prices: Arc::new(prices),
            room: Arc::new(Semaphore::new(forward::ROOM)),
            answers: answer::Answers::default(),
            cut: CancellationToken::new(),
            calls: TaskTracker::new(),
        });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(ProxyError::Listen)?;
        let addr = listener.local_addr().map_err(ProxyError::Listen)?;
        let stop = CancellationToken::new();
        tokio::spawn(server::serve(listener, Arc::clone(&shared), stop.clone()));
        Ok(Self { addr, shared, stop })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What the model API answered so far.
    pub fn witness(&self) -> Witness {
        self.shared.seen.witness()
    }

    /// What the session may spend from now on. Without a call there is no limit.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.gate.set_limits(limits);
    }

    /// What was spent so far, earlier attempts included.
    pub fn spent(&self) -> Amount {
        self.shared.gate.spent()
    }

    /// The limits that hold.
    pub fn limits(&self) -> Limits {
        self.shared.gate.limits()
    }

    /// What earlier attempts have spent; told once, before the agent starts.
    pub fn set_spent(&self, spent: Amount) {
        self.shared.gate.set_spent(spent);
    }

    /// True as soon as a request is held because the limit is used up: time to stop the turn.
    pub fn beyond_limits(&self) -> watch::Receiver<bool> {
        self.shared.gate.beyond()
    }

    /// Ends the responses in flight (each gets its closing [`Metered`], estimated) and forwards nothing more.
    pub fn cut(&self) {
        self.shared.cut.cancel();
    }

    /// Waits until every response in flight has sent its closing [`Metered`]; called after [`Proxy::cut`] with a deadline
    /// of the caller's, before the end record is written.
    pub async fn settled(&self) {
        self.shared.calls.close();
        self.shared.calls.wait().await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.cut.cancel();
        self.stop.cancel();
    }
}
