//! The product's binaries in release profile, built on this machine.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{command, paths, progress};

/// A folder with built binaries.
pub(crate) struct Binaries(PathBuf);

impl Binaries {
    /// Builds them; dependencies are built once for all clones, in a target folder in the cache.
    pub(crate) fn build(names: &[&str]) -> Result<Self> {
        let cache = paths::cache()?.join("target");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .current_dir(paths::workspace())
            .env("CARGO_TARGET_DIR", &cache)
            // Optimising across crates takes minutes after every change, and no test can tell the difference. The
            // Dockerfiles' own builds do it.
            .env("CARGO_PROFILE_RELEASE_LTO", "false")
            .args(["build", "--release", "--locked", "--quiet"]);
        let built = linked_as_shipped(&mut cargo, "release")?;
        for package in ["operator", "gateway", "runner", "tests"] {
            cargo.args(["--package", package]);
        }
        for name in names {
            cargo.args(["--bin", name]);
        }
        progress::step("building the release binaries", || command::run(&mut cargo))
            .context("the product does not build")?;
        Ok(Self(cache.join(built)))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// The profile that runner and operator are shipped in.
pub(crate) const SMALL_PROFILE: &str = "small";

/// Builds the operator as its Dockerfile does, for what is measured; answers where it is.
pub(crate) fn operator_as_shipped() -> Result<PathBuf> {
    let target = paths::cache()?.join("target");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(paths::workspace())
        .env("CARGO_TARGET_DIR", &target)
        .args([
            "build",
            "--profile",
            SMALL_PROFILE,
            "--locked",
            "--package",
            "operator",
            "--quiet",
        ]);
    progress::step("building the operator as it is shipped", || command::run(&mut cargo))
        .context("the operator does not build")?;
    Ok(target.join(SMALL_PROFILE).join("agentic-operator"))
}

/// Has `cargo build` link statically: the runner is copied into images of users, whose C library may be another one
/// or none. Returns where in the target folder the binaries are.
pub(crate) fn linked_as_shipped(cargo: &mut Command, profile: &str) -> Result<PathBuf> {
    let host = host()?;
    // With a target named, the flags are not for procedural macros, which cannot be static.
    cargo
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .args(["--target", &host]);
    Ok(PathBuf::from(host).join(profile))
}

/// What this machine's compiler builds for when it is not told.
fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let said = command::output(Command::new(rustc).current_dir(paths::workspace()).arg("-vV"))?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}
