//! kubectl and helm, as a user runs them.

use std::process::{Output, Stdio};

use anyhow::{Context as _, Result, bail};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::required;

/// A `kubectl` for the cluster under test.
pub fn kubectl_command(arguments: &[&str]) -> Result<Command> {
    command("KUBECTL", arguments)
}

fn command(program: &str, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(required(program)?);
    command
        .args(arguments)
        .env("KUBECONFIG", required("KUBECONFIG")?)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    Ok(command)
}

/// Runs kubectl and returns what it printed.
pub async fn kubectl(arguments: &[&str]) -> Result<String> {
    run(kubectl_command(arguments)?).await
}

/// Runs helm and returns what it printed.
pub async fn helm(arguments: &[&str]) -> Result<String> {
    run(command("HELM", arguments)?).await
}

/// Runs kubectl with `input`; succeeded or not, the output is the caller's to judge.
pub async fn kubectl_with(arguments: &[&str], input: &str) -> Result<Output> {
    let mut command = kubectl_command(arguments)?;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("kubectl has no stdin")?;
    stdin.write_all(input.as_bytes()).await?;
    drop(stdin);
    child.wait_with_output().await.context("failed to wait for kubectl")
}

/// `kubectl apply -f -`.
pub async fn apply(namespace: &str, manifest: &str) -> Result<String> {
    let output = kubectl_with(&["apply", "-n", namespace, "-f", "-"], manifest).await?;
    printed("kubectl apply", &output)
}

async fn run(mut command: Command) -> Result<String> {
    let output = command
        .output()
        .await
        .with_context(|| format!("failed to run {command:?}"))?;
    printed(&format!("{:?}", command.as_std()), &output)
}

fn printed(what: &str, output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{what} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
