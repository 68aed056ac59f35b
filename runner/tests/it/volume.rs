//! A volume that hangs, and what a runner has told by the time it is killed.

use std::io::Write as _;

use protocol::Outcome;
use runner::kill_point::{HANG, LOG, VARIABLE};
use rustix::process::Signal;
use tests::model::Logged;
use tokio::time::timeout;

use crate::common::{DEADLINE, Session, bash, ended, eventually, script, signal, text};

#[rstest::rstest]
#[case::before_the_agent_is_started("durable:1")]
#[case::in_mid_turn("durable:6")]
#[tokio::test]
async fn a_volume_that_hangs_does_not_hold_up_the_timeout(#[case] point: &str) {
    let session = Session::new().await;
    let prompt = script("MARK", &[text("Done.")]);
    let mut command = session.command(&prompt, &["--timeout", "5"]);
    let ended = ended(command.env(HANG, point).spawn().unwrap()).await;
    assert_eq!((ended.code, session.report().outcome), (Some(4), Outcome::Timeout));
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_volume_that_hangs_does_not_hold_up_a_stop() {
    let session = Session::new().await;
    let prompt = script("MARK", &[text("Done.")]);
    let child = session.command(&prompt, &[]).env(HANG, "durable:6").spawn().unwrap();
    // Its answer is held back until the disk knows that there is one.
    session.request(Logged::asks_for_message).await;
    signal(&child, Signal::TERM);
    let ended = ended(child).await;
    assert_eq!((ended.code, session.report().outcome), (Some(143), Outcome::Stopped));
    session.assert_nothing_left().await;
}

/// Transcripts are as long as the agent makes them.
#[tokio::test]
async fn a_search_of_the_transcripts_that_takes_for_ever_holds_up_no_stop() {
    let session = Session::new().await;
    let prompt = script("MARK", &[text("Done.")]);
    let killed = ended(session.command(&prompt, &[]).env(VARIABLE, "sent:1").spawn().unwrap()).await;
    assert_eq!(killed.code, None);
    session.assert_nothing_left().await;
    let log = session.state().join("passed");
    let mut command = session.command(&prompt, &[]);
    let child = command.env(HANG, "searching:1").env(LOG, &log).spawn().unwrap();
    eventually("it searches", || {
        std::fs::read_to_string(&log).is_ok_and(|passed| passed.contains("searching:1"))
    })
    .await;
    signal(&child, Signal::TERM);
    let ended = ended(child).await;
    assert_eq!((ended.code, session.report().outcome), (Some(143), Outcome::Stopped));
}

#[tokio::test]
async fn a_runner_that_is_killed_has_told_what_it_used() {
    let session = Session::new().await;
    let child = session.start(&script("MARK", &[bash("touch began; sleep 100"), text("Done.")]), &[]);
    eventually("the report tells of the first round", || {
        session
            .try_report()
            .is_some_and(|report| report.turns == 1 && report.usage.output_tokens > 0)
    })
    .await;
    signal(&child, Signal::KILL);
    assert_eq!(ended(child).await.code, None);
    let report = session.report();
    assert_eq!((report.outcome, report.turns), (Outcome::Running, 1));
    assert!(
        report.cost_usd.is_some_and(|cost| cost.0 > 0) && report.last_seq > 3,
        "{report:?}"
    );
    assert!(report.sdk_session_id.is_some());
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_prompt_that_reads_like_a_key_is_given_again_as_it_was_written() {
    let session = Session::new().await;
    let prompt = script("MARK Use Bearer abcdefghijklmnopqrst0 for it.", &[text("Done.")]);
    let killed = ended(session.command(&prompt, &[]).env(VARIABLE, "sent:1").spawn().unwrap()).await;
    assert_eq!(killed.code, None);
    session.assert_nothing_left().await;
    // Nothing is left that knows it.
    let transcripts = session.state().join("claude");
    eventually("the transcripts are gone", || {
        std::fs::remove_dir_all(&transcripts).is_ok()
    })
    .await;
    assert_eq!(session.run(&prompt, &[]).await.code, Some(0));
    session.assert_prompt_once("MARK Use Bearer abcdefghijklmnopqrst0 for it.");
    let records = format!("{:?}", session.records());
    assert!(!records.contains("abcdefghijklmnopqrst0"), "{records}");
}

#[tokio::test]
async fn a_runner_that_stands_still_in_a_read_ends_though_nobody_reads_what_it_says() {
    let session = Session::new().await;
    std::fs::create_dir_all(session.state()).unwrap();
    let (limits, fifo) = (session.state().join("limits"), session.state().join("fifo"));
    std::fs::write(&limits, "{}").unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let (_reader, mut writer) = std::io::pipe().unwrap();
    // As much as a pipe holds.
    writer.write_all(&vec![b'x'; 64 << 10]).unwrap();
    let prompt = script("MARK", &[bash("touch began; sleep 100"), text("Done.")]);
    let mut command = session.command(&prompt, &["--limits", limits.to_str().unwrap()]);
    let mut child = command.stderr(writer).spawn().unwrap();
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    std::fs::rename(&fifo, &limits).unwrap();
    let status = timeout(2 * DEADLINE, child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(75));
    let report = session.report();
    // Whether the round is counted yet when its tool begins is the CLI's affair.
    assert_eq!(report.outcome, Outcome::VolumeUnavailable, "{report:?}");
    assert!(report.message.contains("does not answer"), "{}", report.message);
    session.assert_nothing_left().await;
}
