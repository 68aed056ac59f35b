//! The API beside its own document, asked by a program that is not ours.

use std::process::Stdio;

use crate::support::{cluster::Cluster, process::Process};

/// `GATEWAY_SCHEMA_EXAMPLES=1000` for the long run.
fn examples() -> String {
    std::env::var("GATEWAY_SCHEMA_EXAMPLES").unwrap_or_else(|_| "10".to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_answers_as_its_document_says_whatever_it_is_asked() {
    let program = tokio::task::spawn_blocking(xtask::schemathesis)
        .await
        .unwrap()
        .expect("schemathesis is needed");
    let cluster = Cluster::start().await;
    cluster.caller("token", "ann");
    for namespace in ["team-a", "0", "a"] {
        cluster.allow("ann", &["get", "list", "create", "update", "delete"], namespace);
    }
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        "--compat-api=tasks,claude-code",
        "--compat-namespace=team-a",
        // A refusal for want of places is a server's error by its number.
        "--session-max-concurrent=1000000",
    ];
    let process = Process::start_with(&[], &cluster, folder.path(), &arguments.map(str::to_owned)).await;
    let output = tokio::process::Command::new(program)
        .current_dir(folder.path())
        .args(["run", &format!("http://{}/openapi.json", process.address)])
        .args(["--header", "Authorization: Bearer token"])
        // Their answers come when an agent has worked, and there is none.
        .args([
            "--exclude-operation-id",
            "claudeCode",
            "--exclude-operation-id",
            "claudeCodeAtRoot",
        ])
        .args(["--max-examples", &examples(), "--seed", "20260102"])
        .args([
            "--phases",
            "examples,coverage,fuzzing",
            "--workers",
            "2",
            "--request-timeout",
            "20",
        ])
        .args([
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,\
             response_headers_conformance",
        ])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let summary: Vec<_> = said
        .lines()
        .filter(|line| line.contains("generated") || line.contains("tested"))
        .collect();
    eprintln!("seed 20260102: {}", summary.join("; "));
}
