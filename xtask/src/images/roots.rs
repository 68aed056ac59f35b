//! The file systems that images start from, made by mmdebstrap from this machine's own distribution: a binary built here
//! needs the C library of here.

use std::{fs, process::Command};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::buildah;
use crate::{command, paths, progress, tools::Scratch};

/// A root and how it is made.
pub(super) struct Root {
    name: &'static str,
    variant: &'static str,
    packages: &'static str,
    /// When the hook runs, and what it does.
    hook: (&'static str, &'static str),
}

/// C library and certificates; no shell.
pub(super) const SMALL: Root = Root {
    name: "small",
    variant: "extract",
    packages: "base-files,libc6,libgcc-s1,ca-certificates",
    hook: ("extract", include_str!("small_root.sh")),
};

/// What an agent works with.
pub(super) const AGENT: Root = Root {
    name: "agent",
    variant: "essential",
    packages: "bash,ca-certificates,coreutils,findutils,git,grep,openssh-client",
    hook: ("customize", include_str!("agent_root.sh")),
};

/// What an agent works with, and a server to clone from: for a test, never beside an agent.
pub(super) const SSH: Root = Root {
    name: "ssh",
    variant: "essential",
    packages: "bash,coreutils,git,openssh-client,openssh-server",
    hook: ("customize", include_str!("agent_root.sh")),
};

/// A shell that needs no C library, and nothing else.
pub(super) const BARE: Root = Root {
    name: "bare",
    variant: "extract",
    packages: "busybox-static",
    hook: ("extract", include_str!("bare_root.sh")),
};

impl Root {
    /// The root's image in the store; made on first use.
    pub(super) fn ensure(&self) -> Result<String> {
        let suite = suite()?;
        let mut hash = Sha256::new();
        for part in [self.variant, self.packages, self.hook.0, self.hook.1, &suite] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let image = format!(
            "localhost/agentic-base-{}:{suite}-{}",
            self.name,
            hex::encode(&hash.finalize()[..6])
        );
        if !buildah::has(&image)? {
            progress::step(
                &format!("making the base image {} of {suite} packages (once)", self.name),
                || self.make(&suite, &image),
            )?;
        }
        Ok(image)
    }

    fn make(&self, suite: &str, image: &str) -> Result<()> {
        let scratch = Scratch::new(&format!("building-root-{}", self.name))?;
        let hook = scratch.path().join("hook.sh");
        fs::write(&hook, self.hook.1)?;
        let archive = scratch.path().join("root.tar");
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap
            .env("SOURCE_DATE_EPOCH", "0")
            .arg("--quiet")
            .arg(format!("--variant={}", self.variant))
            .arg(format!("--include={}", self.packages))
            .arg(format!("--{}-hook=sh {} \"$1\"", self.hook.0, hook.display()))
            .arg(suite)
            .arg(&archive)
            .args(mirrors(suite)?);
        command::logged(
            &mut mmdebstrap,
            &paths::cache()?.join(format!("root-{}.log", self.name)),
        )?;
        buildah::import_root(image, &archive)
    }
}

/// The code name of this machine's release, such as `bookworm`.
fn suite() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("failed to read /etc/os-release")?;
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name
        .context("images are made on Debian or Ubuntu; elsewhere build them with Docker")?
        .trim_matches('"')
        .to_owned())
}

/// This machine's own sources of the release and its updates, and none of other vendors.
fn mirrors(suite: &str) -> Result<Vec<String>> {
    let format = "$(ORIGIN)|$(CODENAME)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)";
    let targets =
        command::output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    let ours = targets.lines().filter_map(|line| {
        let (origin, rest) = line.split_once('|')?;
        let (codename, source) = rest.split_once('|')?;
        let is_ours = matches!(origin, "Debian" | "Ubuntu") && codename.starts_with(suite);
        is_ours.then(|| source.to_owned())
    });
    Ok(ours.collect())
}
