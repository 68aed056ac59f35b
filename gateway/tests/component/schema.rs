//! The API beside its own document, asked by a program that is not ours.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use gateway::compat::Settings;
use protocol::frame::{FileOperation, GatewayFrame};
use serde_json::json;

use crate::{
    support::{
        Served, records,
        runner::{Runner, hello},
    },
    tasks::{answered, begin, complete, open, said, user},
    workspace::answer,
};

/// The session that the document's examples name.
const SESSION: &str = "agentic-session-1700000000-0a1b2c3d4e5f";

/// Keeps the session of the examples alive, with records, files and a runner, whoever deletes it.
async fn worked(served: Arc<Served>) {
    served.cluster.runner("t-examples", Some("p-examples"));
    served.cluster.finalize(SESSION);
    loop {
        // Streams of a session that is over and delivered end; its runner still has its files.
        let status = json!({
            "phase": "Completed", "reason": "Completed", "podUID": "p-examples", "attempt": 1, "run": 1,
            "conditions": [{
                "type": "EventsDelivered", "status": "True", "reason": "Delivered", "message": "",
                "lastTransitionTime": "2026-01-02T03:04:05Z",
            }],
        });
        served.cluster.interactive(SESSION, "u-examples", &status);
        let hello = hello(SESSION, "u-examples", "p-examples");
        let (mut runner, welcome) = Runner::admitted(served.address, &hello, "t-examples").await;
        let next = welcome.acked_seq + 1;
        let some = [records(next, next + 5), vec![user(next + 6, 1, "prompt")]].concat();
        runner.send(&some).await;
        let files = BTreeMap::from([("src/main.rs".to_owned(), b"fn main() {}".to_vec())]);
        while let Ok(frame) = runner.next().await {
            match frame {
                GatewayFrame::FileRequest(request) if request.op == FileOperation::Write => {}
                GatewayFrame::FileRequest(request) => answer(&mut runner, &files, request).await,
                GatewayFrame::FileChunk(chunk) if chunk.eof => {
                    runner
                        .text(json!({"command_result": {"id": chunk.id}}).to_string())
                        .await;
                }
                GatewayFrame::FileChunk(_) | GatewayFrame::Ack(_) => {}
                command => {
                    let id = gateway::commands::id(&command);
                    runner.text(json!({"command_result": {"id": id}}).to_string()).await;
                }
            }
        }
    }
}

/// Does what requests of the claude-code API ask for.
async fn works(served: Arc<Served>) {
    let mut done = BTreeSet::new();
    loop {
        let sessions = served.cluster.sessions("team-a").into_keys();
        let new: Vec<_> = sessions
            .filter(|name| name.starts_with("claude-code-") && done.insert(name.clone()))
            .collect();
        for name in new {
            let served = served.clone();
            tokio::spawn(async move {
                let mut runner = begin(&served, &name).await;
                let text = json!({"type": "text", "text": "I see."});
                runner.send(&[user(1, 1, "prompt"), said(2, 1, "m1", &text)]).await;
                runner.send(&answered(3, 1, "42")).await;
                complete(&served, &name, &mut runner, 5).await;
            });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

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
    let served = Served::serving(Settings {
        open: false,
        // A refusal for want of places is a server's error by its number.
        max_concurrent: 1_000_000,
        ..open()
    });
    let served = Arc::new(served.await);
    served.cluster.caller("token", "ann");
    for namespace in ["team-a", "0", "a"] {
        let verbs = ["get", "list", "create", "update", "delete"];
        served.cluster.allow("ann", &verbs, namespace);
    }
    let folder = tempfile::tempdir().unwrap();
    let agents = [
        tokio::spawn(worked(served.clone())),
        tokio::spawn(works(served.clone())),
    ];
    let output = tokio::process::Command::new(program)
        .current_dir(folder.path())
        .args(["run", &format!("http://{}/openapi.json", served.address)])
        .args(["--header", "Authorization: Bearer token"])
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
    assert!(
        agents.iter().all(|agent| !agent.is_finished()),
        "the agents worked to the end"
    );
    let queries = served.cluster.sessions("team-a").into_keys();
    assert!(
        queries.filter(|name| name.starts_with("claude-code-")).count() > 0,
        "nothing was run"
    );
    for agent in agents {
        agent.abort();
    }
    eprintln!("seed 20260102: {}", summary.join("; "));
}
