//! A pod ends with its runner: nobody waits for a grace period.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use protocol::names::{container, label};
use serde_json::json;
use tokio::time;

use crate::harness::scene::marker;
use crate::harness::wait::SOON;
use crate::harness::{Scene, disturbing};

const SESSIONS: usize = 10;

/// How long a pod outlived its runner.
struct Tail {
    /// Until the last of its containers had ended. The kubelet gives both ends in whole seconds.
    containers: Duration,
    /// Until a watch saw the pod as terminal. The kubelet looks at its containers once a second, and three times before it says
    /// so: two to four seconds that are its own.
    phase: Duration,
}

async fn tail(scene: &Scene, name: &str) -> Result<Tail> {
    let pods: Api<Pod> = Api::namespaced(scene.client.clone(), &scene.namespace);
    let config = watcher::Config::default().labels(&format!("{}={name}", label::SESSION));
    scene.create(name, &marker(), &json!([{ "text": "Done." }])).await?;
    let mut changes = Box::pin(watcher(pods, config).applied_objects());
    let watching = async {
        while let Some(change) = changes.next().await {
            let status = change?.status.unwrap_or_default();
            if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
                return Ok((status, Timestamp::now()));
            }
        }
        bail!("the watch ended")
    };
    let end = time::timeout(SOON, watching).await;
    let (status, seen) = end.with_context(|| format!("no end of {name} within {SOON:?}"))??;
    let runner = ended(&status, container::RUNNER)?;
    let last = runner.max(ended(&status, container::AGENT)?);
    let since = |time: Timestamp| Duration::try_from(time.duration_since(runner)).context("an end before the runner's");
    Ok(Tail {
        containers: since(last)?,
        phase: since(seen)?,
    })
}

fn ended(status: &PodStatus, name: &str) -> Result<Timestamp> {
    let all = status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .flatten();
    let container = all.clone().find(|status| status.name == name);
    let state = container.and_then(|container| container.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref());
    Ok(state
        .with_context(|| format!("container {name} of a terminal pod has no end"))?
        .0)
}

#[tokio::test]
async fn a_pod_ends_soon_after_its_runner() -> Result<()> {
    // Alone, because it is about time.
    disturbing("endings", async |scene| {
        let names: Vec<_> = (0..SESSIONS).map(|number| format!("short-{number}")).collect();
        let tails = futures::stream::iter(&names)
            .map(|name| tail(scene, name))
            .buffer_unordered(2);
        let tails: Vec<_> = tails.collect::<Vec<_>>().await.into_iter().collect::<Result<_>>()?;
        let sorted = |of: fn(&Tail) -> Duration| {
            let mut all: Vec<_> = tails.iter().map(of).collect();
            all.sort();
            all
        };
        let (containers, phases) = (sorted(|tail| tail.containers), sorted(|tail| tail.phase));
        eprintln!("from the runner's end to the last container's: {containers:?}\nto the pod's phase: {phases:?}");
        ensure!(
            containers[SESSIONS / 2] <= Duration::from_secs(2),
            "the median: {containers:?}"
        );
        ensure!(
            containers[SESSIONS - 1] <= Duration::from_secs(4),
            "the longest: {containers:?}"
        );
        // A sidecar that ignores SIGTERM would make it the whole grace period, a minute.
        ensure!(phases[SESSIONS - 1] <= Duration::from_secs(10), "the phase: {phases:?}");
        Ok(())
    })
    .await
}
