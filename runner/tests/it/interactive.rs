//! Sessions that stay for messages, with the real CLI.

use std::process::Stdio;

use protocol::{Kind, Outcome};
use runner::control::{Reply, Request};
use runner::status::Phase;
use serde_json::json;
use tests::model::Logged;
use tokio::process::Command;

use crate::common::{Session, bash, ended, eventually, script, text};

/// The runner as a person calls it.
async fn runner(session: &Session, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_runner"))
        .args(arguments)
        .arg("--state")
        .arg(session.state())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), said)
}

fn refused(reply: Reply) -> String {
    match reply {
        Reply::Refused(why) => why,
        other => panic!("refused, not {other:?}"),
    }
}

/// In the last request each of these is in exactly one user message.
fn assert_said_once(session: &Session, markers: &[&str]) {
    let requests = session.model.requests();
    for request in requests.iter().filter(|request| request.asks_for_message()) {
        for marker in markers {
            assert!(
                request.user_messages_with(marker) <= 1,
                "{marker}: {:#?}",
                request.messages()
            );
        }
    }
    let last = requests.iter().rfind(|request| request.asks_for_message()).unwrap();
    for marker in markers {
        assert_eq!(last.user_messages_with(marker), 1, "{marker}: {:#?}", last.messages());
    }
}

#[tokio::test]
async fn a_session_stays_for_messages_until_it_is_ended() {
    let session = Session::new().await;
    let child = session.start(&script("MARK", &[text("One.")]), &["--interactive"]);
    session.idle(1).await;
    // As a list begins.
    let (code, said) = runner(&session, &["send", &script("- NEXT", &[text("Two.")])]).await;
    assert_eq!(code, Some(0), "{said}");
    let status = session.idle(2).await;
    assert_eq!((status.rounds, status.queued), (2, 0));
    assert!(status.usage.total() > 0 && status.unacked.is_none());
    let (code, said) = runner(&session, &["status"]).await;
    assert!(
        code == Some(0) && said.contains("phase      waits for a message"),
        "{said}"
    );
    let (_, said) = runner(&session, &["status", "--json"]).await;
    let figures: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&figures["phase"], &figures["turn"]), (&json!("idle"), &json!(2)));
    assert_said_once(&session, &["MARK", "NEXT"]);

    let (code, said) = runner(&session, &["end"]).await;
    assert_eq!(code, Some(0), "{said}");
    let ended = ended(child).await;
    assert_eq!(ended.code, Some(0));
    let report = session.report();
    assert_eq!((report.outcome, report.turns), (Outcome::EndedByRequest, 2));
    assert_eq!(report.result, "Two.");
    session.assert_nothing_left().await;
    let turns: Vec<_> = session
        .events("turnEnded")
        .iter()
        .map(|event| (event["turn"].clone(), event["outcome"].clone()))
        .collect();
    assert_eq!(turns, [(json!(1), json!("succeeded")), (json!(2), json!("succeeded"))]);
    let (code, said) = runner(&session, &["status"]).await;
    assert!(
        code == Some(1) && said.contains("failed to reach the session"),
        "{said}"
    );
}

#[tokio::test]
async fn a_session_without_a_prompt_waits_for_its_first_message() {
    let session = Session::new().await;
    let mut command = session.command("", &["--interactive"]);
    let child = command.spawn().unwrap();
    session.status("it waits", |status| status.phase == Phase::Idle).await;
    session.send(&script("FIRST", &[text("Hello.")])).await;
    session.idle(1).await;
    assert_said_once(&session, &["FIRST"]);
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
}

