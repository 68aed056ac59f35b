//! The runner and the shim as the two containers of a pod have them: a socket between them, one connection at a time.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{Ack, GatewayFrame, RunnerFrame, Welcome};
use protocol::report::Delivery;
use protocol::spec::LiveLimits;
use protocol::{Outcome, RecordHead, Report};
use runner::agent::Place;
use runner::cli::options::Options;
use runner::config::{AgentConfig, Config, Folders, Gateway};
use runner::proxy::{Credential, Upstream};
use runner::secrets::Secrets;
use runner::transcript::Format;
use rustix::process::Signal;
use tests::model::{FAKE_KEY, Logged, MockModel};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::common::{DEADLINE, Session, bash, eventually, script, signal, text};
use crate::drain::{left_behind, slow_volume};

/// The agent container.
pub fn agent_container(session: &Session) -> Child {
    // The socket's folder is there before the container is.
    std::fs::create_dir_all(session.state()).unwrap();
    Command::new(env!("CARGO_BIN_EXE_runner"))
        .args(["agent", "--socket"])
        .arg(session.state().join("agent.sock"))
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// What the operator's environment says to the runner container.
pub fn config(session: &Session, prompt: &str) -> Config {
    config_at(session.state(), &session.workspace(), session.model.url(), prompt)
}

/// The same for who knows the folders and the model's address only.
pub fn config_at(state: PathBuf, workspace: &Path, model: String, prompt: &str) -> Config {
    for folder in [state.as_path(), workspace] {
        std::fs::create_dir_all(folder).unwrap();
    }
    Config {
        name: "hello".into(),
        namespace: "team".into(),
        uid: "6fa459ea-ee8a-3ca4-894e-db77e160355e".into(),
        pod_uid: "pod-1".into(),
        attempt: Some(1),
        run: 1,
        used: Duration::ZERO,
        prompt: prompt.to_owned(),
        options: Options::default(),
        prices: protocol::price::Prices::default(),
        limits: LiveLimits {
            timeout: Some(DEADLINE.as_secs()),
            ..LiveLimits::default()
        },
        upstream: Some(Upstream {
            base_url: model,
            credential: Credential::ApiKey(FAKE_KEY.into()),
            vertex: None,
            authorities: None,
        }),
        mcp: runner::proxy::mcp::Around::default(),
        gateway: None,
        langfuse: None,
        agent: AgentConfig {
            place: Place::Container(state.join("agent.sock")),
            cli: xtask::claude_cli().unwrap().display().to_string(),
            workspace: workspace.display().to_string(),
            mount: workspace.display().to_string(),
            home: state.display().to_string(),
            config_dir: state.join("claude").display().to_string(),
        },
        folders: Folders {
            transcripts: state.join("claude/projects"),
            report: state.join("report.json"),
            limits: Some(state.join("limits")),
            control: state.join("control.sock"),
            state,
        },
        format: Format::Quiet,
        stdout: None,
        secrets: Vec::new(),
        vault: runner::redact::Vault::default(),
        repos: runner::workspace::git::Repos::default(),
        last_word: Arc::default(),
        pulse: runner::watchdog::Pulse::default(),
    }
}

/// Boxed: the future of a whole attempt is a large one.
pub fn drive(config: Config) -> impl Future<Output = Outcome> {
    let (told, stop) = watch::channel(false);
    let driven = Box::pin(runner::drive::drive(config, stop));
    async move {
        let _told = told;
        timeout(DEADLINE, driven).await.expect("the attempt ends")
    }
}

#[tokio::test]
async fn the_agent_works_behind_its_socket() {
    let session = Session::new().await;
    let config = config(&session, &script("MARK", &[bash("echo hi > out.txt"), text("Done.")]));
    let mut container = agent_container(&session);
    assert_eq!(drive(config).await, Outcome::Succeeded);
    assert_eq!(
        std::fs::read_to_string(session.workspace().join("out.txt")).unwrap(),
        "hi\n"
    );
    // Not the first process of a container, so it ends when the runner is gone.
    timeout(DEADLINE, container.wait()).await.unwrap().unwrap();
}

#[tokio::test]
async fn reading_the_records_of_earlier_attempts_gives_signs_of_life() {
    let session = Session::new().await;
    let first = config(&session, &script("MARK", &[text("Done.")]));
    let _container = agent_container(&session);
    assert_eq!(drive(first).await, Outcome::Succeeded);
    let records = session.records().len() as u64;
    let next = Config {
        attempt: Some(2),
        ..config(&session, "MARK")
    };
    let pulse = next.pulse.clone();
    assert_eq!(drive(next).await, Outcome::Succeeded);
    assert_eq!(pulse.beats(), records);
}

#[tokio::test]
async fn who_is_told_to_stop_while_the_volume_is_slow_does_not_read_all_of_it() {
    let session = Session::new().await;
    let next = Config {
        attempt: Some(2),
        gateway: Some(runner::config::Gateway {
            url: "ws://127.0.0.1:1/ws".to_owned(),
            token_file: None,
        }),
        ..config(&session, "MARK")
    };
    left_behind(&session.state(), 1, 12);
    let slow = slow_volume(&session.state(), Duration::from_secs(3));
    let (tell, stop) = watch::channel(false);
    // The runtime has one thread, and that one reads.
    let told = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(4));
        tell.send_replace(true);
        tell
    });
    let begun = Instant::now();
    let outcome = timeout(DEADLINE, Box::pin(runner::drive::drive(next, stop)))
        .await
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(
        (outcome, session.report().outcome),
        (Outcome::Stopped, Outcome::Stopped)
    );
    // Else nobody would deliver them.
    assert_eq!(session.report().events, Delivery::Failed, "what attempt 1 left");
    drop(told.join());
    slow.join().unwrap();
}

