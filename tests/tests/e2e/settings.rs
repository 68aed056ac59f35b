//! What the admin of a namespace decides, and what becomes of claims and of sessions whose time is over.

use anyhow::{Context as _, Result, ensure};
use crds::session::{LlmSettings, ObjectName, Retention};
use crds::{AgenticSessionSpec, Phase};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Api;
use serde_json::{Value, json};
use tests::model::FAKE_KEY;
use tests::model::script::prompt;

use crate::harness::command::apply;
use crate::harness::mock::Mock;
use crate::harness::scene::{marker, small};
use crate::harness::volume::{on_claim, on_volume};
use crate::harness::wait::{SOON, until};
use crate::harness::{Keys, MODEL_URL, Scene, scene};

const KEYS: &str = "keys-of-the-team";
const SHARED: &str = "shared-data";

fn bash(command: &str) -> Value {
    json!({ "name": "Bash", "input": { "command": command, "description": "t" } })
}

/// A session with the team's keys, on the shared claim.
fn of_the_team(marker: &str, command: &str) -> AgenticSessionSpec {
    let steps = json!([{ "tools": [bash(command)] }, { "text": "Done." }]);
    let mut spec = AgenticSessionSpec {
        prompt: Some(prompt(marker, &steps)),
        runner_secrets: Some(vec![ObjectName(KEYS.to_owned())]),
        ..small()
    };
    let workspace = spec.workspace.get_or_insert_default();
    (workspace.size, workspace.existing_claim) = (None, Some(SHARED.to_owned()));
    spec
}

async fn told(mock: &Mock, marker: &str) -> Result<(String, String)> {
    let request = mock.request(marker, SOON, |request| request.step == Some(1)).await?;
    let result = request.messages().last().map(ToString::to_string);
    let model = request.body["model"].as_str().unwrap_or_default().to_owned();
    Ok((model, result.unwrap_or_default()))
}

#[tokio::test]
async fn model_keys_and_claim_are_what_the_admin_allows_and_defaults() -> Result<()> {
    scene("settings", Keys::None, async |scene| {
        let (mock, first, second) = (Mock::reach().await?, marker(), marker());
        scene.create_with("writer", of_the_team(&first, "echo seen > for-others.txt")).await?;
        let refused = waits_for(scene, "writer", &[SHARED, "allowedClaims"]).await?;
        ensure!(refused == Phase::Pending, "nothing is made before the admin allows it: {refused}");

        let claim = json!({ "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": SHARED },
            "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "256Mi" } } } });
        apply(&scene.namespace, &claim.to_string()).await?;
        let allowed = json!({ "llmSettings": { "model": "claude-haiku-4-5" }, "allowedSecrets": [KEYS], "allowedClaims": [SHARED] });
        scene.settings(&allowed).await?;
        // The kubelet says that the Secret is not there.
        waits_for(scene, "writer", &[KEYS]).await?;
        let key = format!("--from-literal=ANTHROPIC_API_KEY={FAKE_KEY}");
        let url = format!("--from-literal=ANTHROPIC_BASE_URL={MODEL_URL}");
        scene.kubectl(&["create", "secret", "generic", KEYS, &key, &url]).await?;
        scene.phase("writer", Phase::Completed).await?;
        let (model, _) = told(&mock, &first).await?;
        ensure!(model == "claude-haiku-4-5", "the admin's default: {model}");

        let mut own = of_the_team(&second, "cat for-others.txt");
        own.llm_settings = Some(LlmSettings { model: Some("claude-opus-4-5".to_owned()), ..LlmSettings::default() });
        scene.create_with("reader", own).await?;
        scene.phase("reader", Phase::Completed).await?;
        let (model, seen) = told(&mock, &second).await?;
        ensure!(model == "claude-opus-4-5", "what the session says itself: {model}");
        ensure!(seen.contains("seen"), "both work in the claim's one folder: {seen}");
        let listed = scene.kubectl(&["get", "pvc", "-o", "name"]).await?;
        ensure!(listed.trim() == format!("persistentvolumeclaim/{SHARED}"), "no other claim was made: {listed}");
        scene.kubectl(&["delete", "agenticsessions", "writer", "reader"]).await?;
        let kept = on_claim(scene, SHARED, "cat /data/workspace/for-others.txt").await?;
        ensure!(kept == "seen\n", "somebody's own claim outlives the sessions: {kept}");
        Ok(())
    })
    .await
}

/// Waits until the session says that it cannot begin, and names all of these.
async fn waits_for(scene: &Scene, name: &str, words: &[&str]) -> Result<Phase> {
    until(&format!("session {name} to wait for {words:?}"), SOON, async || {
        let status = scene.status(name).await?;
        ensure!(!status.phase.is_terminal(), "{status:#?}");
        let said = status.message.unwrap_or_default();
        let waits = status.reason.as_deref() == Some("ConfigError") && words.iter().all(|word| said.contains(word));
        Ok(waits.then_some(status.phase))
    })
    .await
}

#[tokio::test]
async fn a_session_goes_when_its_time_is_over_and_a_retained_claim_stays() -> Result<()> {
    scene("retained", Keys::Good, async |scene| {
        let marker = marker();
        let steps = json!([{ "tools": [bash("echo kept > kept.txt")] }, { "text": "Done." }]);
        let mut spec = AgenticSessionSpec {
            prompt: Some(prompt(&marker, &steps)),
            ..small()
        };
        spec.ttl_seconds_after_finished = Some(5);
        spec.workspace.get_or_insert_default().retention = Some(Retention::Retain);
        let uid = scene.create_with("brief", spec).await?.metadata.uid.context("no uid")?;
        until("the session to be gone", SOON, async || {
            Ok(scene.sessions().get_opt("brief").await?.is_none().then_some(()))
        })
        .await?;
        until("its Job and pod to be gone", SOON, async || {
            let left = scene.kubectl(&["get", "jobs,pods", "-o", "name"]).await?;
            Ok(left.is_empty().then_some(()))
        })
        .await?;
        Mock::reach().await?.prompt_was_given_once(&marker).await?;
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(scene.client.clone(), &scene.namespace);
        let claim = claims.get("ambient-workspace-brief").await?;
        ensure!(
            claim.metadata.deletion_timestamp.is_none(),
            "the claim goes: {:?}",
            claim.metadata
        );
        let kept = on_volume(scene, "brief", &format!("cat /data/sessions/{uid}/workspace/kept.txt")).await?;
        ensure!(kept == "kept\n", "{kept}");
        Ok(())
    })
    .await
}