#[tokio::test]
async fn messages_sent_while_a_tool_runs_are_folded_into_the_turn_and_the_same_one_is_sent_once() {
    let session = Session::new().await;
    let wait = "touch began; while [ ! -e go ]; do sleep 0.05; done";
    let child = session.start(&script("MARK", &[bash(wait), text("Done.")]), &["--interactive"]);
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    let again = Request::Send {
        text: "FOLLOW".into(),
        id: Some("c-1".into()),
    };
    let (first, second) = (session.ask(&again).await, session.ask(&again).await);
    assert!(matches!(first, Reply::Done(_)));
    assert_eq!(first, second);
    session.send("OTHER").await;
    session.status("they are queued", |status| status.queued == 2).await;
    std::fs::write(session.workspace().join("go"), "").unwrap();
    let status = session.idle(1).await;
    assert_eq!((status.turn, status.queued), (1, 0), "it is one turn");
    // The CLI gives folded messages to the model in its own words.
    let last = session.model.requests().pop().unwrap();
    for marker in ["MARK", "FOLLOW", "OTHER"] {
        let messages = serde_json::to_string(last.messages()).unwrap();
        assert_eq!(messages.matches(marker).count(), 1, "{marker}: {messages}");
    }
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    assert_eq!(session.bodies(Kind::User).len(), 3);
}

#[tokio::test]
async fn an_interrupt_stops_the_tool_of_the_turn_that_it_names_and_the_session_goes_on() {
    let session = Session::new().await;
    let child = session.start(
        &script("MARK", &[bash("echo $$ > tool.pid; exec sleep 100"), text("Not said.")]),
        &["--interactive"],
    );
    let pid = session.workspace().join("tool.pid");
    eventually("the tool runs", || pid.exists()).await;
    let why = refused(session.ask(&Request::Interrupt { turn: Some(7) }).await);
    assert!(why.contains("turn 7 does not run"), "{why}");
    let reply = session.ask(&Request::Interrupt { turn: Some(1) }).await;
    assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
    session.idle(1).await;
    let tool = std::fs::read_to_string(&pid).unwrap();
    let tool = std::path::PathBuf::from(format!("/proc/{}", tool.trim()));
    eventually("the tool is gone", || !tool.exists()).await;
    session.send(&script("NEXT", &[text("Two.")])).await;
    session.idle(2).await;
    assert_said_once(&session, &["MARK", "NEXT"]);
    let why = refused(session.ask(&Request::Interrupt { turn: None }).await);
    assert!(why.contains("turn 2 does not run"), "{why}");
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    let turns: Vec<_> = session
        .events("turnEnded")
        .iter()
        .map(|event| event["outcome"].clone())
        .collect();
    assert_eq!(turns, ["stoppedByUser", "succeeded"]);
}

#[tokio::test]
async fn an_interrupt_stops_an_answer_and_what_was_queued_opens_the_next_turn() {
    let session = Session::new().await;
    let held = json!({ "text": "word ".repeat(400), "hold": "go" });
    let child = session.start(&script("MARK", &[held, text("Next.")]), &["--interactive"]);
    session.request(Logged::asks_for_message).await;
    session.send("QUEUED").await;
    let reply = session.ask(&Request::Interrupt { turn: None }).await;
    assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
    session.status("the next turn begins", |status| status.turn == 2).await;
    session.model.release("go");
    session.idle(2).await;
    assert_said_once(&session, &["MARK", "QUEUED"]);
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    assert_eq!(session.events("turnStarted").len(), 1);
}

/// Whether a transcript of the CLI has this.
fn transcribed(session: &Session, text: &str) -> bool {
    let folders = std::fs::read_dir(session.state().join("claude/projects"));
    let files = folders
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|folder| std::fs::read_dir(folder.path()).ok())
        .flatten()
        .flatten();
    files
        .filter_map(|file| std::fs::read_to_string(file.path()).ok())
        .any(|transcript| transcript.contains(text))
}

/// Whether the process whose id is in `file` is stopped.
fn stopped(file: &std::path::Path) -> bool {
    let pid = std::fs::read_to_string(file).unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim()));
    status.is_ok_and(|status| status.contains("State:\tT"))
}

