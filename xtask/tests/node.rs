//! The local cluster with a node, itself under test. Needs root, as the cluster does.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use xtask::{command, packages, paths};

/// A cluster that is gone when the test is over, whatever came of it.
struct Cluster(String);

impl Cluster {
    fn named(name: &str) -> Self {
        Self(format!("test-{name}-{}", std::process::id()))
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(["cluster", "--name", &self.0]).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> String {
        command::output(&mut self.command(words)).unwrap()
    }

    fn state(&self) -> PathBuf {
        paths::clusters().unwrap().join(&self.0)
    }

    fn assert_ready(&self) {
        let nodes = self.run(&["kubectl", "get", "nodes", "--no-headers"]);
        assert!(nodes.contains(" Ready "), "{nodes}");
    }

    /// Nothing on the machine may remind of it.
    fn assert_gone(&self) {
        assert!(!self.state().exists());
        for (what, text) in [
            ("process", command::running().join("\n")),
            ("mount", fs::read_to_string("/proc/mounts").unwrap()),
            (
                "network namespace",
                command::output(Command::new("ip").args(["netns", "list"])).unwrap(),
            ),
            (
                "control group",
                command::output(Command::new("find").args(["/sys/fs/cgroup", "-name", "agentic-*"])).unwrap(),
            ),
        ] {
            // The test's own name for it is in no argument of the test itself.
            let left: Vec<&str> = text.lines().filter(|line| line.contains(&self.0)).collect();
            assert!(left.is_empty(), "{what} left: {left:?}");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.command(&["down"]).output();
    }
}

fn can_run() -> bool {
    let is_root = packages::is_root();
    if !is_root {
        eprintln!("SKIPPED: a node needs root");
    }
    is_root
}

fn wait_for(path: &Path) {
    let begun = Instant::now();
    while !path.exists() {
        assert!(
            begun.elapsed() < Duration::from_mins(2),
            "{} does not appear",
            path.display()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn clusters_run_side_by_side_and_one_that_was_killed_while_starting_is_cleared_away() {
    if !can_run() {
        return;
    }
    let (steady, killed) = (Cluster::named("a"), Cluster::named("b"));
    steady.run(&["up"]);

    let mut start = killed
        .command(&["up"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&killed.state().join("pid/kubelet"));
    start.kill().unwrap();
    start.wait().unwrap();
    killed.run(&["up"]);
    killed.assert_ready();
    killed.run(&["down"]);
    killed.assert_gone();

    steady.assert_ready();
    steady.run(&["down"]);
    steady.assert_gone();
}

#[test]
fn the_way_out_is_there_only_when_asked_for_and_leaves_no_rule_behind() {
    if !can_run() {
        return;
    }
    let rules = || {
        let nat = command::output(Command::new("iptables").args(["-w", "-t", "nat", "-S", "POSTROUTING"])).unwrap();
        nat.lines().filter(|line| line.contains("10.98.")).count()
    };
    // An address that stands for the outside; nothing is sent.
    let route = ["exec", "ip", "route", "get", "192.0.2.1"];
    let cluster = Cluster::named("e");
    cluster.run(&["up"]);
    assert!(!cluster.command(&route).output().unwrap().status.success());
    cluster.run(&["down"]);

    let before = rules();
    cluster.run(&["up", "--egress"]);
    assert!(cluster.run(&route).contains("via 10.98."));
    assert_eq!(rules(), before + 1);
    cluster.run(&["down"]);
    assert_eq!(rules(), before);
    cluster.assert_gone();
}

/// `cargo test --workspace` may build this program anew while it waits to start the cluster for the tests.
#[test]
fn a_cluster_is_started_by_a_program_whose_file_has_been_replaced() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::named("r");
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("xtask");
    fs::copy(env!("CARGO_BIN_EXE_xtask"), &copy).unwrap();
    let script = "exec 3<\"$1\"; rm \"$1\"; exec /proc/self/fd/3 cluster --name \"$2\" up";
    let mut up = Command::new("sh");
    up.args(["-c", script, "sh"]).arg(&copy).arg(&cluster.0);
    command::output(&mut up).unwrap();
    cluster.assert_ready();
}
