//! An agent that means harm: what runs in its container floods, kills and lies. The runner goes on, and ends in time.

use protocol::Outcome;
use runner::control::Request;
use runner::kill_point::HANG;
use rustix::process::Signal;
use serde_json::Value;
use tests::model::{FAKE_KEY, Logged};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::common::{DEADLINE, Ended, Session, bash, ended, eventually, script, signal, text};
use crate::pod::{config, drive};

/// Written to the CLI's stdout again and again by something that outlives the CLI.
const QUESTION: &str = r#"{"type":"control_request","request_id":"","request":{"subtype":""}}"#;

/// A tool call that starts the flood of questions, and then does this; when it is run again it just takes long.
fn flood(then: &str) -> Value {
    flood_of(QUESTION, then)
}

fn flood_of(question: &str, then: &str) -> Value {
    bash(&format!(
        "if [ -e flood.pid ]; then touch again; sleep 100; fi; cli=$PPID; setsid bash -c 'echo $$ > flood.pid; exec yes '\"'\"'{question}'\"'\"' > /proc/'$cli'/fd/1' \
         >/dev/null 2>&1 </dev/null & while [ ! -s flood.pid ]; do :; done; {then}"
    ))
}

fn flood_runs(session: &Session) -> bool {
    std::fs::read_to_string(session.workspace().join("flood.pid"))
        .ok()
        .is_some_and(|pid| !pid.trim().is_empty())
}

