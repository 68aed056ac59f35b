//! The end-to-end tests: brings up all that they need, runs them, and takes it away.

use std::{ffi::OsString, fs, path::Path, process::Command};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{
    cluster::{Cluster, Extent},
    command, paths, progress, target, tools,
};

/// What to do with the cluster when the tests are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// Removes it.
    Remove,
    /// Leaves it for a look, until the next run.
    Keep,
}

/// Runs the tests that `arguments` (of the test binary) select, on a fresh cluster.
pub fn run(afterwards: Afterwards, arguments: &[OsString]) -> Result<()> {
    run_with(afterwards, arguments, &[])
}

/// The same with variables of the tests' environment.
pub(crate) fn run_with(afterwards: Afterwards, arguments: &[OsString], environment: &[(&str, OsString)]) -> Result<()> {
    let name = cluster_name();
    // Two runs of one clone would use the same cluster.
    let _lock = tools::lock(&name)?;
    tools::ensure(tools::Group::Chart)?;
    remove_leftover(&name)?;
    let target = target::prepare(&name, Extent::Node)?;
    let result = progress::step("running the end-to-end tests", || {
        command::run(
            Command::new(env_cargo())
                .current_dir(paths::workspace())
                .env("KUBECONFIG", &target.kubeconfig)
                .env("KUBECTL", tools::path("kubectl")?)
                .env("HELM", tools::path("helm")?)
                .envs(target.audit_log.iter().map(|file| ("AUDIT_LOG", file)))
                .envs(
                    target
                        .local
                        .iter()
                        .map(|cluster| ("CLUSTER_NETWORK", cluster.namespace())),
                )
                .envs(environment.iter().map(|(name, value)| (name, value)))
                // Most of them wait most of the time. How many work at once the tests themselves decide.
                .env("RUST_TEST_THREADS", "16")
                .args([
                    "test",
                    "--locked",
                    "--package",
                    "tests",
                    "--features",
                    "e2e",
                    "--test",
                    "e2e",
                    "--",
                ])
                .args(arguments),
        )
    });
    let Some(cluster) = target.local else { return result };
    if result.is_err() {
        let logs = cluster.keep_logs()?;
        print_tails(&logs);
        progress::say(&format!("all logs of the cluster are in {}", logs.display()));
    }
    match afterwards {
        Afterwards::Keep => {
            progress::say(&format!(
                "the cluster stays: export KUBECONFIG={}",
                cluster.kubeconfig().display()
            ));
        }
        Afterwards::Remove => cluster.down()?,
    }
    result
}

/// Removes what an interrupted run left behind.
pub fn remove_leftover(name: &str) -> Result<()> {
    let cluster = Cluster::named(name)?;
    if cluster.exists() {
        cluster.down()?;
    }
    Ok(())
}

/// One name for each clone, so that clones on one machine do not meet.
pub fn cluster_name() -> String {
    let hash = Sha256::digest(paths::workspace().as_os_str().as_encoded_bytes());
    format!("e2e-{}", hex::encode(&hash[..4]))
}

pub(crate) fn env_cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// The ends of the logs that explain most failures.
fn print_tails(logs: &Path) {
    for daemon in [
        "kube-apiserver",
        "kube-controller-manager",
        "kubelet",
        "containerd",
        "local-path-provisioner",
    ] {
        print_tail(&logs.join("log").join(format!("{daemon}.log")));
    }
    // Namespace, pod and UID are joined by underscores in a folder's name.
    let pods = fs::read_dir(logs.join("podlogs")).into_iter().flatten().flatten();
    for pod in pods.filter(|pod| pod.file_name().to_string_lossy().starts_with("agentic-")) {
        for container in fs::read_dir(pod.path()).into_iter().flatten().flatten() {
            for file in fs::read_dir(container.path()).into_iter().flatten().flatten() {
                print_tail(&file.path());
            }
        }
    }
}

fn print_tail(file: &Path) {
    eprintln!("---- the end of {}", file.display());
    eprintln!("{}", command::tail(file, 15));
}

/// Fails early, with a reason, where the tests could not run.
pub fn possible() -> Result<()> {
    if std::env::var("CLUSTER").is_ok_and(|cluster| cluster == "current") {
        return Ok(());
    }
    crate::packages::ensure_node().context("the end-to-end tests cannot run here")
}
