//! A session from its prompt to its end, with the real CLI.

use crate::common::{Session, asks_the_model, bash, ended, eventually, script, text};
use protocol::record::EndBody;
use protocol::{Kind, Outcome};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tests::model::FAKE_KEY;

#[tokio::test]
async fn a_one_shot_is_driven_to_its_end() {
    let session = Session::new().await;
    let prompt = script("MARK", &[bash("echo hi > out.txt; cat out.txt"), text("All done.")]);
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(
        std::fs::read_to_string(session.workspace().join("out.txt")).unwrap(),
        "hi\n"
    );
    let report = session.report();
    assert_eq!(
        (report.outcome, report.turns, report.result.as_str()),
        (Outcome::Succeeded, 2, "All done.")
    );
    assert!(report.usage.input_tokens > 0 && report.cost_usd.is_some(), "{report:?}");
    assert!(report.sdk_session_id.is_some());
    for part in [
        "> MARK",
        "* Bash echo hi > out.txt; cat out.txt\n  | hi\n",
        "All done.\n= done: 2 rounds in ",
    ] {
        assert!(ended.stdout.contains(part), "{part:?} in {}", ended.stdout);
    }
    session.assert_prompt_once("MARK");
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn records_are_numbered_without_a_hole_and_closed_with_their_sums() {
    let session = Session::new().await;
    session.run(&script("MARK", &[text("Done.")]), &[]).await;
    let records = session.records();
    assert!(records.iter().map(|record| record.seq).eq(1..=records.len() as u64));
    assert!(records.iter().all(|record| record.attempt == 1));
    let (last, before) = records.split_last().unwrap();
    assert_eq!(last.kind, Kind::End);
    let end: EndBody = serde_json::from_str(last.body.get()).unwrap();
    let bytes: Vec<u8> = before
        .iter()
        .flat_map(|record| serde_json::to_vec(record).unwrap())
        .collect();
    assert_eq!(end.sha256, hex::encode(Sha256::digest(&bytes)));
    assert_eq!(
        (end.outcome, end.bytes, end.last_seq),
        (Outcome::Succeeded, bytes.len() as u64, last.seq - 1)
    );
    assert_eq!(session.report().last_seq, last.seq);
    let kinds = |kind| records.iter().filter(|record| record.kind == kind).count();
    assert_eq!(kinds(Kind::User), 1);
    assert!(kinds(Kind::Usage) >= 2, "an opening and a closing");
    let live = records.iter().any(|record| record.body.get().contains("stream_event"));
    assert!(!live, "pieces of messages are not kept");
}

#[tokio::test]
async fn the_key_is_not_in_the_agents_environment_and_in_no_record() {
    let session = Session::new().await;
    let canary = "fake-canary-5d41402abc4b2a76";
    // Into files, because what the records show is redacted: the tool's own environment, and those of all above it.
    let spy = "env > seen.txt; pid=$$; while [ $pid -gt 1 ]; do cat /proc/$pid/environ >> above.txt 2>/dev/null; \
               grep -q runner /proc/$pid/comm && break; pid=$(awk '/^PPid/ {print $2}' /proc/$pid/status); done; true";
    let mut command = session.command(&script("MARK", &[bash(spy), text("Done.")]), &[]);
    let ended = crate::common::ended(command.env("GITHUB_TOKEN", canary).spawn().unwrap()).await;
    assert_eq!(ended.code, Some(0));
    for name in ["seen.txt", "above.txt"] {
        let seen = std::fs::read(session.workspace().join(name)).unwrap();
        let seen = String::from_utf8_lossy(&seen);
        assert!(seen.contains("ANTHROPIC_BASE_URL=http://127.0.0.1:"), "{seen}");
        assert!(!seen.contains(canary) && !seen.contains(FAKE_KEY), "{name}: {seen}");
    }
    let records: String = session
        .records()
        .iter()
        .map(|record| record.body.get().to_owned())
        .collect();
    assert!(!records.contains(FAKE_KEY));
}

#[tokio::test]
async fn a_key_that_the_agent_says_is_not_recorded() {
    let session = Session::new().await;
    let prompt = script("MARK", &[text(&format!("The key is {FAKE_KEY}."))]);
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    let records: String = session
        .records()
        .iter()
        .map(|record| record.body.get().to_owned())
        .collect();
    for place in [&records, &ended.stdout, &session.report().result] {
        assert!(!place.contains(FAKE_KEY), "{place}");
    }
}

#[tokio::test]
async fn a_refused_key_ends_it_at_once() {
    let session = Session::new()
        .await
        .with_key(Some("sk-ant-fake-another-one-that-is-not-known"));
    let ended = session.run(&script("MARK", &[text("Done.")]), &[]).await;
    assert_eq!(ended.code, Some(2));
    let report = session.report();
    assert_eq!(report.outcome, Outcome::InvalidCredentials);
    assert!(report.message.contains("ambient-runner-secrets"), "{}", report.message);
    // The CLI counts two, which were refused.
    assert_eq!(report.turns, 0);
    assert!(ended.stdout.contains(": 0 rounds in "), "{}", ended.stdout);
    assert!(ended.took.as_secs() < 40, "{:?}", ended.took);
}

#[tokio::test]
async fn a_model_that_a_tool_may_not_use_is_the_tools_own_matter() {
    let session = Session::new().await;
    let forbidden = asks_the_model(&script("TOOL", &[json!({ "error": { "status": 403 } })]));
    let steps = [bash(&format!("{forbidden} > told.txt")), bash("echo on"), text("Done.")];
    let ended = session.run(&script("MARK", &steps), &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Done.");
    let told = std::fs::read_to_string(session.workspace().join("told.txt")).unwrap();
    assert!(
        told.starts_with("HTTP/1.1 403") && told.contains("permission_error"),
        "{told}"
    );
}

#[tokio::test]
async fn a_credential_that_is_forbidden_the_sessions_own_model_later_ends_it() {
    let session = Session::new().await;
    let steps = [bash("echo on"), json!({ "error": { "status": 403 } })];
    let ended = session.run(&script("MARK", &steps), &[]).await;
    assert_eq!(
        (ended.code, session.report().outcome),
        (Some(2), Outcome::InvalidCredentials)
    );
}

#[tokio::test]
async fn without_a_key_nothing_is_started() {
    let session = Session::new().await.with_key(None);
    let ended = session.run(&script("MARK", &[text("Done.")]), &[]).await;
    assert_eq!(ended.code, Some(2));
    let report = session.report();
    assert_eq!(report.outcome, Outcome::NoCredentials);
    for name in protocol::names::RUNNER_SECRETS {
        assert!(report.message.contains(name), "{}", report.message);
    }
    assert!(session.model.requests().is_empty());
    assert!(session.events("cliStarted").is_empty());
}

#[tokio::test]
async fn an_overloaded_model_is_for_another_attempt() {
    let session = Session::new().await;
    let ended = session
        .run(&script("MARK", &[json!({ "error": { "status": 529 } })]), &[])
        .await;
    assert_eq!(ended.code, Some(75));
    assert_eq!(session.report().outcome, Outcome::ModelUnavailable);
    session.assert_nothing_left().await;

    // The next attempt goes on with the same conversation, when the model answers again.
    let before = session.model.requests().len();
    let ended = session.run("not used", &[]).await;
    assert_eq!(ended.code, Some(75), "the script still fails");
    let again = &session.model.requests()[before];
    assert_eq!(again.user_messages_with("MARK"), 1);
    assert_eq!(again.user_messages_with(runner::drive::CONTINUE), 1);
}

#[tokio::test]
async fn a_limited_rate_says_how_long_to_wait() {
    let session = Session::new().await;
    let step = json!({ "error": { "status": 429 }, "headers": { "retry-after": "1" } });
    let ended = session.run(&script("MARK", &[step]), &[]).await;
    assert_eq!(ended.code, Some(75));
    let report = session.report();
    assert_eq!((report.outcome, report.retry_after), (Outcome::RateLimited, Some(1)));
}

#[tokio::test]
async fn a_refusal_of_the_api_is_the_agents_error() {
    let session = Session::new().await;
    let ended = session
        .run(&script("MARK", &[json!({ "error": { "status": 400 } })]), &[])
        .await;
    assert_eq!(ended.code, Some(1));
    assert_eq!(session.report().outcome, Outcome::AgentError);
}

#[tokio::test]
async fn a_hanging_model_meets_the_timeout() {
    let session = Session::new().await;
    let ended = session
        .run(&script("MARK", &[json!({ "hang": true })]), &["--timeout", "3"])
        .await;
    assert_eq!(ended.code, Some(4));
    assert_eq!(session.report().outcome, Outcome::Timeout);
    assert!(ended.took.as_secs() >= 3, "{:?}", ended.took);
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn what_a_tool_leaves_running_ends_with_the_session() {
    let session = Session::new().await;
    let detached = "setsid nohup bash -c 'echo $$ > left.pid; exec sleep 300' >/dev/null 2>&1 & while [ ! -s left.pid ]; do :; done";
    let ended = session
        .run(&script("MARK", &[bash(detached), text("Done.")]), &[])
        .await;
    assert_eq!(ended.code, Some(0));
    assert!(session.workspace().join("left.pid").exists());
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_finished_session_is_not_worked_on_again_in_the_same_run_but_goes_on_in_the_next() {
    let session = Session::new().await;
    let prompt = script("MARK", &[text("Done."), text("Continued.")]);
    session.run(&prompt, &[]).await;
    let before = session.model.requests().len();
    let ended = session.run(&prompt, &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.model.requests().len(), before, "nothing is asked of the model");
    assert_eq!(
        (session.report().attempt, session.report().result.as_str()),
        (2, "Done.")
    );

    let ended = session.run(&prompt, &["--run", "2"]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Continued.");
    session.assert_prompt_once("MARK");
}

#[tokio::test]
async fn a_cli_that_cannot_be_started_is_a_configuration_error() {
    let session = Session::new().await;
    let ended = session.run("MARK", &["--cli", "/nowhere/claude"]).await;
    assert_eq!(ended.code, Some(2));
    let report = session.report();
    assert_eq!(report.outcome, Outcome::ConfigError);
    assert!(report.message.contains("/nowhere/claude"), "{}", report.message);
}

#[tokio::test]
async fn machines_read_records_on_stdout() {
    let session = Session::new().await;
    let mut command = session.command(&script("MARK", &[text("Done.")]), &[]);
    let ended = crate::common::ended(command.env("LOG_FORMAT", "json").spawn().unwrap()).await;
    let records = session.records();
    let lines: Vec<_> = ended.stdout.lines().collect();
    assert_eq!(lines.len(), records.len());
    assert_eq!(lines[0], serde_json::to_string(&records[0]).unwrap());
}

#[tokio::test]
async fn the_report_is_there_while_the_session_runs() {
    let session = Session::new().await;
    let child = session.start(&script("MARK", &[json!({ "text": "x", "hold": "go" })]), &[]);
    session.request(tests::model::Logged::asks_for_message).await;
    eventually("the report says that it runs", || {
        session
            .try_report()
            .is_some_and(|report| report.outcome == Outcome::Running)
    })
    .await;
    session.model.release("go");
    assert_eq!(crate::common::ended(child).await.code, Some(0));
}

#[tokio::test]
async fn a_one_shot_without_a_task_is_refused_at_once() {
    let session = Session::new().await;
    for prompt in ["", " \n\t"] {
        let ended = session.run(prompt, &[]).await;
        assert_eq!(
            (ended.code, session.report().outcome),
            (Some(2), Outcome::ConfigError),
            "{prompt:?}"
        );
        assert!(ended.stderr.contains("the prompt is empty"), "{}", ended.stderr);
    }
    assert!(session.events("cliStarted").is_empty());
}

#[tokio::test]
async fn a_path_of_the_cli_counts_from_where_the_runner_is_started() {
    let session = Session::new().await;
    let cli = xtask::claude_cli().unwrap();
    let (folder, name) = (cli.parent().unwrap(), cli.file_name().unwrap().to_str().unwrap());
    let relative = format!("./{name}");
    let mut command = session.command(&script("MARK", &[text("Done.")]), &["--cli", &relative]);
    let ended = ended(command.current_dir(folder).spawn().unwrap()).await;
    assert_eq!((ended.code, session.report().outcome), (Some(0), Outcome::Succeeded));
}

#[tokio::test]
async fn a_session_whose_folder_nobody_named_says_which_it_is_and_goes_on_there() {
    let session = Session::new().await;
    let home = session.workspace();
    std::fs::create_dir_all(&home).unwrap();
    let run = async |more: &[&str]| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_runner"));
        command
            .args(["--local", "--prompt", &script("- MARK", &[text("Done.")]), "--cli"])
            .arg(xtask::claude_cli().unwrap())
            .args(more)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", &home)
            .env("ANTHROPIC_BASE_URL", session.model.url())
            .env("ANTHROPIC_API_KEY", FAKE_KEY)
            .current_dir(&home)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true);
        ended(command.spawn().unwrap()).await
    };
    let first = run(&[]).await;
    assert_eq!(first.code, Some(0));
    let folder = first
        .stderr
        .split("kept in ")
        .nth(1)
        .and_then(|rest| rest.split(':').next());
    let asked = session.model.requests().len();
    let second = run(&["--state", folder.expect("a folder")]).await;
    assert_eq!(second.code, Some(0));
    assert_eq!(session.model.requests().len(), asked, "it is done already");
}
