//! What the process makes of the environment that users of the task API know.

use std::process::Stdio;

use rstest::rstest;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::{
    support::{cluster::Cluster, soon, sse::http},
    tasks::ask,
};

fn gateway(cluster: &Cluster, folder: &std::path::Path, environment: &[(&str, &str)]) -> Child {
    let kubeconfig = folder.join("kubeconfig");
    std::fs::write(&kubeconfig, cluster.kubeconfig()).unwrap();
    Command::new(env!("CARGO_BIN_EXE_agentic-gateway"))
        .env_clear()
        .env("KUBECONFIG", kubeconfig)
        .env("GATEWAY_METRICS_ADDRESS", "127.0.0.1:0")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn the_environment_of_the_task_api_acts_and_log_lines_have_its_shape() {
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let environment = [
        ("SERVER_HOST", "127.0.0.1"),
        ("SERVER_PORT", "0"),
        ("SERVER_LOG_LEVEL", "INFO"),
        ("LOG_FORMAT", "flat"),
        ("STORAGE_TYPE", "memory"),
        ("GATEWAY_COMPAT_APIS", "tasks,claude-code"),
        ("GATEWAY_COMPAT_NAMESPACE", "team-a"),
        ("API_AUTH_ENABLED", "False"),
        ("API_RATE_LIMIT_PER_MINUTE", "3"),
        ("CLAUDE_DEFAULT_MODEL", "claude-3-5-sonnet-20241022"),
        ("CLAUDE_MAX_TURNS", "7"),
        ("SESSION_IDLE_TIMEOUT_SECONDS", "60"),
        ("SESSION_MAX_CONCURRENT", "1"),
    ];
    let mut child = gateway(&cluster, folder.path(), &environment);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = soon("the gateway listening", async {
        loop {
            let line: Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
            if line["message"] == "listening" {
                return line;
            }
        }
    })
    .await;
    assert_eq!(
        (&line["level"], &line["logger"]),
        (&"INFO".into(), &"agentic_gateway".into()),
        "{line}"
    );
    assert!(line["timestamp"].as_str().unwrap().ends_with('Z'), "{line}");
    let address = line["address"].as_str().unwrap().parse().unwrap();

    let task =
        serde_json::json!({"task_id": "a", "prompt": "p", "workspace": "/w", "session": {"reuse_existing": true}});
    let (code, answer) = ask(address, "POST", "/api/v1/tasks", Some(&task)).await;
    assert_eq!(code, 200, "{answer}");
    let sessions = cluster.sessions("team-a");
    let (_, session) = sessions.iter().next().unwrap();
    assert_eq!(session["spec"]["llmSettings"]["model"], "claude-3-5-sonnet-20241022");
    assert_eq!(session["spec"]["inactivityTimeout"], 60);
    let asked = session["metadata"]["annotations"]["vteam.ambient-code/task-asked"]
        .as_str()
        .unwrap();
    assert!(asked.contains(r#""max_turns":7"#), "{asked}");
    let other = serde_json::json!({"task_id": "b", "prompt": "p"});
    assert_eq!(ask(address, "POST", "/api/v1/tasks", Some(&other)).await.0, 503);
    assert_eq!(ask(address, "GET", "/api/v1/sessions", None).await.0, 200);
    let url = format!("http://{address}/api/v1/sessions");
    let refused = http().get(url).send().await.unwrap();
    assert_eq!(refused.status(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    // No file was made.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[rstest]
#[case(&[("STORAGE_TYPE", "redis")], "PostgreSQL")]
#[case(&[("STORAGE_TYPE", "memory"), ("GATEWAY_COMPAT_APIS", "tasks")], "GATEWAY_COMPAT_NAMESPACE")]
#[case(&[("STORAGE_TYPE", "memory"), ("GATEWAY_COMPAT_APIS", "tasks"), ("GATEWAY_COMPAT_NAMESPACE", "team-a"), ("CLAUDE_API_KEY", "sk-ant-fake-key")], "ambient-runner-secrets")]
#[case(&[("STORAGE_TYPE", "memory"), ("GATEWAY_COMPAT_APIS", "tasks"), ("GATEWAY_COMPAT_NAMESPACE", "team-a"), ("CLAUDE_BASE_URL", "http://models.test")], "ANTHROPIC_BASE_URL")]
#[case(&[("STORAGE_TYPE", "memory"), ("GATEWAY_COMPAT_APIS", "tasks"), ("GATEWAY_COMPAT_NAMESPACE", "team-a"), ("API_API_KEY", "short")], "16 characters")]
#[case(&[("STORAGE_TYPE", "sqlite"), ("GATEWAY_DATA", ":memory:")], "STORAGE_TYPE is sqlite")]
#[case(&[("SERVER_LOG_LEVEL", "loud")], "WARNING")]
#[tokio::test]
async fn what_cannot_be_honoured_ends_the_process_with_what_to_do(
    #[case] environment: &[(&str, &str)],
    #[case] says: &str,
) {
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let child = gateway(&cluster, folder.path(), environment);
    let output = soon("the end of the process", child.wait_with_output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(says), "{said}");
    assert!(!said.contains("sk-ant-fake-key"), "{said}");
}
