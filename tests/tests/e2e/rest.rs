//! The platform's own end-to-end test, over REST: create, poll, find the trace, delete.

use anyhow::{Context as _, Result, ensure};
use crds::Phase;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::model::script;

use crate::harness::client::Gateway;
use crate::harness::collector::Collector;
use crate::harness::mock::Mock;
use crate::harness::phases::{ORDER, Phases};
use crate::harness::scene::marker;
use crate::harness::wait::{SOON, until};
use crate::harness::{Keys, Scene, scene};

#[tokio::test]
async fn a_session_is_created_polled_traced_and_deleted_over_rest() -> Result<()> {
    scene("rest", Keys::Good, async |scene| {
        let (gateway, marker) = (Gateway::reach(scene).await?, marker());
        let steps = json!([
            { "text": "Working.", "tools": [{ "name": "Bash", "input": { "command": "echo hello" } }],
              "usage": { "input_tokens": 156, "output_tokens": 20, "cache_read_input_tokens": 1000 } },
            // A model that answers at once would leave no time to be seen `Running`.
            { "text": "Done.", "hold": marker },
        ]);
        let body = json!({
            "prompt": script::prompt(&format!("Say hello. Test ID: {marker}"), &steps), "displayName": "Langfuse test",
            "interactive": false, "timeout": 300,
            "llmSettings": { "model": "claude-sonnet-5-5", "temperature": 0.7, "maxTokens": 4000 },
        });
        let phases = Phases::watch(scene.sessions()).await?;
        let (status, created) = gateway.ask(Method::POST, "", Some(&body)).await?;
        ensure!(status == StatusCode::CREATED, "{status}: {created}");
        ensure!(
            created["message"].is_string() && created["uid"].is_string(),
            "{created}"
        );
        let name = created["name"].as_str().context("no name")?;

        poll_to_the_end(&gateway, name, async || Mock::reach().await?.release(&marker).await).await?;
        until("the watch to see the end", SOON, async || {
            Ok((phases.seen().last() == Some(&Phase::Completed)).then_some(()))
        })
        .await?;
        ensure!(phases.seen() == ORDER, "the watch saw {:?}", phases.seen());
        trace_has_a_generation(name, &marker).await?;

        let children = children(scene, name).await?;
        let (status, answer) = gateway.ask(Method::DELETE, &format!("/{name}"), None).await?;
        ensure!(status.is_success(), "{status}: {answer}");
        until("the session to be gone", SOON, async || {
            let (status, _) = gateway.ask(Method::GET, &format!("/{name}"), None).await?;
            Ok((status == StatusCode::NOT_FOUND).then_some(()))
        })
        .await?;
        ensure!(
            children.len() == 3,
            "a Job, a pod and a claim belonged to it: {children:?}"
        );
        until("its Job, pod and claim to be gone", SOON, async || {
            let left = scene.kubectl(&["get", "jobs,pods,pvc", "-o", "name"]).await?;
            Ok((!children.iter().any(|child| left.contains(child.as_str()))).then_some(()))
        })
        .await
    })
    .await
}

/// Polls like a client that knows nothing of watches; phases never go back.
async fn poll_to_the_end(gateway: &Gateway, name: &str, when_running: impl AsyncFn() -> Result<()>) -> Result<()> {
    let mut last = 0;
    until(&format!("session {name} to be completed"), SOON, async || {
        let (status, session) = gateway.ask(Method::GET, &format!("/{name}"), None).await?;
        ensure!(status == StatusCode::OK, "{status}: {session}");
        let phase: Phase = serde_json::from_value(session["status"]["phase"].clone())?;
        let at = ORDER.iter().position(|known| *known == phase);
        let at = at.with_context(|| format!("phase {phase}: {session}"))?;
        ensure!(at >= last, "the phase went back from {} to {phase}", ORDER[last]);
        if phase == Phase::Running && at > last {
            when_running().await?;
        }
        last = at;
        Ok((phase == Phase::Completed).then_some(()))
    })
    .await
}

