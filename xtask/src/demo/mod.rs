//! `make demo`: from nothing to a finished session, and what to look at then.

mod keys;
mod session;

use std::{path::Path, process::Command};

use anyhow::{Context, Result};

use self::keys::Keys;
use crate::{
    chart::{CHART, NAMESPACE},
    cluster::{Cluster, Extent},
    command, paths, progress,
    target::{self, Target},
    tools,
};

/// The local cluster's name.
const CLUSTER: &str = "demo";
/// Where the demo's session runs.
const SESSIONS: &str = "demo";
/// Namespace of the mock model and the trace collector.
const TEST_TOOLS: &str = "agentic-test-tools";

/// Runs it all; the cluster stays.
pub fn run() -> Result<()> {
    let keys = Keys::from_environment();
    progress::say(keys.announcement());
    tools::ensure(tools::Group::Chart)?;
    let target = prepare(&keys)?;
    let kubectl = Kubectl {
        kubeconfig: &target.kubeconfig,
    };
    if keys.need_test_tools() {
        progress::step("starting the mock model and the trace collector", || {
            start_test_tools(&kubectl)
        })?;
    }
    progress::step("installing the chart", || install(&target, &kubectl))?;
    progress::step(&format!("making namespace {SESSIONS} and its Secrets"), || {
        make_namespace(&kubectl, SESSIONS)?;
        keys.apply(&kubectl, SESSIONS)
    })?;
    session::run(&kubectl, &keys)?;
    print_usage(&target);
    Ok(())
}

/// Removes the demo's local cluster, if there is one.
pub fn remove() -> Result<()> {
    let cluster = Cluster::named(CLUSTER)?;
    if cluster.exists() { cluster.down() } else { Ok(()) }
}

fn prepare(keys: &Keys) -> Result<Target> {
    let extent = if keys.need_egress() {
        Extent::NodeWithEgress
    } else {
        Extent::Node
    };
    let cluster = Cluster::named(CLUSTER)?;
    // A demo with a key after one without: the way out cannot be added to a cluster that runs.
    if cluster.is_up() && cluster.extent()? != extent {
        cluster.down()?;
    }
    target::prepare(CLUSTER, extent)
}

fn start_test_tools(kubectl: &Kubectl<'_>) -> Result<()> {
    let manifest = paths::workspace().join("tests/deploy/tools.yaml");
    kubectl.run(&["apply", "--filename", &manifest.to_string_lossy()])?;
    for name in ["mock-model", "trace-collector"] {
        let deployment = format!("deployment/{name}");
        kubectl.run(&[
            "rollout",
            "status",
            "--namespace",
            TEST_TOOLS,
            &deployment,
            "--timeout=120s",
        ])?;
    }
    Ok(())
}

fn install(target: &Target, kubectl: &Kubectl<'_>) -> Result<()> {
    make_namespace(kubectl, NAMESPACE)?;
    let helm = |words: &[&str]| {
        let mut helm = Command::new(tools::path("helm")?);
        command::quiet(
            helm.env("KUBECONFIG", &target.kubeconfig)
                .args(words)
                .args(["--namespace", NAMESPACE]),
        )
    };
    let is_upgrade = helm(&["status", "agentic-operator"]).is_ok();
    let images = format!("image.registry={},image.tag={}", target.registry, target.tag);
    let chart = paths::workspace().join(CHART);
    helm(&[
        "upgrade",
        "--install",
        "agentic-operator",
        &chart.to_string_lossy(),
        "--set",
        &images,
        // The mock model and the trace collector are in the cluster.
        "--set-json",
        r#"networkPolicy.egress=[{"to":[{"namespaceSelector":{}}]}]"#,
        "--wait",
        "--timeout",
        "180s",
    ])?;
    if is_upgrade {
        // The images may be new under the same tag, and then nothing in the chart has changed.
        let objects = ["deployment/agentic-operator", "statefulset/agentic-gateway"];
        kubectl.run(&[&["rollout", "restart", "--namespace", NAMESPACE], &objects[..]].concat())?;
        for object in objects {
            kubectl.run(&["rollout", "status", "--namespace", NAMESPACE, object, "--timeout=120s"])?;
        }
    }
    Ok(())
}

/// Sessions run under the strictest Pod Security level, and so does the product itself.
fn make_namespace(kubectl: &Kubectl<'_>, name: &str) -> Result<()> {
    let labels = serde_json::json!({"pod-security.kubernetes.io/enforce": "restricted"});
    let namespace = serde_json::json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels},
    });
    kubectl.apply(&[namespace])
}

fn print_usage(target: &Target) {
    println!("\nUse it:\n");
    println!("  export KUBECONFIG={}", target.kubeconfig.display());
    for tool in ["kubectl", "helm"].into_iter().filter(|tool| !command::exists(tool)) {
        if let Some(folder) = tools::path(tool).ok().as_deref().and_then(Path::parent) {
            println!("  export PATH=$PATH:{}", folder.display());
        }
    }
    println!("  kubectl -n {SESSIONS} get as");
    println!("  kubectl -n {SESSIONS} apply -f docs/examples/full.yaml");
    match target.local {
        Some(_) => println!("\nDelete it:\n\n  cargo xtask cluster down --name {CLUSTER}"),
        None => println!(
            "\nDelete it:\n\n  kubectl delete namespace {SESSIONS}\n  helm uninstall --namespace {NAMESPACE} agentic-operator"
        ),
    }
}

/// kubectl with the demo's cluster.
struct Kubectl<'a> {
    kubeconfig: &'a Path,
}

impl Kubectl<'_> {
    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut kubectl = Command::new(tools::path("kubectl")?);
        kubectl.env("KUBECONFIG", self.kubeconfig).args(words);
        Ok(kubectl)
    }

    /// Runs quietly and returns what it printed.
    fn run(&self, words: &[&str]) -> Result<String> {
        command::output(&mut self.command(words)?)
    }

    /// Applies objects by way of stdin: a key must not be in a command line, where every user of the machine can read it.
    fn apply(&self, objects: &[serde_json::Value]) -> Result<()> {
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
        command::with_input(
            &mut self.command(&["apply", "--filename=-"])?,
            &serde_json::to_vec(&list)?,
        )
        .context("failed to apply the demo's objects")
    }
}
