//! One control plane for all tests of this binary.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    sync::OnceLock,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use xtask::cluster::ControlPlane;

static PLANE: OnceLock<ControlPlane> = OnceLock::new();

/// The operator's rules, as they are installed.
const INSTALLED: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/base/operator.yaml"));

/// Node that pods are put on. Nothing of it exists but its name.
pub const NODE: &str = "node-of-the-test";

/// The control plane, with CRD, node and the operator's cluster roles; started by whoever comes first.
pub fn plane() -> &'static ControlPlane {
    PLANE.get_or_init(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plane = ControlPlane::start().expect("the control plane starts");
        apply(&plane, &crds::crd_yaml().unwrap());
        let established = ["wait", "--for=condition=Established", "crd/agenticsessions.vteam.ambient-code", "crd/projectsettings.vteam.ambient-code", "--timeout=30s"];
        // kubectl fails at once on a definition that has no conditions yet.
        let deadline = std::time::Instant::now() + std::time::Duration::from_mins(1);
        while let Err(said) = run(&plane, &established, "") {
            assert!(std::time::Instant::now() < deadline, "{said}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        // More that answer than tests have fall silent: of those that all do it is the way to them that is taken for lost.
        let spare = (0..16).map(|number| format!("{NODE}-spare-{number}"));
        let nodes: Vec<_> = std::iter::once(NODE.to_owned())
            .chain(spare)
            .map(|name| format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"))
            .collect();
        apply(&plane, &nodes.join("\n---\n"));
        for role in documents("ClusterRole") {
            apply(&plane, role);
        }
        let everyone = "{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: test-definition}, \
            roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: agentic-operator-definition}, \
            subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: 'system:serviceaccounts'}]}";
        apply(&plane, everyone);
        plane
    })
}

/// Gives the operator of a namespace what the installed one has, there.
pub fn grant(namespace: &str) {
    for role in documents("Role") {
        apply(
            plane(),
            &role.replace("namespace: agentic-system", &format!("namespace: {namespace}")),
        );
    }
    for (name, kind, role) in [
        ("sessions", "ClusterRole", "agentic-operator"),
        ("leader", "Role", "agentic-operator-leader"),
    ] {
        apply(
            plane(),
            &format!(
                "{{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {{name: {name}, namespace: {namespace}}}, \
                 roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: {kind}, name: {role}}}, \
                 subjects: [{{kind: ServiceAccount, name: agentic-operator, namespace: {namespace}}}]}}"
            ),
        );
    }
}

fn documents(kind: &str) -> impl Iterator<Item = &'static str> {
    let line = format!("\nkind: {kind}\n");
    INSTALLED
        .split("\n---")
        .filter(move |document| document.contains(&line))
}

fn config() -> impl Future<Output = Config> {
    let kubeconfig = Kubeconfig::read_from(plane().kubeconfig()).unwrap();
    async {
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .unwrap()
    }
}

/// The test's own client: an administrator.
pub async fn admin() -> Client {
    Client::try_from(config().await).unwrap()
}

/// How the operator of a namespace connects: as its service account.
pub async fn operator_config(namespace: &str) -> Config {
    let mut config = config().await;
    config.auth_info.impersonate = Some(format!("system:serviceaccount:{namespace}:agentic-operator"));
    config.auth_info.impersonate_groups = Some(vec!["system:serviceaccounts".into(), "system:authenticated".into()]);
    config
}

/// `kubectl apply` of a manifest; answers what it printed on stderr when it failed.
pub fn try_apply(manifest: &str) -> Result<(), String> {
    run(plane(), &["apply", "-f", "-"], manifest)
}

fn apply(plane: &ControlPlane, manifest: &str) {
    kubectl(plane, &["apply", "--server-side", "-f", "-"], manifest);
}

fn kubectl(plane: &ControlPlane, arguments: &[&str], input: &str) {
    run(plane, arguments, input).unwrap_or_else(|said| panic!("kubectl {arguments:?}: {said}\n{input}"));
}

fn run(plane: &ControlPlane, arguments: &[&str], input: &str) -> Result<(), String> {
    let mut kubectl: Command = plane.kubectl().unwrap();
    let mut child = kubectl
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // An older kubectl takes what begins with a brace for JSON.
    let input = if input.is_empty() {
        String::new()
    } else {
        format!("---\n{input}")
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Writes in a namespace that were answered with success, oldest first.
pub fn writes(namespace: &str) -> Vec<Value> {
    answered(namespace, |code| code < 300)
}

/// Writes whose client went away before they were answered: they may have been carried out or not.
pub fn broken_off(namespace: &str) -> Vec<Value> {
    answered(namespace, |code| code == 504)
}

fn answered(namespace: &str, with: impl Fn(u64) -> bool) -> Vec<Value> {
    let log = std::fs::read_to_string(plane().audit_log()).unwrap();
    log.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|entry| entry["objectRef"]["namespace"] == namespace)
        .filter(|entry| entry["responseStatus"]["code"].as_u64().is_some_and(&with))
        .collect()
}

/// The operator's writes in a namespace, but for Events and the lease.
pub fn operator_writes(namespace: &str) -> Vec<Value> {
    let operator = format!("system:serviceaccount:{namespace}:agentic-operator");
    writes(namespace)
        .into_iter()
        .filter(|entry| entry["impersonatedUser"]["username"] == *operator)
        .filter(|entry| entry["objectRef"]["resource"] != "events" && entry["objectRef"]["resource"] != "leases")
        .collect()
}

/// Names of the Jobs that were created in a namespace, sorted; one that was created twice is there twice.
pub fn jobs_created(namespace: &str) -> Vec<String> {
    let mut names: Vec<_> = writes(namespace)
        .iter()
        .filter(|entry| entry["verb"] == "create" && entry["objectRef"]["resource"] == "jobs")
        .map(|entry| entry["objectRef"]["name"].as_str().unwrap_or_default().to_owned())
        .collect();
    names.sort();
    names
}
