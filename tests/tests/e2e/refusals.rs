//! What cannot work says so, at once, with what to do about it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use crds::{AgenticSessionStatus, Phase};
use jiff::Timestamp;
use protocol::names;
use serde_json::{Value, json};
use tests::model::script;
use tokio::time::Instant;

use crate::harness::command::kubectl_with;
use crate::harness::scene::{marker, small};
use crate::harness::wait::until;
use crate::harness::{Keys, Scene, scene};

/// What `kubectl apply` says of a session with this name and spec.
async fn refusal(scene: &Scene, name: &str, spec: &Value) -> Result<String> {
    let manifest = json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession", "metadata": { "name": name }, "spec": spec,
    });
    let output = kubectl_with(&["apply", "-n", &scene.namespace, "-f", "-"], &manifest.to_string()).await?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{spec} was accepted as {name}");
    Ok(said)
}

#[tokio::test]
async fn bad_input_is_refused_at_apply_with_what_to_do() -> Result<()> {
    scene("input", Keys::Good, async |scene| {
        let long = "n".repeat(53);
        let cases = [
            ("unknown", json!({ "prompt": "x", "promt": "y" }), "promt"),
            (
                "both",
                json!({ "prompt": "x", "initialPrompt": "y" }),
                "exactly one of spec.prompt and spec.initialPrompt",
            ),
            ("none", json!({}), "exactly one of spec.prompt and spec.initialPrompt"),
            (&long, json!({ "prompt": "x" }), "at most 52 characters"),
            (
                "never",
                json!({ "prompt": "x", "timeout": 0 }),
                "spec.timeout must be 1 to 604800 seconds",
            ),
            ("huge", json!({ "prompt": "ü".repeat(60_000) }), "at most 100000 bytes"),
        ];
        for (name, spec, expected) in cases {
            let said = refusal(scene, name, &spec).await?;
            ensure!(said.contains(expected), "{name}: {said}");
        }
        let left = scene.kubectl(&["get", "as,jobs,pods,pvc", "-o", "name"]).await?;
        ensure!(left.is_empty(), "nothing was made: {left}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn what_is_fixed_cannot_be_changed_later() -> Result<()> {
    scene("fixed", Keys::None, async |scene| {
        let spec = json!({ "prompt": "x", "suspend": true });
        let manifest = |spec: &Value| {
            json!({ "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession",
                    "metadata": { "name": "fixed" }, "spec": spec })
            .to_string()
        };
        let arguments = ["apply", "-n", &scene.namespace, "-f", "-"];
        let applied = kubectl_with(&arguments, &manifest(&spec)).await?;
        ensure!(applied.status.success(), "{applied:?}");
        let said = refusal(scene, "fixed", &json!({ "prompt": "y", "suspend": true })).await?;
        ensure!(said.contains("spec.prompt cannot be changed"), "{said}");
        let renamed = json!({ "prompt": "x", "suspend": true, "displayName": "New" });
        let applied = kubectl_with(&arguments, &manifest(&renamed)).await?;
        ensure!(applied.status.success(), "displayName may change: {applied:?}");
        Ok(())
    })
    .await
}

async fn failed(scene: &Scene, name: &str, steps: &Value, reason: &str) -> Result<AgenticSessionStatus> {
    let begin = Instant::now();
    scene.create(name, &marker(), steps).await?;
    let status = scene.phase(name, Phase::Failed).await?;
    ensure!(status.reason.as_deref() == Some(reason), "{status:#?}");
    eprintln!("{name}: {reason} after {:?}", begin.elapsed());
    ensure!(status.attempt == Some(1), "it is not tried again: {status:#?}");
    Ok(status)
}

#[tokio::test]
async fn a_session_without_a_key_fails_within_seconds_and_names_the_secrets() -> Result<()> {
    scene("keyless", Keys::None, async |scene| {
        let status = failed(scene, "keyless", &json!([{ "text": "never" }]), "NoCredentials").await?;
        let message = status.message.as_deref().unwrap_or_default();
        ensure!(
            names::RUNNER_SECRETS.iter().all(|secret| message.contains(secret)),
            "{message}"
        );
        let (start, end) = (
            status.start_time.context("no start")?,
            status.completion_time.context("no end")?,
        );
        let took = end.0.duration_since(start.0);
        ensure!(took.as_secs() <= 10, "it took {took} from its start");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_wrong_key_fails_as_such() -> Result<()> {
    scene(
        "wrongkey",
        Keys::This("sk-ant-fake-wrong-000000000000000000"),
        async |scene| {
            let status = failed(scene, "locked-out", &json!([{ "text": "never" }]), "InvalidCredentials").await?;
            let message = status.message.as_deref().unwrap_or_default();
            ensure!(
                message.contains("ambient-runner-secrets"),
                "the message says where the key is: {message}"
            );
            Ok(())
        },
    )
    .await
}

#[tokio::test]
async fn a_request_that_the_api_refuses_is_the_agents_error() -> Result<()> {
    scene("refused", Keys::Good, async |scene| {
        let steps = json!([{ "error": { "status": 400, "message": "a reason of the model API" } }]);
        let status = failed(scene, "refused", &steps, "AgentError").await?;
        let told = format!("{:?} {:?}", status.message, status.result);
        ensure!(told.contains("a reason of the model API"), "{told}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn an_overloaded_model_is_tried_again_in_a_second_attempt() -> Result<()> {
    scene("overload", Keys::Good, async |scene| {
        let mock = crate::harness::mock::Mock::reach().await?;
        let marker = marker();
        // The CLI gives up after its retries; how many those are is its affair, so the trouble ends with the attempt.
        let steps = json!([{ "error": { "status": 529, "times": 4 }, "text": "At last." }]);
        scene.create("patient", &marker, &steps).await?;
        let status = scene.phase("patient", Phase::Completed).await?;
        ensure!(status.result.as_deref() == Some("At last."), "{status:#?}");
        mock.prompt_was_given_once(&marker).await
    })
    .await
}

#[tokio::test]
async fn a_hanging_model_ends_in_a_timeout_with_nothing_left_running() -> Result<()> {
    scene("timeout", Keys::Good, async |scene| {
        let mut spec = small();
        spec.prompt = Some(script::prompt(&marker(), &json!([{ "hang": true }])));
        spec.timeout = Some(5);
        scene.create_with("hanging", spec).await?;
        let status = scene.phase("hanging", Phase::Failed).await?;
        ensure!(status.reason.as_deref() == Some("Timeout"), "{status:#?}");
        let (start, end) = (
            status.start_time.context("no start")?,
            status.completion_time.context("no end")?,
        );
        let took = Duration::try_from(end.0.duration_since(start.0)).context("the end is before the start")?;
        let limit = Duration::from_secs(5 + names::GRACE_PERIOD_SECONDS.unsigned_abs());
        ensure!(took >= Duration::from_secs(5) && took <= limit, "it took {took:?}");
        let left = start.0 + limit - Timestamp::now();
        until(
            "no container to run any more",
            Duration::try_from(left).unwrap_or_default(),
            async || {
                let running = scene
                    .kubectl(&["get", "pods", "-o", "jsonpath={..state.running}"])
                    .await?;
                Ok(running.is_empty().then_some(()))
            },
        )
        .await
    })
    .await
}
