//! A gateway whose log another one still has, such as the one that it takes the place of.

use std::{os::fd::AsFd as _, sync::Arc, time::Duration};

use axum::{Json, Router, http::StatusCode, response::IntoResponse, routing::get};
use http::header::RETRY_AFTER;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    server,
    store::{self, EventLog, Location, StoreError},
};

/// How often it is tried.
const AGAIN: Duration = Duration::from_millis(500);
/// Connections meanwhile.
const CONNECTIONS: usize = 256;

/// Opens the log, when whoever has it lets go of it. Until then `listener` says so: alive and ready, so that whatever
/// replaces the other gateway by this one goes on and ends the other.
pub async fn open(location: Location, listener: &TcpListener) -> Result<Arc<dyn EventLog>, StoreError> {
    let path = match store::open(location.clone()).await {
        Err(StoreError::InUse { path }) => path,
        done => return done,
    };
    let (over, tasks) = (CancellationToken::new(), TaskTracker::new());
    tracing::warn!(log = %path.display(), "another gateway has the event log: waiting for its end");
    let copy = listener.as_fd().try_clone_to_owned().map(std::net::TcpListener::from);
    match copy.and_then(TcpListener::from_std) {
        Ok(copy) => drop(tasks.spawn(server::serve(copy, router(), CONNECTIONS, over.clone(), tasks.clone()))),
        Err(error) => tracing::warn!(%error, "nobody is told of it"),
    }
    let log = loop {
        tokio::time::sleep(AGAIN).await;
        match store::open(location.clone()).await {
            Err(StoreError::InUse { .. }) => {}
            done => break done,
        }
    };
    over.cancel();
    tasks.close();
    tasks.wait().await;
    log
}

fn router() -> Router {
    let health = async || Json(json!({"status": "waiting", "version": env!("CARGO_PKG_VERSION")}));
    let wait = async || {
        let why = "another gateway still has the event log of this one: try again soon";
        let body = Json(
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "reason": "ServiceUnavailable", "message": why, "code": 503, "error": why}),
        );
        (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")], body).into_response()
    };
    Router::new().route("/health", get(health)).fallback(wait)
}
