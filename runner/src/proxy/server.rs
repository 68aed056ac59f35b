//! Accepts the agent's connections.

use std::{convert::Infallible, sync::Arc, time::Duration};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

use super::forward::{self, Shared};

/// Most connections at a time: whoever in the agent container opens more waits.
const MAX_CONNECTIONS: usize = 256;
/// How long to wait when no connection can be accepted (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = async {
        loop {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection of the agent");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = connection(stream, Arc::clone(&shared));
            let stop = stop.clone();
            tokio::spawn(async move {
                let _ = stop.run_until_cancelled(connection).await;
                drop(place);
            });
        }
    };
    let _ = stop.run_until_cancelled(accepting).await;
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) {
    // Small events must not wait for the next: what the proxy adds to the first token counts.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(forward::handle(shared, request).await) }
    });
    if let Err(error) = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await
    {
        tracing::debug!(%error, "a connection of the agent ended early");
    }
}
