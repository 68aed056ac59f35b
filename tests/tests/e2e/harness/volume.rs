//! What is on a session's claim, seen by a pod of ours.

use anyhow::{Result, ensure};
use serde_json::json;
use uuid::Uuid;

use super::command::{apply, kubectl};
use super::wait::{SOON, until};
use super::{SHELL_IMAGE, Scene};

/// Runs a shell script in a pod that has the session's claim at `/data` and returns what it printed.
pub async fn on_volume(scene: &Scene, session: &str, script: &str) -> Result<String> {
    on_claim(scene, &format!("ambient-workspace-{session}"), script).await
}

/// The same with any claim.
pub async fn on_claim(scene: &Scene, claim: &str, script: &str) -> Result<String> {
    let name = format!("look-{}", &Uuid::new_v4().simple().to_string()[..8]);
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name },
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 0,
            "securityContext": { "runAsUser": protocol::names::USER_ID, "runAsGroup": protocol::names::USER_ID,
                "fsGroup": protocol::names::USER_ID, "runAsNonRoot": true,
                "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{ "name": "look", "image": SHELL_IMAGE, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", script],
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                "volumeMounts": [{ "name": "data", "mountPath": "/data" }] }],
            "volumes": [{ "name": "data",
                "persistentVolumeClaim": { "claimName": claim } }],
        },
    });
    apply(&scene.namespace, &manifest.to_string()).await?;
    let phase = until("the end of the pod that looks at the volume", SOON, async || {
        let arguments = [
            "get",
            "pod",
            "-n",
            &scene.namespace,
            &name,
            "-o",
            "jsonpath={.status.phase}",
        ];
        let phase = kubectl(&arguments).await?;
        Ok((phase == "Succeeded" || phase == "Failed").then_some(phase))
    })
    .await?;
    let said = kubectl(&["logs", "-n", &scene.namespace, &name]).await?;
    ensure!(phase == "Succeeded", "the script failed on the claim {claim}: {said}");
    kubectl(&["delete", "pod", "-n", &scene.namespace, &name, "--wait=false"]).await?;
    Ok(said)
}
