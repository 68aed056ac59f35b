//! A git server over ssh in a scene's namespace: the real sshd, with a host key and a user's key of its own.

use anyhow::{Result, ensure};
use protocol::names::USER_ID;
use serde_json::json;

use super::command::{apply, kubectl_with};
use super::{SSH_IMAGE, Scene};

/// Its host, as pods of the namespace reach it.
pub const HOST: &str = "ssh";
const PORT: u16 = 2222;

/// What the server does; without root it serves its own user only.
const SERVER: &str = r#"
set -eu
cd /srv/ssh
for key in host user; do ssh-keygen -q -t ed25519 -N '' -C test -f "$key"; done
git init --quiet --bare --initial-branch=main app.git
git init --quiet --initial-branch=main first
echo 'First line.' > first/README.md
git -C first add README.md
git -C first -c user.name=upstream -c user.email=upstream@test.example commit --quiet -m first
git -C first push --quiet ../app.git main
cat > config <<END
Port 2222
HostKey /srv/ssh/host
AuthorizedKeysFile /srv/ssh/user.pub
AllowUsers agent
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitUserRC no
PrintMotd no
END
exec /usr/sbin/sshd -D -e -f config
"#;

/// The running server with one repository, `app`.
pub struct Ssh<'a> {
    scene: &'a Scene,
    /// The private key that it takes.
    pub key: String,
    /// A line for a file of known hosts.
    pub known_host: String,
}

impl<'a> Ssh<'a> {
    /// Starts it.
    pub async fn serve(scene: &'a Scene) -> Result<Self> {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": HOST, "labels": { "app": HOST } },
            "spec": {
                "automountServiceAccountToken": false, "enableServiceLinks": false, "terminationGracePeriodSeconds": 0,
                "securityContext": { "runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID, "runAsNonRoot": true,
                    "seccompProfile": { "type": "RuntimeDefault" } },
                "containers": [{ "name": "sshd", "image": SSH_IMAGE, "imagePullPolicy": "IfNotPresent",
                    "command": ["bash", "-c", SERVER], "ports": [{ "containerPort": PORT }],
                    "readinessProbe": { "tcpSocket": { "port": PORT }, "periodSeconds": 1 },
                    "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                    "volumeMounts": [{ "name": "srv", "mountPath": "/srv/ssh" }] }],
                "volumes": [{ "name": "srv", "emptyDir": {} }],
            },
        });
        let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": HOST },
            "spec": { "selector": { "app": HOST }, "ports": [{ "port": PORT }] } });
        apply(&scene.namespace, &pod.to_string()).await?;
        apply(&scene.namespace, &service.to_string()).await?;
        let ready = [
            "wait",
            &format!("pod/{HOST}"),
            "--for=condition=Ready",
            "--timeout=120s",
        ];
        scene.kubectl(&ready).await?;
        let file = async |name: &str| {
            scene
                .kubectl(&["exec", HOST, "--", "cat", &format!("/srv/ssh/{name}")])
                .await
        };
        let host_key = file("host.pub").await?;
        Ok(Self {
            scene,
            key: file("user").await?,
            known_host: format!("[{HOST}]:{PORT} {host_key}"),
        })
    }

    /// Address of the repository.
    pub fn url() -> String {
        format!("ssh://agent@{HOST}:{PORT}/srv/ssh/app.git")
    }

    /// What a script says in the folder of the repository.
    pub async fn within(&self, script: &str) -> Result<String> {
        let script = format!("cd /srv/ssh/app.git && {script}");
        let exec = ["exec", "-i", "-n", &self.scene.namespace, HOST, "--", "bash"];
        let output = kubectl_with(&exec, &script).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What the server has said.
    pub async fn log(&self) -> Result<String> {
        self.scene.kubectl(&["logs", HOST]).await
    }
}
