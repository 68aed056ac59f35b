//! The proxy on loopback through which the agent reaches the model API: it holds the key, meters, and is the witness of
//! what the API answered.

use std::net::SocketAddr;

use protocol::record::UsageBody;
use secrecy::SecretString;
use tokio::sync::{mpsc, oneshot};

/// The model API and its credential.
#[derive(Clone)]
pub struct Upstream {
    /// Base URL without a trailing slash, such as `https://api.anthropic.com`.
    pub base_url: String,
    /// What it is reached with.
    pub credential: Credential,
}

/// A credential of the model API.
#[derive(Clone)]
pub enum Credential {
    /// Sent as `x-api-key`.
    ApiKey(SecretString),
    /// Sent as `Authorization: Bearer`.
    Bearer(SecretString),
}

/// What a proxy needs to know.
pub struct ProxyConfig {
    /// Where requests go.
    pub upstream: Upstream,
    /// What the agent must show, as `x-api-key` or bearer; made per run.
    pub token: SecretString,
}

/// One metered response, told when it opens (`body.open`) and when it ends.
pub struct Metered {
    /// What goes into the `usage` record.
    pub body: UsageBody,
    /// Present for an opening: the proxy sends nothing more of this response to the agent until it is answered, which
    /// means that the record is on disk. Dropped instead of answered: the spool is gone; the proxy cuts the response.
    pub durable: Option<oneshot::Sender<()>>,
}

/// What the model API answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    /// Status of the last answer; `None`: no request was answered yet. A broken or impossible connection is
    /// [`Witness::UNREACHABLE`].
    pub last_status: Option<u16>,
    /// `retry-after` of the last answer, seconds.
    pub retry_after: Option<u64>,
    /// The API refused the credential (401, 403); nothing more is forwarded.
    pub credential_refused: bool,
}

impl Witness {
    /// Stands in [`Witness::last_status`] for a connection that could not be made or broke before an answer.
    pub const UNREACHABLE: u16 = 0;
}

/// Why there is no proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// No port.
    #[error("failed to listen on loopback for the agent's model calls")]
    Listen(#[source] std::io::Error),
}

/// A running proxy. Dropping it ends it.
pub struct Proxy {}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and serves until dropped.
    pub async fn start(config: ProxyConfig, events: mpsc::Sender<Metered>) -> Result<Self, ProxyError> {
        let _ = (config, events);
        std::future::ready(Err(ProxyError::Listen(std::io::ErrorKind::Unsupported.into()))).await
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    /// What the model API answered so far.
    pub fn witness(&self) -> Witness {
        Witness::default()
    }

    /// Ends the responses in flight (each gets its closing [`Metered`], estimated) and forwards nothing more.
    pub fn cut(&self) {}

    /// Waits until every response in flight has sent its closing [`Metered`]; called after [`Proxy::cut`] with a deadline
    /// of the caller's, before the end record is written.
    pub async fn settled(&self) {
        std::future::ready(()).await;
    }
}
