//! The trace of a session, as a collector has it in the end.

use std::collections::BTreeSet;

use protocol::report::Delivery;
use protocol::{Outcome, identity};
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::model::Logged;
use tests::traces::{FAKE_PUBLIC_KEY, FAKE_SECRET_KEY, TraceCollector};
use tokio::process::Child;

use crate::common::{Session, bash, ended, eventually, script, signal, text};

fn traced(session: &Session, collector: &TraceCollector, prompt: &str) -> Child {
    let mut command = session.command(prompt, &[]);
    command
        .env("LANGFUSE_ENABLED", "true")
        .env("LANGFUSE_HOST", collector.url());
    command
        .env("LANGFUSE_PUBLIC_KEY", FAKE_PUBLIC_KEY)
        .env("LANGFUSE_SECRET_KEY", FAKE_SECRET_KEY);
    command.spawn().unwrap()
}

#[tokio::test]
async fn a_session_leaves_one_trace_with_what_was_asked_answered_and_used() {
    let (session, collector) = (Session::new().await, TraceCollector::start().await.unwrap());
    let prompt = script("MARK", &[bash("echo from-the-tool"), text("Done.")]);
    assert_eq!(ended(traced(&session, &collector, &prompt)).await.code, Some(0));
    let report = session.report();
    assert_eq!(
        (report.outcome, report.traces),
        (Outcome::Succeeded, Delivery::Delivered)
    );
    let observations = collector.observations();
    let traces: BTreeSet<_> = observations
        .iter()
        .map(|observation| observation.trace.clone())
        .collect();
    assert_eq!(traces.into_iter().collect::<Vec<_>>(), [report.trace_id.unwrap()]);
    let of_kind = |kind: &str| {
        observations
            .iter()
            .filter(|observation| observation.kind == kind)
            .collect::<Vec<_>>()
    };
    let generations = of_kind("GENERATION");
    assert_eq!(generations.len(), 2);
    assert!(
        generations
            .iter()
            .all(|generation| generation.usage["input"] > 0 && generation.model.is_some())
    );
    assert!(generations[0].input.as_deref().unwrap().contains("MARK"));
    let tools = of_kind("TOOL");
    assert_eq!(tools.len(), 1);
    assert!(tools[0].output.as_deref().unwrap().contains("from-the-tool"));
}

#[tokio::test]
async fn a_session_that_was_killed_and_resumed_leaves_one_trace_without_doubles() {
    let (session, collector) = (Session::new().await, TraceCollector::start().await.unwrap());
    let prompt = script("MARK", &[bash("touch ran"), json!({ "text": "Done.", "hold": "go" })]);
    let mut first = traced(&session, &collector, &prompt);
    session
        .request(|request| request.asks_for_message() && request.step == Some(1))
        .await;
    let ran = session.workspace().join("ran");
    eventually("the tool ran", || ran.exists()).await;
    signal(&first, Signal::KILL);
    first.wait().await.unwrap();
    session.assert_nothing_left().await;
    session.model.release("go");
    assert_eq!(ended(traced(&session, &collector, &prompt)).await.code, Some(0));
    let observations = collector.observations();
    // The CLI may ask for the tool anew, when it was killed before its transcript was written.
    let lines = session.bodies(protocol::Kind::Cli);
    let calls: BTreeSet<_> = lines
        .iter()
        .filter_map(|line| line["message"]["content"][0]["tool_use_id"].as_str())
        .collect();
    let tools = observations
        .iter()
        .filter(|observation| observation.kind == "TOOL")
        .count();
    assert_eq!(tools, calls.len(), "what both attempts sent is the same span");
    let answered = session
        .model
        .requests()
        .iter()
        .filter(|request| request.asks_for_message() && request.status == Some(200))
        .count();
    let generations = observations
        .iter()
        .filter(|observation| observation.kind == "GENERATION")
        .count();
    assert!(
        (1..=answered).contains(&generations),
        "{generations} generations for {answered} answers"
    );
    assert!(session.model.requests().iter().any(Logged::asks_for_message));
    assert!(
        observations
            .iter()
            .all(|observation| observation.trace.len() == identity::trace_id("any").len())
    );
}

#[tokio::test]
async fn a_collector_that_is_not_there_does_not_fail_the_session() {
    let (session, collector) = (Session::new().await, TraceCollector::start().await.unwrap());
    let prompt = script("MARK", &[text("Done.")]);
    let mut command = session.command(&prompt, &[]);
    command
        .env("LANGFUSE_ENABLED", "true")
        .env("LANGFUSE_HOST", "http://127.0.0.1:1");
    command
        .env("LANGFUSE_PUBLIC_KEY", FAKE_PUBLIC_KEY)
        .env("LANGFUSE_SECRET_KEY", FAKE_SECRET_KEY);
    let ended = ended(command.spawn().unwrap()).await;
    assert_eq!(ended.code, Some(0));
    assert!(ended.took.as_secs() < 40, "{:?}", ended.took);
    assert_eq!(session.report().traces, Delivery::Failed);
    assert!(collector.exports().is_empty());
}

