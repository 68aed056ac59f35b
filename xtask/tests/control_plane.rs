//! The control plane that component tests stand on, itself under test.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used)]

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use xtask::{cluster::ControlPlane, command};

#[test]
fn a_control_plane_serves_audits_writes_survives_its_api_server_and_leaves_nothing() {
    let cluster = ControlPlane::start().unwrap();
    let state = cluster.kubeconfig().parent().unwrap().to_owned();
    let kubectl = |words: &[&str]| command::output(cluster.kubectl().unwrap().args(words));

    kubectl(&["create", "namespace", "a-namespace"]).unwrap();
    let audit = fs::read_to_string(cluster.audit_log()).unwrap();
    assert!(
        audit
            .lines()
            .any(|line| line.contains(r#""verb":"create""#) && line.contains("a-namespace")),
        "{audit}"
    );

    cluster.stop_api_server().unwrap();
    assert!(kubectl(&["get", "namespace", "a-namespace", "--request-timeout=2s"]).is_err());
    cluster.start_api_server().unwrap();
    kubectl(&["get", "namespace", "a-namespace"]).unwrap();

    // The controller manager works: it makes the service account, and a Job's pod needs that.
    kubectl(&["create", "job", "a-job", "--image=none", "--namespace=a-namespace"]).unwrap();
    kubectl(&[
        "wait",
        "--for=create",
        "pod",
        "--selector=job-name=a-job",
        "--namespace=a-namespace",
        "--timeout=60s",
    ])
    .unwrap();

    drop(cluster);
    assert!(!state.exists());
    assert_eq!(processes_of(&state), Vec::<String>::new());
}

/// Set in the process that the test below kills.
const HOLD: &str = "HOLD_A_CONTROL_PLANE";

#[test]
fn a_control_plane_dies_with_the_process_that_started_it_and_the_next_start_clears_it_away() {
    if env::var_os(HOLD).is_some() {
        let cluster = ControlPlane::start().unwrap();
        println!("{}", cluster.kubeconfig().display());
        loop {
            thread::park();
        }
    }
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["a_control_plane_dies", "--nocapture"])
        .env(HOLD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let kubeconfig = lines
        .map_while(Result::ok)
        .find(|line| line.ends_with("/kubeconfig"))
        .unwrap();
    let state = PathBuf::from(kubeconfig).parent().unwrap().to_owned();
    assert_ne!(processes_of(&state), Vec::<String>::new());

    child.kill().unwrap();
    child.wait().unwrap();
    let begun = Instant::now();
    while !processes_of(&state).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", processes_of(&state));
        thread::sleep(Duration::from_millis(20));
    }
    assert!(state.exists());
    let _next = ControlPlane::start().unwrap();
    assert!(!state.exists());
}

fn processes_of(state: &Path) -> Vec<String> {
    let state = state.to_str().unwrap();
    command::running()
        .into_iter()
        .filter(|line| line.contains(state))
        .collect()
}
