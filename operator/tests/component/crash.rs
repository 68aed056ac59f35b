//! The operator dies at every write that it makes: before the API server has it, or after, with the answer lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use crds::Phase;
use futures::{StreamExt as _, future::BoxFuture, stream};
use http::{Method, Request};
use kube::{
    Client, ResourceExt as _,
    client::{Body, ClientBuilder},
};
use protocol::Outcome;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service};

use crate::{
    plane::{jobs_created, operator_config, operator_writes},
    world::{World, report, until},
};

/// Where it dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Before,
    After,
}

/// Ends the operator at a write. Leases and Events are not counted: nothing rests on them.
#[derive(Clone)]
struct Crash {
    at: Option<(usize, Moment)>,
    writes: Arc<AtomicUsize>,
    crashed: CancellationToken,
}

impl<S> Layer<S> for Crash {
    type Service = Crashing<S>;

    fn layer(&self, inner: S) -> Crashing<S> {
        Crashing {
            crash: self.clone(),
            inner,
        }
    }
}

struct Crashing<S> {
    crash: Crash,
    inner: S,
}

impl<S> Service<Request<Body>> for Crashing<S>
where
    S: Service<Request<Body>>,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        let counts = request.method() != Method::GET && !path.contains("/leases") && !path.contains("/events");
        let number = if counts {
            self.crash.writes.fetch_add(1, Ordering::SeqCst) + 1
        } else {
            0
        };
        let moment = self.crash.at.filter(|(at, _)| *at == number).map(|(_, moment)| moment);
        let crashed = self.crash.crashed.clone();
        // A dead process sends nothing more.
        if moment == Some(Moment::Before) || crashed.is_cancelled() {
            crashed.cancel();
            return Box::pin(std::future::pending());
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            if moment == Some(Moment::After) {
                crashed.cancel();
                std::future::pending::<()>().await;
            }
            answer
        })
    }
}

async fn client(namespace: &str, crash: &Crash) -> Client {
    ClientBuilder::try_from(operator_config(namespace).await)
        .unwrap()
        .with_layer(crash)
        .build()
}

/// A session whose first pod is deleted and whose second succeeds, under an operator that dies once; answers how many
/// writes the operator made before it died, or in all.
async fn live_through(namespace: String, at: Option<(usize, Moment)>) -> usize {
    let world = World::without_operator(&namespace).await;
    let crash = Crash {
        at,
        writes: Arc::default(),
        crashed: CancellationToken::new(),
    };
    let doomed = client(&namespace, &crash).await;
    let settings = world.settings();
    let operators = tokio::spawn({
        let (crash, namespace) = (crash.clone(), namespace.clone());
        async move {
            let never = CancellationToken::new;
            tokio::select! {
                ended = operator::run(doomed, settings.clone(), never()) => panic!("the operator ended: {ended:?}"),
                () = crash.crashed.cancelled() => {}
            }
            let next = Client::try_from(operator_config(&namespace).await).unwrap();
            operator::run(next, settings, never()).await.unwrap();
        }
    });

    world.create("poem", json!({"prompt": "write a poem"})).await;
    let first = world.pod("poem", 1).await;
    world.status_when("poem", |s| s.pod_uid == first.uid()).await;
    world.start(&first).await;
    world.phase("poem", Phase::Running).await;
    world.delete_pod(&first, Some(&report(Outcome::Stopped, 1))).await;
    let second = world.pod("poem", 2).await;
    world.status_when("poem", |s| s.pod_uid == second.uid()).await;
    world.start(&second).await;
    world.phase("poem", Phase::Running).await;
    world.end(&second, 4, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world.phase("poem", Phase::Completed).await;
    until("the finalizers to go", async || {
        let gone = world.pod_now(&first).await.is_none();
        let free = world
            .pod_now(&second)
            .await
            .is_none_or(|pod| pod.finalizers().is_empty());
        (gone && free).then_some(())
    })
    .await;

    assert_eq!(jobs_created(&namespace), ["poem-job", "poem-job-2"], "{at:?}");
    assert_eq!(
        (done.attempt, done.run, done.running_seconds),
        (Some(2), Some(1), Some(11)),
        "{at:?}"
    );
    let claims = operator_writes(&namespace)
        .into_iter()
        .filter(|write| write["objectRef"]["resource"] == "persistentvolumeclaims")
        .count();
    assert_eq!(claims, 1, "{at:?}");
    assert_eq!(
        crash.crashed.is_cancelled(),
        at.is_some(),
        "it died where it should: {at:?}"
    );
    operators.abort();
    crash.writes.load(Ordering::SeqCst)
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_the_operator_dies_each_attempt_has_one_job_and_the_session_completes() {
    let writes = live_through("crash-never".to_owned(), None).await;
    assert!((10..=16).contains(&writes), "{writes} writes");
    let deaths = (1..=writes).flat_map(|at| [(at, Moment::Before), (at, Moment::After)]);
    stream::iter(deaths)
        .map(|(at, moment)| {
            let namespace = format!("crash-{}-{at}", format!("{moment:?}").to_lowercase());
            live_through(namespace, Some((at, moment)))
        })
        .buffer_unordered(14)
        .for_each(|_| async {})
        .await;
}
