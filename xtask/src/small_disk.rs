//! A disk that fills up, for a test that must see what happens then.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::tools::Scratch;

const FOLDER: &str = "SMALL_DISK";

/// Runs the test of this name again in a mount namespace of its own, with a disk of so many bytes as mount's `size`. There it gives
/// the disk's folder; outside nothing, because the test is over then. Only root may mount, so others leave it out.
pub fn small_disk(test: &str, size: &str) -> Result<Option<PathBuf>> {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return Ok(Some(folder.into()));
    }
    if !rustix::process::geteuid().is_root() && std::env::var_os("CI").is_none() {
        eprintln!("left out: only root may mount a small disk");
        return Ok(None);
    }
    let name = format!("small-disk-{}-{}", std::process::id(), test.replace(':', "-"));
    let folder = Scratch::new(&name)?;
    let mount = format!("mount -t tmpfs -o size={size} none \"${FOLDER}\"; exec \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-euc", &mount, "sh"])
        .arg(std::env::current_exe()?)
        .args(["--exact", test, "--nocapture"])
        .env(FOLDER, folder.path())
        .output()
        .context("failed to run unshare")?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.contains("1 passed"), "{said}");
    Ok(None)
}
