//! Whether the gateway works.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
};
use http::HeaderMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;

use super::{
    ApiError,
    messages::wrong_query,
    openapi::{self, Api},
};
use crate::{
    Gateway,
    auth::{Credential, api_key::Described, kubernetes::Verb},
    compat::{Settings, active},
};

/// How long an answer of the API server is believed.
const BELIEVED: Duration = Duration::from_secs(10);
/// How long it may take: probes wait for us.
const ANSWERS_WITHIN: Duration = Duration::from_millis(700);

/// That the gateway works.
#[derive(Serialize, JsonSchema)]
pub struct Health {
    /// `healthy`, or `full` while the event log has no room: then streams go on, and runners keep what happens until it has.
    status: &'static str,
    /// Version of the gateway.
    version: &'static str,
    /// `reachable` or `unreachable`: the cluster's API server. Without it streams and deliveries go on, and nobody new is let in.
    cluster: String,
    /// Sessions of the task API that are active.
    #[serde(skip_serializing_if = "Option::is_none")]
    active_sessions: Option<usize>,
    /// Tasks of the task API that are worked on or wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    active_tasks: Option<usize>,
    /// Seconds since the gateway started.
    uptime_seconds: u64,
    /// With `verbose`: who may do what in which namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    mapping: Option<Mapping>,
}

/// How callers without a Kubernetes identity are led to namespaces.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    /// The task API is served.
    tasks: bool,
    /// The claude-code API is served.
    claude_code: bool,
    /// Namespace of these two APIs for callers whose key names none; empty when neither is served.
    namespace: String,
    /// Callers of these two APIs must show who they are.
    authentication: bool,
    /// The API keys, without what they are.
    keys: Vec<Described>,
    /// Requests a minute of all callers without a key together; no bound when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_per_minute: Option<u32>,
    /// Sessions of tasks that may be active at once in a namespace.
    max_concurrent_sessions: usize,
    /// Seconds without a task after which a workspace's session is stopped.
    idle_timeout_seconds: u32,
}

/// How much is wanted.
#[derive(Deserialize, JsonSchema)]
struct Wanted {
    /// `true`: with who may do what in which namespace, for callers who may list the sessions of all namespaces.
    verbose: Option<bool>,
}

/// `/health`.
pub fn routes(api: Api) -> Api {
    let health = openapi::get("getHealth", "Whether the gateway works", health)
        .open()
        .answers::<Health>(
            200,
            "The event log answers",
            json!({"status": "healthy", "version": "0.1.0", "cluster": "reachable", "uptime_seconds": 3600}),
        )
        .query::<Wanted>()
        .refuses(&[400, 401, 403, 503]);
    let live = openapi::get(
        "getLiveness",
        "Whether the process runs, whatever the event log does",
        live,
    )
    .open()
    .answers::<Live>(200, "It runs", json!({"status": "alive"}));
    api.route("/health", [health]).route("/live", [live])
}

/// That the process runs.
#[derive(Serialize, JsonSchema)]
struct Live {
    /// `alive`.
    status: &'static str,
}

/// A database that is away is no reason to end a gateway: nothing would be better with the next one.
async fn live() -> Json<Live> {
    Json(Live { status: "alive" })
}

/// Whether the API server answers, asked once in a while however many ask us.
#[derive(Debug, Default)]
pub struct Cluster {
    last: tokio::sync::Mutex<Option<(Instant, String)>>,
}

impl Cluster {
    async fn state(&self, client: &kube::Client) -> String {
        let mut last = self.last.lock().await;
        if let Some((when, state)) = &*last
            && when.elapsed() < BELIEVED
        {
            return state.clone();
        }
        let state = match tokio::time::timeout(ANSWERS_WITHIN, client.apiserver_version()).await {
            Ok(Ok(_)) => "reachable".to_owned(),
            // It answers, whatever it says.
            Ok(Err(kube::Error::Api(status))) if status.code < 500 => "reachable".to_owned(),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the API server cannot be reached");
                "unreachable".to_owned()
            }
            Err(_) => "unreachable".to_owned(),
        };
        *last = Some((Instant::now(), state.clone()));
        state
    }
}

async fn health(
    State(gateway): State<Arc<Gateway>>,
    headers: HeaderMap,
    query: Result<Query<Wanted>, QueryRejection>,
) -> Result<Json<Health>, ApiError> {
    let Query(Wanted { verbose }) = query.map_err(wrong_query)?;
    let mapping = match verbose {
        Some(true) => Some(mapping(&gateway, &headers).await?),
        _ => None,
    };
    gateway.log.state("").await?;
    let tasks = gateway.compat.settings.tasks;
    Ok(Json(Health {
        status: if gateway.log.is_full() { "full" } else { "healthy" },
        version: env!("CARGO_PKG_VERSION"),
        cluster: gateway.cluster.state(&gateway.client).await,
        active_sessions: tasks.then(|| active::active(&gateway, None).len()),
        active_tasks: tasks.then(|| gateway.compat.kept.busy()),
        uptime_seconds: gateway.compat.uptime_seconds(),
        mapping,
    }))
}

async fn mapping(gateway: &Gateway, headers: &HeaderMap) -> Result<Mapping, ApiError> {
    let credential = Credential::of(headers).ok_or_else(|| {
        ApiError::unauthorized("no token: send one of an administrator in the header `Authorization: Bearer <token>`")
    })?;
    let caller = gateway.authenticate(&credential).await?;
    gateway.authorize(&caller, Verb::List, "", None).await?;
    let Settings {
        tasks,
        claude_code,
        namespace,
        open,
        rate,
        max_concurrent,
        idle_seconds,
        ..
    } = gateway.compat.settings.clone();
    Ok(Mapping {
        tasks,
        claude_code,
        namespace,
        authentication: !open,
        keys: gateway.keys.described(),
        rate_per_minute: rate,
        max_concurrent_sessions: max_concurrent,
        idle_timeout_seconds: idle_seconds,
    })
}
