//! A branch of the control groups for one cluster's pods: limits work there, and nothing in it escapes `down`.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

const ROOT: &str = "/sys/fs/cgroup";

/// The kubelet's root, as `cgroupRoot` wants it.
pub(super) fn name(cluster: &str) -> String {
    format!("/agentic-{cluster}")
}

/// Makes the branch in the unified hierarchy, or in each controller's.
pub(super) fn create(cluster: &str) -> Result<()> {
    if is_unified() {
        // Controllers reach a branch only when each level above hands them down.
        let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"))?;
        let enable = controllers
            .split_whitespace()
            .map(|controller| format!("+{controller}"))
            .collect::<Vec<_>>()
            .join(" ");
        let branch = branches(cluster)
            .pop()
            .context("no control group hierarchy is mounted")?;
        fs::write(Path::new(ROOT).join("cgroup.subtree_control"), &enable)
            .context("failed to hand down control group controllers from the root; is this a container of its own?")?;
        fs::create_dir_all(&branch)?;
        fs::write(branch.join("cgroup.subtree_control"), &enable)?;
        return Ok(());
    }
    for branch in branches(cluster) {
        fs::create_dir_all(&branch).with_context(|| format!("failed to create {}", branch.display()))?;
        // In version 1 a new cpuset is empty, and nothing may run in it.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if branch.join(file).exists() {
                fs::write(branch.join(file), fs::read(Path::new(ROOT).join("cpuset").join(file))?)?;
            }
        }
    }
    Ok(())
}

/// Kills what runs in the branch and removes it.
pub(super) fn delete(cluster: &str) -> Result<()> {
    let begun = Instant::now();
    for branch in branches(cluster).into_iter().filter(|branch| branch.exists()) {
        loop {
            let folders = below(&branch);
            for pid in folders
                .iter()
                .filter_map(|folder| fs::read_to_string(folder.join("cgroup.procs")).ok())
            {
                pid.lines()
                    .filter_map(|line| Pid::from_raw(line.parse().ok()?))
                    .for_each(|pid| {
                        let _ = kill_process(pid, Signal::KILL);
                    });
            }
            // A group goes when it is empty and has no children, so the deepest come first.
            let left = folders
                .iter()
                .rev()
                .filter(|folder| fs::remove_dir(folder).is_err())
                .count();
            if left == 0 {
                break;
            }
            if begun.elapsed() > Duration::from_secs(10) {
                anyhow::bail!("{} still holds processes that survive SIGKILL", branch.display());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The cluster's folder in each hierarchy.
fn branches(cluster: &str) -> Vec<PathBuf> {
    let name = name(cluster);
    let name = name.trim_start_matches('/');
    if is_unified() {
        return vec![Path::new(ROOT).join(name)];
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let hierarchies = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (folder, kind) = (fields.next()?, fields.next()?);
        // Beside the old hierarchies runc also uses an empty unified one.
        matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(folder).join(name))
    });
    hierarchies.collect()
}

/// A folder and all below it, parents first.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&entry.path()));
        }
    }
    found
}
