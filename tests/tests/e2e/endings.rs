//! A pod ends with its runner: nobody waits for a grace period.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use protocol::names::container;
use serde_json::json;
use tokio::time;

use crate::harness::scene::marker;
use crate::harness::wait::SOON;
use crate::harness::{Keys, Scene, scene};

const SESSIONS: usize = 10;

/// From the end of the runner to the moment at which everybody sees the pod as terminal. The kubelet gives the first in whole
/// seconds, rounded down, so the truth is up to a second less.
async fn tail(scene: &Scene, name: &str) -> Result<Duration> {
    let pods: Api<Pod> = Api::namespaced(scene.client.clone(), &scene.namespace);
    let config = watcher::Config::default().labels(&format!("vteam.ambient-code/session={name}"));
    scene.create(name, &marker(), &json!([{ "text": "Done." }])).await?;
    let mut changes = Box::pin(watcher(pods, config).applied_objects());
    let watching = async {
        while let Some(change) = changes.next().await {
            let pod = change?;
            let status = pod.status.unwrap_or_default();
            if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
                let ended = ended(&status.container_statuses.unwrap_or_default()).context("the runner has no end")?;
                return Duration::try_from(Timestamp::now().duration_since(ended)).context("an end in the future");
            }
        }
        anyhow::bail!("the watch ended")
    };
    time::timeout(SOON, watching)
        .await
        .with_context(|| format!("no end of {name} within {SOON:?}"))?
}

fn ended(containers: &[ContainerStatus]) -> Option<Timestamp> {
    let runner = containers.iter().find(|status| status.name == container::RUNNER)?;
    Some(runner.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()?.0)
}

#[tokio::test]
async fn a_pod_is_terminal_soon_after_its_runner() -> Result<()> {
    scene("endings", Keys::Good, async |scene| {
        let names: Vec<_> = (0..SESSIONS).map(|number| format!("short-{number}")).collect();
        let tails = futures::stream::iter(&names)
            .map(|name| tail(scene, name))
            .buffer_unordered(2);
        let mut tails: Vec<_> = tails.collect::<Vec<_>>().await.into_iter().collect::<Result<_>>()?;
        tails.sort();
        eprintln!("from the runner's end to the pod's: {tails:?}");
        ensure!(tails[SESSIONS / 2] <= Duration::from_secs(2), "the median: {tails:?}");
        ensure!(tails[SESSIONS - 1] <= Duration::from_secs(4), "the longest: {tails:?}");
        Ok(())
    })
    .await
}
