//! A gateway that cannot have its log yet: another one still has the file, such as the one that it takes the place of, or the
//! database is away.

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

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    /// Another gateway's end. Whoever replaces it by this one must go on, so this one says that it is ready.
    Gateway,
    /// The database. Others may have it already, so requests are for them.
    Database,
}

impl For {
    fn of(error: &StoreError) -> Option<Self> {
        match error {
            StoreError::InUse { .. } => Some(Self::Gateway),
            error => error.is_away().then_some(Self::Database),
        }
    }

    fn health(self) -> StatusCode {
        match self {
            Self::Gateway => StatusCode::OK,
            Self::Database => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn said(self) -> &'static str {
        match self {
            Self::Gateway => "another gateway has the event log: waiting for its end",
            Self::Database => "the database of the event log is away: waiting for it",
        }
    }

    fn why(self) -> &'static str {
        match self {
            Self::Gateway => "another gateway still has the event log of this one: try again soon",
            Self::Database => "the database of the event log is away: try again soon",
        }
    }
}

/// Opens the log, when it can be had. Until then `listener` says what is waited for, and that the process is alive.
pub async fn open(location: Location, listener: &TcpListener) -> Result<Arc<dyn EventLog>, StoreError> {
    let mut failed = match store::open(location.clone()).await {
        Ok(log) => return Ok(log),
        Err(error) => error,
    };
    while let Some(waiting) = For::of(&failed) {
        tracing::warn!(log = ?location, error = %failed, "{}", waiting.said());
        let (over, tasks) = (CancellationToken::new(), TaskTracker::new());
        let copy = listener.as_fd().try_clone_to_owned().map(std::net::TcpListener::from);
        match copy.and_then(TcpListener::from_std) {
            Ok(copy) => {
                let serving = server::serve(copy, router(waiting), CONNECTIONS, over.clone(), tasks.clone());
                drop(tasks.spawn(serving));
            }
            Err(error) => tracing::warn!(%error, "nobody is told of it"),
        }
        let opened = loop {
            tokio::time::sleep(AGAIN).await;
            match store::open(location.clone()).await {
                Err(error) if For::of(&error) == Some(waiting) => {}
                done => break done,
            }
        };
        over.cancel();
        tasks.close();
        tasks.wait().await;
        match opened {
            Ok(log) => return Ok(log),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Does something with a database, again while that is away.
pub async fn until_there<T>(work: impl AsyncFn() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let mut told = false;
    loop {
        match work().await {
            Err(error) if error.is_away() => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "waiting for the database");
                }
                tokio::time::sleep(AGAIN).await;
            }
            done => return done,
        }
    }
}

fn router(waiting: For) -> Router {
    let health = async move || {
        let body = Json(json!({"status": "waiting", "version": env!("CARGO_PKG_VERSION")}));
        (waiting.health(), body).into_response()
    };
    let wait = async move || {
        let why = waiting.why();
        let body = Json(
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "reason": "ServiceUnavailable", "message": why, "code": 503, "error": why}),
        );
        (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")], body).into_response()
    };
    Router::new()
        .route("/health", get(health))
        .route("/live", get(async || Json(json!({"status": "alive"}))))
        .fallback(wait)
}
