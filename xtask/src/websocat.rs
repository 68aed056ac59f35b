//! `websocat`, for the client guide's examples.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{command, e2e::env_cargo, paths, progress, tools};

const VERSION: &str = "1.14.1";

/// The folder that it is in; built on first use.
pub fn websocat() -> Result<PathBuf> {
    let folder = paths::cache()?.join(format!("websocat-{VERSION}"));
    let _lock = tools::lock("websocat")?;
    let bin = folder.join("bin");
    if !bin.join("websocat").exists() {
        progress::step(&format!("building websocat {VERSION}"), || -> Result<()> {
            let build = tools::Scratch::new("websocat-build")?;
            let mut cargo = Command::new(env_cargo());
            cargo
                .args(["install", "websocat", "--version", VERSION, "--locked", "--quiet"])
                // Without TLS it needs no library of the system.
                .args(["--no-default-features", "--root"])
                .arg(&folder)
                .arg("--target-dir")
                .arg(build.path())
                .env_remove("RUSTFLAGS")
                .env_remove("CARGO_TARGET_DIR")
                .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0");
            command::quiet(&mut cargo)?;
            Ok(())
        })
        .context("the client guide's test needs crates.io for websocat")?;
    }
    Ok(bin)
}
