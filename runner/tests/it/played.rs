//! CLIs that are none: scripts that say what the real one says at moments that are hard to meet.

use std::os::unix::fs::PermissionsExt as _;

use protocol::{Kind, Outcome};
use runner::control::{Reply, Request};
use runner::status::Phase;
use serde_json::json;

use crate::common::{Session, ended, eventually};

/// What they have in common.
const WORDS: &str = r#"#!/bin/bash
state() { echo '{"type":"system","subtype":"session_state_changed","state":"'$1'"}'; }
result() { echo '{"type":"result","subtype":"success","is_error":'$2',"terminal_reason":"'$1'","result":"'$1'","num_turns":1,"user_message_uuids":["'$3'"]}'; }
uuid() { [[ $1 =~ \"uuid\":\"([^\"]*)\" ]]; echo "${BASH_REMATCH[1]}"; }
"#;

/// Its answer to an interrupt comes in one piece with all of the next turn.
const AT_ONCE: &str = r#"
while read -r line; do case "$line" in
  *MARK*) first=$(uuid "$line"); state running ;;
  *QUEUED*) second=$(uuid "$line") ;;
  *interrupt*) all=$(result aborted_streaming true $first; state running
    echo '{"type":"command_lifecycle","command_uuid":"'$second'","state":"started"}'
    result completed false $second; state idle); echo "$all" ;;
esac; done
"#;

/// A sub-agent goes on behind the first result.
const BEHIND: &str = r#"
while read -r line; do case "$line" in
  *MARK*) first=$(uuid "$line"); state running; result completed false $first ;;
  *interrupt*) result aborted_tools true $first; state idle ;;
esac; done
"#;

/// The same, and it does not heed an interrupt then: the real one does not.
const DEAF: &str = r#"
while read -r line; do case "$line" in
  *MARK*) state running; result completed false $(uuid "$line") ;;
esac; done
"#;

/// Dies in mid-turn, and in its second life reads all that it is told.
const DIES: &str = r#"
cd "${0%/*}"
read -r line; state running
if [ ! -e died ]; then
    while [ ! -e die ]; do sleep 0.05; done
    touch died; kill -9 $$
fi
exec cat > told
"#;

/// The path of a CLI that is none.
fn played(session: &Session, script: &str) -> String {
    std::fs::create_dir_all(session.state()).unwrap();
    let cli = session.state().join("cli");
    std::fs::write(&cli, WORDS.to_owned() + script).unwrap();
    std::fs::set_permissions(&cli, std::fs::Permissions::from_mode(0o755)).unwrap();
    cli.display().to_string()
}

#[rstest::rstest]
#[case::heeded(BEHIND)]
#[case::not_heeded(DEAF)]
#[tokio::test]
async fn an_interrupt_behind_a_first_result_stops_the_turn_and_does_not_complete_it(#[case] cli: &str) {
    let session = Session::new().await;
    let child = session.start("MARK", &["--cli", &played(&session, cli)]);
    let results = || {
        session
            .bodies(Kind::Cli)
            .iter()
            .filter(|line| line["type"] == "result")
            .count()
    };
    eventually("the first result is there", || results() == 1).await;
    let reply = session.ask(&Request::Interrupt { turn: Some(1) }).await;
    assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
    assert_eq!(ended(child).await.code, Some(0));
    let report = session.report();
    assert_eq!(
        (report.outcome, &*report.message),
        (Outcome::StoppedByUser, "the turn was interrupted")
    );
}

/// What waits for a CLI is said to the next one all at once.
#[tokio::test]
async fn messages_that_nobody_could_be_told_again_are_refused_and_the_others_reach_the_next_cli() {
    let session = Session::new().await;
    let child = session.start("MARK", &["--interactive", "--cli", &played(&session, DIES)]);
    session
        .status("it works", |status| status.phase == Phase::Working)
        .await;
    let mut refusals = Vec::new();
    for letter in ["a", "b", "c", "d"] {
        let request = Request::Send {
            text: letter.repeat(5 << 20),
            id: Some(format!("c-{letter}")),
        };
        if let Reply::Refused(why) = session.ask(&request).await {
            refusals.push(why);
        }
    }
    let file = |name: &str| session.state().join(name);
    std::fs::write(file("die"), "").unwrap();
    let told = || std::fs::metadata(file("told")).map_or(0, |told| told.len());
    eventually("it was told again", || told() > 10 << 20).await;
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    assert_eq!(session.report().outcome, Outcome::EndedByRequest);
    assert_eq!(refusals.len(), 2, "{refusals:?}");
    assert!(refusals[0].contains("wait for the agent"), "{refusals:?}");
    assert_eq!(session.events("agentRestarted").len(), 1);
}

#[tokio::test]
async fn a_turn_that_begins_in_one_piece_with_the_end_of_the_last_is_a_turn_of_its_own() {
    let session = Session::new().await;
    let child = session.start("MARK", &["--interactive", "--cli", &played(&session, AT_ONCE)]);
    session
        .status("it works", |status| status.phase == Phase::Working && status.turn == 1)
        .await;
    session.send("QUEUED").await;
    session.ask(&Request::Interrupt { turn: None }).await;
    session.idle(2).await;
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    let turns: Vec<_> = session
        .events("turnEnded")
        .iter()
        .map(|event| (event["turn"].clone(), event["outcome"].clone()))
        .collect();
    assert_eq!(
        turns,
        [(json!(1), json!("stoppedByUser")), (json!(2), json!("succeeded"))]
    );
}
