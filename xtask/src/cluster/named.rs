//! A cluster that stays up between commands: found again by its name.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    certificates::Certificates,
    cleanup, control_plane, kubeconfig,
    network::{API_SERVICE_IP, Egress, NODE_IP, Network, SERVICE_CIDR},
    node::{self, NODE, Node},
    processes::{self, Processes},
    servers::{self, Addresses, Shape},
};
use crate::{
    packages, paths, progress,
    tools::{self, Lock},
};

/// What a cluster is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Extent {
    /// A node that runs pods, in a network namespace without a way out. Needs root.
    #[default]
    Node,
    /// The same with a way out.
    NodeWithEgress,
    /// etcd, API server and controller manager on loopback. Needs no root.
    ControlPlane,
}

/// A cluster by name; it may be up or not.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    state: PathBuf,
}

impl Cluster {
    /// The cluster with this name: lower-case letters, digits and dashes, at most 24.
    pub fn named(name: &str) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            !name.is_empty() && name.len() <= 24 && name.chars().all(allowed) && !name.starts_with('-'),
            "{name:?} is no name for a cluster: use up to 24 lower-case letters, digits and dashes"
        );
        Ok(Self {
            name: name.to_owned(),
            state: paths::clusters()?.join(name),
        })
    }

    /// An administrator's kubeconfig for use on this machine, complete in one file.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state.join("kubeconfig")
    }

    /// The API server's audit log: one JSON object a line for every write.
    pub fn audit_log(&self) -> PathBuf {
        servers::audit_log(&self.state)
    }

    /// A `kubectl` for this cluster.
    pub fn kubectl(&self) -> Result<Command> {
        ensure!(
            self.is_up(),
            "cluster {0} is not up: run `cargo xtask cluster up --name {0}`",
            self.name
        );
        self.kubectl_while_starting()
    }

    /// A command that runs in the cluster's network namespace.
    pub fn inside(&self, program: &str) -> Command {
        let prefix = Network::of_cluster(&self.name).prefix();
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(program);
        command
    }

    /// The network namespace's file.
    pub fn namespace(&self) -> PathBuf {
        Network::of_cluster(&self.name).path()
    }

    /// Whether it was started to the end and its API server runs.
    pub fn is_up(&self) -> bool {
        self.extent_file().is_file() && processes::is_alive(&self.state, "kube-apiserver")
    }

    /// Whether anything of it is there, running or not.
    pub fn exists(&self) -> bool {
        self.state.exists()
    }

    /// Starts it. What a killed run left behind is cleared away first; a cluster that is up stays as it is.
    pub fn up(&self, extent: Extent) -> Result<()> {
        let _lock = self.lock()?;
        if self.is_up() {
            ensure!(
                self.extent()? == extent,
                "cluster {} is up with another extent: run `cargo xtask cluster down --name {0}` first",
                self.name
            );
            progress::say(&format!("cluster {} is up already", self.name));
            return Ok(());
        }
        if extent == Extent::ControlPlane {
            tools::ensure(tools::Group::ControlPlane)?;
        } else {
            packages::ensure_node()?;
            tools::ensure(tools::Group::Node)?;
        }
        cleanup::remove(&self.name, &self.state)?;
        let started = progress::step(&format!("starting cluster {}", self.name), || {
            fs::create_dir_all(&self.state).with_context(|| format!("failed to create {}", self.state.display()))?;
            match extent {
                Extent::ControlPlane => control_plane::start_detached(&self.state)?,
                Extent::Node => self.start(None)?,
                Extent::NodeWithEgress => self.start(Some(&Egress::of_cluster(&self.name)))?,
            }
            // Last, because it says that the start got to its end.
            fs::write(self.extent_file(), extent.word()).context("failed to record what was started")
        });
        if started.is_err() {
            let logs = self.keep_logs()?;
            progress::say(&format!("the logs of what did start are in {}", logs.display()));
            cleanup::remove(&self.name, &self.state)?;
        }
        started
    }

    /// Ends it and deletes all that it had.
    pub fn down(&self) -> Result<()> {
        let _lock = self.lock()?;
        progress::step(&format!("removing cluster {}", self.name), || {
            cleanup::remove(&self.name, &self.state)
        })
    }

    /// Makes images known to the node.
    pub fn load(&self, archives: &[PathBuf]) -> Result<()> {
        ensure!(
            node::socket(&self.name).exists(),
            "cluster {} has no node that is up",
            self.name
        );
        archives.iter().try_for_each(|archive| node::load(&self.name, archive))
    }

    /// Copies the daemons' and pods' logs to where they outlive the cluster.
    pub fn keep_logs(&self) -> Result<PathBuf> {
        let kept = paths::cache()?.join("logs").join(&self.name);
        if kept.exists() {
            fs::remove_dir_all(&kept)?;
        }
        fs::create_dir_all(&kept)?;
        for folder in ["log", "podlogs"]
            .map(|folder| self.state.join(folder))
            .iter()
            .filter(|folder| folder.exists())
        {
            crate::command::quiet(Command::new("cp").arg("-rL").arg(folder).arg(&kept))?;
        }
        Ok(kept)
    }

    fn kubectl_while_starting(&self) -> Result<Command> {
        let mut kubectl = Command::new(tools::path("kubectl")?);
        kubectl.env("KUBECONFIG", self.kubeconfig());
        Ok(kubectl)
    }

    fn start(&self, egress: Option<&Egress>) -> Result<()> {
        let network = Network::of_cluster(&self.name);
        network.create()?;
        if let Some(egress) = egress {
            egress.create(&network)?;
        }
        fs::create_dir_all(node::run_folder(&self.name))?;
        let addresses = [Ipv4Addr::LOCALHOST, NODE_IP, API_SERVICE_IP];
        let certificates = Certificates::create(&self.state.join("pki"), &addresses, NODE)?;
        let processes = Processes::new(&self.state, network.prefix())?;
        let shape = Shape {
            addresses: Addresses {
                etcd: 2379,
                etcd_peer: 2380,
                api: (NODE_IP, 6443).into(),
                controller_manager: 10257,
            },
            service_cidr: SERVICE_CIDR,
            controllers: "*",
            endpoint_reconciler: "master-count",
        };
        let node = Node {
            cluster: &self.name,
            state: &self.state,
            processes: &processes,
            egress,
        };
        servers::start_etcd(&processes, &self.state, &shape.addresses)?;
        servers::start_api_server(&processes, &self.state, &certificates, &shape)?;
        let outside = start_forwarder(&processes, &network.path(), shape.addresses.api)?;
        kubeconfig::write(&self.kubeconfig(), outside, &certificates, "admin")?;
        let inside = self.state.join("inside.kubeconfig");
        kubeconfig::write(&inside, shape.addresses.api, &certificates, "admin")?;
        kubeconfig::write(
            &self.state.join("kubelet.kubeconfig"),
            shape.addresses.api,
            &certificates,
            "kubelet",
        )?;
        // The API server takes seconds to become ready; containerd and its images come up meanwhile.
        node.start_containerd()?;
        servers::wait_for_api_server(&processes, &self.kubeconfig(), None)?;
        servers::start_controller_manager(&processes, &inside, &certificates, &shape)?;
        node.start_daemons(&mut || self.kubectl_while_starting())
    }

    fn lock(&self) -> Result<Lock> {
        tools::lock(&format!("cluster-{}", self.name))
    }

    fn extent_file(&self) -> PathBuf {
        self.state.join("extent")
    }

    /// What it was started with.
    pub fn extent(&self) -> Result<Extent> {
        let word = fs::read_to_string(self.extent_file())?;
        [Extent::Node, Extent::NodeWithEgress, Extent::ControlPlane]
            .into_iter()
            .find(|extent| extent.word() == word)
            .with_context(|| format!("cluster {} was made by another version of this program", self.name))
    }
}

impl Extent {
    fn word(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::NodeWithEgress => "node-with-egress",
            Self::ControlPlane => "control-plane",
        }
    }
}

/// This program, also when a build has replaced its file since it was started, as `cargo test --workspace` may do.
fn own_program() -> Result<PathBuf> {
    let file = std::env::current_exe().context("failed to find this program's own file")?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    // The kernel's word for a file that is not there any more.
    match name.strip_suffix(" (deleted)").unwrap_or(&name) {
        "xtask" if file.is_file() => Ok(file),
        "xtask" => Ok(PathBuf::from(format!("/proc/{}/exe", std::process::id()))),
        _ => bail!("a cluster with a node is started by `cargo xtask cluster up`, which stays as its forwarder"),
    }
}

/// Starts the process that makes the API server reachable on the host's loopback, and returns the address.
fn start_forwarder(processes: &Processes, namespace: &Path, to: SocketAddr) -> Result<SocketAddr> {
    let listen = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let program = own_program()?;
    processes.spawn_on_host(
        "forwarder",
        &program,
        &[
            "cluster".into(),
            "forwarder".into(),
            listen.to_string(),
            namespace.display().to_string(),
            to.to_string(),
        ],
    )?;
    Ok(listen)
}
