//! Counts what the operator writes, where it leaves for the API server.

use std::task::{self, Poll};

use futures::future::BoxFuture;
use http::{Method, Request, Response};
use kube::{Client, client::Body};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tower::Service;

/// Labels of a write.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    verb: &'static str,
    kind: &'static str,
}

/// Writes that were answered with success, by verb and kind.
pub type Writes = Family<Call, Counter>;

/// A client whose writes are counted.
pub fn counted(client: Client, writes: Writes) -> Client {
    let namespace = client.default_namespace().to_owned();
    Client::new(Counting { client, writes }, namespace)
}

#[derive(Clone)]
struct Counting {
    client: Client,
    writes: Writes,
}

impl Service<Request<Body>> for Counting {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        // The inner client queues by itself.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let call = call(request.method(), request.uri().path());
        let Self { client, writes } = self.clone();
        Box::pin(async move {
            let answer = client.send(request).await?;
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
