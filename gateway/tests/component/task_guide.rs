//! The lines of `docs/task-api.md`, run as they are printed, beside a cluster in which every agent answers at once.

use std::{collections::HashSet, fmt::Write as _, path::Path, process::Stdio, time::Duration};

use protocol::frame::GatewayFrame;

use crate::{
    support::Served,
    tasks::{answered, begin, complete, open, user},
};

const GUIDE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/task-api.md"));

/// Runs the guide as one script: shells share their variables, Python programs stand alone.
fn script(python: &Path, folder: &Path) -> String {
    let mut script = "set -eux\n".to_owned();
    let blocks = GUIDE.split("\n```").skip(1).step_by(2);
    let blocks = blocks.filter_map(|block| block.split_once('\n'));
    for (number, (language, code)) in blocks.enumerate() {
        match language {
            "sh" => script += code,
            "python" => {
                let file = folder.join(format!("{number}.py"));
                std::fs::write(&file, code).unwrap();
                let _ = write!(script, "{} {}", python.display(), file.display());
            }
            "js" => {
                let file = folder.join(format!("{number}.mjs"));
                std::fs::write(&file, code).unwrap();
                let _ = write!(script, "node --experimental-websocket {}", file.display());
            }
            _ => {}
        }
        script += "\n";
    }
    script
}

/// A session's agent: it answers everything, and a session that takes no messages is over then.
async fn agent(served: &Served, name: &str, interactive: bool) {
    let mut runner = begin(served, name).await;
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, "Answer.")).await;
    if !interactive {
        return complete(served, name, &mut runner, 4).await;
    }
    let (mut seq, mut turn) = (3, 1);
    while let Ok(frame) = runner.next().await {
        if let GatewayFrame::UserMessage(message) = frame {
            turn += 1;
            runner.send(&[user(seq + 1, turn, &message.id)]).await;
            runner.send(&answered(seq + 2, turn, "Answer.")).await;
            seq += 3;
        }
    }
}

async fn agents(served: &Served) {
    let mut known = HashSet::new();
    let mut working = futures::stream::FuturesUnordered::new();
    loop {
        for (name, session) in served.cluster.sessions("team-a") {
            if known.insert(name.clone()) {
                let interactive = session["spec"]["interactive"] == true;
                working.push(async move { agent(served, &name, interactive).await });
            }
        }
        tokio::select! {
            Some(()) = futures::StreamExt::next(&mut working) => {}
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lines_of_the_task_guide_do_what_it_says() {
    let python = tokio::task::spawn_blocking(xtask::python_websockets);
    let python = python
        .await
        .unwrap()
        .expect("the guide's Python needs `websockets` and `requests`");
    let served = Served::serving(open()).await;
    let folder = tempfile::tempdir().unwrap();
    let output = tokio::process::Command::new("bash")
        .arg("-c")
        .arg(script(&python, folder.path()))
        .current_dir(folder.path())
        .env("SERVER", served.url(""))
        .env("no_proxy", "127.0.0.1")
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = async {
        tokio::select! {
            output = output => output.unwrap(),
            () = agents(&served) => unreachable!(),
        }
    };
    let output = tokio::time::timeout(Duration::from_mins(3), Box::pin(output));
    let output = output.await.expect("the guide's lines end");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains(r#""session_id":"session-task-123""#), "{said}");
    assert!(said.contains("Event: complete"), "{said}");
    assert_eq!(said.matches(r#""type":"result""#).count(), 2, "{said}");
    assert!(said.contains(r#""status":"deleted""#), "{said}");
}
