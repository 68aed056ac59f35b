//! The product runs under the rights that its chart gives, and needs no others.

use anyhow::{Result, ensure};
use crds::Phase;
use serde_json::json;

use crate::harness::command::{kubectl, kubectl_with};
use crate::harness::kill::pod_of;
use crate::harness::scene::marker;
use crate::harness::{Keys, SYSTEM, audit, scene};

async fn may(account: &str, question: &[&str]) -> Result<bool> {
    let who = format!("--as=system:serviceaccount:{SYSTEM}:{account}");
    let arguments = [&["auth", "can-i"], question, &["--all-namespaces", &who]].concat();
    let output = kubectl_with(&arguments, "").await?;
    Ok(String::from_utf8_lossy(&output.stdout).trim() == "yes")
}

#[tokio::test]
async fn operator_and_gateway_have_the_rights_of_the_chart_and_nothing_more() -> Result<()> {
    scene("rights", Keys::Good, async |scene| {
        scene
            .create("ordinary", &marker(), &json!([{ "text": "Done." }]))
            .await?;
        scene.phase("ordinary", Phase::Completed).await?;
        for account in ["agentic-operator", "agentic-gateway"] {
            let pod = pod_of(SYSTEM, account).await?;
            ensure!(pod["spec"]["serviceAccountName"] == account, "{}", pod["spec"]);
            // Each of these would be a way to everything else in the cluster.
            for question in [
                &["get", "secrets"][..],
                &["list", "secrets"],
                &["create", "pods"],
                &["create", "pods/exec"],
                &["create", "serviceaccounts/token"],
                &["create", "clusterrolebindings"],
                &["escalate", "clusterroles"],
                &["impersonate", "users"],
                &["update", "nodes"],
                &["*", "*"],
            ] {
                ensure!(!may(account, question).await?, "{account} may {question:?}");
            }
        }
        ensure!(
            may("agentic-operator", &["create", "jobs.batch"]).await?,
            "the question itself works"
        );
        ensure!(
            !may(
                "agentic-gateway",
                &["patch", "agenticsessions.vteam.ambient-code", "--subresource=status"]
            )
            .await?
        );

        let ours = format!("system:serviceaccount:{SYSTEM}:");
        let events = audit::events()?;
        let refused: Vec<_> = events
            .iter()
            .filter(|event| {
                event["user"]["username"]
                    .as_str()
                    .is_some_and(|user| user.starts_with(&ours))
            })
            .filter(|event| event["responseStatus"]["code"] == 403)
            // The namespaces of other tests go while their sessions still have things to say.
            .filter(|event| !event["responseStatus"].to_string().contains("is being terminated"))
            .collect();
        ensure!(refused.is_empty(), "the product wanted what it may not: {refused:#?}");
        let jobs = events
            .iter()
            .filter(|event| event["objectRef"]["namespace"] == scene.namespace.as_str());
        let by_operator = jobs.filter(|event| event["user"]["username"] == format!("{ours}agentic-operator"));
        ensure!(by_operator.count() > 0, "the operator acts as its own account");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn sessions_run_where_pod_security_is_restricted() -> Result<()> {
    scene("restricted", Keys::Good, async |scene| {
        let run = [
            "run",
            "rude",
            "--image=any",
            "--privileged",
            "--dry-run=server",
            "-n",
            &scene.namespace,
        ];
        let output = kubectl_with(&run, "").await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && said.contains("restricted"),
            "the namespace enforces it: {said}"
        );
        scene.create("polite", &marker(), &json!([{ "text": "Done." }])).await?;
        scene.phase("polite", Phase::Completed).await?;
        let labels = kubectl(&["get", "namespace", SYSTEM, "-o", "jsonpath={.metadata.labels}"]).await?;
        ensure!(
            labels.contains(r#""pod-security.kubernetes.io/enforce":"restricted""#),
            "{labels}"
        );
        Ok(())
    })
    .await
}
