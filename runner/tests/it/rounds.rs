//! The limit of rounds, with the real CLI.

use protocol::Outcome;
use tests::model::Logged;

use crate::common::{Session, bash, ended, eventually, script, text};

fn asked(session: &Session) -> usize {
    session
        .model
        .requests()
        .iter()
        .filter(|request| request.asks_for_message())
        .count()
}

#[tokio::test]
async fn a_session_that_has_had_its_rounds_is_stopped_and_goes_on_when_it_may_have_more() {
    let session = Session::new().await;
    let steps: Vec<_> = (0..4)
        .map(|n| bash(&format!("echo {n}")))
        .chain([text("Done.")])
        .collect();
    let prompt = script("MARK", &steps);
    let first = session.run(&prompt, &["--max-turns", "2"]).await;
    assert_eq!(first.code, Some(3), "{}", first.stderr);
    let report = session.report();
    assert_eq!((report.outcome, report.turns), (Outcome::MaxTurns, 2));
    assert!(report.message.contains("maxTurns is 2"), "{}", report.message);
    // The next request may be on its way when the last tool is done.
    assert!(asked(&session) <= 3, "{}", asked(&session));
    let before = asked(&session);
    let same = session.run(&prompt, &["--max-turns", "2", "--run", "2"]).await;
    assert_eq!(
        (same.code, asked(&session)),
        (Some(3), before),
        "nothing is asked of the model"
    );
    let more = session.run(&prompt, &["--max-turns", "9", "--run", "3"]).await;
    assert_eq!(more.code, Some(0), "{}", more.stderr);
    session.assert_prompt_once("MARK");
    let last = session
        .model
        .requests()
        .into_iter()
        .rfind(Logged::asks_for_message)
        .unwrap();
    assert_eq!(last.user_messages_with(runner::drive::CONTINUE), 1);
}

#[tokio::test]
async fn a_turn_that_ends_with_the_last_round_has_succeeded() {
    let session = Session::new().await;
    let prompt = script("MARK", &[bash("echo 1"), text("Done.")]);
    let ended = session.run(&prompt, &["--max-turns", "2"]).await;
    assert_eq!((ended.code, session.report().outcome), (Some(0), Outcome::Succeeded));
}

#[tokio::test]
async fn a_limit_that_is_raised_while_the_session_runs_counts() {
    let session = Session::new().await;
    let limits = session.state().join("limits.json");
    std::fs::create_dir_all(session.state()).unwrap();
    std::fs::write(&limits, r#"{"maxTurns":1}"#).unwrap();
    let wait = "touch began; while [ ! -e go ]; do sleep 0.05; done";
    let prompt = script("MARK", &[bash(wait), text("Done.")]);
    let child = session.start(&prompt, &["--limits", limits.to_str().unwrap()]);
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    session
        .status("the limit is known and the round is counted", |status| {
            status.limits.max_turns == Some(1) && status.rounds == 1
        })
        .await;
    std::fs::write(&limits, r#"{"maxTurns":5}"#).unwrap();
    session
        .status("the new limit is known", |status| status.limits.max_turns == Some(5))
        .await;
    std::fs::write(session.workspace().join("go"), "").unwrap();
    let ended = ended(child).await;
    assert_eq!((ended.code, session.report().outcome), (Some(0), Outcome::Succeeded));
}
