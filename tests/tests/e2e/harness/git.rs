//! A git server in a scene's namespace.

use anyhow::{Result, ensure};
use protocol::names::USER_ID;
use serde_json::json;

use super::command::{apply, kubectl_with};
use super::wait::{SOON, until};
use super::{SHELL_IMAGE, Scene, TOOLS_IMAGE};

/// Its host and port, as pods of the namespace reach it.
pub const HOST: &str = "git:8443";
const FOLDER: &str = "/srv/git/repositories";

/// A git server that asks for a token.
pub struct Git<'a> {
    scene: &'a Scene,
    /// The certificate of its authority.
    pub ca: String,
}

impl<'a> Git<'a> {
    /// Starts one with these repositories.
    pub async fn serve(scene: &'a Scene, token: &str, repositories: &[&str]) -> Result<Self> {
        let program = "/srv/git/git-server";
        let mut command = vec![
            program.to_owned(),
            "--listen=0.0.0.0:8443".to_owned(),
            "--show=/srv/git".to_owned(),
        ];
        command.extend(repositories.iter().map(|name| format!("--repository={name}")));
        let security = json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
        let mounts = json!([{ "name": "srv", "mountPath": "/srv/git" }, { "name": "srv", "mountPath": "/tmp" }]);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "git", "labels": { "app": "git" } },
            "spec": {
                "automountServiceAccountToken": false, "enableServiceLinks": false, "terminationGracePeriodSeconds": 0,
                "securityContext": { "runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID, "runAsNonRoot": true,
                    "seccompProfile": { "type": "RuntimeDefault" } },
                // The one image has the server, the other has git.
                "initContainers": [{ "name": "copy", "image": TOOLS_IMAGE, "imagePullPolicy": "IfNotPresent",
                    "command": ["git-server", format!("--copy-to={program}")], "securityContext": security, "volumeMounts": mounts }],
                "containers": [{ "name": "git", "image": SHELL_IMAGE, "imagePullPolicy": "IfNotPresent", "command": command,
                    "env": [{ "name": "GIT_SERVER_TOKEN", "value": token }], "ports": [{ "containerPort": 8443 }],
                    "readinessProbe": { "exec": { "command": ["test", "-e", "/srv/git/ca.crt"] }, "periodSeconds": 1 },
                    "securityContext": security, "volumeMounts": mounts }],
                "volumes": [{ "name": "srv", "emptyDir": {} }],
            },
        });
        let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "git" },
            "spec": { "selector": { "app": "git" }, "ports": [{ "port": 8443 }] } });
        apply(&scene.namespace, &pod.to_string()).await?;
        apply(&scene.namespace, &service.to_string()).await?;
        let ca = until("the git server", SOON, async || {
            let ca = scene
                .kubectl(&["exec", "git", "-c", "git", "--", "cat", "/srv/git/ca.crt"])
                .await?;
            Ok(ca.contains("END CERTIFICATE").then_some(ca))
        })
        .await?;
        scene
            .kubectl(&["wait", "pod/git", "--for=condition=Ready", "--timeout=120s"])
            .await?;
        Ok(Self { scene, ca })
    }

    /// What a script says in the folder of a repository.
    pub async fn within(&self, repository: &str, script: &str) -> Result<String> {
        let script = format!("cd {FOLDER}/{repository}.git && {script}");
        let exec = [
            "exec",
            "-i",
            "-n",
            &self.scene.namespace,
            "git",
            "-c",
            "git",
            "--",
            "bash",
        ];
        let output = kubectl_with(&exec, &script).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The requests that came, one a line.
    pub async fn asked(&self) -> Result<String> {
        self.scene.kubectl(&["logs", "git", "-c", "git"]).await
    }
}
