//! Two nodes that both have the volume: the second runner has another kernel's id, and a lock of its own, as on a volume that
//! does not carry locks from node to node.

use std::path::PathBuf;

use protocol::Outcome;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;

use super::World;
use crate::common::eventually;

/// What makes it another node, for whom it is started below.
const OTHER_NODE: &str =
    r#"mount --bind "$0/boot_id" /proc/sys/kernel/random/boot_id; mount --bind "$0/lock" "$1"; shift; exec "$@""#;

/// Only root may mount.
fn left_out() -> bool {
    let out = !rustix::process::geteuid().is_root() && std::env::var_os("CI").is_none();
    if out {
        eprintln!("left out: only root may make it look like another node");
    }
    out
}

impl World {
    /// Starts an attempt on another node, and its agent's container.
    fn start_elsewhere(&self, attempt: u32) -> (Child, Child, tempfile::TempDir) {
        let node = tempfile::tempdir().unwrap();
        std::fs::write(node.path().join("boot_id"), "00000000-0000-4000-8000-00000000000b\n").unwrap();
        std::fs::write(node.path().join("lock"), "").unwrap();
        let lock = self.session.state().join("lock");
        let (node_path, lock) = (node.path().to_str().unwrap(), lock.to_str().unwrap());
        let program = ["unshare", "--mount", "sh", "-euc", OTHER_NODE, node_path, lock];
        let (runner, container) = self.start_by(&program, attempt, None);
        (runner, container, node)
    }

    fn began(&self) -> PathBuf {
        self.session.workspace().join("began")
    }

    /// Lets the tool end when it is run again.
    fn go(&self) {
        std::fs::write(self.session.workspace().join("go"), "").unwrap();
    }
}

#[tokio::test]
async fn a_runner_that_is_at_work_elsewhere_has_ended_before_the_next_one_begins() {
    if left_out() {
        return;
    }
    let world = World::stopped().await;
    let (first, _container) = world.start(1, None);
    let began = world.began();
    eventually("the tool runs", || began.exists()).await;
    let (next, _elsewhere, _node) = world.start_elsewhere(2);
    // It also waits until nothing of it runs any more.
    let first = world.end(first).await;
    assert!(first.stderr.contains("\nSuperseded\n"), "{}", first.stderr);
    let started = world.session.events("cliStarted").len();
    assert_eq!(started, 1, "the next one still waits");
    world.go();
    let next = world.end(next).await;
    world.assert_gone_on("two nodes", &next);
}

/// As a machine that was paused: with its agent, and without any sign.
#[tokio::test]
async fn a_runner_that_stood_still_while_another_took_over_writes_nothing_more_and_ends() {
    if left_out() {
        return;
    }
    let world = World::stopped().await;
    let (first, container) = world.start(1, None);
    let began = world.began();
    eventually("the tool runs", || began.exists()).await;
    let paused: Vec<Pid> = [&first, &container].into_iter().flat_map(all_of).collect();
    assert!(paused.len() >= 4, "runner, shim, CLI and tool: {paused:?}");
    let tell = |signal| {
        for pid in &paused {
            let _ = kill_process(*pid, signal);
        }
    };
    tell(Signal::STOP);
    let (next, _elsewhere, _node) = world.start_elsewhere(2);
    world.go();
    let next = crate::common::ended_within(next, super::PATIENCE).await;
    assert_eq!(next.code, Some(0), "{}{}", next.stdout, next.stderr);
    world.assert_ended("a paused node", Outcome::Succeeded);
    let before = world.session.records().len();
    tell(Signal::CONT);
    let first = world.end(first).await;
    assert_ne!(first.code, Some(0), "{}{}", first.stdout, first.stderr);
    assert_eq!(world.session.records().len(), before, "nothing was written any more");
    let attempts: Vec<u32> = world.session.records().iter().map(|record| record.attempt).collect();
    assert!(attempts.is_sorted(), "{attempts:?}");
}

/// A process and everything below it.
fn all_of(child: &Child) -> Vec<Pid> {
    let mut open = vec![child.id().unwrap().to_string()];
    let mut found = Vec::new();
    while let Some(pid) = open.pop() {
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            open.extend(children.split_ascii_whitespace().map(str::to_owned));
        }
        found.extend(pid.parse().ok().and_then(Pid::from_raw));
    }
    found
}
