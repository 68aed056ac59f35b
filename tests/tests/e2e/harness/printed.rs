//! Ports as documents print them: the cluster's network namespace has a loopback of its own, on which they are free.

use std::process::{Output, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::command::kubectl_command;
use super::{SYSTEM, required};

/// The gateway at `localhost` with these ports; until dropped.
pub struct Printed {
    _child: Child,
}

impl Printed {
    /// `8000:8080` is the gateway's 8080 at `localhost:8000`.
    pub async fn on(ports: &[&str]) -> Result<Self> {
        // The other kubeconfig leads to the API server by this machine's loopback.
        let kubeconfig = required("KUBECONFIG")?.with_file_name("inside.kubeconfig");
        let forward = [
            "port-forward",
            "-n",
            SYSTEM,
            "--address=127.0.0.1",
            "service/agentic-gateway",
        ];
        let kubectl = kubectl_command(&[&forward, ports].concat())?;
        let kubectl = kubectl.as_std();
        let mut child = inside(&kubectl.get_program().to_string_lossy())?
            .args(kubectl.get_args())
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("failed to start kubectl port-forward")?;
        let mut lines = BufReader::new(child.stdout.take().context("kubectl has no stdout")?).lines();
        for _ in ports {
            if lines.next_line().await?.is_none() {
                let output = child.wait_with_output().await?;
                bail!(
                    "kubectl port-forward ended: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
        }
        // kubectl blocks when nobody reads what it says about each connection.
        tokio::spawn(async move { while matches!(lines.next_line().await, Ok(Some(_))) {} });
        Ok(Self { _child: child })
    }

    /// Runs a script as its reader would, and returns what it printed.
    pub async fn run(&self, script: &str) -> Result<String> {
        let output = self.output(script).await?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{script}\n{said}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(said)
    }

    async fn output(&self, script: &str) -> Result<Output> {
        let output = inside("bash")?
            .args(["-c", script])
            .env("no_proxy", "localhost")
            .env("NO_PROXY", "localhost")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        output.await.context("failed to run bash")
    }
}

fn inside(program: &str) -> Result<Command> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", required("CLUSTER_NETWORK")?.display()))
        .args(["--", program]);
    Ok(command)
}
