//! Runners and agents that die, at bad moments.

use crate::common::{Session, bash, eventually, script, signal, text};
use futures::StreamExt as _;
use protocol::{Kind, Outcome};
use rustix::process::Signal;
use serde_json::json;
use tests::model::Logged;

/// Kills the runner as the kernel would; its CLI must not live on.
async fn killed(session: &Session, mut runner: tokio::process::Child) {
    signal(&runner, Signal::KILL);
    runner.wait().await.unwrap();
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn killed_during_a_model_call_the_prompt_is_still_given_once() {
    let session = Session::new().await;
    let prompt = script("MARK", &[json!({ "text": "Done.", "hold": "go" })]);
    let runner = session.start(&prompt, &[]);
    session.request(Logged::asks_for_message).await;
    killed(&session, runner).await;
    session.model.release("go");
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(
        (session.report().outcome, session.report().attempt),
        (Outcome::Succeeded, 2)
    );
    session.assert_prompt_once("MARK");
    let ends: Vec<_> = session
        .bodies(Kind::End)
        .iter()
        .map(|end| end["outcome"].clone())
        .collect();
    assert_eq!(ends, ["lost", "succeeded"]);
    let prompts = session
        .bodies(Kind::User)
        .iter()
        .filter(|user| user["command"] == "prompt")
        .count();
    assert_eq!(prompts, 1);
}

#[tokio::test]
async fn a_conversation_that_is_lost_begins_again_with_the_prompt() {
    let session = Session::new().await;
    // The model has been given the prompt for so long that nobody asks the transcripts for it.
    let prompt = script("MARK", &[bash("sleep 1.5"), json!({ "text": "Done.", "hold": "go" })]);
    let runner = session.start(&prompt, &[]);
    session.request(|request| request.step == Some(1)).await;
    killed(&session, runner).await;
    std::fs::remove_dir_all(session.state().join("claude/projects")).unwrap();
    session.model.release("go");
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    session.assert_prompt_once("MARK");
    let started: Vec<_> = session
        .events("cliStarted")
        .iter()
        .map(|event| event["resumed"].clone())
        .collect();
    assert_eq!(started, [false, true, false]);
    let told = session
        .bodies(Kind::Log)
        .iter()
        .any(|log| log["message"].as_str().unwrap().contains("could not be resumed"));
    assert!(told);
}

#[tokio::test]
async fn killed_in_a_tool_the_turn_goes_on() {
    let session = Session::new().await;
    let prompt = script(
        "MARK",
        &[
            bash("echo x >> runs.txt; [ $(wc -l < runs.txt) -gt 1 ] || sleep 100"),
            text("Done."),
        ],
    );
    let runner = session.start(&prompt, &[]);
    let runs = session.workspace().join("runs.txt");
    // The file is there before its line is: without it the tool of the second run would sleep, too.
    eventually("the tool runs", || {
        std::fs::read(&runs).is_ok_and(|line| !line.is_empty())
    })
    .await;
    killed(&session, runner).await;
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Done.");
    session.assert_prompt_once("MARK");
    assert_eq!(session.events("cliStarted")[1]["resumed"], true);
}

/// The spool is cut behind a record, as if the runner had been killed there, and the session is run again.
#[tokio::test]
async fn killed_after_any_record_the_prompt_is_given_once_and_the_session_succeeds() {
    let first = Session::new().await;
    first.run(&script("MARK", &[bash("echo hi"), text("Done.")]), &[]).await;
    let records = first.records().len();
    // The first records are where the decisions are. Behind them, where the CLI has finished what the spool does not
    // know of, each takes the wait for the CLI to go on by itself.
    let cuts = (1..=8).chain((9..records).step_by(5));
    futures::stream::iter(cuts).for_each_concurrent(4, killed_after).await;
}

async fn killed_after(keep: usize) {
    let session = Session::new().await;
    let prompt = script("MARK", &[bash("echo hi"), text("Done.")]);
    session.run(&prompt, &[]).await;
    cut(&session, keep);
    session.model.reset();
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0), "cut behind record {keep}");
    assert_eq!(session.report().outcome, Outcome::Succeeded);
    if session.model.requests().iter().any(Logged::asks_for_message) {
        session.assert_prompt_once("MARK");
    }
    let seqs: Vec<u64> = session.records().iter().map(|record| record.seq).collect();
    assert!(seqs.iter().copied().eq(1..=seqs.len() as u64));
}

