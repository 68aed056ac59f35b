//! Ports of the cluster on this machine's loopback, through `kubectl port-forward`.

use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;

use super::command::kubectl_command;
use super::wait::{SOON, until};

/// A forwarded port; closed when dropped.
#[derive(Debug)]
pub struct Forward {
    port: u16,
    _child: Child,
}

impl Forward {
    /// Forwards a free port to `port` of the Service.
    pub async fn to_service(namespace: &str, service: &str, port: u16) -> Result<Self> {
        Self::to(namespace, &format!("service/{service}"), port).await
    }

    /// Forwards a free port to `port` of the pod.
    pub async fn to_pod(namespace: &str, pod: &str, port: u16) -> Result<Self> {
        Self::to(namespace, &format!("pod/{pod}"), port).await
    }

    async fn to(namespace: &str, target: &str, port: u16) -> Result<Self> {
        // A pod that has just become ready may refuse the first attempt.
        until(&format!("a forward to {target}"), SOON, async || {
            Self::try_to(namespace, target, port).await.map(Some)
        })
        .await
    }

    async fn try_to(namespace: &str, target: &str, port: u16) -> Result<Self> {
        let ports = format!(":{port}");
        let mut child = kubectl_command(&["port-forward", "-n", namespace, "--address=127.0.0.1", target, &ports])?
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("failed to start kubectl port-forward")?;
        let mut lines = BufReader::new(child.stdout.take().context("kubectl has no stdout")?).lines();
        let Some(line) = lines.next_line().await? else {
            let output = child.wait_with_output().await?;
            bail!(
                "kubectl port-forward ended: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        };
        // "Forwarding from 127.0.0.1:41234 -> 8080"
        let port = line
            .split(" -> ")
            .next()
            .and_then(|text| text.rsplit(':').next())
            .and_then(|port| port.parse().ok());
        let port = port.with_context(|| format!("kubectl port-forward said {line:?}"))?;
        // kubectl blocks when nobody reads what it says about each connection.
        tokio::spawn(async move { while matches!(lines.next_line().await, Ok(Some(_))) {} });
        Ok(Self { port, _child: child })
    }

    /// Base URL of the forwarded Service.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}
