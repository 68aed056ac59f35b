//! An agent that means harm: what runs in its container floods, kills and lies. The runner goes on, and ends in time.

use protocol::Outcome;
use rustix::process::Signal;
use serde_json::Value;

use crate::common::{Session, bash, ended, eventually, script, signal, text};

/// Written to the CLI's stdout again and again by something that outlives the CLI.
const QUESTION: &str = r#"{"type":"control_request","request_id":"","request":{"subtype":""}}"#;

/// A tool call that starts the flood of questions, and then does this; when it is run again it just takes long.
fn flood(then: &str) -> Value {
    bash(&format!(
        "if [ -e flood.pid ]; then touch again; sleep 100; fi; cli=$PPID; setsid bash -c 'echo $$ > flood.pid; exec yes '\"'\"'{QUESTION}'\"'\"' > /proc/'$cli'/fd/1' \
         >/dev/null 2>&1 </dev/null & while [ ! -s flood.pid ]; do :; done; {then}"
    ))
}

fn flood_runs(session: &Session) -> bool {
    std::fs::read_to_string(session.workspace().join("flood.pid"))
        .ok()
        .is_some_and(|pid| !pid.trim().is_empty())
}

#[tokio::test]
async fn a_flood_of_questions_does_not_hold_up_the_timeout() {
    let session = Session::new().await;
    let child = session.start(&script("MARK", &[flood("sleep 100")]), &["--timeout", "6"]);
    let ended = ended(child).await;
    assert!(flood_runs(&session), "there was a flood");
    assert_eq!((ended.code, session.report().outcome), (Some(4), Outcome::Timeout));
    session.assert_nothing_left().await;
}

#[tokio::test]
async fn a_flood_that_outlives_the_cli_does_not_hold_up_the_timeout() {
    let session = Session::new().await;
    let steps = [flood("sleep 0.3; kill -9 $cli; sleep 100"), text("Done.")];
    let ended = ended(session.start(&script("MARK", &steps), &["--timeout", "8"])).await;
    assert!(flood_runs(&session), "there was a flood");
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
