//! Taking a cluster away, whole or in pieces: whatever an earlier run got done before it ended.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{
    cgroups,
    network::{Egress, Network},
    node, processes,
};
use crate::command;

/// Ends what runs, unmounts what is mounted, deletes the rest.
pub(super) fn remove(cluster: &str, state: &Path) -> Result<()> {
    // Daemons and shims first: they would start again what the next line ends. Containers outlive both, by design.
    processes::stop_all(state)?;
    cgroups::delete(cluster)?;

    let run = node::run_folder(cluster);
    unmount_below(&[state, &run])?;
    let network = Network::of_cluster(cluster);
    if network.path().exists() {
        Egress::of_cluster(cluster).delete();
        network.delete()?;
    }
    remove_dead_links(state);
    for folder in [state, run.as_path()] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("failed to delete {}", folder.display()))?;
        }
    }
    Ok(())
}

/// Deleting below a mount would delete what is mounted there; so nothing is deleted before all of it is unmounted.
fn unmount_below(folders: &[&Path]) -> Result<()> {
    let mounted = || -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts
            .lines()
            .filter_map(|line| Some(PathBuf::from(unescaped(line.split(' ').nth(1)?))));
        points
            .filter(|point| folders.iter().any(|folder| point.starts_with(folder)))
            .collect()
    };
    // What was mounted last may lie in what was mounted first.
    for point in mounted().iter().rev() {
        let _ = command::quiet(Command::new("umount").arg("--lazy").arg(point));
    }
    let left = mounted();
    ensure!(left.is_empty(), "still mounted, so nothing was deleted: {left:?}");
    Ok(())
}

/// The kernel writes spaces and the like in octal.
fn unescaped(field: &str) -> String {
    field
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// The kubelet links each container's log from a fixed folder of the host, and never removes those of a dead cluster.
fn remove_dead_links(state: &Path) {
    for entry in fs::read_dir("/var/log/containers").into_iter().flatten().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(state)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