fn cut(session: &Session, keep: usize) {
    let spool = session.state().join("spool");
    let segment = std::fs::read_dir(&spool)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "spool"))
        .unwrap();
    let bytes = std::fs::read(&segment).unwrap();
    let mut end = 44;
    for _ in 0..keep {
        end += 8 + u32::from_le_bytes(bytes[end..end + 4].try_into().unwrap()) as usize;
    }
    std::fs::write(&segment, &bytes[..end + 3]).unwrap();
}

#[tokio::test]
async fn a_conversation_that_was_never_written_begins_again_at_once() {
    let session = Session::new().await;
    let prompt = script("MARK", &[json!({ "text": "Done.", "hold": "go" })]);
    let runner = session.start(&prompt, &[]);
    session.request(Logged::asks_for_message).await;
    killed(&session, runner).await;
    std::fs::remove_dir_all(session.state().join("claude/projects")).unwrap();
    session.model.release("go");
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    session.assert_prompt_once("MARK");
    let resumed: Vec<_> = session
        .events("cliStarted")
        .iter()
        .map(|event| event["resumed"].clone())
        .collect();
    assert_eq!(resumed, [false, false]);
    let told = session
        .bodies(Kind::Log)
        .iter()
        .any(|log| log["message"].as_str().unwrap().contains("could not be resumed"));
    assert!(told);
}

#[tokio::test]
async fn a_cli_that_was_killed_while_it_wrote_its_configuration_goes_on_without_it() {
    let session = Session::new().await;
    let tear = r#"echo "{" > "$CLAUDE_CONFIG_DIR/.claude.json"; kill -9 $PPID; sleep 100"#;
    let once = format!("[ -e torn ] || {{ touch torn; {tear}; }}");
    let prompt = script("MARK", &[bash(&once), text("Done."), text("Done.")]);
    assert_eq!(session.run(&prompt, &[]).await.code, Some(0));
    went_on_without_its_configuration(&session);
}

#[tokio::test]
async fn the_next_run_goes_on_without_a_configuration_that_is_torn() {
    let session = Session::new().await;
    let prompt = script("MARK", &[text("Begun."), text("Done.")]);
    assert_eq!(session.run(&prompt, &[]).await.code, Some(0));
    let conversation = session.report().sdk_session_id;
    std::fs::write(session.state().join("claude/.claude.json"), "{\n").unwrap();
    assert_eq!(session.run(&prompt, &["--run", "2"]).await.code, Some(0));
    assert_eq!(session.report().sdk_session_id, conversation);
    went_on_without_its_configuration(&session);
}

fn went_on_without_its_configuration(session: &Session) {
    assert_eq!(session.report().result, "Done.");
    session.assert_prompt_once("MARK");
    let logs: Vec<_> = session
        .bodies(Kind::Log)
        .iter()
        .map(|log| log["message"].to_string())
        .collect();
    let said = |what: &str| logs.iter().any(|log| log.contains(what));
    assert!(said("claude/.claude.json, which is removed"), "{logs:?}");
    assert!(!said("could not be resumed") && !said("may be too low"), "{logs:?}");
}

#[tokio::test]
async fn a_cli_goes_on_though_there_is_a_pipe_in_the_place_of_its_configuration() {
    let session = Session::new().await;
    let file = "\"$CLAUDE_CONFIG_DIR/.claude.json\"";
    let lay = format!("[ -e laid ] || {{ touch laid; rm -f {file}; mkfifo {file}; kill -9 $PPID; sleep 100; }}");
    let prompt = script("MARK", &[bash(&lay), text("Done."), text("Done.")]);
    let ended = session.run(&prompt, &["--timeout", "40"]).await;
    assert_eq!(ended.code, Some(0), "{}", session.report().message);
    session.assert_prompt_once("MARK");
}

#[tokio::test]
async fn told_to_stop_it_leaves_a_report_and_goes_on_the_next_time() {
    let session = Session::new().await;
    // The interrupt itself counts as an answer for the mock.
    let steps = [
        bash("echo $$ > tool.pid; sleep 100"),
        text("Continued."),
        text("Continued."),
    ];
    let prompt = script("MARK", &steps);
    let runner = session.start(&prompt, &[]);
    let tool = session.workspace().join("tool.pid");
    eventually("the tool runs", || tool.exists()).await;
    signal(&runner, Signal::TERM);
    let ended = crate::common::ended(runner).await;
    assert_eq!(ended.code, Some(143));
    assert!(ended.took.as_secs() < 40, "{:?}", ended.took);
    assert_eq!(session.report().outcome, Outcome::Stopped);
    session.assert_nothing_left().await;
    assert_eq!(session.events("stopping").len(), 1);

    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Continued.");
    session.assert_prompt_once("MARK");
    let last = session.model.requests().pop().unwrap();
    assert_eq!(last.user_messages_with(runner::drive::CONTINUE), 1);
}

