//! What the process is told on its command line and by its environment.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use clap::{Parser, Subcommand};
use gateway::{
    compat,
    quantity::{self, Bytes, Seconds},
    retention, store,
};
use http::HeaderValue;
use tracing::Level;

/// Receives the records of agentic sessions and serves them, with the sessions themselves, over HTTP.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// Address of the API and of the runners' WebSocket; `0.0.0.0:8080` when nothing else is said.
    #[arg(long, env = "GATEWAY_LISTEN")]
    listen: Option<SocketAddr>,
    /// Address of the API, where `--listen` is not given.
    #[arg(long, env = "SERVER_HOST")]
    server_host: Option<IpAddr>,
    /// Port of the API, where `--listen` is not given.
    #[arg(long, env = "SERVER_PORT")]
    server_port: Option<u16>,
    /// Address of `/metrics`.
    #[arg(long, env = "GATEWAY_METRICS_ADDRESS", default_value = "0.0.0.0:9090")]
    pub(crate) metrics_address: SocketAddr,
    /// File of the event log, or `:memory:` to lose it with the process.
    #[arg(long, env = "GATEWAY_DATA", default_value = "/data/events.db")]
    pub(crate) data: store::Location,
    /// `memory`: the event log is lost with the process; `sqlite`: it is the file of `--data`.
    #[arg(long, env = "STORAGE_TYPE", value_parser = storage)]
    storage_type: Option<Storage>,
    /// PostgreSQL database of the event log instead, such as `postgresql://user:password@host/database`: any number of
    /// gateways may share it.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub(crate) database_url: Option<String>,
    /// PEM file of the authorities that may have issued the database's certificate, which is then required; whom the system trusts
    /// when absent, if `sslmode` of the URL asks for TLS.
    #[arg(long, env = "GATEWAY_DATABASE_CA")]
    pub(crate) database_ca: Option<PathBuf>,
    /// Where other gateways on the same database find this one's API, such as `10.0.0.7:8080`; when absent, where it
    /// listens, unless that is everywhere.
    #[arg(long, env = "GATEWAY_ADVERTISE")]
    pub(crate) advertise: Option<String>,
    /// File of API keys, such as a mounted Secret; read again when it changes.
    #[arg(long, env = "GATEWAY_API_KEYS")]
    pub(crate) api_keys: Option<PathBuf>,
    /// Address of the same API with TLS; needs the certificate and the key.
    #[arg(long, env = "GATEWAY_TLS_LISTEN", requires_all = ["tls_certificate", "tls_key"])]
    pub(crate) tls_listen: Option<SocketAddr>,
    /// PEM file of the certificate and its chain; read again when it changes.
    #[arg(long, env = "GATEWAY_TLS_CERTIFICATE")]
    pub(crate) tls_certificate: Option<PathBuf>,
    /// PEM file of the certificate's key; read again when it changes.
    #[arg(long, env = "GATEWAY_TLS_KEY")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Origins whose web pages may use the API and its streams, such as `https://console.example.com`.
    #[arg(long = "allow-origin", env = "GATEWAY_ALLOW_ORIGINS", value_delimiter = ',')]
    pub(crate) allow_origins: Vec<HeaderValue>,
    /// Connections at most; more wait.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS", default_value_t = 10_000)]
    pub(crate) max_connections: usize,
    /// Requests a minute of each caller with a Kubernetes token; `0`: no bound.
    #[arg(long, env = "GATEWAY_RATE_PER_MINUTE", default_value_t = 6000)]
    pub(crate) rate_per_minute: u32,
    /// Seconds for which requests are still taken when the gateway is to end: so long may it take until nobody sends any, where
    /// others serve as well.
    #[arg(long, env = "GATEWAY_LINGER_SECONDS", default_value_t = 0)]
    pub(crate) linger_seconds: u64,
    /// What the log keeps.
    #[command(flatten)]
    pub(crate) retention: Retention,
    /// `json`: log lines for machines; `flat`: the same with all fields side by side, on stdout.
    #[arg(long, env = protocol::names::env::LOG_FORMAT, default_value = "text")]
    pub(crate) log_format: String,
    /// What is logged, where `RUST_LOG` says nothing, such as `INFO`.
    #[arg(long, env = "SERVER_LOG_LEVEL", default_value = "info", value_parser = level)]
    pub(crate) log_level: Level,
    /// The APIs of other systems.
    #[command(flatten)]
    pub(crate) compat: compat::Options,
}