async fn trace_has_a_generation(name: &str, marker: &str) -> Result<()> {
    let collector = Collector::reach().await?;
    let traces = collector.traces(name).await?;
    ensure!(traces.len() == 1, "one trace for a session: {traces:#?}");
    ensure!(
        traces[0]["sessionId"] == name,
        "the trace's session is the session's name: {}",
        traces[0]
    );
    let id = traces[0]["id"].as_str().context("a trace without id")?;
    let observations = collector.observations(id).await?;
    let generations: Vec<&Value> = observations.iter().filter(|one| one["type"] == "GENERATION").collect();
    ensure!(
        generations.len() == 2,
        "one for each answer of the model: {observations:#?}"
    );
    let inputs: Vec<_> = generations
        .iter()
        .filter_map(|one| one["usage"]["input"].as_u64())
        .collect();
    ensure!(inputs.iter().all(|tokens| *tokens > 0), "{inputs:?}");
    let first = generations.iter().find(|one| one["usageDetails"]["input"] == 156);
    let first = first.with_context(|| format!("no generation with the first answer's usage: {generations:#?}"))?;
    ensure!(
        first["input"].to_string().contains(marker),
        "the prompt is in the input: {first}"
    );
    ensure!(first["model"] == "claude-sonnet-5-5", "{first}");
    ensure!(first["usageDetails"]["cache_read_input_tokens"] == 1000, "{first}");
    let tool = observations
        .iter()
        .find(|one| one["type"] == "TOOL" && one["name"] == "Bash");
    let tool = tool.with_context(|| format!("no observation of the tool: {observations:#?}"))?;
    ensure!(
        tool["parentObservationId"] == first["parentObservationId"],
        "a tool is a sibling of its generation: {tool}"
    );
    let total = collector
        .observations(id)
        .await?
        .iter()
        .filter(|one| one["type"] == "AGENT")
        .count();
    ensure!(total >= 2, "the session and its turn are agents: {observations:#?}");
    Ok(())
}

/// Names of what belongs to the session, as `kubectl get -o name` prints them.
async fn children(scene: &Scene, name: &str) -> Result<Vec<String>> {
    let all = scene.kubectl(&["get", "jobs,pods,pvc", "-o", "name"]).await?;
    Ok(all
        .lines()
        .filter(|line| line.contains(name))
        .map(str::to_owned)
        .collect())
}

#[tokio::test]
async fn a_caller_without_rights_learns_nothing() -> Result<()> {
    scene("strangers", Keys::Good, async |scene| {
        let gateway = Gateway::reach(scene).await?;
        let mine = gateway.request(Method::GET, "").send().await?;
        ensure!(mine.status() == StatusCode::OK, "{mine:?}");
        scene.kubectl(&["delete", "rolebinding", "caller"]).await?;
        scene.kubectl(&["create", "serviceaccount", "stranger"]).await?;
        let token = scene.kubectl(&["create", "token", "stranger"]).await?;
        for (token, expected) in [
            (token.trim(), StatusCode::FORBIDDEN),
            ("not-a-token", StatusCode::UNAUTHORIZED),
        ] {
            for (method, path) in [
                (Method::GET, ""),
                (Method::POST, ""),
                (Method::GET, "/some/events"),
                (Method::DELETE, "/some"),
            ] {
                let mut request = gateway.request(method.clone(), path).build()?;
                request
                    .headers_mut()
                    .insert("authorization", format!("Bearer {token}").parse()?);
                let answer = tests::http::client().execute(request).await?;
                ensure!(answer.status() == expected, "{method} {path}: {answer:?}");
            }
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_body_that_cannot_be_honoured_is_refused_by_name() -> Result<()> {
    scene("bodies", Keys::Good, async |scene| {
        let gateway = Gateway::reach(scene).await?;
        let (status, answer) = gateway
            .ask(Method::POST, "", Some(&json!({ "prompt": "x", "multiAgent": true })))
            .await?;
        ensure!(
            status.is_client_error() && answer.to_string().contains("multiAgent"),
            "{status}: {answer}"
        );
        let (status, answer) = gateway
            .ask(Method::POST, "", Some(&json!({ "displayName": "no task" })))
            .await?;
        ensure!(
            status.is_client_error() && answer.to_string().contains("prompt"),
            "{status}: {answer}"
        );
        Ok(())
    })
    .await
}
