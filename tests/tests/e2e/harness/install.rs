//! Installs the product from its chart and the test tools beside it, once for the whole run.

use anyhow::{Context as _, Result};
use tokio::sync::OnceCell;

use super::command::{helm, kubectl};
use super::explain::explain;
use super::{required, root};

/// Namespace of the operator and the gateway.
pub const SYSTEM: &str = "agentic-system";
/// Namespace of the sessions of the task API and the claude-code API.
pub const COMPAT: &str = "e2e-compat";
/// Namespace of the mock model and the trace collector.
pub const TOOLS: &str = "agentic-test-tools";
/// The one image with a shell that is on the node.
pub const SHELL_IMAGE: &str = "localhost/agentic-runner:dev";
/// The image of the test tools.
pub const TOOLS_IMAGE: &str = "localhost/agentic-test-tools:dev";
/// The image with an ssh server.
pub const SSH_IMAGE: &str = "localhost/agentic-test-ssh:dev";
/// The mock model, as pods reach it.
pub const MODEL_URL: &str = "http://mock-model.agentic-test-tools.svc:8080";
/// The trace collector, as pods reach it.
pub const COLLECTOR_URL: &str = "http://trace-collector.agentic-test-tools.svc:3000";

static INSTALLED: OnceCell<()> = OnceCell::const_new();

/// Makes sure that everything is installed and ready.
pub async fn installed() -> Result<()> {
    let installed = INSTALLED.get_or_try_init(async || {
        let result = install().await;
        if result.is_err() {
            explain(SYSTEM).await;
        }
        result
    });
    installed.await.copied()
}

async fn install() -> Result<()> {
    required("KUBECONFIG")?;
    let tools = root().join("tests/deploy/tools.yaml");
    kubectl(&["apply", "-f", &tools.to_string_lossy()])
        .await
        .context("failed to deploy the test tools")?;
    // The product itself must get along with what it demands of sessions.
    let _ = kubectl(&["create", "namespace", SYSTEM]).await;
    kubectl(&[
        "label",
        "--overwrite",
        "namespace",
        SYSTEM,
        "pod-security.kubernetes.io/enforce=restricted",
    ])
    .await?;
    let chart = root().join("charts/agentic-operator");
    helm(&[
        "upgrade",
        "--install",
        "agentic-operator",
        &chart.to_string_lossy(),
        "--namespace",
        SYSTEM,
        "--set",
        "image.registry=localhost,image.tag=dev",
        // Models, repositories and collectors of the tests are in the cluster.
        "--set-json",
        r#"networkPolicy.egress=[{"to":[{"namespaceSelector":{}}]}]"#,
        "--set",
        &format!(
            "gateway.compat.apis={{tasks,claude-code}},gateway.compat.namespace={COMPAT},gateway.compat.authEnabled=false,\
             gateway.compat.rateLimitPerMinute=0"
        ),
        "--wait",
        "--timeout",
        "120s",
    ])
    .await
    .context("failed to install the chart")?;
    for name in ["mock-model", "trace-collector"] {
        let deployment = format!("deployment/{name}");
        kubectl(&["rollout", "status", "-n", TOOLS, &deployment, "--timeout=120s"]).await?;
    }
    Ok(())
}
