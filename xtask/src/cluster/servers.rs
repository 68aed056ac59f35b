//! etcd, the API server and the controller manager: how they are started, for both kinds of cluster.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{certificates::Certificates, processes::Processes};
use crate::{command, tools};

/// Every write is on record, with who asked and what came of it; tests count Jobs here.
const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  verbs: [create, update, patch, delete, deletecollection]
- level: None
";

/// Generous: a cold page cache on a busy two-core machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// Where the servers listen, as seen where they run.
pub(super) struct Addresses {
    pub(super) etcd: u16,
    pub(super) etcd_peer: u16,
    pub(super) api: SocketAddr,
    pub(super) controller_manager: u16,
}

impl Addresses {
    /// Ports on loopback that are free now. Another program may take one before we do; the caller then tries again.
    pub(super) fn free() -> Result<Self> {
        let listeners = (0..4)
            .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr()))
            .collect::<Vec<_>>();
        let mut ports = listeners.into_iter();
        let mut next = || -> Result<SocketAddr> { Ok(ports.next().context("no port left")??) };
        Ok(Self {
            etcd: next()?.port(),
            etcd_peer: next()?.port(),
            api: next()?,
            controller_manager: next()?.port(),
        })
    }
}

/// What differs between a cluster with a node and a control plane alone.
pub(super) struct Shape<'a> {
    pub(super) addresses: Addresses,
    pub(super) service_cidr: &'a str,
    /// Controllers of the controller manager, in its own syntax.
    pub(super) controllers: &'a str,
    /// How the API server's own address reaches pods: the `kubernetes` Service, or not at all.
    pub(super) endpoint_reconciler: &'a str,
}

pub(super) fn start_etcd(processes: &Processes, state: &Path, addresses: &Addresses) -> Result<()> {
    let client = format!("http://127.0.0.1:{}", addresses.etcd);
    let peer = format!("http://127.0.0.1:{}", addresses.etcd_peer);
    processes.spawn(
        "etcd",
        &tools::path("etcd")?,
        &[
            flag("data-dir", &state.join("etcd").display().to_string()),
            // A test cluster's data is worth nothing after a power cut.
            "--unsafe-no-fsync".into(),
            flag("log-level", "warn"),
            flag("listen-client-urls", &client),
            flag("advertise-client-urls", &client),
            flag("listen-peer-urls", &peer),
            flag("initial-advertise-peer-urls", &peer),
            flag("initial-cluster", &format!("default={peer}")),
        ],
    )
}

pub(super) fn start_api_server(
    processes: &Processes,
    state: &Path,
    certificates: &Certificates,
    shape: &Shape<'_>,
) -> Result<()> {
    let policy = state.join("audit-policy.yaml");
    fs::write(&policy, AUDIT_POLICY)?;
    let api = shape.addresses.api;
    processes.spawn(
        "kube-apiserver",
        &tools::path("kube-apiserver")?,
        &[
            flag("etcd-servers", &format!("http://127.0.0.1:{}", shape.addresses.etcd)),
            flag(
                "bind-address",
                &if api.ip().is_loopback() {
                    api.ip().to_string()
                } else {
                    "0.0.0.0".into()
                },
            ),
            flag("advertise-address", &api.ip().to_string()),
            flag("secure-port", &api.port().to_string()),
            flag("endpoint-reconciler-type", shape.endpoint_reconciler),
            flag("tls-cert-file", &certificates.path("apiserver.crt")),
            flag("tls-private-key-file", &certificates.path("apiserver.key")),
            flag("client-ca-file", &certificates.path("ca.crt")),
            flag("cert-dir", &state.join("pki").display().to_string()),
            flag("service-account-key-file", &certificates.path("sa.pub")),
            flag("service-account-signing-key-file", &certificates.path("sa.key")),
            flag("service-account-issuer", "https://kubernetes.default.svc"),
            flag("service-cluster-ip-range", shape.service_cidr),
            flag("authorization-mode", "Node,RBAC"),
            flag("enable-admission-plugins", "NodeRestriction"),
            "--allow-privileged".into(),
            flag("kubelet-client-certificate", &certificates.path("admin.crt")),
            flag("kubelet-client-key", &certificates.path("admin.key")),
            flag("kubelet-certificate-authority", &certificates.path("ca.crt")),
            flag("kubelet-preferred-address-types", "InternalIP"),
            flag("audit-policy-file", &policy.display().to_string()),
            flag("audit-log-path", &audit_log(state).display().to_string()),
            // So that a test which has seen an object finds the request that made it.
            flag("audit-log-mode", "blocking"),
            flag("shutdown-delay-duration", "0s"),
        ],
    )
}

/// Waits until the API server serves; `connect` is false where its address is in another network namespace.
pub(super) fn wait_for_api_server(processes: &Processes, kubeconfig: &Path, connect: Option<SocketAddr>) -> Result<()> {
    let kubectl = tools::path("kubectl")?;
    processes.wait("kube-apiserver", PATIENCE, || {
        let listens = connect.is_none_or(|address| TcpStream::connect(address).is_ok());
        listens
            && command::quiet(Command::new(&kubectl).env("KUBECONFIG", kubeconfig).args([
                "get",
                "--raw",
                "/readyz",
                "--request-timeout=5s",
            ]))
            .is_ok()
    })
}

pub(super) fn start_controller_manager(
    processes: &Processes,
    kubeconfig: &Path,
    certificates: &Certificates,
    shape: &Shape<'_>,
) -> Result<()> {
    processes.spawn(
        "kube-controller-manager",
        &tools::path("kube-controller-manager")?,
        &[
            flag("kubeconfig", &kubeconfig.display().to_string()),
            flag("bind-address", "127.0.0.1"),
            flag("secure-port", &shape.addresses.controller_manager.to_string()),
            flag("controllers", shape.controllers),
            flag("service-account-private-key-file", &certificates.path("sa.key")),
            flag("root-ca-file", &certificates.path("ca.crt")),
            "--use-service-account-credentials".into(),
            flag("leader-elect", "false"),
            flag("kube-api-qps", "200"),
            flag("kube-api-burst", "400"),
            // On a busy machine every request is slow; the Jobs of many tests must not queue for the usual five.
            flag("concurrent-job-syncs", "20"),
        ],
    )
}

/// The API server's audit log of a state folder.
pub(super) fn audit_log(state: &Path) -> std::path::PathBuf {
    state.join("log/audit.log")
}

pub(super) fn flag(name: &str, value: &str) -> String {
    format!("--{name}={value}")
}
