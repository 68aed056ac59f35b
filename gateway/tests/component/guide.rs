//! The lines of `docs/api.md`, run as they are printed.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, process::Stdio};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use protocol::frame::{FileOperation, FileRequest, GatewayFrame};
use serde_json::{Value, json};

use crate::{
    support::{
        Served, end,
        runner::{Runner, hello},
        soon,
    },
    workspace::answer,
};

const GUIDE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md"));

/// The blocks of code that are run, with their language.
fn blocks() -> Vec<(&'static str, &'static str)> {
    let parts = GUIDE.split("\n```").skip(1).step_by(2);
    parts
        .filter_map(|block| block.split_once('\n'))
        .filter(|(language, _)| matches!(*language, "sh" | "python" | "js"))
        .collect()
}

fn record(seq: u64, kind: &str, body: &Value) -> String {
    json!({"seq": seq, "attempt": 1, "turn": 1, "ts": "2026-01-02T03:04:05Z", "kind": kind, "body": body}).to_string()
}

fn user(seq: u64, command: &str, text: &str) -> String {
    let uuid = "00000000-0000-5000-8000-000000000001";
    record(seq, "user", &json!({"command": command, "uuid": uuid, "text": text}))
}

/// What operator and runner do, as far as the guide sees: the session runs, answers, and ends when it is told to.
async fn cluster(served: &Served) {
    let name = loop {
        let listed = served
            .gateway
            .watched
            .listed("team-a", &gateway::catalog::Wanted::default());
        match listed.first() {
            Some(entry) => break entry.key.1.clone(),
            None => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
        }
    };
    let uid = format!("uid-of-{name}");
    let running = json!({"phase": "Running", "podUID": "p1", "attempt": 1, "run": 1});
    served.cluster.set_status("team-a", &name, &running);
    let (mut runner, _) = Runner::admitted(served.address, &hello(&name, &uid, "p1"), "t1").await;
    let mut seq = 1;
    runner.send(&[user(seq, "prompt", "Say hello.")]).await;
    let (mut files, mut writes) = (BTreeMap::new(), BTreeMap::new());
    loop {
        seq += 1;
        match runner.frame().await {
            GatewayFrame::Ack(_) => seq -= 1,
            GatewayFrame::UserMessage(message) => runner.send(&[user(seq, &message.id, &message.text)]).await,
            GatewayFrame::Interrupt(protocol::frame::Interrupt { id, .. })
            | GatewayFrame::PermissionResponse(protocol::frame::PermissionResponse { id, .. }) => {
                runner
                    .send(&[record(seq, "session", &json!({"event": "commandDone", "id": id}))])
                    .await;
            }
            GatewayFrame::FileRequest(FileRequest {
                id,
                op: FileOperation::Write,
                path,
                ..
            }) => {
                seq -= 1;
                writes.insert(id, (path, Vec::new()));
            }
            GatewayFrame::FileRequest(request) => {
                seq -= 1;
                answer(&mut runner, &files, request).await;
            }
            GatewayFrame::FileChunk(chunk) => {
                seq -= 1;
                let (path, bytes) = writes.get_mut(&chunk.id).unwrap();
                bytes.extend(STANDARD.decode(chunk.data).unwrap());
                if chunk.eof {
                    files.insert(path.clone(), bytes.clone());
                    runner
                        .text(json!({"command_result": {"id": chunk.id}}).to_string())
                        .await;
                }
            }
            GatewayFrame::EndSession(command) => {
                let done = record(seq, "session", &json!({"event": "commandDone", "id": command.id}));
                runner.send(&[done, end(seq + 1)]).await;
                while !matches!(runner.frame().await, GatewayFrame::Ack(ack) if ack.seq == seq + 1) {}
                let completed =
                    json!({"phase": "Completed", "reason": "Completed", "podUID": "p1", "attempt": 1, "run": 1});
                served.cluster.set_status("team-a", &name, &completed);
                return;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Runs the guide as one script: shells share their variables, Python programs stand alone.
fn script(python: &Path, folder: &Path) -> String {
    let mut script = "set -eu\n".to_owned();
    for (number, (language, code)) in blocks().into_iter().enumerate() {
        if language == "sh" {
            script += code;
        } else if language == "js" {
            // As in a page: without anything installed.
            let file = folder.join(format!("{number}.mjs"));
            std::fs::write(&file, code).unwrap();
            let _ = write!(script, "\nnode --experimental-websocket {} $NAME", file.display());
        } else {
            let file = folder.join(format!("{number}.py"));
            std::fs::write(&file, code).unwrap();
            let _ = write!(script, "\n{} {}", python.display(), file.display());
        }
        script += "\n";
    }
    script
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lines_of_the_client_guide_do_what_it_says() {
    assert!(blocks().len() >= 9, "{:?}", blocks());
    let python = tokio::task::spawn_blocking(xtask::python_websockets);
    let python = python.await.unwrap().expect("the guide's Python needs `websockets`");
    let websocat = tokio::task::spawn_blocking(xtask::websocat).await.unwrap();
    let path = format!("{}:{}", websocat.unwrap().display(), std::env::var("PATH").unwrap());
    let served = Served::new().await;
    served.cluster.runner("t1", Some("p1"));
    served.cluster.caller("token", "ann");
    let verbs = ["get", "list", "create", "update", "delete"];
    served.cluster.allow("ann", &verbs, "team-a");
    let folder = tempfile::tempdir().unwrap();
    let shell = tokio::process::Command::new("bash")
        .arg("-c")
        .arg(script(&python, folder.path()))
        .current_dir(folder.path())
        .env("GATEWAY", served.url(""))
        .env("TOKEN", "token")
        .env("PATH", path)
        .env("no_proxy", "127.0.0.1")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let shell = async {
        let output = shell.await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}\n{errors}");
        said
    };
    let (said, ()) = Box::pin(soon("the guide", async { tokio::join!(shell, cluster(&served)) })).await;
    assert_eq!(said.matches("said: Say hello.").count(), 3, "{said}");
    assert!(said.contains(r#""event":"user""#), "websocat: {said}");
    assert!(said.contains("event: close"), "{said}");
    assert!(said.contains("USER: Now in French."), "{said}");
}
