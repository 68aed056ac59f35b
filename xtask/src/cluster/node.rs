//! The node: containerd, kubelet, kube-proxy, DNS and volumes, all in the cluster's network namespace.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{
    cgroups,
    network::{Egress, NODE_IP, POD_CIDR},
    processes::Processes,
    servers::flag,
    templates,
};
use crate::{command, images::pods, tools};

/// The node's name.
pub(super) const NODE: &str = "node1";

const PATIENCE: Duration = Duration::from_mins(1);

/// What the node's daemons are started with.
pub(super) struct Node<'a> {
    pub(super) cluster: &'a str,
    pub(super) state: &'a Path,
    pub(super) processes: &'a Processes,
    pub(super) egress: Option<&'a Egress>,
}

/// The folder for sockets, whose paths must be short.
pub(super) fn run_folder(cluster: &str) -> PathBuf {
    PathBuf::from(format!("/run/agentic-{cluster}"))
}

/// containerd's socket.
pub(super) fn socket(cluster: &str) -> PathBuf {
    run_folder(cluster).join("containerd.sock")
}

/// A `ctr` that sees the images and containers of the cluster.
pub(super) fn ctr(cluster: &str) -> Command {
    let mut ctr = Command::new("ctr");
    ctr.arg("--address")
        .arg(socket(cluster))
        .args(["--namespace", "k8s.io"]);
    ctr
}

impl Node<'_> {
    /// Starts containerd and gives it the images that pods cannot do without; needs no API server yet.
    pub(super) fn start_containerd(&self) -> Result<()> {
        let config = self.state.join("containerd.toml");
        self.template(&config, templates::CONTAINERD)?;
        self.template(&self.state.join("cni/10-pods.conflist"), templates::CNI)?;
        cgroups::create(self.cluster)?;
        let containerd = PathBuf::from("containerd");
        self.processes.spawn(
            "containerd",
            &containerd,
            &["--config".into(), config.display().to_string()],
        )?;
        self.processes.wait("containerd", PATIENCE, || {
            socket(self.cluster).exists() && command::quiet(ctr(self.cluster).arg("version")).is_ok()
        })?;
        for archive in pods::ensure()? {
            load(self.cluster, &archive)?;
        }
        Ok(())
    }

    /// Starts what needs the API server, which must be ready.
    pub(super) fn start_daemons(&self, kubectl: &mut dyn FnMut() -> Result<Command>) -> Result<()> {
        let inside = self.state.join("inside.kubeconfig").display().to_string();
        self.start_kubelet()?;
        self.processes.spawn(
            "kube-scheduler",
            &tools::path("kube-scheduler")?,
            &[flag("kubeconfig", &inside), flag("leader-elect", "false")],
        )?;
        let proxy = self.state.join("kube-proxy.yaml");
        self.template(&proxy, templates::KUBE_PROXY)?;
        self.processes.spawn(
            "kube-proxy",
            &tools::path("kube-proxy")?,
            &[flag("config", &proxy.display().to_string())],
        )?;
        self.start_dns()?;

        let storage = self.state.join("storage.yaml");
        self.template(&storage, templates::STORAGE)?;
        command::quiet(kubectl()?.arg("apply").arg("--filename").arg(&storage))?;
        self.processes.spawn(
            "local-path-provisioner",
            &tools::path("local-path-provisioner")?,
            &[
                "start".into(),
                flag("kubeconfig", &inside),
                flag("namespace", "local-path-storage"),
                flag("configmap-name", "local-path-config"),
                flag("service-account-name", "local-path-provisioner-service-account"),
            ],
        )?;
        let node = format!("node/{NODE}");
        command::quiet(kubectl()?.args(["wait", "--for=create", &node, "--timeout=60s"]))?;
        command::quiet(kubectl()?.args(["wait", "--for=condition=Ready", &node, "--timeout=60s"])).with_context(
            || {
                format!(
                    "the kubelet's log ends:\n{}",
                    command::tail(&self.processes.log("kubelet"), 20)
                )
            },
        )?;
        // Pods are refused until the controller manager has made their namespace's account.
        command::quiet(kubectl()?.args(["wait", "--for=create", "serviceaccount/default", "--timeout=60s"]))
    }

    fn start_kubelet(&self) -> Result<()> {
        let config = self.state.join("kubelet.yaml");
        self.template(&config, templates::KUBELET)?;
        self.processes.spawn(
            "kubelet",
            &tools::path("kubelet")?,
            &[
                flag("config", &config.display().to_string()),
                flag(
                    "kubeconfig",
                    &self.state.join("kubelet.kubeconfig").display().to_string(),
                ),
                flag("root-dir", &self.state.join("kubelet").display().to_string()),
                flag("hostname-override", NODE),
                flag("node-ip", &NODE_IP.to_string()),
            ],
        )
    }

    fn start_dns(&self) -> Result<()> {
        let coredns = tools::path("coredns")?;
        if let Some(egress) = self.egress {
            // On the host, because /etc/resolv.conf may name a server on the host's own loopback.
            let file = self.state.join("Corefile.host");
            templates::write(
                &file,
                templates::COREFILE_HOST,
                &[("HOST_IP", egress.host_ip.to_string())],
            )?;
            self.processes
                .spawn_on_host("coredns-host", &coredns, &["-conf".into(), file.display().to_string()])?;
        }
        let file = self.state.join("Corefile");
        self.template(&file, templates::COREFILE)?;
        self.processes
            .spawn("coredns", &coredns, &["-conf".into(), file.display().to_string()])
    }

    fn template(&self, file: &Path, template: &str) -> Result<()> {
        let upstream = self
            .egress
            .map(|egress| format!("forward . {}", egress.host_ip))
            .unwrap_or_default();
        templates::write(
            file,
            template,
            &[
                ("STATE", self.state.display().to_string()),
                ("RUN", run_folder(self.cluster).display().to_string()),
                ("NODE_IP", NODE_IP.to_string()),
                ("NODE", NODE.to_owned()),
                ("POD_CIDR", POD_CIDR.to_owned()),
                ("CGROUP", cgroups::name(self.cluster)),
                ("UPSTREAM", upstream),
            ],
        )
    }
}

/// Imports an OCI archive into the node's containerd.
pub(super) fn load(cluster: &str, archive: &Path) -> Result<()> {
    command::quiet(ctr(cluster).args(["images", "import"]).arg(archive))
        .with_context(|| format!("failed to load {} into cluster {cluster}", archive.display()))
}
