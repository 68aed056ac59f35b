//! What stands between an operator and its API server: a layer of its client that lets requests through, holds them up, answers
//! in the server's place, or loses answers.

use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, DynBody, retry::RetryPolicy},
};
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Layer, Service, buffer::BufferLayer, retry::RetryLayer};

/// What becomes of a request.
pub enum Fate {
    /// It is sent, and answered.
    Pass,
    /// It is not sent, and never answered.
    Silence,
    /// It is sent; when it is carried out, this is told, and the answer never arrives.
    Unheard(CancellationToken),
    /// It is sent; the answer arrives as this status.
    Garbled(StatusCode),
    /// It is not sent; this is the answer.
    Instead(Answer),
    /// It is sent; the connection is reset before the answer arrives, or, if not even that, before it is sent.
    Reset {
        /// Whether it is sent.
        sent: bool,
    },
    /// It is sent; what arrives of the answer's body is up to this.
    Through(Change),
}

/// What becomes of an answer.
pub type Change = Box<dyn FnOnce(Answer) -> Answer + Send>;

/// An answer of the API server.
pub type Answer = Response<Box<DynBody>>;

/// Decides about requests.
pub trait Wire: Clone + Send + Sync + 'static {
    /// What becomes of this one.
    fn fate(&self, request: &Request<Body>) -> Fate;
}

/// A client whose every request, those of its own retries too, goes over the wire.
pub fn client(mut config: Config, wire: impl Wire) -> Client {
    config.default_retry = false;
    ClientBuilder::try_from(config)
        .unwrap()
        .with_layer(&Wired(wire))
        // Retries are made of clones.
        .with_layer(&BufferLayer::new(1_024))
        .with_layer(&RetryLayer::new(RetryPolicy::server_retry()))
        .build()
}

/// A client of which the wire sees each request once, whatever its retries do.
pub fn client_above_retries(config: Config, wire: impl Wire) -> Client {
    ClientBuilder::try_from(config)
        .unwrap()
        .with_layer(&Wired(wire))
        .build()
}

/// Whether a request writes something that the state of sessions rests on: neither Events nor the lease do.
pub fn is_write(request: &Request<Body>) -> bool {
    let path = request.uri().path();
    request.method() != http::Method::GET && !path.contains("/leases") && !path.contains("/events")
}

/// Whether a request is a watch.
pub fn is_watch(request: &Request<Body>) -> bool {
    request.uri().query().is_some_and(|query| query.contains("watch=true"))
}

struct Wired<W>(W);

impl<S, W: Wire> Layer<S> for Wired<W> {
    type Service = OnWire<S, W>;

    fn layer(&self, inner: S) -> OnWire<S, W> {
        OnWire {
            wire: self.0.clone(),
            inner,
        }
    }
}

#[derive(Clone)]
struct OnWire<S, W> {
    wire: W,
    inner: S,
}

impl<S, W: Wire> Service<Request<Body>> for OnWire<S, W>
where
    S: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<Box<DynBody>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let fate = self.wire.fate(&request);
        match fate {
            Fate::Pass => Box::pin(self.inner.call(request)),
            Fate::Silence => Box::pin(std::future::pending()),
            Fate::Instead(answer) => Box::pin(async { Ok(answer) }),
            Fate::Reset { sent: false } => Box::pin(async { Err(reset()) }),
            Fate::Reset { sent: true } => {
                let answer = self.inner.call(request);
                Box::pin(async {
                    let _ = answer.await;
                    Err(reset())
                })
            }
            Fate::Unheard(told) => {
                let answer = self.inner.call(request);
                Box::pin(async move {
                    let _ = answer.await;
                    told.cancel();
                    std::future::pending().await
                })
            }
            Fate::Garbled(status) => {
                let answer = self.inner.call(request);
                Box::pin(async move {
                    let mut answer = answer.await?;
                    *answer.status_mut() = status;
                    Ok(answer)
                })
            }
            Fate::Through(change) => {
                let answer = self.inner.call(request);
                Box::pin(async move { Ok(change(answer.await?)) })
            }
        }
    }
}

fn reset() -> BoxError {
    std::io::Error::new(std::io::ErrorKind::ConnectionReset, "connection reset by the test").into()
}
