//! A bare control plane with the product's definitions and rules, and an operator that runs there as its own account.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use xtask::{cluster::ControlPlane, command, paths};

use crate::bench::machine;

/// Where the product is installed.
const INSTALLED_IN: &str = "agentic-system";
/// The namespace of the sessions.
pub const NAMESPACE: &str = "sessions";
/// Who the operator is to the API server.
pub const ACCOUNT: &str = "system:serviceaccount:agentic-system:agentic-operator";

const PATIENCE: Duration = Duration::from_mins(2);

/// The control plane.
pub struct Plane {
    plane: ControlPlane,
    folder: tempfile::TempDir,
}

impl Plane {
    /// Starts one and installs the product's definitions and rules.
    pub fn start() -> Result<Self> {
        let plane = Self {
            plane: ControlPlane::start()?,
            folder: tempfile::tempdir()?,
        };
        plane.apply(&installed()?)?;
        plane.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"])?;
        plane.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}}}}}"
        ))?;
        plane.write_operators_kubeconfig()?;
        Ok(plane)
    }

    /// An administrator's client with connections of its own.
    pub async fn client(&self) -> Result<Client> {
        client(&self.plane.kubeconfig()).await
    }

    /// A client that is the operator to the API server.
    pub async fn operators_client(&self) -> Result<Client> {
        client(&self.folder.path().join("kubeconfig")).await
    }

    /// The API server's log of writes.
    pub fn audit_log(&self) -> PathBuf {
        self.plane.audit_log()
    }

    /// Version of the API server.
    pub fn version(&self) -> Result<String> {
        let said = self.kubectl(&["get", "--raw", "/version"])?;
        let version: serde_json::Value = serde_json::from_str(&said)?;
        Ok(version["gitVersion"].as_str().unwrap_or("unknown").to_owned())
    }

    /// Starts the operator from `binary`; it is ready when this returns.
    pub async fn operator(&self, binary: &Path) -> Result<Operator> {
        Operator::start(binary, self.folder.path()).await
    }

    /// An administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.plane.kubeconfig()
    }

    /// A folder that is gone when this is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs kubectl and answers what it says.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        command::output(self.plane.kubectl()?.args(arguments))
    }

    /// Applies objects.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let mut kubectl = self.plane.kubectl()?;
        command::with_input(kubectl.args(["apply", "--server-side", "-f", "-"]), manifest.as_bytes())
    }

    fn write_operators_kubeconfig(&self) -> Result<()> {
        let token = self.kubectl(&[
            "create",
            "token",
            "agentic-operator",
            "-n",
            INSTALLED_IN,
            "--duration=24h",
        ])?;
        let mut kubeconfig = serde_json::to_value(Kubeconfig::read_from(self.plane.kubeconfig())?)?;
        for user in kubeconfig["users"].as_array_mut().into_iter().flatten() {
            user["user"] = serde_json::json!({"token": token.trim()});
        }
        std::fs::write(
            self.folder.path().join("kubeconfig"),
            serde_json::to_string(&kubeconfig)?,
        )?;
        Ok(())
    }
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// What the installed product consists of, but for its own pods.
fn installed() -> Result<String> {
    let folder = paths::workspace().join("manifests/base");
    let mut files: Vec<_> = std::fs::read_dir(&folder)?.flatten().map(|file| file.path()).collect();
    // The namespace first.
    files.sort_by_key(|file| (!file.ends_with("namespace.yaml"), file.clone()));
    let mut wanted = Vec::new();
    for file in files.iter().filter(|file| !file.ends_with("kustomization.yaml")) {
        let text = std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
        let runs_pods = |document: &str| {
            ["\nkind: Deployment", "\nkind: StatefulSet"]
                .iter()
                .any(|kind| document.contains(kind))
        };
        wanted.extend(
            text.split("\n---\n")
                .filter(|document| !runs_pods(document))
                .map(str::to_owned),
        );
    }
    ensure!(!wanted.is_empty(), "failed to find manifests in {}", folder.display());
    Ok(wanted.join("\n---\n"))
}

/// A running operator; killed when dropped.
pub struct Operator {
    process: Child,
    address: SocketAddr,
    /// When it was started.
    pub since: Instant,
}

impl Operator {
    async fn start(binary: &Path, folder: &Path) -> Result<Self> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let log = folder.join("operator.log");
        let since = Instant::now();
        let process = Command::new(binary)
            .arg("run")
            .args(["--runner-image", "registry.test/agentic-runner:1"])
            .args(["--metrics-address", &address.to_string()])
            .args(["--lease-namespace", INSTALLED_IN, "--watch-namespace", NAMESPACE])
            .env("KUBECONFIG", folder.join("kubeconfig"))
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("failed to start {}", binary.display()))?;
        let mut operator = Self {
            process,
            address,
            since,
        };
        let deadline = Instant::now() + PATIENCE;
        while operator.metric("agentic_operator_leader").await != Some(1.0) {
            if let Some(status) = operator.process.try_wait()? {
                bail!("the operator ended with {status}:\n{}", command::tail(&log, 20));
            }
            ensure!(
                Instant::now() < deadline,
                "the operator does not lead:\n{}",
                command::tail(&log, 20)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(operator)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Processor time that it has used.
    pub fn cpu(&self) -> Result<Duration> {
        machine::cpu(self.pid())
    }

    /// Sum of a metric of its own over all labels; `None` while it does not answer or does not have it.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        self.sum(name, |_| true).await
    }

    /// Its own count of what it wrote, but for its lease.
    pub async fn writes(&self) -> Option<f64> {
        let ours = |labels: &str| !labels.contains("kind=\"Lease\"");
        self.sum("agentic_operator_api_writes_total", ours).await
    }

    async fn sum(&self, name: &str, counts: impl Fn(&str) -> bool) -> Option<f64> {
        let page = reqwest::get(format!("http://{}/metrics", self.address))
            .await
            .ok()?
            .text()
            .await
            .ok()?;
        let values = page.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            (rest.starts_with(' ') || rest.starts_with('{')).then_some(rest)?;
            counts(rest).then_some(rest)?;
            rest.rsplit(' ').next()?.parse::<f64>().ok()
        });
        values.reduce(|sum, value| sum + value)
    }

    /// Asks it to end, and waits until it has.
    pub async fn stop(mut self) -> Result<()> {
        let pid = rustix_pid(self.pid())?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while self.process.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "the operator does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn rustix_pid(pid: u32) -> Result<rustix::process::Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .context("the process has no id")
}
