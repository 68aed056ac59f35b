//! Limits of dollars and tokens, with the real CLI and whatever else runs in the agent's container.

use protocol::{Kind, Outcome};
use serde_json::{Value, json};

use crate::common::{Session, asks_the_model, bash, script, text};

/// Tokens of a response of [`costly`].
const EACH: u64 = 1_010;

/// A step whose response uses [`EACH`] tokens.
fn costly(mut step: Value) -> Value {
    step["usage"] = json!({ "input_tokens": 10, "output_tokens": 1_000 });
    step
}

fn endless(marker: &str) -> String {
    let steps: Vec<Value> = (0..40).map(|n| costly(bash(&format!("echo {n}")))).collect();
    script(marker, &steps)
}

/// Shell commands by which a tool of the agent asks the model for something itself.
fn ask() -> String {
    format!("{} >/dev/null", asks_the_model(&script("TOOL", &[costly(text("ok"))])))
}

/// Tokens of all responses, as they were metered.
fn metered(session: &Session) -> u64 {
    let closed = session
        .bodies(Kind::Usage)
        .into_iter()
        .filter(|body| body["open"] != true);
    closed.map(|body| tokens(&body)).sum()
}

fn tokens(usage: &Value) -> u64 {
    [
        "inputTokens",
        "outputTokens",
        "cacheReadInputTokens",
        "cacheCreationInputTokens",
    ]
    .iter()
    .filter_map(|field| usage[*field].as_u64())
    .sum()
}

#[tokio::test]
async fn a_session_stops_when_its_tokens_are_used_up_and_goes_on_when_it_may_use_more() {
    let session = Session::new().await;
    let ended = session.run(&endless("MARK"), &["--max-tokens", "3500"]).await;
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    let report = session.report();
    assert_eq!(report.outcome, Outcome::BudgetExceeded);
    assert!(report.message.contains("of maxTokens 3500"), "{}", report.message);
    assert_eq!((report.usage.total(), metered(&session)), (4 * EACH, 4 * EACH));
    session.assert_nothing_left().await;

    let again = session.run("", &["--run", "2", "--max-tokens", "4500"]).await;
    assert_eq!(again.code, Some(3), "what was spent before counts: {}", again.stderr);
    assert_eq!(session.report().usage.total(), 5 * EACH);
    session.assert_prompt_once("MARK");
}

#[tokio::test]
async fn a_session_stops_when_its_dollars_are_used_up() {
    let session = Session::new().await;
    // A response costs 10 × 4,000 + 1,000 × 20,000 billionths of a dollar.
    let ended = session.run(&endless("MARK"), &["--max-cost-usd", "0.05"]).await;
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    let report = session.report();
    assert_eq!(report.cost_usd.unwrap().0, 3 * 20_040_000);
    assert!(report.message.contains("of maxCostUSD 0.05"), "{}", report.message);
}

#[tokio::test]
async fn dollars_are_not_limited_for_a_model_without_a_price_and_nothing_is_asked() {
    let session = Session::new().await;
    let ended = session
        .run("hello", &["--max-cost-usd", "1", "--model", "gpt-oss"])
        .await;
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    let report = session.report();
    assert_eq!(report.outcome, Outcome::ConfigError);
    assert!(report.message.contains("\"gpt-oss\""), "{}", report.message);
    assert!(session.model.requests().is_empty());
}

#[tokio::test]
async fn what_the_agents_tools_ask_of_the_model_is_metered_and_said() {
    let session = Session::new().await;
    std::fs::create_dir_all(session.workspace()).unwrap();
    std::fs::write(session.workspace().join("ask.sh"), ask()).unwrap();
    let prompt = script("MARK", &[costly(bash("bash ask.sh")), costly(text("Done."))]);
    assert_eq!(session.run(&prompt, &[]).await.code, Some(0));
    assert_eq!(metered(&session), 3 * EACH);
    let logs = session.bodies(Kind::Log);
    let said = logs[0]["message"].as_str().unwrap();
    assert!(
        said.contains(&format!("metered {} tokens and the CLI counts {}", 3 * EACH, 2 * EACH)),
        "{said}"
    );
}

#[tokio::test]
async fn five_hundred_requests_at_once_from_the_agents_shell_overshoot_by_one_response() {
    let session = Session::new().await;
    let flood = format!(
        "for n in $(seq 500); do
({}) &
done
wait",
        ask()
    );
    std::fs::create_dir_all(session.workspace()).unwrap();
    std::fs::write(session.workspace().join("flood.sh"), flood).unwrap();
    let prompt = script("MARK", &[bash("bash flood.sh"), text("Done.")]);
    let limit = 20_000;
    let ended = session.run(&prompt, &["--max-tokens", "20000"]).await;
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    let spent = metered(&session);
    // The CLI's own first response is a small one.
    assert!((limit..limit + EACH).contains(&spent), "{spent} of {limit}");
    let answered = session
        .model
        .requests()
        .iter()
        .filter(|request| request.asks_for_message())
        .count() as u64;
    assert!(answered <= limit / EACH + 2, "{answered} requests reached the API");
    session.assert_nothing_left().await;
}

fn sub_agents(responses: usize) -> String {
    let steps: Vec<Value> = (1..responses)
        .map(|n| costly(bash(&format!("echo {n}"))))
        .chain([costly(text("ok"))])
        .collect();
    let agent = |n: usize| {
        json!({ "name": "Agent", "input": {
            "description": format!("part {n}"), "subagent_type": "general-purpose",
            "prompt": script(&format!("SUB{n}"), &steps), "run_in_background": false,
        } })
    };
    let tools: Vec<Value> = (0..4).map(agent).collect();
    script("MARK", &[costly(json!({ "tools": tools })), costly(text("Done."))])
}

#[tokio::test]
async fn sub_agents_side_by_side_are_metered_as_the_cli_counts_them() {
    let session = Session::new().await;
    assert_eq!(session.run(&sub_agents(2), &[]).await.code, Some(0));
    let lines = session.bodies(Kind::Cli);
    let result = lines.iter().rfind(|line| line["type"] == "result").unwrap();
    let cli: u64 = result["modelUsage"].as_object().unwrap().values().map(tokens).sum();
    assert_eq!((cli, metered(&session)), (10 * EACH, 10 * EACH));
    let cost = session.report().cost_usd.unwrap().0 as f64 / 1e9;
    let told = result["total_cost_usd"].as_f64().unwrap();
    assert!((cost - told).abs() < 1e-9, "{cost} and the CLI says {told}");
    let logs = session.bodies(Kind::Log);
    assert!(logs.is_empty(), "meter and CLI agree: {logs:?}");
}

#[tokio::test]
async fn sub_agents_side_by_side_overshoot_by_one_response() {
    let session = Session::new().await;
    let ended = session.run(&sub_agents(30), &["--max-tokens", "12000"]).await;
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    let spent = metered(&session);
    assert!((12_000..12_000 + EACH).contains(&spent), "{spent}");
    session.assert_nothing_left().await;
}