#[tokio::test]
async fn the_generations_of_a_session_with_sub_agents_add_up_to_what_the_cli_counts() {
    let (session, collector) = (Session::new().await, TraceCollector::start().await.unwrap());
    let used = |mut step: Value, input: u64, cached: u64| {
        step["usage"] = json!({ "input_tokens": input, "output_tokens": 40, "cache_read_input_tokens": cached, "cache_5m_input_tokens": 7 });
        step
    };
    let inner = script("SUB", &[used(bash("false"), 100, 5), used(text("part done"), 300, 9)]);
    let agent = json!({ "tools": [{ "name": "Agent", "input": {
        "description": "a part", "subagent_type": "general-purpose", "prompt": inner, "run_in_background": false,
    } }] });
    let prompt = script("MARK", &[used(agent, 11, 1_000), used(text("Done."), 23, 2_000)]);
    assert_eq!(ended(traced(&session, &collector, &prompt)).await.code, Some(0));
    let lines = session.bodies(protocol::Kind::Cli);
    let result = lines.iter().rfind(|line| line["type"] == "result").unwrap();
    let observations = collector.observations();
    let of_kind = |kind: &str| {
        observations
            .iter()
            .filter(|observation| observation.kind == kind)
            .collect::<Vec<_>>()
    };
    let generations = of_kind("GENERATION");
    assert_eq!(generations.len(), 4);
    for (bucket, field) in [
        ("input", "inputTokens"),
        ("output", "outputTokens"),
        ("cache_read_input_tokens", "cacheReadInputTokens"),
        ("cache_creation_input_tokens", "cacheCreationInputTokens"),
    ] {
        let sum: u64 = generations.iter().map(|generation| generation.usage[bucket]).sum();
        let told: u64 = result["modelUsage"]
            .as_object()
            .unwrap()
            .values()
            .filter_map(|usage| usage[field].as_u64())
            .sum();
        assert_eq!(sum, told, "{bucket}");
    }
    assert!(
        generations
            .iter()
            .all(|generation| generation.completion_start.is_some())
    );
    let others = observations
        .iter()
        .filter(|observation| observation.kind != "GENERATION");
    assert!(
        others.clone().all(|observation| observation.usage.is_empty()),
        "usage stands on generations only"
    );
    let part = of_kind("AGENT")
        .into_iter()
        .find(|agent| agent.name != "agent-session" && agent.name != "agent-turn")
        .unwrap();
    let below = observations
        .iter()
        .filter(|observation| observation.parent.as_ref() == Some(&part.id));
    assert_eq!(
        below
            .clone()
            .filter(|observation| observation.kind == "GENERATION")
            .count(),
        2
    );
    let failed = below.clone().find(|observation| observation.kind == "TOOL").unwrap();
    assert_eq!((failed.name.as_str(), failed.level.as_str()), ("Bash", "ERROR"));
    assert!(
        observations
            .iter()
            .all(|observation| observation.of_trace == observations[0].of_trace),
        "every span says whose it is"
    );
    assert_eq!(
        observations
            .iter()
            .filter(|observation| observation.parent.is_none())
            .count(),
        1,
        "one root"
    );
}

#[tokio::test]
async fn a_masked_trace_has_numbers_and_names_and_no_word_of_the_conversation() {
    let (session, collector) = (Session::new().await, TraceCollector::start().await.unwrap());
    let prompt = script("MARKEDPROMPT", &[bash("echo MARKEDOUTPUT"), text("MARKEDANSWER")]);
    let mut command = session.command(&prompt, &[]);
    command
        .env("LANGFUSE_ENABLED", "true")
        .env("LANGFUSE_MASK_MESSAGES", "true")
        .env("LANGFUSE_HOST", collector.url())
        .env("LANGFUSE_PUBLIC_KEY", FAKE_PUBLIC_KEY)
        .env("LANGFUSE_SECRET_KEY", FAKE_SECRET_KEY);
    assert_eq!(ended(command.spawn().unwrap()).await.code, Some(0));
    let observations = collector.observations();
    assert!(observations.iter().any(|observation| observation.name == "Bash"));
    assert!(
        observations
            .iter()
            .any(|observation| observation.usage.contains_key("output"))
    );
    let all = format!("{observations:?}");
    assert!(!all.contains("MARKED"), "{all}");
}
