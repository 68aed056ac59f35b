//! HTTP on a listener, with limits that a single client cannot lift, and an end that cuts nobody off.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

/// How long a request's headers may take.
const HEADERS_WITHIN: Duration = Duration::from_secs(10);
/// How long a TLS handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of a request's headers at most; each connection may hold as many.
const MAX_HEADERS: usize = 16 << 10;
/// Milliseconds after which a peer that takes nothing is cut off.
const UNREAD_MILLIS: u32 = 60_000;

/// A connection's place among those allowed, in the extensions of its requests. Who takes the connection over keeps it.
#[derive(Clone, Debug)]
pub struct Place(#[expect(dead_code, reason = "its drop frees the place")] Arc<OwnedSemaphorePermit>);

/// In the extensions of requests that came with TLS.
#[derive(Clone, Copy, Debug)]
pub struct Secure;

/// Serves until `shutdown`, then lets the requests under way end. Sockets taken over and streams watch `shutdown` themselves.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    max_connections: usize,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    accept(listener, None, router, max_connections, shutdown, tasks).await;
}

/// [`serve`] with TLS.
pub async fn serve_tls(
    listener: TcpListener,
    tls: TlsAcceptor,
    router: Router,
    max_connections: usize,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    let router = router.layer(axum::Extension(Secure));
    accept(listener, Some(tls), router, max_connections, shutdown, tasks).await;
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    max_connections: usize,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    let places = Arc::new(Semaphore::new(max_connections));
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.ok()?;
            Some((listener.accept().await, place))
        };
        let (accepted, place) = tokio::select! {
            Some(accepted) = accepted => accepted,
            () = shutdown.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Mostly: no file descriptor is free. Connections that end will free some.
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Small frames leave at once. The kernel ends what nobody reads: HTTP has no limit of its own for that.
        let _ = stream.set_nodelay(true);
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, UNREAD_MILLIS);
        let (tls, router, place, shutdown) = (tls.clone(), router.clone(), Place(Arc::new(place)), shutdown.clone());
        tasks.spawn(async move {
            let Some(tls) = tls else {
                return connection(stream, router, place, shutdown).await;
            };
            match tokio::time::timeout(HANDSHAKE_WITHIN, tls.accept(stream)).await {
                Ok(Ok(stream)) => connection(stream, router, place, shutdown).await,
                Ok(Err(error)) => tracing::debug!(%error, "no TLS"),
                Err(_) => {}
            }
        });
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    place: Place,
    shutdown: CancellationToken,
) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .max_buf_size(MAX_HEADERS);
    let service = hyper::service::service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(place.clone());
        router.clone().oneshot(request)
    });
    let connection = http.serve_connection(TokioIo::new(stream), service).with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
