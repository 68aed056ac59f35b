//! Whether the gateway works.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

use super::{
    ApiError,
    openapi::{self, Api},
};
use crate::Gateway;

/// How long an answer of the API server is believed.
const BELIEVED: Duration = Duration::from_secs(10);
/// How long it may take: probes wait for us.
const ANSWERS_WITHIN: Duration = Duration::from_millis(700);

/// That the gateway works.
#[derive(Serialize, JsonSchema)]
pub struct Health {
    /// Always `healthy`.
    status: &'static str,
    /// Version of the gateway.
    version: &'static str,
    /// `reachable` or `unreachable`: the cluster's API server. Without it streams and deliveries go on, and nobody new is let in.
    cluster: String,
}

/// `/health`.
pub fn routes(api: Api) -> Api {
    let health = openapi::get("getHealth", "Whether the gateway works", health)
        .open()
        .answers::<Health>(
            200,
            "The event log answers",
            json!({"status": "healthy", "version": "0.1.0", "cluster": "reachable"}),
        )
        .refuses(&[503]);
    api.route("/health", [health])
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

async fn health(State(gateway): State<Arc<Gateway>>) -> Result<Json<Health>, ApiError> {
    gateway.log.state("").await?;
    Ok(Json(Health {
        status: "healthy",
        version: env!("CARGO_PKG_VERSION"),
        cluster: gateway.cluster.state(&gateway.client).await,
    }))
}
