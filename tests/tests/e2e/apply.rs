//! `kubectl apply` alone is enough.

use anyhow::{Context as _, Result, ensure};
use crds::{Phase, condition};

use crate::harness::phases::{ORDER, Phases};
use crate::harness::volume::on_volume;
use crate::harness::wait::{SOON, until};
use crate::harness::{Keys, root, scene};

#[tokio::test]
async fn the_example_runs_to_its_end_and_says_what_became_of_it() -> Result<()> {
    scene("example", Keys::Good, async |scene| {
        let phases = Phases::watch(scene.sessions()).await?;
        let example = root().join("docs/examples/hello.yaml");
        scene.kubectl(&["apply", "-f", &example.to_string_lossy()]).await?;
        let wait = [
            "wait",
            "agenticsession/hello",
            "--for=jsonpath={.status.phase}=Completed",
            "--timeout=180s",
        ];
        scene.kubectl(&wait).await?;

        until("the watch to see the end", SOON, async || {
            Ok((phases.seen().last() == Some(&Phase::Completed)).then_some(()))
        })
        .await?;
        // However short the agent's work is: who waits for one of them must not wait for ever.
        ensure!(phases.seen() == ORDER, "the watch saw {:?}", phases.seen());

        let uid = scene.uid("hello").await?;
        let file = on_volume(scene, "hello", &format!("cat /data/sessions/{uid}/workspace/hello.txt")).await?;
        ensure!(
            file == "Hello from an agent in Kubernetes!\n",
            "the agent's file has {file:?}"
        );

        let status = scene.status("hello").await?;
        ensure!(status.reason.as_deref() == Some("Completed"), "{status:#?}");
        let result = status.result.as_deref().unwrap_or_default();
        ensure!(result.contains("Hello from an agent in Kubernetes!"), "{result:?}");
        ensure!(status.turns == Some(2), "two answers of the model: {:?}", status.turns);
        let usage = status.usage.context("no usage")?;
        ensure!(
            usage.input_tokens == 50 && usage.output_tokens > 0,
            "two answers of 25 tokens each: {usage:?}"
        );
        let cost: f64 = status.cost_usd.as_deref().context("no cost")?.parse()?;
        // Both answers are the default model's, at 4 and 20 dollars for a million tokens.
        let expected = (50.0 * 4.0 + usage.output_tokens as f64 * 20.0) / 1e6;
        ensure!((cost - expected).abs() < 1e-6, "{cost} dollars, {expected} expected");
        ensure!(
            status
                .sdk_session_id
                .is_some_and(|id| uuid::Uuid::parse_str(&id).is_ok()),
            "no id of the conversation"
        );
        ensure!(status.trace_id.is_some_and(|id| id.len() == 32), "no id of the trace");
        ensure!(
            status.start_time.is_some() && status.completion_time.is_some(),
            "no times"
        );
        for wanted in [
            condition::WORKSPACE_READY,
            condition::RUNNER_STARTED,
            condition::FINISHED,
            condition::EVENTS_DELIVERED,
            condition::TRACES_DELIVERED,
        ] {
            let found = status.conditions.iter().find(|condition| condition.type_ == wanted);
            ensure!(
                found.is_some_and(|found| found.status == "True"),
                "condition {wanted}: {found:?}"
            );
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn kubectl_get_and_kubectl_logs_show_a_person_what_happened() -> Result<()> {
    scene("people", Keys::Good, async |scene| {
        let marker = crate::harness::scene::marker();
        let steps = serde_json::json!([
            { "text": "I look around.", "tools": [{ "name": "Bash", "input": { "command": "echo seen-by-the-tool" } }] },
            { "text": "There is nothing here." },
        ]);
        scene.create("readable", &marker, &steps).await?;
        let status = scene.phase("readable", Phase::Completed).await?;
        let table = scene.kubectl(&["get", "as"]).await?;
        ensure!(table.contains("PHASE") && table.contains("readable") && table.contains("Completed"), "{table}");
        let pod = status.pod_name.context("no pod in status")?;
        let log = scene.kubectl(&["logs", &pod, "-c", "runner"]).await?;
        for wanted in [&marker, "I look around.", "seen-by-the-tool", "There is nothing here."] {
            ensure!(log.contains(wanted), "the transcript in the log lacks {wanted:?}: {log}");
        }
        let events = scene.kubectl(&["get", "events", "--field-selector", "involvedObject.name=readable"]).await?;
        ensure!(events.contains("Completed"), "no Event tells of the end: {events}");
        Ok(())
    })
    .await
}
