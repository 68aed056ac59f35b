//! A control plane for one test binary: real etcd, API server and controller manager on loopback, without root.

use std::{
    ffi::OsString,
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow};

use super::{
    certificates::Certificates,
    kubeconfig, kueue,
    processes::{self, Processes},
    servers::{self, Addresses, Shape},
};
use crate::{paths, progress, tools};

/// A running control plane; dropping it ends its processes and deletes its data.
///
/// It has no kubelet and no scheduler: a test that wants a pod to run writes the pod's status itself. Nodes are whatever
/// Node objects the test creates, so the controllers that judge nodes by their heartbeats are off; so is the one that
/// binds claims. Pods without a finalizer that a test deletes are gone after their grace period only if a test plays the
/// kubelet, or at once when they have no `nodeName`.
///
/// The daemons die with the process that started them, however it ends, so a `static` control plane is fine.
///
/// ```no_run
/// let cluster = xtask::cluster::ControlPlane::start()?;
/// let kubeconfig = kube::config::Kubeconfig::read_from(cluster.kubeconfig())?;
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Debug)]
pub struct ControlPlane {
    state: PathBuf,
    /// Closed to ask the keeper to end the daemons.
    keep: Option<mpsc::Sender<Request>>,
    keeper: Option<JoinHandle<()>>,
    _lock: File,
}

/// What the thread that owns the daemons is asked to do.
enum Request {
    StopApiServer(mpsc::Sender<Result<()>>),
    StartApiServer(mpsc::Sender<Result<()>>),
    StartKueue(mpsc::Sender<Result<()>>),
}

impl ControlPlane {
    /// Starts one; blocks for about four seconds. Builds the tools first when they are missing, which takes minutes.
    pub fn start() -> Result<Self> {
        tools::ensure(tools::Group::ControlPlane)?;
        sweep();
        let (state, lock) = claim()?;
        let (keep, requests) = mpsc::channel();
        let (started, outcome) = mpsc::channel();
        let folder = state.clone();
        // The daemons are killed by the kernel when the thread that started them ends, so one thread keeps them all.
        let keeper = thread::Builder::new().name("control-plane".into()).spawn(move || {
            keep_running(&folder, &requests, &started);
        })?;
        let plane = Self {
            state,
            keep: Some(keep),
            keeper: Some(keeper),
            _lock: lock,
        };
        outcome.recv().context("the thread of the control plane has ended")??;
        Ok(plane)
    }

    /// An administrator's kubeconfig, complete in one file.
    pub fn kubeconfig(&self) -> PathBuf {
        kubeconfig_of(&self.state)
    }

    /// The key (P-256, PKCS #8, PEM) that signs the tokens of service accounts, for a test that makes one itself.
    pub fn service_account_key(&self) -> PathBuf {
        self.state.join("pki").join("sa.key")
    }

    /// The audit log: one JSON object a line for every write, `Metadata` level, written before the answer.
    pub fn audit_log(&self) -> PathBuf {
        servers::audit_log(&self.state)
    }

    /// A `kubectl` that talks to this control plane.
    pub fn kubectl(&self) -> Result<Command> {
        let mut kubectl = Command::new(tools::path("kubectl")?);
        kubectl.env("KUBECONFIG", self.kubeconfig());
        Ok(kubectl)
    }

    /// Kills the API server, as an upgrade or a crash would; etcd and its data stay.
    pub fn stop_api_server(&self) -> Result<()> {
        self.ask(Request::StopApiServer)
    }

    /// Starts the API server again at its old address and waits until it serves.
    pub fn start_api_server(&self) -> Result<()> {
        self.ask(Request::StartApiServer)
    }

    /// Installs Kueue with its webhooks, and starts its manager on loopback; it ends with the control plane. Builds it when it is missing.
    pub fn start_kueue(&self) -> Result<()> {
        tools::ensure(tools::Group::Admission)?;
        self.ask(Request::StartKueue)
    }

    fn ask(&self, request: impl FnOnce(mpsc::Sender<Result<()>>) -> Request) -> Result<()> {
        let (reply, answer) = mpsc::channel();
        let keep = self.keep.as_ref().context("the control plane is stopping")?;
        keep.send(request(reply))
            .map_err(|_| anyhow!("the thread of the control plane has ended"))?;
        answer.recv().context("the thread of the control plane has ended")?
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        drop(self.keep.take());
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
        let _ = fs::remove_dir_all(&self.state);
    }
}

fn kubeconfig_of(state: &Path) -> PathBuf {
    state.join("kubeconfig")
}

