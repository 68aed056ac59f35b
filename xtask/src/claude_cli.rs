//! The pinned Claude Code CLI. Its licence forbids shipping it, so it is fetched from npm where it is needed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context as _, Result, bail, ensure};

use crate::paths;

/// The CLI version that the runner is tested with.
pub const VERSION: &str = "2.1.329";
/// The npm package that holds the native binary; the wrapper package needs a newer Node and is not wanted.
const PACKAGE: &str = "@anthropic-ai/claude-code-linux-x64";
/// SHA-256 of the binary, as the vendor's manifest gives it.
pub const SHA256: &str = "30e2724e2aecb1bf5dc9f3130901afb71c5fa229051c190a6d7ad9aff6378d6d";
/// Size of the binary in bytes.
const SIZE: u64 = 377_545_232;

/// Path of the pinned CLI in the cache; fetched with npm and checked when it is not there yet.
pub fn claude_cli() -> Result<PathBuf> {
    let dir = paths::cache()?.join(format!("claude-code-{VERSION}"));
    let binary = dir.join("claude");
    // It only gets its name after its checksum was right, so the size is enough from then on.
    if fs::metadata(&binary).is_ok_and(|found| found.len() == SIZE) {
        return Ok(binary);
    }
    fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let scratch = dir.join(format!("fetch.{}", process::id()));
    let fetched = fetch(&scratch, &binary);
    let _ = fs::remove_dir_all(&scratch);
    fetched.map(|()| binary)
}

fn fetch(scratch: &Path, binary: &Path) -> Result<()> {
    fs::create_dir_all(scratch).with_context(|| format!("failed to create {}", scratch.display()))?;
    let tarball = run(Command::new("npm")
        .args(["pack", "--silent", "--ignore-scripts"])
        .arg(format!("{PACKAGE}@{VERSION}"))
        .current_dir(scratch))?;
    run(Command::new("tar")
        .args(["-xzf", tarball.trim(), "package/claude"])
        .current_dir(scratch))?;
    let unpacked = scratch.join("package/claude");
    let sum = run(Command::new("sha256sum").arg(&unpacked))?;
    let sum = sum.split_whitespace().next().unwrap_or_default();
    ensure!(
        sum == SHA256,
        "{PACKAGE}@{VERSION} has SHA-256 {sum}, expected {SHA256}: the registry does not serve the pinned binary"
    );
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("failed to make {} executable", unpacked.display()))?;
    fs::rename(&unpacked, binary).with_context(|| format!("failed to move the CLI to {}", binary.display()))
}

fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("failed to run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} wrote bytes that are not text"))
}
