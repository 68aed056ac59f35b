//! What a test does to pods in the place of scheduler and kubelet.

use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use operator::TimingSettings;
use protocol::{Outcome, Report, names::label};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{POLL, World, report, until};
use crate::plane::NODE;

/// Ends with its owner.
pub struct Kubelet(JoinHandle<()>);

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl World {
    /// A kubelet that obeys: deleted pods are stopped with `report`, and go when nothing holds them.
    pub fn kubelet(&self) -> Kubelet {
        let (client, namespace) = (self.client.clone(), self.namespace.clone());
        let task = tokio::spawn(async move {
            let world = Self {
                client,
                namespace,
                metrics: ([127, 0, 0, 1], 0).into(),
                timing: TimingSettings::default(),
                egress: None,
                operator: None,
            };
            loop {
                // Also after a failure: at the end of the test's runtime every request fails at once, and the task must yield to end.
                tokio::time::sleep(POLL * 2).await;
                let Ok(pods) = world.pods().list(&ListParams::default()).await else {
                    continue;
                };
                for pod in pods
                    .items
                    .iter()
                    .filter(|pod| pod.metadata.deletion_timestamp.is_some())
                {
                    world.stop(pod).await;
                }
            }
        });
        Kubelet(task)
    }

    /// The kubelet's part in a deletion, as far as it is not done.
    async fn stop(&self, pod: &Pod) {
        let status = pod.status.clone().unwrap_or_default();
        if !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            let runner = status.container_statuses.into_iter().flatten().next();
            let ran = runner.and_then(|c| c.state?.running).is_some();
            let attempt = pod.labels().get(label::ATTEMPT).and_then(|n| n.parse().ok());
            if let (true, Some(attempt)) = (ran, attempt) {
                self.end_runner(pod, 7, Some(&report(Outcome::Stopped, attempt))).await;
            }
            self.set_pod_status(pod, json!({"phase": "Failed"})).await;
        }
        let _ = self
            .pods()
            .delete(&pod.name_any(), &DeleteParams::default().grace_period(0))
            .await;
    }

    /// The scheduler puts the pod on a node, and the kubelet starts its containers.
    pub async fn start(&self, pod: &Pod) {
        self.bind(pod).await;
        let now = jiff::Timestamp::now();
        self.set_pod_status(
            pod,
            json!({
                "phase": "Running",
                "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
                "containerStatuses": [container("runner", json!({"running": {"startedAt": second(now)}}))],
                "initContainerStatuses": [container("agent", json!({"running": {"startedAt": second(now)}}))],
            }),
        )
        .await;
    }

    pub async fn bind(&self, pod: &Pod) {
        self.bind_to(pod, NODE).await;
    }

    pub async fn bind_to(&self, pod: &Pod, node: &str) {
        if self.pod_now(pod).await.and_then(|pod| pod.spec?.node_name).is_some() {
            return;
        }
        let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name_any()}, "target": {"kind": "Node", "name": node}});
        let request = http::Request::post(format!(
            "/api/v1/namespaces/{}/pods/{}/binding",
            self.namespace,
            pod.name_any()
        ))
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&binding).unwrap())
        .unwrap();
        match self.client.request_text(request).await {
            Ok(_) => {}
            // It was deleted, or went, meanwhile.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
            Err(error) => panic!("{}: {error}", self.namespace),
        }
    }

    /// The runner ran for `seconds` and left `report`; then the whole pod is over.
    pub async fn end(&self, pod: &Pod, seconds: i64, report: Option<&Report>) {
        self.end_runner(pod, seconds, report).await;
        let phase = if report.is_some_and(|r| r.outcome.exit_code() == 0) {
            "Succeeded"
        } else {
            "Failed"
        };
        self.set_pod_status(pod, json!({"phase": phase})).await;
    }

    /// The runner ended, its pod not yet.
    pub async fn end_runner(&self, pod: &Pod, seconds: i64, report: Option<&Report>) {
        self.end_runner_with(pod, seconds, "Error", report).await;
    }

    /// The same, with the kubelet's word for it.
    pub async fn end_runner_with(&self, pod: &Pod, seconds: i64, reason: &str, report: Option<&Report>) {
        let until = jiff::Timestamp::now();
        let since = until - jiff::SignedDuration::from_secs(seconds);
        let terminated = json!({
            "exitCode": report.map_or(137, |r| i32::from(r.outcome.exit_code())),
            "startedAt": second(since),
            "finishedAt": second(until),
            "reason": reason,
            "message": report.map(|r| String::from_utf8(r.to_bytes()).unwrap()),
        });
        self.set_pod_status(
            pod,
            json!({"containerStatuses": [container("runner", json!({"terminated": terminated}))]}),
        )
        .await;
    }

    pub async fn set_pod_status(&self, pod: &Pod, status: Value) {
        let patch = Patch::Merge(json!({"status": status}));
        match self
            .pods()
            .patch_status(&pod.name_any(), &PatchParams::default(), &patch)
            .await
        {
            Ok(_) => {}
            // It went meanwhile: nobody asks any more.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => panic!("{}: {error}", self.namespace),
        }
    }

    /// Somebody deletes a pod; the kubelet then ends it, and takes it away when its finalizers are gone.
    pub async fn delete_pod(&self, pod: &Pod, report: Option<&Report>) {
        self.pods()
            .delete(&pod.name_any(), &DeleteParams::default())
            .await
            .unwrap();
        self.obey_deletion(pod, report).await;
    }

    /// The kubelet's part in a deletion that somebody asked for.
    pub async fn obey_deletion(&self, pod: &Pod, report: Option<&Report>) {
        until("the pod's deletion", async || {
            self.pod_now(pod)
                .await
                .filter(|pod| pod.metadata.deletion_timestamp.is_some())
        })
        .await;
        self.end(pod, 7, report).await;
        let now = DeleteParams::default().grace_period(0);
        let _ = self.pods().delete(&pod.name_any(), &now).await;
    }
}

#[expect(clippy::needless_pass_by_value, reason = "reads better with json! in place")]
fn container(name: &str, state: Value) -> Value {
    json!({"name": name, "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state})
}

/// To the second, as the kubelet writes times.
fn second(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