/// Where the event log is, in the words of the task API's users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storage {
    Memory,
    Sqlite,
}

/// A level by its name, also by those of Python.
fn level(text: &str) -> Result<Level, String> {
    let level = match text.to_ascii_lowercase().as_str() {
        "warning" => Ok(Level::WARN),
        "critical" => Ok(Level::ERROR),
        level => level.parse(),
    };
    level.map_err(|_| "the levels are DEBUG, INFO, WARNING, ERROR and CRITICAL".to_owned())
}

fn storage(text: &str) -> Result<Storage, String> {
    match text {
        "memory" => Ok(Storage::Memory),
        "sqlite" => Ok(Storage::Sqlite),
        "redis" => Err("redis is no storage here: for more than one gateway use PostgreSQL (DATABASE_URL)".to_owned()),
        _ => Err("the storages are memory and sqlite".to_owned()),
    }
}

impl Args {
    /// Address of the API and of the runners' WebSocket.
    pub(crate) fn listen(&self) -> SocketAddr {
        self.listen.unwrap_or_else(|| {
            let host = self.server_host.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            SocketAddr::new(host, self.server_port.unwrap_or(8080))
        })
    }

    /// Where the event log is, for a gateway that listens on `listening`.
    pub(crate) fn location(&self, listening: SocketAddr) -> anyhow::Result<store::Location> {
        let given = self.advertise.clone().filter(|address| !address.is_empty());
        let own = || (!listening.ip().is_unspecified()).then(|| listening.to_string());
        match self.database() {
            Some(database) => Ok(store::Location::Database {
                database,
                address: given.or_else(own),
            }),
            None => self.data(),
        }
    }

    /// The database, if there is one.
    pub(crate) fn database(&self) -> Option<store::postgres::Database> {
        Some(store::postgres::Database {
            url: self.database_url.clone().filter(|url| !url.is_empty())?,
            authorities: self.database_ca.clone(),
        })
    }

    fn data(&self) -> anyhow::Result<store::Location> {
        match (self.storage_type, &self.data) {
            (Some(Storage::Memory), _) => Ok(store::Location::Memory),
            (Some(Storage::Sqlite), store::Location::Memory) => {
                anyhow::bail!("STORAGE_TYPE is sqlite, and --data names no file: give the file, or STORAGE_TYPE=memory")
            }
            (_, data) => Ok(data.clone()),
        }
    }
}

/// What the process can do besides serving.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move the event log from the file `--data` into the database `--database-url`, once: with every gateway of both stopped.
    /// Sessions that are there already stay as they are, so it can be repeated. The file is then renamed to `….moved`.
    Migrate,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Retention {
    /// Keep a session's records so long after its last one, such as `90d`; `0`: for ever.
    #[arg(long = "retention-age", env = "GATEWAY_RETENTION_AGE", default_value = "0", value_parser = quantity::seconds)]
    age: Seconds,
    /// Keep the records of deleted sessions so long, such as `7d`; `0`: for ever.
    #[arg(long = "retention-deleted", env = "GATEWAY_RETENTION_DELETED", default_value = "7d", value_parser = quantity::seconds)]
    deleted: Seconds,
    /// Bytes kept of one session, such as `1Gi`; `0`: no bound.
    #[arg(long = "retention-session-size", env = "GATEWAY_RETENTION_SESSION_SIZE", default_value = "0", value_parser = quantity::bytes)]
    session_size: Bytes,
    /// Bytes kept of all sessions of one namespace; `0`: no bound.
    #[arg(long = "retention-namespace-size", env = "GATEWAY_RETENTION_NAMESPACE_SIZE", default_value = "0", value_parser = quantity::bytes)]
    namespace_size: Bytes,
    /// Bytes kept of all sessions; keep it well below the volume's size. `0`: no bound.
    #[arg(long = "retention-size", env = "GATEWAY_RETENTION_SIZE", default_value = "0", value_parser = quantity::bytes)]
    size: Bytes,
}

impl Retention {
    pub(crate) fn limits(&self) -> retention::Limits {
        let Self {
            age: Seconds(age),
            deleted: Seconds(deleted),
            session_size: Bytes(session),
            namespace_size: Bytes(namespace),
            size: Bytes(total),
        } = *self;
        retention::Limits {
            age,
            deleted,
            session,
            namespace,
            total,
        }
    }
}
