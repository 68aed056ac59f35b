//! Nodes on which pods run by themselves: the real scheduler puts them there, kwok starts and ends them.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use protocol::{Outcome, Report, names::label};
use serde_json::{Value, json};
use xtask::{command, tools};

use super::plane::{NAMESPACE, Plane};

const NODES: usize = 4;
const STAGES: &str = include_str!("stages.yaml");
/// Pins kwok.
const MODULE: &str = include_str!("../../../../cluster/tools/kwok/go.mod");

/// What the nodes are, for whoever reads the numbers.
pub fn about() -> Result<String> {
    let mut lines = MODULE.lines();
    let required = lines.find_map(|line| line.trim().strip_prefix("sigs.k8s.io/kwok v"));
    let version = required.and_then(|rest| rest.split(' ').next());
    Ok(format!(
        "{NODES} nodes of kwok v{}",
        version.context("kwok's go.mod does not require it")?
    ))
}

/// Whose pods end by themselves.
#[derive(Clone, Copy, Debug)]
pub enum Ends {
    /// Those of all sessions.
    All,
    /// That of one session; the others run on.
    Only(&'static str),
}

/// Scheduler and kwok; both end when this is dropped, and pods stay as they are.
pub struct Nodes {
    _daemons: [Daemon; 2],
}

impl Nodes {
    /// Makes the nodes; they are ready when this returns.
    pub fn start(plane: &Plane, ends: Ends) -> Result<Self> {
        let nodes: Vec<_> = (0..NODES)
            .map(|n| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{n}")}}))
            .collect();
        plane.apply(&json!({"apiVersion": "v1", "kind": "List", "items": nodes}).to_string())?;
        let kubeconfig = plane.kubeconfig().display().to_string();
        let (scheduler, stages) = (scheduler(&kubeconfig).to_string(), stages(ends)?);
        let start = |name, settings: String, arguments: &[&str]| -> Result<Daemon> {
            let file = plane.folder().join(format!("{name}.yaml"));
            fs::write(&file, settings)?;
            Daemon::start(name, &file, arguments, plane.folder())
        };
        let daemons = [
            start("kube-scheduler", scheduler, &["--secure-port=0"])?,
            start("kwok", stages, &["--kubeconfig", &kubeconfig, "--manage-all-nodes"])?,
        ];
        plane
            .kubectl(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=60s"])
            .with_context(|| command::tail(&plane.folder().join("kwok.log"), 20))?;
        Ok(Self { _daemons: daemons })
    }
}

/// The scheduler as it is, but for volumes: there is nothing here that makes any, and a claim would wait for ever.
fn scheduler(kubeconfig: &str) -> Value {
    let off = ["VolumeBinding", "VolumeRestrictions", "VolumeZone", "NodeVolumeLimits"];
    json!({
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": false},
        "clientConnection": {"kubeconfig": kubeconfig, "qps": 1000, "burst": 2000},
        "profiles": [{"plugins": {"multiPoint": {"disabled": off.map(|name| json!({"name": name}))}}}],
    })
}

/// What is to become of nodes and pods; the runner's last word is a report of success.
fn stages(ends: Ends) -> Result<String> {
    let report = Report {
        turns: 3,
        result: "The test expected a trailing newline, which the writer left out.".into(),
        ..Report::new(Outcome::Succeeded, 1)
    };
    let message = String::from_utf8(report.to_bytes())?;
    let whose = match ends {
        Ends::All => json!({}),
        Ends::Only(session) => json!({label::SESSION: session}),
    };
    Ok(STAGES
        .replace("WHOSE", &whose.to_string())
        .replace("REPORT", &json!(message).to_string()))
}

/// How many pods of sessions whose name begins so are in this phase.
pub async fn pods(client: &Client, prefix: &str, phase: &str) -> Result<usize> {
    let all: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let all = all.list(&ListParams::default()).await?;
    let counts = |pod: &&Pod| {
        let session = pod.labels().get(label::SESSION);
        let now = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        session.is_some_and(|name| name.starts_with(prefix)) && now == Some(phase)
    };
    Ok(all.iter().filter(counts).count())
}

/// A process that is killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(name: &str, settings: &Path, arguments: &[&str], folder: &Path) -> Result<Self> {
        let log = File::create(folder.join(format!("{name}.log")))?;
        let process = Command::new(tools::path(name)?)
            .arg("--config")
            .arg(settings)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        Ok(Self(process.with_context(|| format!("failed to start {name}"))?))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