#[tokio::test]
async fn a_cli_that_does_not_heed_an_interrupt_is_ended_and_the_session_goes_on() {
    let session = Session::new().await;
    let child = session.start(
        &script(
            "MARK",
            &[bash(
                "echo $PPID > cli.pid; until [ -e go ]; do sleep 0.1; done; kill -STOP $PPID; sleep 100",
            )],
        ),
        &["--interactive"],
    );
    // It writes its transcript behind what it does.
    eventually("the transcript has the prompt", || transcribed(&session, "MARK")).await;
    std::fs::write(session.workspace().join("go"), "").unwrap();
    let file = session.workspace().join("cli.pid");
    // Stopped, it hears nothing; a moment before it would.
    eventually("the CLI is stopped", || stopped(&file)).await;
    session.ask(&Request::Interrupt { turn: None }).await;
    session.idle(1).await;
    session.send(&script("NEXT", &[text("Two.")])).await;
    session.idle(2).await;
    assert_said_once(&session, &["MARK", "NEXT"]);
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_one_shot_takes_an_interrupt_and_no_messages() {
    let session = Session::new().await;
    let child = session.start(&script("MARK", &[bash("touch began; sleep 100")]), &[]);
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    for request in [
        Request::Send {
            text: "x".into(),
            id: None,
        },
        Request::End,
    ] {
        let why = refused(session.ask(&request).await);
        assert!(why.contains("not interactive"), "{why}");
    }
    session.ask(&Request::Interrupt { turn: None }).await;
    assert_eq!(ended(child).await.code, Some(0));
    assert_eq!(session.report().outcome, Outcome::StoppedByUser);
    session.assert_nothing_left().await;
}

fn write() -> serde_json::Value {
    json!({ "tools": [{ "name": "Write", "input": { "file_path": "out.txt", "content": "x" } }] })
}

/// The environment of a session whose tools ask.
fn asking(session: &Session, prompt: &str, more: &[&str]) -> Command {
    let mut command = session.command(prompt, more);
    command.env("AGENTIC_SPEC_JSON", r#"{"run":1,"tools":{"permissionMode":"default"}}"#);
    command
}

#[tokio::test]
async fn a_permission_question_is_asked_and_its_answer_counts() {
    let session = Session::new().await;
    let prompt = script("MARK", &[write(), write(), text("Done.")]);
    let child = asking(&session, &prompt, &["--interactive"]).spawn().unwrap();
    let asks = |status: &runner::status::Status| status.phase == Phase::Asking;
    let first = session.status("it asks", asks).await;
    assert_eq!(first.questions[0].tool, "Write");
    let question = first.questions[0].request_id.clone();
    let (code, said) = runner(&session, &["answer", "deny", "--message", "NOT THIS"]).await;
    assert_eq!(code, Some(0), "{said}");
    let second = session
        .status("it asks again", |status| {
            asks(status) && status.questions[0].request_id != question
        })
        .await;
    assert!(!session.workspace().join("out.txt").exists());
    let (code, said) = runner(
        &session,
        &["answer", "allow", "--question", &second.questions[0].request_id],
    )
    .await;
    assert_eq!(code, Some(0), "{said}");
    session.idle(1).await;
    assert!(session.workspace().join("out.txt").exists());
    let why = refused(
        session
            .ask(&Request::Answer {
                request_id: Some(question),
                allow: true,
                message: String::new(),
            })
            .await,
    );
    assert!(why.contains("no such question"), "{why}");
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    let told = session
        .bodies(Kind::Cli)
        .iter()
        .any(|line| line.to_string().contains("NOT THIS"));
    assert!(told);
    let asked = session
        .bodies(Kind::Cli)
        .iter()
        .filter(|line| line["type"] == "control_request")
        .count();
    assert_eq!(asked, 2, "the questions are records");
    let answers: Vec<_> = session
        .events("permissionAnswered")
        .iter()
        .map(|event| event["allowed"].clone())
        .collect();
    assert_eq!(answers, [false, true]);
}

#[tokio::test]
async fn in_a_one_shot_what_would_be_asked_for_is_denied_at_once() {
    let session = Session::new().await;
    let prompt = script("MARK", &[write(), text("Done.")]);
    let ended = ended(asking(&session, &prompt, &[]).spawn().unwrap()).await;
    assert_eq!(ended.code, Some(0));
    assert!(!session.workspace().join("out.txt").exists());
    assert_eq!(session.report().result, "Done.");
}

#[tokio::test]
async fn an_idle_session_ends_and_goes_on_in_the_next_run() {
    let session = Session::new().await;
    let arguments = ["--interactive", "--inactivity-timeout", "2"];
    let first = session.run(&script("MARK", &[text("One.")]), &arguments).await;
    assert_eq!(first.code, Some(0));
    assert_eq!(session.report().outcome, Outcome::Inactive);
    assert!(first.took.as_secs() >= 2);
    // Another attempt of the same run has nothing to do.
    let same = session.run("not used", &arguments).await;
    assert_eq!((same.code, session.report().outcome), (Some(0), Outcome::Inactive));
    assert_eq!(session.events("cliStarted").len(), 1);

    let child = session.start("not used", &["--interactive", "--run", "2"]);
    session.idle(1).await;
    session.send(&script("NEXT", &[text("Two.")])).await;
    session.idle(2).await;
    assert_said_once(&session, &["MARK", "NEXT"]);
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
}

#[tokio::test]
async fn a_question_that_nobody_answers_is_idleness() {
    let session = Session::new().await;
    let prompt = script("MARK", &[write(), text("Done.")]);
    let child = asking(&session, &prompt, &["--interactive", "--inactivity-timeout", "2"])
        .spawn()
        .unwrap();
    assert_eq!(ended(child).await.code, Some(0));
    assert_eq!(session.report().outcome, Outcome::Inactive);
    assert!(!session.workspace().join("out.txt").exists());
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_conversation_that_is_cleared_while_the_runner_dies_stays_cleared() {
    use rustix::process::Signal;
    let session = Session::new().await;
    let mut child = session.start(&script("MARK", &[text("One.")]), &["--interactive"]);
    session.idle(1).await;
    session.send("/clear").await;
    // The CLI goes on while the runner stands still.
    let cleared = || transcribed(&session, "<command-name>/clear");
    let deadline = tokio::time::Instant::now() + crate::common::DEADLINE;
    while !cleared() {
        assert!(tokio::time::Instant::now() < deadline, "it is cleared");
        crate::common::signal(&child, Signal::CONT);
        tokio::task::yield_now().await;
        crate::common::signal(&child, Signal::STOP);
        let soon = tokio::time::Instant::now() + std::time::Duration::from_millis(500);
        while !cleared() && tokio::time::Instant::now() < soon {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    crate::common::signal(&child, Signal::KILL);
    child.wait().await.unwrap();
    session.assert_nothing_left().await;
    assert!(
        session.events("conversationReset").is_empty(),
        "the runner had not heard of it"
    );
    let child = session.start("not used", &["--interactive"]);
    session
        .status("it rests", |status| status.phase == Phase::Idle && status.attempt == 2)
        .await;
    let asked = session.model.requests().len();
    session.send(&script("AFTER", &[text("Two.")])).await;
    session
        .status("it is answered", |status| {
            status.phase == Phase::Idle && status.turn > 2
        })
        .await;
    let requests = session.model.requests();
    assert_eq!(requests.len(), asked + 1, "nothing was asked but this");
    let counts = ["MARK", "AFTER"].map(|marker| requests.last().unwrap().user_messages_with(marker));
    assert_eq!(counts, [0, 1], "{:#?}", requests.last().unwrap().messages());
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
}

#[tokio::test]
async fn a_cleared_conversation_is_the_one_that_is_resumed() {
    let session = Session::new().await;
    let child = session.start(&script("MARK", &[text("One.")]), &["--interactive"]);
    session.idle(1).await;
    session.send("/clear").await;
    session.idle(2).await;
    session.send(&script("AFTER", &[text("Two.")])).await;
    session.idle(3).await;
    crate::common::signal(&child, rustix::process::Signal::KILL);
    ended(child).await;
    session.assert_nothing_left().await;
    let child = session.start("not used", &["--interactive"]);
    session.idle(3).await;
    session.send(&script("NEXT", &[text("Three.")])).await;
    session.idle(4).await;
    let last = session.model.requests().pop().unwrap();
    let counts = ["MARK", "AFTER", "NEXT"].map(|marker| last.user_messages_with(marker));
    assert_eq!(counts, [0, 1, 1], "{:#?}", last.messages());
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
}
