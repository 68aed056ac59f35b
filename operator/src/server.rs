//! `/metrics`, `/healthz`, `/readyz`.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::context::Context;

/// What the operator still waits for; empty when it is ready.
pub type Readiness = watch::Receiver<Option<String>>;

#[derive(Clone)]
struct Shared {
    context: Arc<Context>,
    waiting_for: Readiness,
}

/// Serves until `stop`.
pub async fn serve(
    listener: TcpListener,
    context: Arc<Context>,
    waiting_for: Readiness,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        // That it answers is all that liveness means: a restart would not bring an API server back.
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Shared { context, waiting_for });
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn readyz(State(shared): State<Shared>) -> (StatusCode, String) {
    match &*shared.waiting_for.borrow() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(what) => (StatusCode::SERVICE_UNAVAILABLE, format!("{what}\n")),
    }
}

async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (
        [(header::CONTENT_TYPE, openmetrics)],
        shared.context.metrics.text(&shared.context.memory),
    )
}