/// Has the session's time end as soon as there is a flood.
async fn timed_out(session: &Session, steps: &[Value]) -> Ended {
    let limits = session.state().join("limits.json");
    std::fs::create_dir_all(session.state()).unwrap();
    let child = session.start(&script("MARK", steps), &["--limits", limits.to_str().unwrap()]);
    eventually("the flood runs", || flood_runs(session)).await;
    std::fs::write(&limits, r#"{"timeout":2}"#).unwrap();
    ended(child).await
}

#[tokio::test]
async fn a_flood_of_questions_does_not_hold_up_the_timeout() {
    let session = Session::new().await;
    let ended = timed_out(&session, &[flood("sleep 100")]).await;
    assert_eq!((ended.code, session.report().outcome), (Some(4), Outcome::Timeout));
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_flood_that_outlives_the_cli_does_not_hold_up_the_timeout() {
    let session = Session::new().await;
    let steps = [flood("sleep 0.3; kill -9 $cli; sleep 100"), text("Done.")];
    let ended = timed_out(&session, &steps).await;
    assert_eq!((ended.code, session.report().outcome), (Some(4), Outcome::Timeout));
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_flood_that_outlives_the_cli_does_not_hold_up_a_stop() {
    let session = Session::new().await;
    let steps = [flood("sleep 0.3; kill -9 $cli; sleep 100"), text("Done.")];
    let child = session.start(&script("MARK", &steps), &[]);
    eventually("the flood runs", || flood_runs(&session)).await;
    let again = session.workspace().join("again");
    eventually("the CLI was started again", || again.exists()).await;
    signal(&child, Signal::TERM);
    let ended = ended(child).await;
    assert_eq!((ended.code, session.report().outcome), (Some(143), Outcome::Stopped));
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_flood_of_permission_questions_is_not_kept_and_the_session_is_ended_as_asked() {
    let session = Session::new().await;
    let question =
        r#"{"type":"control_request","request_id":"q","request":{"subtype":"can_use_tool","tool_name":"Bash"}}"#;
    let prompt = script("MARK", &[flood_of(question, "sleep 100")]);
    let child = session.start(&prompt, &["--interactive"]);
    let status = session
        .status("there are questions", |status| status.last_seq > 1_000)
        .await;
    assert!((1..=64).contains(&status.questions.len()), "{}", status.questions.len());
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    session.assert_nothing_left().await;
}

/// Bytes of memory that a runner has had at most.
fn peak(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    let kib: u64 = line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[tokio::test]
async fn lines_that_are_hard_to_take_in_cost_neither_time_nor_memory() {
    let session = Session::new().await;
    let brackets = r#"(printf '{"type":"assistant","message":{"content":[{"type":"tool_use","input":['; yes '{"":0},' | tr -d '\n' | head -c 7000000; echo '0]}]}}') > /proc/$PPID/fd/1"#;
    let keys = r#"(printf '{"type":"x","y":"'; yes eyJ | tr -d '\n' | head -c 3000000; echo '"}') > /proc/$PPID/fd/1"#;
    let steps = [bash(&format!("{brackets}; {keys}; touch written; sleep 100"))];
    let child = session.start(&script("MARK", &steps), &["--interactive"]);
    let written = session.workspace().join("written");
    eventually("the lines are written", || written.exists()).await;
    session.status("they are taken in", |status| status.last_seq > 8).await;
    let peak = peak(&child);
    assert!(peak < 300 << 20, "{} MiB", peak >> 20);
    signal(&child, Signal::TERM);
    assert_eq!(ended(child).await.code, Some(143));
    session.assert_nothing_left().await;
}

/// Each of them is a conversation that is to be resumed from now on, and so a record.
#[tokio::test]
async fn a_flood_of_new_conversations_does_not_wait_for_the_disk_one_by_one() {
    let session = Session::new().await;
    let write = r#"for n in {100000..119999}; do echo '{"type":"system","subtype":"init","session_id":"6fa459ea-ee8a-3ca4-894e-db77e1'$n'"}'; done > /proc/$PPID/fd/1; touch written; sleep 100"#;
    let mut command = session.command(&script("MARK", &[bash(write)]), &["--interactive"]);
    // From some line of the flood on nothing gets onto the disk: whoever waits for it waits for ever, and the pipe is full.
    let child = command.env(HANG, "durable:100").spawn().unwrap();
    let written = session.workspace().join("written");
    eventually("they are written", || written.exists()).await;
    signal(&child, Signal::TERM);
    ended(child).await;
    session.assert_nothing_left().await;
}

/// As behind a pager, or a container runtime whose log is stuck.
#[tokio::test]
async fn output_that_nobody_reads_holds_up_nothing() {
    let session = Session::new().await;
    // More than a pipe holds.
    let long = format!("{} {}", script("MARK", &[text("Done.")]), "x".repeat(90_000));
    let mut command = session.command(&long, &[]);
    command.env("RUST_LOG", "trace");
    let mut child = command.spawn().unwrap();
    let status = timeout(DEADLINE, child.wait()).await.expect("it ends").unwrap();
    assert_eq!((status.code(), session.report().outcome), (Some(0), Outcome::Succeeded));
}

/// Whoever may set `RUST_LOG` and read a pod's log need not be somebody who may read its Secrets.
#[tokio::test]
async fn the_log_shows_no_credential_whatever_is_asked_of_it() {
    let session = Session::new().await;
    std::fs::create_dir_all(session.state()).unwrap();
    let file = session.state().join("token");
    std::fs::write(&file, "fake-gateway-token").unwrap();
    let gateway = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", gateway.local_addr().unwrap());
    let came = tokio::spawn(async move {
        let (mut stream, _) = gateway.accept().await.unwrap();
        let mut request = vec![0; 4_096];
        let length = stream.read(&mut request).await.unwrap();
        String::from_utf8_lossy(&request[..length]).into_owned()
    });
    let mut command = session.command(&script("MARK", &[text("Done.")]), &[]);
    command
        .env("RUST_LOG", "trace,tungstenite::handshake=trace")
        .env("WEBSOCKET_URL", url)
        .env("GATEWAY_TOKEN_FILE", &file);
    let child = command.spawn().unwrap();
    let asked = timeout(DEADLINE, came).await.unwrap().unwrap();
    assert!(asked.contains("Bearer fake-gateway-token"), "{asked}");
    session.request(Logged::asks_for_message).await;
    // Any other end would wait for acknowledgements.
    signal(&child, Signal::KILL);
    let ended = ended(child).await;
    for secret in ["fake-gateway-token", FAKE_KEY] {
        assert!(!ended.stderr.contains(secret), "{}", ended.stderr);
    }
}

/// Where the shim is not the first process of a container, its processes may send it any signal.
#[tokio::test]
async fn a_shim_that_the_agent_stopped_is_put_down_with_all_that_it_had() {
    let session = Session::new().await;
    let stop = "setsid sleep 300 >/dev/null 2>&1 & touch began; kill -STOP $(awk '/^PPid/ {print $2}' /proc/$PPID/status); sleep 100";
    let child = session.start(&script("MARK", &[bash(stop)]), &[]);
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    signal(&child, Signal::TERM);
    let ended = ended(child).await;
    assert_eq!((ended.code, session.report().outcome), (Some(143), Outcome::Stopped));
    session.assert_nothing_left().await;
}

/// An agent container whose shim is the first process of a PID namespace, as in a pod.
fn isolated_container(session: &Session) -> Child {
    std::fs::create_dir_all(session.state()).unwrap();
    let mut command = Command::new("unshare");
    if !rustix::process::getuid().is_root() {
        command.arg("--map-root-user");
    }
    let runner = env!("CARGO_BIN_EXE_runner");
    command
        .args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            runner,
            "agent",
            "--socket",
        ])
        .arg(session.state().join("agent.sock"))
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn an_agent_that_kills_all_it_can_reach_is_started_again_in_place() {
    let session = Session::new().await;
    let all = "[ -e again ] || { touch again; kill -9 -1; }; sleep 0.1";
    let config = config(&session, &script("MARK", &[bash(all), text("Done.")]));
    let _container = isolated_container(&session);
    assert_eq!(drive(config).await, Outcome::Succeeded);
    assert_eq!(session.events("agentRestarted").len(), 1);
    session.assert_prompt_once("MARK");
    session.assert_nothing_left().await;
}
