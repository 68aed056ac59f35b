//! Debian packages that a step needs, installed when they are missing and we are root.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use anyhow::{Result, bail};

use crate::{command, paths, progress, tools};

/// How to see that a package is there, and its name on Debian and Ubuntu.
///
/// The program is asked for, not the package: on a machine with Docker containerd comes from elsewhere.
enum Need {
    Program(&'static str, &'static str),
    File(&'static str, &'static str),
}

const NODE: &[Need] = &[
    Need::Program("containerd", "containerd"),
    Need::Program("ctr", "containerd"),
    Need::Program("runc", "runc"),
    Need::File("/usr/lib/cni/bridge", "containernetworking-plugins"),
    Need::Program("ip", "iproute2"),
    Need::Program("iptables", "iptables"),
    Need::Program("conntrack", "conntrack"),
    Need::Program("nsenter", "util-linux"),
    Need::Program("buildah", "buildah"),
];

const IMAGES: &[Need] = &[
    Need::Program("buildah", "buildah"),
    Need::Program("runc", "runc"),
    Need::Program("mmdebstrap", "mmdebstrap"),
];

/// What a node is made of.
pub fn ensure_node() -> Result<()> {
    if !is_root() {
        bail!("a cluster with a node needs root: use sudo, or CLUSTER=current for a cluster that you have");
    }
    ensure(NODE)
}

/// What images are made with.
pub fn ensure_images() -> Result<()> {
    ensure(IMAGES)
}

/// What a test looks at system calls with.
pub fn ensure_strace() -> Result<()> {
    ensure(&[Need::Program("strace", "strace")])
}

/// The ssh server that a test clones from. The package would have one listen everywhere: where there is systemd, its
/// service is masked before it comes, so that none starts now or with the next boot.
pub fn ensure_sshd() -> Result<PathBuf> {
    let server = Need::Program("sshd", "openssh-server");
    if !server.is_met() && is_root() && Path::new("/run/systemd/system").is_dir() {
        command::quiet(Command::new("systemctl").args(["mask", "ssh.service", "ssh.socket"]))?;
    }
    ensure(&[Need::Program("ssh-keygen", "openssh-client"), server])?;
    Ok("/usr/sbin/sshd".into())
}

/// A PostgreSQL server that is started by hand: where there is systemd, the service of the package is masked before it comes.
pub fn ensure_postgres() -> Result<()> {
    let server = Need::File("/usr/lib/postgresql", "postgresql");
    if !server.is_met() && is_root() && Path::new("/run/systemd/system").is_dir() {
        command::quiet(Command::new("systemctl").args(["mask", "postgresql.service"]))?;
    }
    ensure(&[server, Need::Program("setpriv", "util-linux")])
}

/// A Python that can make environments.
pub fn ensure_python() -> Result<()> {
    ensure(&[Need::Program("python3", "python3")])?;
    let mut can = Command::new("python3");
    if command::quiet(can.args(["-c", "import ensurepip, venv"])).is_err() {
        // Debian keeps it apart, in a place that names Python's version.
        ensure(&[Need::File("/nonexistent", "python3-venv")])?;
    }
    Ok(())
}

/// Whether this process may do what only root may.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn ensure(needs: &[Need]) -> Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if missing(needs).is_empty() {
        return Ok(());
    }
    let _guard = ONE_AT_A_TIME.lock();
    let _lock = tools::lock("packages")?;
    // Somebody else may have installed them meanwhile.
    let packages = missing(needs);
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !is_root() || !command::exists("apt-get") {
        bail!("these packages are missing: {list}. Install them, for example with `sudo apt-get install {list}`");
    }
    install(&packages, &list)
}

fn missing(needs: &[Need]) -> Vec<&'static str> {
    let mut packages: Vec<_> = needs.iter().filter(|need| !need.is_met()).map(Need::package).collect();
    packages.dedup();
    packages
}

fn install(packages: &[&str], list: &str) -> Result<()> {
    progress::step(&format!("installing Debian packages: {list}"), || {
        let log = paths::cache()?.join("packages.log");
        command::logged(Command::new("apt-get").args(["update", "--quiet"]), &log)?;
        command::logged(
            Command::new("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(["install", "--yes", "--quiet", "--no-install-recommends"])
                .args(packages),
            &log,
        )
    })
}

impl Need {
    fn is_met(&self) -> bool {
        match self {
            Self::Program(program, _) => command::exists(program) || Path::new("/usr/sbin").join(program).is_file(),
            Self::File(file, _) => Path::new(file).exists(),
        }
    }

    fn package(&self) -> &'static str {
        match self {
            Self::Program(_, package) | Self::File(_, package) => package,
        }
    }
}
