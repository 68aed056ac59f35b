pub mod cluster;
pub mod postgres;
pub mod process;
pub mod runner;
pub mod sse;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use gateway::{
    Gateway,
    compat::Settings,
    server,
    store::{self, EventLog, Location, StoreError, memory::MemoryLog},
};
use protocol::{Kind, record::EndBody};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use cluster::Cluster;

/// Longest wait for anything.
pub const DEADLINE: Duration = Duration::from_mins(1);

/// Waits for something that must happen.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(DEADLINE, future).await;
    waited.unwrap_or_else(|_| panic!("{what} did not happen within {DEADLINE:?}"))
}

/// A gateway in this process, and the cluster that it serves.
pub struct Served<C = Cluster> {
    pub gateway: Arc<Gateway>,
    pub address: SocketAddr,
    pub cluster: C,
    _watch: AbortOnDropHandle<()>,
}

/// Opens the log in a file when nobody else has it any more.
pub async fn opened(file: &Path) -> Arc<dyn EventLog> {
    let opened = async {
        loop {
            match store::open(Location::File(file.to_owned())).await {
                Err(StoreError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
                log => return log.unwrap(),
            }
        }
    };
    soon("the log being let go of", opened).await
}

impl Served {
    /// With its log in memory.
    pub async fn new() -> Self {
        let cluster = Cluster::start().await;
        Self::on(cluster.client(), cluster, Arc::new(MemoryLog::default())).await
    }

    /// With the APIs of other systems.
    pub async fn serving(settings: Settings) -> Self {
        let cluster = Cluster::start().await;
        let log = Arc::new(MemoryLog::default());
        Self::with(cluster.client(), cluster, log, settings).await
    }
}

impl<C> Served<C> {
    pub async fn on(client: kube::Client, cluster: C, log: Arc<dyn EventLog>) -> Self {
        Self::with(client, cluster, log, Settings::default()).await
    }

    pub async fn with(client: kube::Client, cluster: C, log: Arc<dyn EventLog>, settings: Settings) -> Self {
        let gateway = Gateway::serving(client, log, CancellationToken::new(), settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = gateway::router(gateway.clone());
        gateway.tasks.spawn(server::serve(
            listener,
            router,
            1000,
            gateway.shutdown.clone(),
            gateway.tasks.clone(),
        ));
        gateway.tasks.spawn(gateway::commands::run(gateway.clone()));
        gateway.tasks.spawn(gateway::compat::keeper::run(gateway.clone()));
        gateway.tasks.spawn({
            let gateway = gateway.clone();
            async move { gateway::news::run(&gateway).await }
        });
        let watch = tokio::spawn({
            let gateway = gateway.clone();
            async move { gateway.watched.run(&gateway.sessions).await }
        });
        Self {
            _watch: AbortOnDropHandle::new(watch),
            gateway,
            address,
            cluster,
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Ends it as the process does; what does not end in time is a fault.
    pub async fn stop(self) {
        self.gateway.shutdown.cancel();
        self.gateway.tasks.close();
        soon("the end of all requests", self.gateway.tasks.wait()).await;
    }
}

/// A record whose body says `text`, with spaces that a re-encoding would drop.
pub fn record(seq: u64, kind: Kind, text: &str) -> String {
    let kind = kind.as_str();
    format!(
        r#"{{"seq":{seq},"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05.678Z","kind":"{kind}","body":{{"text" : "{text}", "n":1.50}}}}"#
    )
}

/// Records `from..=to` of the kind `cli`.
pub fn records(from: u64, to: u64) -> Vec<String> {
    (from..=to)
        .map(|seq| record(seq, Kind::Cli, &format!("record {seq}")))
        .collect()
}

/// The record that closes attempt 1.
pub fn end(seq: u64) -> String {
    let body = EndBody {
        outcome: protocol::Outcome::Succeeded,
        last_seq: seq - 1,
        bytes: 1,
        sha256: "00".to_owned(),
    };
    let body: Value = serde_json::to_value(body).unwrap();
    json!({"seq": seq, "attempt": 1, "turn": 1, "ts": "2026-01-02T03:04:06Z", "kind": "end", "body": body}).to_string()
}
