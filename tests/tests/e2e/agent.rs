//! The real CLI in the agent's container, through what happens to it in a session's life.

use anyhow::{Context as _, Result, ensure};
use crds::session::Limits;
use crds::{AgenticSessionSpec, Phase};
use serde_json::{Value, json};
use tests::model::script::prompt;

use crate::events::complete_log;
use crate::harness::client::Gateway;
use crate::harness::mock::Mock;
use crate::harness::scene::{marker, small};
use crate::harness::{Keys, scene};

fn bash(command: &str) -> Value {
    json!({ "name": "Bash", "input": { "command": command, "description": "t" } })
}

#[tokio::test]
async fn tools_that_fail_sub_agents_background_shells_and_an_api_that_fails_are_lived_through() -> Result<()> {
    scene("agent", Keys::Good, async |scene| {
        let marker = marker();
        let below = prompt("BELOW", &json!([{ "tools": [bash("echo below > below.txt")] }, { "text": "Looked." }]));
        let agent = json!({ "name": "Agent", "input": { "description": "look", "subagent_type": "general-purpose",
            "run_in_background": false, "prompt": below } });
        let shell = json!({ "name": "Bash", "input": { "command": "sleep 1; echo late > late.txt", "description": "t",
            "run_in_background": true } });
        // Nothing answers there; what counts is that nobody else is asked before.
        let fetch = json!({ "name": "WebFetch", "input": { "url": "https://git.invalid/page", "prompt": "What is it?" } });
        let steps = json!([
            { "tools": [bash("echo broken >&2; exit 3")] },
            { "tools": [agent] },
            { "tools": [bash("echo again")], "error": { "status": 500, "times": 1 } },
            { "tools": [bash("echo again")], "error": { "status": 529, "times": 1 } },
            { "tools": [bash("echo again")], "error": { "status": 429, "times": 1 }, "headers": { "retry-after": "0" } },
            { "text": "A text of some length.", "tools": [bash("echo whole")], "cut": { "times": 1 } },
            { "tools": [fetch] },
            { "tools": [shell] },
            { "text": "Started." },
            { "text": "Heard." },
        ]);
        scene.create("weathered", &marker, &steps).await?;
        let status = scene.phase("weathered", Phase::Completed).await?;
        ensure!(
            status.attempt == Some(1) && status.result.as_deref() == Some("Heard."),
            "{status:#?}"
        );
        let records = complete_log(&Gateway::reach(scene).await?, "weathered").await?;
        let log = records.iter().map(|record| record.data.as_str()).collect::<Vec<_>>().join("\n");
        for part in ["broken", "Looked.", "\"estimated\":true"] {
            ensure!(log.contains(part), "{part:?} is not in the log: {log}");
        }
        let ends = records.iter().filter(|record| record.kind == "end").count();
        ensure!(ends == 1, "{ends} ends");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_session_that_has_used_up_its_tokens_stops_and_goes_on_when_it_may_use_more() -> Result<()> {
    scene("budget", Keys::Good, async |scene| {
        let (mock, marker) = (Mock::reach().await?, marker());
        let mut steps: Vec<Value> = (0..6)
            .map(|n| json!({ "tools": [bash(&format!("echo {n} >> rounds.txt"))], "usage": { "input_tokens": 10, "output_tokens": 1000 } }))
            .collect();
        steps.push(json!({ "text": "Done.", "usage": { "input_tokens": 10, "output_tokens": 1000 } }));
        let spec = AgenticSessionSpec {
            prompt: Some(prompt(&marker, &json!(steps))),
            limits: Some(Limits { max_tokens: Some(3_500), ..Limits::default() }),
            ..small()
        };
        scene.create_with("thrifty", spec).await?;
        let status = scene.phase("thrifty", Phase::Failed).await?;
        ensure!(status.reason.as_deref() == Some("BudgetExceeded"), "{status:#?}");
        let usage = status.usage.context("no usage")?;
        let used = usage.input_tokens + usage.output_tokens;
        ensure!(used == 4 * 1_010, "overshot by at most one response: {used}");

        let raise = r#"{"spec":{"limits":{"maxTokens":100000}}}"#;
        scene.kubectl(&["patch", "agenticsession", "thrifty", "--type=merge", "-p", raise]).await?;
        scene.start_again("thrifty").await?;
        let status = scene.phase_of_run("thrifty", 2, Phase::Completed).await?;
        ensure!(status.result.as_deref() == Some("Done."), "{status:#?}");
        mock.prompt_was_given_once(&marker).await?;
        let mut asked: Vec<_> = mock.requests(&marker).await?.iter().filter_map(|request| request.step).collect();
        asked.dedup();
        ensure!(asked.is_sorted(), "no finished round is asked for again: {asked:?}");
        Ok(())
    })
    .await
}
