//! A pod ends with its runner: nobody waits for a grace period.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use kube::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use protocol::names::{USER_ID, container, label};
use serde_json::json;
use tokio::time;

use crate::harness::command::apply;
use crate::harness::scene::marker;
use crate::harness::wait::SOON;
use crate::harness::{SHELL_IMAGE, Scene, disturbing};

const SESSIONS: usize = 10;

/// How long a pod outlived its runner.
struct Tail {
    /// Until the last of its containers had ended. The kubelet gives both ends in whole seconds.
    containers: Duration,
    /// Until a watch saw the pod as terminal. The kubelet looks at its containers once a second, and more than once before it
    /// says so; what of it is the kubelet's own, a pod of one container shows.
    phase: Duration,
}

async fn tail_of_session(scene: &Scene, name: &str) -> Result<Tail> {
    scene.create(name, &marker(), &json!([{ "text": "Done." }])).await?;
    tail(scene, &format!("{}={name}", label::SESSION), container::RUNNER).await
}

/// What the kubelet takes for a pod of one container and nothing to stop: what no pod can do better than.
async fn tail_of_plain_pod(scene: &Scene, name: &str) -> Result<Tail> {
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "plain": name } },
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false,
            "securityContext": { "runAsUser": USER_ID, "runAsNonRoot": true,
                "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{ "name": "plain", "image": SHELL_IMAGE, "imagePullPolicy": "IfNotPresent", "command": ["true"],
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } } }],
        },
    });
    apply(&scene.namespace, &manifest.to_string()).await?;
    tail(scene, &format!("plain={name}"), "plain").await
}

async fn tail(scene: &Scene, labels: &str, main: &str) -> Result<Tail> {
    let pods: Api<Pod> = Api::namespaced(scene.client.clone(), &scene.namespace);
    let config = watcher::Config::default().labels(labels);
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
    let (status, seen) = end.with_context(|| format!("no end of {labels} within {SOON:?}"))??;
    let runner = ended(&status, main)?;
    let last = all(&status).filter_map(finished).max().unwrap_or(runner);
    let since = |time: Timestamp| Duration::try_from(time.duration_since(runner)).context("an end before the runner's");
    Ok(Tail {
        containers: since(last)?,
        phase: since(seen)?,
    })
}

fn all(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .flatten()
}

fn finished(container: &ContainerStatus) -> Option<Timestamp> {
    Some(container.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()?.0)
}

fn ended(status: &PodStatus, name: &str) -> Result<Timestamp> {
    all(status)
        .find(|container| container.name == name)
        .and_then(finished)
        .with_context(|| format!("container {name} of a terminal pod has no end"))
}

fn sorted(tails: &[Tail], of: fn(&Tail) -> Duration) -> Vec<Duration> {
    let mut all: Vec<_> = tails.iter().map(of).collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_pod_ends_soon_after_its_runner() -> Result<()> {
    // Alone, because it is about time.
    disturbing("endings", async |scene| {
        let (mut sessions, mut plain) = (Vec::new(), Vec::new());
        for number in 0..SESSIONS {
            sessions.push(tail_of_session(scene, &format!("short-{number}")).await?);
            plain.push(tail_of_plain_pod(scene, &format!("plain-{number}")).await?);
        }
        let containers = sorted(&sessions, |tail| tail.containers);
        let (phases, plain) = (sorted(&sessions, |tail| tail.phase), sorted(&plain, |tail| tail.phase));
        eprintln!(
            "from the runner's end to the last container's: {containers:?}\nto the pod's phase: {phases:?}\n\
             the same of a pod of one container: {plain:?}"
        );
        ensure!(
            containers[SESSIONS / 2] <= Duration::from_secs(2),
            "the median: {containers:?}"
        );
        // One of them may have met with a busy moment; what is wrong is a minute.
        ensure!(
            containers[SESSIONS - 1] <= Duration::from_secs(15),
            "the longest: {containers:?}"
        );
        // Whole seconds of the runner's end and what any pod takes are in these. A sidecar that ignores SIGTERM would make
        // it the whole grace period, a minute.
        ensure!(
            phases[SESSIONS / 2] <= plain[SESSIONS / 2] + Duration::from_secs(2),
            "the phase: {phases:?}, and of a pod of one container: {plain:?}"
        );
        Ok(())
    })
    .await
}
