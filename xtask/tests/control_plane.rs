//! The control plane that component tests stand on, itself under test.

use std::{fs, process::Command};

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
    let processes = command::output(Command::new("ps").args(["-eo", "args"])).unwrap();
    assert!(!processes.contains(state.to_str().unwrap()), "{processes}");
}
