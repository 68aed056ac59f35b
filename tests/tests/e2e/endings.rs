//! A pod ends with its runner: nobody waits for a grace period.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, ResourceExt as _};
use protocol::names::{container, label};
use serde_json::json;
use tokio::time;

use crate::harness::scene::marker;
use crate::harness::wait::SOON;
use crate::harness::{Scene, disturbing};

const SESSIONS: usize = 10;

/// From the end of the runner to the moment at which everybody sees the pod as terminal.
async fn tail(scene: &Scene, name: &str) -> Result<Duration> {
    let pods: Api<Pod> = Api::namespaced(scene.client.clone(), &scene.namespace);
    let config = watcher::Config::default().labels(&format!("{}={name}", label::SESSION));
    scene.create(name, &marker(), &json!([{ "text": "Done." }])).await?;
    let mut changes = Box::pin(watcher(pods, config).applied_objects());
    let watching = async {
        while let Some(change) = changes.next().await {
            let pod = change?;
            if pod
                .status
                .as_ref()
                .is_some_and(|status| matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")))
            {
                return Ok((pod, Timestamp::now()));
            }
        }
        bail!("the watch ended")
    };
    let end = time::timeout(SOON, watching).await;
    let (pod, seen) = end.with_context(|| format!("no end of {name} within {SOON:?}"))??;
    Duration::try_from(seen.duration_since(ended(scene, &pod).await?)).context("an end in the future")
}

/// When the runner ended, or a little before: the kubelet rounds down to a second, and the runner's last line comes before the
/// last acknowledgement. The later of both is the closer one.
async fn ended(scene: &Scene, pod: &Pod) -> Result<Timestamp> {
    let containers = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let runner = containers.and_then(|all| all.iter().find(|status| status.name == container::RUNNER));
    let state = runner.and_then(|runner| runner.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref());
    let rounded = state.context("the runner has no end")?.0;
    let arguments = [
        "logs",
        &pod.name_any(),
        "-c",
        container::RUNNER,
        "--timestamps",
        "--tail=1",
    ];
    let line = scene.kubectl(&arguments).await?;
    let said: Timestamp = line
        .split_whitespace()
        .next()
        .context("the runner said nothing")?
        .parse()?;
    Ok(rounded.max(said))
}

#[tokio::test]
async fn a_pod_is_terminal_soon_after_its_runner() -> Result<()> {
    // Alone, because it is about time.
    disturbing("endings", async |scene| {
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
