//! Counts what the operator writes, where it leaves for the API server, and takes the time from its answers.

use std::task::{self, Poll};

use futures::future::BoxFuture;
use http::{Method, Request, Response};
use kube::{
    Client,
    client::{Body, ClientBuilder},
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tower::{BoxError, Service};

use crate::clock::Clock;

/// Labels of a write.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    verb: &'static str,
    kind: &'static str,
}

/// Writes that were answered with success, by verb and kind.
pub type Writes = Family<Call, Counter>;

/// A client and the counter of its writes.
pub struct Counted {
    /// The client.
    pub client: Client,
    /// What it wrote.
    pub writes: Writes,
    /// This machine's clock, and the API server's.
    pub clock: Clock,
}

impl Counted {
    /// Counts in the client's own stack. Around a client it costs a second queue, and with it two switches of tasks a request.
    pub fn build<S, B>(builder: ClientBuilder<S>) -> Self
    where
        S: Service<Request<Body>, Response = Response<B>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError> + Send + 'static,
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Self::by(builder, Clock::default())
    }

    fn by<S, B>(builder: ClientBuilder<S>, clock: Clock) -> Self
    where
        S: Service<Request<Body>, Response = Response<B>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError> + Send + 'static,
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let writes = Writes::default();
        let layer = Layer {
            writes: writes.clone(),
            clock: clock.clone(),
        };
        let client = builder.with_layer(&layer).build();
        Self { client, writes, clock }
    }
}

impl From<Client> for Counted {
    fn from(client: Client) -> Self {
        Self::around(client, Clock::default())
    }
}

impl Counted {
    /// Around a client that is built, by a clock in the place of this machine's.
    pub fn around(client: Client, clock: Clock) -> Self {
        let namespace = client.default_namespace().to_owned();
        let around = tower::service_fn(move |request| {
            let client = client.clone();
            async move { client.send(request).await }
        });
        Self::by(ClientBuilder::new(around, namespace), clock)
    }
}

struct Layer {
    writes: Writes,
    clock: Clock,
}

impl<S> tower::Layer<S> for Layer {
    type Service = Counting<S>;

    fn layer(&self, inner: S) -> Counting<S> {
        Counting {
            inner,
            writes: self.writes.clone(),
            clock: self.clock.clone(),
        }
    }
}

#[derive(Clone)]
struct Counting<S> {
    inner: S,
    writes: Writes,
    clock: Clock,
}

impl<S, B> Service<Request<Body>> for Counting<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let call = call(request.method(), request.uri().path());
        let (answer, writes, clock) = (self.inner.call(request), self.writes.clone(), self.clock.clone());
        Box::pin(async move {
            let answer = answer.await?;
            clock.hear(answer.headers());
            if let Some(call) = call.filter(|_| answer.status().is_success()) {
                writes.get_or_create(&call).inc();
            }
            Ok(answer)
        })
    }
}

/// What a request writes; `None` of one that reads. Both labels are of few values.
fn call(method: &Method, path: &str) -> Option<Call> {
    let verb = match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => return None,
    };
    let known = [
        ("agenticsessions", "AgenticSession"),
        ("jobs", "Job"),
        ("pods", "Pod"),
        ("persistentvolumeclaims", "PersistentVolumeClaim"),
        ("networkpolicies", "NetworkPolicy"),
        ("events", "Event"),
        ("leases", "Lease"),
        ("deployments", "Deployment"),
    ];
    // Behind `/namespaces/<name>/`: what a namespace is called must not count.
    let resource = path
        .split("/namespaces/")
        .nth(1)
        .and_then(|rest| rest.split('/').nth(1));
    let kind = known
        .iter()
        .find(|(plural, _)| resource == Some(*plural))
        .map_or("other", |(_, kind)| kind);
    Some(Call { verb, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_told_by_its_resource_and_not_by_names() {
        let of = |method, path| call(&method, path).map(|call| (call.verb, call.kind));
        let status = "/apis/vteam.ambient-code/v1alpha1/namespaces/pods/agenticsessions/jobs/status";
        assert_eq!(of(Method::PATCH, status), Some(("patch", "AgenticSession")));
        assert_eq!(
            of(Method::POST, "/apis/batch/v1/namespaces/a/jobs"),
            Some(("create", "Job"))
        );
        assert_eq!(of(Method::GET, "/apis/batch/v1/namespaces/a/jobs"), None);
    }
}
