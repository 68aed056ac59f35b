//! What the session's author chose, as the model API sees it from the real CLI.

use serde_json::json;
use tests::model::Logged;

use crate::common::{Session, ended, script, text};

#[tokio::test]
async fn temperature_and_most_tokens_and_the_models_reach_the_request() {
    let session = Session::new().await;
    let prompt = script("MARK", &[text("Done.")]);
    let mut command = session.command(&prompt, &["--model", "claude-haiku-5-5"]);
    command
        .env("LLM_TEMPERATURE", "0.25")
        .env("LLM_MAX_TOKENS", "4321")
        .env(
            "AGENTIC_SPEC_JSON",
            r#"{"run":1,"appendSystemPrompt":"--say APPENDED"}"#,
        );
    assert_eq!(ended(command.spawn().unwrap()).await.code, Some(0));
    let request = session.request(Logged::asks_for_message).await;
    let body = &request.body;
    assert_eq!(
        (&body["temperature"], &body["max_tokens"], &body["model"]),
        (&json!(0.25), &json!(4321), &json!("claude-haiku-5-5"))
    );
    assert!(
        body["thinking"].is_null() || body["thinking"]["type"] == "disabled",
        "{body}"
    );
    assert!(request.system_end.contains("--say APPENDED"), "{}", request.system_end);
}

#[tokio::test]
async fn a_temperature_with_thinking_is_a_configuration_error_before_anything_starts() {
    let session = Session::new().await;
    let mut command = session.command("MARK", &[]);
    command
        .env("LLM_TEMPERATURE", "0.25")
        .env("AGENTIC_SPEC_JSON", r#"{"run":1,"additionalArgs":["--effort=high"]}"#);
    let ended = ended(command.spawn().unwrap()).await;
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("temperature"), "{}", ended.stderr);
    assert!(session.model.requests().is_empty());
}

#[tokio::test]
async fn the_fallback_model_answers_when_the_other_is_overloaded() {
    let session = Session::new().await;
    let step = json!({ "text": "Done.", "error": { "status": 529, "times": 6 } });
    let mut command = session.command(&script("MARK", &[step]), &["--model", "claude-opus-5-5"]);
    command.env("AGENTIC_SPEC_JSON", r#"{"run":1,"fallbackModel":"claude-haiku-5-5"}"#);
    assert_eq!(ended(command.spawn().unwrap()).await.code, Some(0));
    let models: Vec<_> = session
        .model
        .requests()
        .iter()
        .map(|request| request.body["model"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(
        models.first().map(String::as_str),
        Some("claude-opus-5-5"),
        "{models:?}"
    );
    assert_eq!(
        models.last().map(String::as_str),
        Some("claude-haiku-5-5"),
        "{models:?}"
    );
}

#[tokio::test]
async fn tools_are_allowed_and_taken_away_and_servers_added_as_the_author_says() {
    let session = Session::new().await;
    // A server of the least: it answers the greeting and the list of its one tool.
    let server = r#"while read -r line; do id=$(sed -n 's/.*"id":\([0-9]*\).*/\1/p' <<<"$line"); case "$line" in
*'"initialize"'*) echo '{"jsonrpc":"2.0","id":'"$id"',"result":{"protocolVersion":"2025-06-18","capabilities":{"tools":{}},"serverInfo":{"name":"near","version":"1"}}}';;
*'"tools/list"'*) echo '{"jsonrpc":"2.0","id":'"$id"',"result":{"tools":[{"name":"hello","inputSchema":{"type":"object"}}]}}';;
*'"id"'*) echo '{"jsonrpc":"2.0","id":'"$id"',"result":{"content":[{"type":"text","text":"'"$GREETING"'"}]}}';;
esac; done"#;
    let spec = json!({
        "run": 1,
        "tools": {
            "allowed": ["Bash(echo *)", "mcp__near__hello"],
            "disallowed": ["Write", "Edit"],
            "permissionMode": "dontAsk",
            "mcpServers": { "near": { "stdio": { "command": "bash", "args": ["-c", server], "env": { "GREETING": "HELLO FROM NEAR" } } } },
        },
    });
    let steps = [
        json!({ "tools": [{ "name": "Bash", "input": { "command": "echo ALLOWED", "description": "t" } }] }),
        json!({ "tools": [{ "name": "Bash", "input": { "command": "touch denied", "description": "t" } }] }),
        json!({ "tools": [{ "name": "mcp__near__hello", "input": {} }] }),
        text("Done."),
    ];
    let mut command = session.command(&script("MARK", &steps), &[]);
    command.env("AGENTIC_SPEC_JSON", spec.to_string());
    assert_eq!(ended(command.spawn().unwrap()).await.code, Some(0));
    let last = session.model.requests().pop().unwrap();
    let messages = serde_json::to_string(last.messages()).unwrap();
    assert!(messages.contains("\"ALLOWED"), "{messages}");
    assert!(messages.contains("HELLO FROM NEAR"), "{messages}");
    assert!(!session.workspace().join("denied").exists());
    assert!(
        !last.tools.iter().any(|tool| tool == "Write" || tool == "Edit"),
        "{:?}",
        last.tools
    );
    assert!(last.tools.iter().any(|tool| tool == "Bash"), "{:?}", last.tools);
}

#[tokio::test]
async fn a_cli_of_another_version_is_used_with_a_warning() {
    let session = Session::new().await;
    let cli = session.state().join("other-cli");
    std::fs::create_dir_all(session.state()).unwrap();
    let real = xtask::claude_cli().unwrap();
    let script_text = format!(
        "#!/bin/bash\nexec {} \"$@\" > >(exec sed -u 's/\"claude_code_version\":\"[0-9.]*\"/\"claude_code_version\":\"9.9.9\"/')\n",
        real.display()
    );
    std::fs::write(&cli, script_text).unwrap();
    std::fs::set_permissions(&cli, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let prompt = script("MARK", &[text("Done.")]);
    let ended = session.run(&prompt, &["--cli", cli.to_str().unwrap()]).await;
    assert_eq!(ended.code, Some(0));
    let warned: Vec<_> = session
        .bodies(protocol::Kind::Log)
        .iter()
        .filter(|log| log["message"].as_str().unwrap().contains("the agent's is 9.9.9"))
        .map(|log| log["level"].clone())
        .collect();
    assert_eq!(warned, ["warning"]);
}

#[test]
fn the_tested_version_is_the_one_that_the_tests_use() {
    let path = xtask::claude_cli().unwrap().display().to_string();
    assert!(path.contains(runner::cli::TESTED_VERSION), "{path}");
}
