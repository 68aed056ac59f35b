//! What the CLI does in a session's life, with the real one: tools that work and fail, shells in the background, an API
//! that fails for a while, answers that break off.

use protocol::{Kind, Outcome};
use rstest::rstest;
use runner::control::Request;
use serde_json::{Value, json};
use tests::model::Logged;

use crate::common::{Session, bash, ended, script, text};

/// Results of tools, as the CLI tells them: whether each failed, and what it said.
fn tool_results(session: &Session) -> Vec<(bool, String)> {
    let lines = session.bodies(Kind::Cli);
    let blocks = lines.iter().filter(|line| line["type"] == "user");
    let blocks = blocks.flat_map(|line| line["message"]["content"].as_array().cloned().unwrap_or_default());
    let results = blocks.filter(|block| block["type"] == "tool_result");
    results
        .map(|block| (block["is_error"] == true, block["content"].to_string()))
        .collect()
}

#[tokio::test]
async fn two_turns_with_tools_of_which_one_fails() {
    let session = Session::new().await;
    let first = script(
        "MARK",
        &[
            bash("echo one > made"),
            bash("echo broken >&2; exit 3"),
            text("It failed."),
        ],
    );
    let child = session.start(&first, &["--interactive"]);
    session.idle(1).await;
    session
        .send(&script("NEXT", &[bash("cat made"), text("It is there.")]))
        .await;
    let status = session.idle(2).await;
    assert_eq!(status.rounds, 5);
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    let results = tool_results(&session);
    let failed: Vec<bool> = results.iter().map(|(failed, _)| *failed).collect();
    assert_eq!(failed, [false, true, false], "{results:?}");
    assert!(
        results[1].1.contains("broken") && results[1].1.contains('3'),
        "{results:?}"
    );
    assert!(results[2].1.contains("one"), "{results:?}");
    let report = session.report();
    assert_eq!((report.turns, report.result.as_str()), (5, "It is there."));
}

#[tokio::test]
async fn a_shell_in_the_background_is_waited_for_and_its_end_is_heard() {
    let session = Session::new().await;
    let shell = json!({ "tools": [{ "name": "Bash", "input": {
        "command": "sleep 1; echo late > late.txt", "description": "t", "run_in_background": true,
    } }] });
    let ended = session
        .run(&script("MARK", &[shell, text("Started."), text("Heard.")]), &[])
        .await;
    assert_eq!(ended.code, Some(0));
    let late = std::fs::read_to_string(session.workspace().join("late.txt")).unwrap();
    assert_eq!((late.as_str(), session.report().result.as_str()), ("late\n", "Heard."));
    session.assert_nothing_left().await;
}

/// How often the model was asked for a message, and how many responses were metered to their end and by an estimate.
fn asked_and_metered(session: &Session) -> (usize, usize, usize) {
    let requests = session.model.requests();
    let asked = requests
        .iter()
        .filter(|request| Logged::asks_for_message(request))
        .count();
    let usage = session.bodies(Kind::Usage);
    let closed = |estimated: bool| {
        let of = |body: &&Value| body["open"] != true && (body["estimated"] == true) == estimated;
        usage.iter().filter(of).count()
    };
    (asked, closed(false), closed(true))
}

#[rstest]
#[case::rate_limit(json!({ "error": { "status": 429, "times": 1 }, "headers": { "retry-after": "0" } }))]
#[case::internal_error(json!({ "error": { "status": 500, "times": 1 } }))]
#[case::overloaded(json!({ "error": { "status": 529, "times": 1 } }))]
#[tokio::test]
async fn an_api_that_fails_once_is_asked_again(#[case] mut step: Value) {
    let session = Session::new().await;
    step["text"] = "Done.".into();
    let ended = session.run(&script("MARK", &[step]), &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Done.");
    assert_eq!(asked_and_metered(&session), (2, 1, 0), "a failure costs nothing");
    session.assert_prompt_once("MARK");
}

#[tokio::test]
async fn an_api_that_is_broken_is_for_another_attempt() {
    let session = Session::new().await;
    let ended = session
        .run(&script("MARK", &[json!({ "error": { "status": 500 } })]), &[])
        .await;
    assert_eq!(ended.code, Some(75));
    let report = session.report();
    assert_eq!(report.outcome, Outcome::ModelUnavailable);
    assert!(report.cost_usd.is_none_or(|cost| cost == protocol::NanoUsd::default()));
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_asked_for_again_and_metered_by_an_estimate() {
    let session = Session::new().await;
    let cut = json!({ "text": "Done, with a text of some length.", "cut": { "times": 1 } });
    let ended = session.run(&script("MARK", &[cut]), &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Done, with a text of some length.");
    assert_eq!(asked_and_metered(&session), (2, 1, 1));
    session.assert_prompt_once("MARK");
}

#[tokio::test]
async fn an_error_in_the_middle_of_an_answer_is_for_another_try() {
    let session = Session::new().await;
    let broken = json!({ "text": "Done.", "sse_error": { "type": "overloaded_error", "times": 1 } });
    let ended = session.run(&script("MARK", &[broken]), &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Done.");
    let (asked, metered, _) = asked_and_metered(&session);
    assert!(asked == 2 && metered >= 1, "{asked} {metered}");
}

/// Without the setting that leaves it out, the CLI first asks a host of its maker whether the address may be fetched.
#[tokio::test]
async fn a_page_is_fetched_without_asking_anybody_whether_it_may_be() {
    let session = Session::new().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/page", listener.local_addr().unwrap());
    let fetched = tokio::spawn(async move {
        use tokio::io::AsyncReadExt as _;
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut first = [0; 2];
        stream.read_exact(&mut first).await.unwrap();
        first
    });
    let fetch = json!({ "tools": [{ "name": "WebFetch", "input": { "url": url, "prompt": "What does it say?" } }] });
    let ended = session.run(&script("MARK", &[fetch, text("Done.")]), &[]).await;
    assert_eq!(ended.code, Some(0));
    assert_eq!(session.report().result, "Done.");
    // There is no page behind it, which the model is told; that it was asked for is what counts.
    assert_eq!(fetched.await.unwrap(), [0x16, 0x03], "the beginning of TLS");
    let results = tool_results(&session);
    assert!(results.len() == 1 && results[0].0, "{results:?}");
    assert!(!results[0].1.contains("verify"), "{results:?}");
}