#[tokio::test]
async fn told_to_stop_during_a_model_call_it_does_not_wait_for_the_answer() {
    let session = Session::new().await;
    let prompt = script("MARK", &[json!({ "hang": true })]);
    let runner = session.start(&prompt, &[]);
    session.request(Logged::asks_for_message).await;
    signal(&runner, Signal::TERM);
    let ended = crate::common::ended(runner).await;
    assert_eq!(ended.code, Some(143));
    assert!(ended.took.as_secs() < 40, "{:?}", ended.took);
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_cli_that_is_killed_is_started_again_in_place() {
    let session = Session::new().await;
    // $PPID of the tool's shell is the CLI.
    let suicide = "if [ ! -e once ]; then touch once; kill -9 $PPID; sleep 5; fi; echo survived";
    let ended = session.run(&script("MARK", &[bash(suicide), text("Done.")]), &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().attempt, 1);
    assert_eq!(session.events("agentRestarted").len(), 1);
    session.assert_prompt_once("MARK");
}

#[tokio::test]
async fn a_cli_that_is_killed_again_and_again_is_given_up() {
    let session = Session::new().await;
    let steps: Vec<_> = (0..9).map(|_| bash("kill -9 $PPID; sleep 5")).collect();
    let ended = session.run(&script("MARK", &steps), &[]).await;
    assert_eq!(ended.code, Some(1));
    assert_eq!(session.report().outcome, Outcome::AgentLost);
    assert_eq!(session.events("agentRestarted").len(), 3);
}

#[tokio::test]
async fn a_second_runner_on_the_same_state_waits_its_turn() {
    let session = Session::new().await;
    let prompt = script("MARK", &[json!({ "text": "Done.", "hold": "go" })]);
    let first = session.start(&prompt, &[]);
    session.request(Logged::asks_for_message).await;
    let second = session.start(&prompt, &[]);
    session.model.release("go");
    assert_eq!(crate::common::ended(first).await.code, Some(0));
    assert_eq!(crate::common::ended(second).await.code, Some(0));
    session.assert_prompt_once("MARK");
    assert_eq!(session.events("cliStarted").len(), 1, "the second found it done");
}

#[tokio::test]
async fn with_a_grace_of_fifteen_seconds_a_deaf_agent_and_a_gateway_that_is_away_everything_is_on_disk() {
    let session = Session::new().await;
    // A stopped CLI heeds neither the interrupt nor the signals, and its tool runs in a session of its own.
    let deaf = "if [ ! -e deaf ]; then touch deaf; kill -STOP $PPID; sleep 100; fi";
    let prompt = script("MARK", &[bash(deaf), text("Done."), text("Done.")]);
    let mut command = session.command(&prompt, &[]);
    let mut runner = command.env("WEBSOCKET_URL", "ws://127.0.0.1:1/").spawn().unwrap();
    let deaf = session.workspace().join("deaf");
    eventually("the CLI is stopped", || deaf.exists()).await;
    let told = tokio::time::Instant::now();
    signal(&runner, Signal::TERM);
    eventually("the report says so before anything else is done", || {
        session
            .try_report()
            .is_some_and(|report| report.outcome == Outcome::Stopped)
    })
    .await;
    assert!(session.is_at_work(), "the agent is still there");
    // The ladder takes nine seconds at most, and of the grace enough is left.
    session.assert_nothing_left().await;
    assert!(told.elapsed().as_secs() < 13, "{:?}", told.elapsed());
    let alive = tokio::time::timeout_at(told + std::time::Duration::from_secs(14), runner.wait()).await;
    assert!(alive.is_err(), "it waits for acknowledgements: {alive:?}");
    killed(&session, runner).await;
    let ends: Vec<_> = session
        .bodies(Kind::End)
        .iter()
        .map(|end| end["outcome"].clone())
        .collect();
    assert_eq!(ends, ["stopped"]);
    assert_eq!(session.report().outcome, Outcome::Stopped);

    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    session.assert_prompt_once("MARK");
    let last = session.model.requests().pop().unwrap();
    assert_eq!(last.user_messages_with(runner::drive::CONTINUE), 1);
}

#[tokio::test]
async fn an_agent_that_has_removed_its_working_folder_goes_on_in_a_new_one() {
    let session = Session::new().await;
    let away = "[ -e ../again ] || { touch ../again; cd ..; rm -r work; kill -9 $PPID; }; sleep 0.1";
    let ended = session.run(&script("MARK", &[bash(away), text("Done.")]), &[]).await;
    assert_eq!((ended.code, session.report().outcome), (Some(0), Outcome::Succeeded));
    session.assert_prompt_once("MARK");
}