#[tokio::test]
async fn an_image_without_what_the_agent_needs_is_named_and_not_used() {
    let session = Session::new().await;
    let config = config(&session, &script("MARK", &[text("never")]));
    std::fs::create_dir_all(session.state()).unwrap();
    let mut container = Command::new(env!("CARGO_BIN_EXE_runner"));
    container
        .args(["agent", "--socket"])
        .arg(session.state().join("agent.sock"));
    // The workspace is a folder without programs.
    let _container = container
        .env("PATH", session.workspace())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    assert_eq!(drive(config).await, Outcome::ConfigError);
    let report: Report = serde_json::from_slice(&std::fs::read(session.state().join("report.json")).unwrap()).unwrap();
    let said = report.message;
    assert!(
        said.contains("lacks bash, git:") && said.contains("spec.pod.image"),
        "{said}"
    );
    assert!(session.model.requests().is_empty(), "the model is not asked");
}

#[tokio::test]
async fn a_cli_that_dies_is_started_again_over_the_same_connection() {
    let session = Session::new().await;
    let hide =
        "setsid bash -c 'echo $$ > left.pid; exec sleep 300' >/dev/null 2>&1 & while [ ! -s left.pid ]; do :; done";
    let look = "kill -0 $(cat left.pid) 2>/dev/null && echo it lives || echo it is gone";
    let suicide = format!("if [ ! -e left.pid ]; then {hide}; kill -9 $PPID; sleep 5; fi; {look}");
    let config = config(&session, &script("MARK", &[bash(&suicide), text("Done.")]));
    let _container = agent_container(&session);
    assert_eq!(drive(config).await, Outcome::Succeeded);
    assert_eq!(session.events("agentRestarted").len(), 1);
    let said: String = session
        .records()
        .iter()
        .map(|record| record.body.get().to_owned())
        .collect();
    assert!(
        said.contains("\"stdout\":\"it is gone\""),
        "what the dead CLI left is not there when the next one starts"
    );
    session.assert_prompt_once("MARK");
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_conversation_that_is_not_there_begins_again_over_the_same_connection() {
    let session = Session::new().await;
    let prompt = script(
        "MARK",
        &[
            // Stopped first: it must not write the transcript again before it is killed.
            bash(
                "if [ ! -e once ]; then touch once; sleep 1.5; kill -STOP $PPID; rm -rf \"$CLAUDE_CONFIG_DIR/projects\"; kill -9 $PPID; sleep 5; fi",
            ),
            text("Done."),
        ],
    );
    let config = config(&session, &prompt);
    let _container = agent_container(&session);
    assert_eq!(drive(config).await, Outcome::Succeeded);
    let resumed: Vec<_> = session
        .events("cliStarted")
        .iter()
        .map(|event| event["resumed"] == true)
        .collect();
    assert_eq!(resumed, [false, true, false]);
    session.assert_prompt_once("MARK");
}

#[tokio::test]
async fn a_container_that_was_killed_is_started_again_and_the_turn_goes_on() {
    let session = Session::new().await;
    let once = "if [ ! -e once ]; then touch once; sleep 100; fi; echo on";
    let config = config(&session, &script("MARK", &[bash(once), text("Done.")]));
    let mut first = agent_container(&session);
    let driven = tokio::spawn(drive(config));
    let mark = session.workspace().join("once");
    eventually("the tool runs", || mark.exists()).await;
    // Out of memory: the kernel kills all of the container, and the kubelet starts it again.
    kill_all_below(&first);
    first.wait().await.unwrap();
    let _second = agent_container(&session);
    assert_eq!(driven.await.unwrap(), Outcome::Succeeded);
    assert_eq!(session.events("agentRestarted").len(), 1);
    session.assert_prompt_once("MARK");
}

/// What the end of a PID namespace does.
fn kill_all_below(shim: &Child) {
    let group = |pid: &str| format!("/proc/{pid}/task/{pid}/children");
    let mut open = vec![shim.id().unwrap().to_string()];
    signal(shim, Signal::STOP);
    while let Some(pid) = open.pop() {
        let children = std::fs::read_to_string(group(&pid)).unwrap_or_default();
        open.extend(children.split_ascii_whitespace().map(str::to_owned));
        if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

#[tokio::test]
async fn a_timeout_that_is_changed_while_it_runs_counts() {
    let session = Session::new().await;
    let config = config(&session, &script("MARK", &[bash("touch began; sleep 100")]));
    let _container = agent_container(&session);
    let driven = tokio::spawn(drive(config));
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    std::fs::write(session.state().join("limits"), r#"{"timeout":1}"#).unwrap();
    assert_eq!(driven.await.unwrap(), Outcome::Timeout);
}

#[tokio::test]
async fn time_that_earlier_attempts_used_counts() {
    let session = Session::new().await;
    let config = Config {
        used: DEADLINE.saturating_sub(Duration::from_secs(2)),
        ..config(&session, &script("MARK", &[serde_json::json!({ "hang": true })]))
    };
    let _container = agent_container(&session);
    let begun = std::time::Instant::now();
    assert_eq!(drive(config).await, Outcome::Timeout);
    assert!(begun.elapsed() < DEADLINE / 2, "{:?}", begun.elapsed());
}

/// A gateway that keeps everything; gives the records and how many live pieces came.
async fn gateway() -> (Gateway, Arc<Mutex<(Vec<String>, usize)>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let kept = Arc::new(Mutex::new((Vec::new(), 0)));
    let shared = Arc::clone(&kept);
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            let Message::Text(text) = message else { continue };
            let answer = match serde_json::from_str(&text).unwrap() {
                RunnerFrame::Hello(_) => GatewayFrame::Welcome(Welcome {
                    acked_seq: 0,
                    spool: None,
                }),
                RunnerFrame::Records(records) => {
                    let mut kept = shared.lock().unwrap();
                    kept.0.extend(records.iter().map(|record| record.get().to_owned()));
                    let head: RecordHead = serde_json::from_str(kept.0.last().unwrap()).unwrap();
                    GatewayFrame::Ack(Ack { seq: head.seq })
                }
                RunnerFrame::Delta(_) => {
                    shared.lock().unwrap().1 += 1;
                    continue;
                }
                _ => continue,
            };
            socket
                .send(Message::Text(serde_json::to_string(&answer).unwrap().into()))
                .await
                .unwrap();
        }
    });
    (Gateway { url, token_file: None }, kept)
}

#[tokio::test]
async fn a_gateway_gets_every_record_and_the_pieces_live() {
    let session = Session::new().await;
    let (gateway, kept) = gateway().await;
    let config = Config {
        gateway: Some(gateway),
        ..config(
            &session,
            &script(
                "MARK",
                &[text("A text that comes in more than one piece, I should think.")],
            ),
        )
    };
    let _container = agent_container(&session);
    assert_eq!(drive(config).await, Outcome::Succeeded);
    let records: Vec<_> = session
        .records()
        .iter()
        .map(|record| serde_json::to_string(record).unwrap())
        .collect();
    let kept = kept.lock().unwrap();
    assert_eq!(kept.0, records);
    assert!(kept.1 > 2, "{} live pieces", kept.1);
    let report: Report = session.report();
    assert_eq!(
        (report.acked_seq, report.last_seq),
        (records.len() as u64, records.len() as u64)
    );
    assert_eq!(report.events, protocol::report::Delivery::Delivered);
    assert!(session.model.requests().iter().any(Logged::asks_for_message));
}

#[tokio::test]
async fn a_key_that_is_changed_in_its_secret_is_used_from_then_on_and_never_recorded() {
    const KEYS: [&str; 2] = ["gateway-fake-key-one", "gateway-fake-key-two"];
    let mut session = Session::new().await;
    session.model = MockModel::accepting(KEYS.map(str::to_owned).to_vec()).await.unwrap();
    let secret = session.state().join("secrets/ambient-runner-secrets");
    std::fs::create_dir_all(&secret).unwrap();
    let rotate = |key: &str| std::fs::write(secret.join("ANTHROPIC_API_KEY"), key).unwrap();
    rotate(KEYS[0]);
    let wait = "touch began; while [ ! -e go ]; do sleep 0.05; done";
    let prompt = script("MARK", &[bash(wait), bash("cat leaked"), text("Done.")]);
    let base = config(&session, &prompt);
    let secrets = Secrets::new(session.state().join("secrets"), |_| None).telling(base.vault.clone());
    let config = Config {
        upstream: Some(Upstream {
            credential: Credential::anthropic(&secrets).unwrap(),
            ..base.upstream.unwrap()
        }),
        ..base
    };
    let _container = agent_container(&session);
    let driven = tokio::spawn(drive(config));
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    rotate(KEYS[1]);
    // However an agent may come by it.
    std::fs::write(session.workspace().join("leaked"), KEYS.join(" and ")).unwrap();
    std::fs::write(session.workspace().join("go"), "").unwrap();
    assert_eq!(driven.await.unwrap(), Outcome::Succeeded);
    let records: String = session
        .records()
        .iter()
        .map(|record| record.body.get().to_owned())
        .collect();
    assert!(records.contains("[redacted ANTHROPIC_API_KEY] and [redacted ANTHROPIC_API_KEY]"));
    assert!(KEYS.iter().all(|key| !records.contains(key)));
}

#[tokio::test]
async fn a_volume_that_cannot_be_written_is_said() {
    let session = Session::new().await;
    let mut config = config(&session, "MARK");
    config.folders.state = "/proc/nowhere".into();
    assert_eq!(drive(config).await, Outcome::VolumeUnavailable);
    let report = session.report();
    assert!(report.message.contains("/proc belongs to 0:0"), "{}", report.message);
}
