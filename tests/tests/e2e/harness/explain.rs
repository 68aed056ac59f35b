//! What a failed test leaves for people: states, events and logs.

use super::SYSTEM;
use super::command::kubectl;

/// Prints everything of the namespace and the product's own logs.
pub async fn explain(namespace: &str) {
    let kinds = "agenticsessions,jobs,pods,persistentvolumeclaims";
    show(&["get", kinds, "-n", namespace, "-o", "wide"]).await;
    show(&["get", "agenticsessions", "-n", namespace, "-o", "yaml"]).await;
    show(&["describe", "pods,jobs", "-n", namespace]).await;
    show(&["get", "events", "-n", namespace, "--sort-by=.lastTimestamp"]).await;
    let pods = kubectl(&[
        "get",
        "pods",
        "-n",
        namespace,
        "-o",
        "jsonpath={.items[*].metadata.name}",
    ])
    .await;
    for pod in pods.unwrap_or_default().split_whitespace() {
        show(&[
            "logs",
            "-n",
            namespace,
            pod,
            "--all-containers",
            "--prefix",
            "--tail=200",
        ])
        .await;
    }
    for (name, what) in [
        ("deployment/agentic-operator", "operator"),
        ("statefulset/agentic-gateway", "gateway"),
    ] {
        eprintln!("--- the {what}");
        show(&["logs", "-n", SYSTEM, name, "--tail=150"]).await;
    }
    show(&["get", "pods", "-n", SYSTEM, "-o", "wide"]).await;
}

async fn show(arguments: &[&str]) {
    match kubectl(arguments).await {
        Ok(said) => eprintln!("$ kubectl {}\n{said}", arguments.join(" ")),
        Err(error) => eprintln!("$ kubectl {}\n{error:#}", arguments.join(" ")),
    }
}
