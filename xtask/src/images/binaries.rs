//! The product's binaries in release profile, built on this machine.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{command, paths, progress};

/// A folder with built binaries.
pub(crate) struct Binaries(PathBuf);

impl Binaries {
    /// Builds them; dependencies are built once for all clones, in a target folder in the cache.
    pub(crate) fn build(names: &[&str]) -> Result<Self> {
        let target = paths::cache()?.join("target");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .current_dir(paths::workspace())
            // What cargo sets for this program is not meant for another build.
            .env_remove("RUSTFLAGS")
            .env("CARGO_TARGET_DIR", &target)
            // Optimising across crates takes minutes after every change, and no test can tell the difference. The
            // Dockerfiles' own builds do it.
            .env("CARGO_PROFILE_RELEASE_LTO", "false")
            .args(["build", "--release", "--locked", "--quiet"]);
        for package in ["operator", "gateway", "runner", "tests"] {
            cargo.args(["--package", package]);
        }
        for name in names {
            cargo.args(["--bin", name]);
        }
        progress::step("building the release binaries", || command::run(&mut cargo))
            .context("the product does not build")?;
        Ok(Self(target.join("release")))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}
