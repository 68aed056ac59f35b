//! Any process may die at any line, and the next start goes on.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use crds::Phase;
use serde_json::json;

use crate::events::complete_log;
use crate::harness::client::Gateway;
use crate::harness::command::kubectl;
use crate::harness::kill::{came_back, kill};
use crate::harness::mock::Mock;
use crate::harness::scene::marker;
use crate::harness::wait::{SOON, until};
use crate::harness::{SYSTEM, Scene, audit, disturbing};

fn each_job_was_made_once(scene: &Scene, expected: &[&str]) -> Result<()> {
    let made = audit::jobs_created(&scene.namespace)?;
    let expected: BTreeMap<_, _> = expected.iter().map(|name| ((*name).to_owned(), 1)).collect();
    ensure!(made == expected, "the audit log has {made:?}");
    Ok(())
}

#[tokio::test]
async fn a_session_outlives_the_kill_of_operator_and_gateway() -> Result<()> {
    disturbing("kills", async |scene| {
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([
            { "text": "First.", "tools": [{ "name": "Bash", "input": { "command": "echo one >> runs.txt" } }] },
            { "text": "Second.", "hold": marker },
        ]);
        scene.create("survivor", &marker, &steps).await?;
        mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        scene.phase("survivor", Phase::Running).await?;

        let (operator, gateway) = (
            kill(SYSTEM, "agentic-operator").await?,
            kill(SYSTEM, "agentic-gateway").await?,
        );
        // The session ends while both are on their way back.
        mock.release(&marker).await?;
        came_back(SYSTEM, "agentic-operator", &operator).await?;
        came_back(SYSTEM, "agentic-gateway", &gateway).await?;

        let status = scene.phase("survivor", Phase::Completed).await?;
        ensure!(
            status.attempt == Some(1) && status.result.as_deref() == Some("Second."),
            "{status:#?}"
        );
        each_job_was_made_once(scene, &["survivor-job"])?;
        mock.prompt_was_given_once(&marker).await?;
        everything_arrived(scene, "survivor").await
    })
    .await
}

#[tokio::test]
async fn a_pod_deleted_while_the_operator_is_down_is_followed_by_a_second_attempt() -> Result<()> {
    disturbing("deleted", async |scene| {
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([
            { "text": "First.", "tools": [{ "name": "Bash", "input": { "command": "echo one >> runs.txt" } }] },
            { "text": "Second.", "hold": marker },
        ]);
        scene.create("phoenix", &marker, &steps).await?;
        mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let pod = scene
            .phase("phoenix", Phase::Running)
            .await?
            .pod_name
            .context("no pod in status")?;

        kill(SYSTEM, "agentic-operator").await?;
        kubectl(&["scale", "-n", SYSTEM, "deployment/agentic-operator", "--replicas=0"]).await?;
        let deleted = delete_without_operator(scene, &pod).await;
        // Whatever came of it, the tests after this one want their operator back.
        kubectl(&["scale", "-n", SYSTEM, "deployment/agentic-operator", "--replicas=1"]).await?;
        kubectl(&[
            "rollout",
            "status",
            "-n",
            SYSTEM,
            "deployment/agentic-operator",
            "--timeout=120s",
        ])
        .await?;
        deleted?;

        // The second attempt asks again for the answer that the first did not get.
        mock.request(&marker, SOON, |request| {
            request.step == Some(1) && request.end.is_none()
        })
        .await?;
        mock.release(&marker).await?;
        let status = scene.phase("phoenix", Phase::Completed).await?;
        ensure!(
            status.attempt == Some(2) && status.result.as_deref() == Some("Second."),
            "{status:#?}"
        );
        each_job_was_made_once(scene, &["phoenix-job", "phoenix-job-2"])?;
        mock.prompt_was_given_once(&marker).await?;
        everything_arrived(scene, "phoenix").await
    })
    .await
}

async fn delete_without_operator(scene: &Scene, pod: &str) -> Result<()> {
    let operators = [
        "get",
        "pods",
        "-n",
        SYSTEM,
        "-l",
        "app.kubernetes.io/name=agentic-operator",
        "-o",
        "name",
    ];
    until("the operator to be gone", SOON, async || {
        Ok(kubectl(&operators).await?.is_empty().then_some(()))
    })
    .await?;
    scene.kubectl(&["delete", "pod", pod, "--wait=false"]).await?;
    until("the deleted pod to be terminal", SOON, async || {
        let phase = scene
            .kubectl(&["get", "pod", pod, "-o", "jsonpath={.status.phase}"])
            .await?;
        Ok((phase == "Failed" || phase == "Succeeded").then_some(()))
    })
    .await?;
    let finalizers = scene
        .kubectl(&["get", "pod", pod, "-o", "jsonpath={.metadata.finalizers}"])
        .await?;
    ensure!(
        finalizers.contains(protocol::names::REPORT_FINALIZER),
        "the pod waits for the operator: {finalizers}"
    );
    Ok(())
}

/// No record is missing at the gateway, and the numbers in status agree.
async fn everything_arrived(scene: &Scene, name: &str) -> Result<()> {
    let gateway = Gateway::reach(scene).await?;
    let log = complete_log(&gateway, name).await?;
    let status = scene.status(name).await?;
    ensure!(
        status.last_seq == Some(log.len() as u64),
        "{:?} of {} records",
        status.last_seq,
        log.len()
    );
    ensure!(
        status.acked_seq == status.last_seq,
        "{:?} of {:?} acknowledged",
        status.acked_seq,
        status.last_seq
    );
    Ok(())
}

#[tokio::test]
async fn what_a_run_left_on_its_volume_is_delivered_when_the_gateway_is_back() -> Result<()> {
    disturbing("drained", async |scene| {
        let gateway = ["scale", "-n", SYSTEM, "statefulset/agentic-gateway"];
        kubectl(&[&gateway[..], &["--replicas=0"]].concat()).await?;
        let ended = end_without_gateway(scene).await;
        kubectl(&[&gateway[..], &["--replicas=1"]].concat()).await?;
        let rollout = [
            "rollout",
            "status",
            "-n",
            SYSTEM,
            "statefulset/agentic-gateway",
            "--timeout=120s",
        ];
        kubectl(&rollout).await?;
        ended?;

        until("the drain to deliver", SOON, async || {
            Ok(delivered(scene, "True").await?.then_some(()))
        })
        .await?;
        everything_arrived(scene, "cut-off").await?;
        let made = audit::jobs_created(&scene.namespace)?;
        ensure!(
            made.keys().any(|job| job.starts_with("cut-off-drain-")),
            "it came by a Job of its own: {made:?}"
        );
        Ok(())
    })
    .await
}

/// A session that ends while there is no gateway: its work is done, and its records are said to be undelivered.
async fn end_without_gateway(scene: &Scene) -> Result<()> {
    scene
        .create("cut-off", &marker(), &json!([{ "text": "Done." }]))
        .await?;
    let status = scene.phase("cut-off", Phase::Completed).await?;
    ensure!(status.result.as_deref() == Some("Done."), "{status:#?}");
    ensure!(
        status.acked_seq.unwrap_or_default() == 0 && status.last_seq.unwrap_or_default() > 0,
        "{status:#?}"
    );
    until("it to be said", SOON, async || {
        Ok(delivered(scene, "False").await?.then_some(()))
    })
    .await
}

async fn delivered(scene: &Scene, wanted: &str) -> Result<bool> {
    let status = scene.status("cut-off").await?;
    let told = status
        .conditions
        .iter()
        .find(|told| told.type_ == crds::condition::EVENTS_DELIVERED);
    Ok(told.is_some_and(|told| told.status == wanted))
}