fn keep_running(state: &Path, requests: &mpsc::Receiver<Request>, started: &mpsc::Sender<Result<()>>) {
    let running = match start_daemons(state, &tied_to_this_thread()) {
        Ok(running) => running,
        Err(error) => {
            let _ = processes::stop_all(state);
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(()));
    while let Ok(request) = requests.recv() {
        let (reply, result) = match request {
            Request::StopApiServer(reply) => (reply, running.processes.kill("kube-apiserver")),
            Request::StartApiServer(reply) => (reply, running.start_api_server(state)),
            Request::StartKueue(reply) => (reply, kueue::start(&running.processes, state, &kubeconfig_of(state))),
        };
        let _ = reply.send(result);
    }
    let _ = processes::stop_all(state);
}

/// Starts one whose daemons stay when this process ends.
pub(super) fn start_detached(state: &Path) -> Result<()> {
    start_daemons(state, &[]).map(drop)
}

/// The daemons and all that is needed to start one again.
struct Running {
    processes: Processes,
    certificates: Certificates,
    shape: Shape<'static>,
}

impl Running {
    fn start_api_server(&self, state: &Path) -> Result<()> {
        servers::start_api_server(&self.processes, state, &self.certificates, &self.shape)?;
        servers::wait_for_api_server(&self.processes, &kubeconfig_of(state), Some(self.shape.addresses.api))
    }
}

/// A port that was free may be taken before the daemon binds it, so this tries a few sets of ports.
fn start_daemons(state: &Path, prefix: &[OsString]) -> Result<Running> {
    let mut attempt = 1;
    loop {
        match try_daemons(state, prefix.to_vec()) {
            Err(error) if attempt < 3 && error.to_string().contains("address already in use") => {
                progress::say("a port was taken by another program; trying others");
                processes::stop_all(state)?;
                for leftover in ["pki", "etcd", "pid"] {
                    let _ = fs::remove_dir_all(state.join(leftover));
                }
                attempt += 1;
            }
            result => return result,
        }
    }
}

fn try_daemons(state: &Path, prefix: Vec<OsString>) -> Result<Running> {
    let shape = Shape {
        addresses: Addresses::free()?,
        service_cidr: "10.96.0.0/16",
        // No claim here ever has a volume. The binder would tell each of them so every 15 s, hundreds of writes a second.
        controllers: "*,-node-lifecycle-controller,-taint-eviction-controller,-persistentvolume-binder-controller",
        // The API server refuses to publish a loopback address as an endpoint.
        endpoint_reconciler: "none",
    };
    let certificates = Certificates::create(&state.join("pki"), &[Ipv4Addr::LOCALHOST], "none")?;
    kubeconfig::write(&kubeconfig_of(state), shape.addresses.api, &certificates, "admin")?;
    let processes = Processes::new(state, prefix)?;
    servers::start_etcd(&processes, state, &shape.addresses)?;
    let running = Running {
        processes,
        certificates,
        shape,
    };
    running.start_api_server(state)?;
    servers::start_controller_manager(
        &running.processes,
        &kubeconfig_of(state),
        &running.certificates,
        &running.shape,
    )?;
    Ok(running)
}

/// `setpriv` (util-linux) sets the parent-death signal and `exec`s; doing so ourselves would need unsafe code.
fn tied_to_this_thread() -> Vec<OsString> {
    ["setpriv", "--pdeathsig", "KILL", "--"].map(OsString::from).to_vec()
}

fn folder() -> Result<PathBuf> {
    Ok(paths::cache()?.join("control-planes"))
}

/// A fresh state folder and the lock that says that its owner lives.
fn claim() -> Result<(PathBuf, File)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // Claiming and sweeping exclude each other, or a folder could be swept before its lock is taken.
    let _guard = tools::lock("control-planes")?;
    let state = folder()?.join(format!(
        "{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    ));
    fs::create_dir_all(&state).with_context(|| format!("failed to create {}", state.display()))?;
    let lock = File::create(state.join("lock"))?;
    lock.lock()?;
    Ok((state, lock))
}

/// Deletes what runs left behind that were killed: nobody holds the lock of their folder any more.
fn sweep() {
    let Ok(_guard) = tools::lock("control-planes") else {
        return;
    };
    let folders = folder().ok().and_then(|folder| fs::read_dir(folder).ok());
    for state in folders.into_iter().flatten().flatten().map(|entry| entry.path()) {
        let abandoned = File::open(state.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok());
        if abandoned {
            let _ = processes::stop_all(&state);
            let _ = fs::remove_dir_all(&state);
        }
    }
}
