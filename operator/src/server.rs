//! `/metrics`, `/healthz`, `/readyz`.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::context::Context;

/// Connections at most. Anybody in the cluster may open some, agents too, and each takes memory.
const MOST: usize = 256;
/// How long a request's headers may take.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection may take as a whole: it is for one request.
const LONGEST: Duration = Duration::from_secs(30);
/// Bytes of a request's headers at most.
const MAX_HEADERS: usize = 16 << 10;

/// What the operator still waits for; empty when it is ready.
pub type Readiness = watch::Receiver<Option<String>>;

#[derive(Clone)]
struct Shared {
    context: Arc<Context>,
    waiting_for: Readiness,
}

/// Serves until `stop`, and ends at once then: nobody needs the answers of a process that ends.
pub async fn serve(listener: TcpListener, context: Arc<Context>, waiting_for: Readiness, stop: CancellationToken) {
    let router = Router::new()
        // That it answers is all that liveness means: a restart would not bring an API server back.
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Shared { context, waiting_for });
    tokio::select! {
        () = accept(listener, router, HEADERS_WITHIN) => {}
        () = stop.cancelled() => {}
    }
}

async fn accept(listener: TcpListener, router: Router, headers_within: Duration) {
    let mut open = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Mostly: no file descriptor is free.
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        open.retain(|connection: &AbortOnDropHandle<()>| !connection.is_finished());
        if open.len() >= MOST {
            // The oldest gives way: the kubelet's probe gets in however many others hold connections.
            open.pop_front();
        }
        let answer = answer(stream, router.clone(), headers_within);
        open.push_back(AbortOnDropHandle::new(tokio::spawn(answer)));
    }
}

async fn answer(stream: TcpStream, router: Router, headers_within: Duration) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(headers_within)
        .max_buf_size(MAX_HEADERS)
        .keep_alive(false);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // How a client ends is its own affair.
    let _ = timeout(LONGEST, connection).await;
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
        shared
            .context
            .metrics
            .text(&shared.context.memory, &shared.context.queue),
    )
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_probe_is_answered_however_many_connections_say_nothing() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/healthz", get(async || "ok\n"));
        let _server = AbortOnDropHandle::new(tokio::spawn(accept(listener, router, LONGEST)));
        let mut silent = Vec::new();
        for _ in 0..MOST + 10 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
            silent.push(stream);
        }
        let mut probe = TcpStream::connect(address).await.unwrap();
        probe
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: operator\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        probe.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("ok\n"),
            "{answer}"
        );
        // The oldest of the others was cut off for it, and not the newest.
        let cut = silent[0].read(&mut [0; 64]).await;
        assert!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
        let newest = silent.last().unwrap().try_read(&mut [0; 64]);
        assert_eq!(newest.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}
