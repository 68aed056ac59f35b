//! A conversation through the gateway.

use futures::StreamExt as _;
use protocol::Outcome;
use protocol::frame::{EndSession, GatewayFrame};
use runner::control::{Reply, Request, client};
use runner::kill_point::{LOG, VARIABLE};
use runner::status::Phase;
use tests::model::Logged;

use super::{PATIENCE, World, chosen, passed};
use crate::commands::{ask, message};
use crate::common::{Ended, bash, script, text};

impl World {
    async fn interactive() -> Self {
        let prompt = script("MARK", &[bash("sleep 0.3"), text("One."), text("One."), text("One.")]);
        Self::new(None, prompt, true).await
    }

    /// The same, while a client of the gateway says something and ends the session when it is answered.
    async fn conversation(&self, attempt: u32, says: &[&str], variable: Option<(&str, &str)>) -> Ended {
        let talking = async {
            for (at, text) in says.iter().enumerate() {
                let id = format!("c-{}", at + 1);
                let said = self.asked(&id);
                if !said {
                    ask(&self.kept, message(&id, text));
                }
                self.answered(&id).await;
            }
            if !self.asked("end") {
                ask(&self.kept, end());
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = self.attempt(attempt, variable) => ended,
            () = talking => unreachable!(),
            () = tokio::time::sleep(PATIENCE) => {
                let records: Vec<_> = self.kept.lock().unwrap().records.values().cloned().collect();
                panic!("attempt {attempt} of {variable:?} does not end: {}", records.join("\n"));
            }
        }
    }

    fn asked(&self, id: &str) -> bool {
        self.kept
            .lock()
            .unwrap()
            .commands
            .iter()
            .any(|command| crate::commands::id(command) == id)
    }

    /// A turn is over since the message was sent, and nothing waits.
    async fn answered(&self, id: &str) {
        let command = format!(r#""command":"{id}""#);
        let socket = self.session.state().join("control.sock");
        loop {
            let over = {
                let kept = self.kept.lock().unwrap();
                let last = |what: &str| kept.records.iter().rev().find(|(_, record)| record.contains(what));
                let sent = last(&command).map(|(seq, _)| *seq);
                sent.is_some() && last(r#""event":"turnEnded""#).map(|(seq, _)| *seq) > sent
            };
            if over
                && let Ok(Reply::Status(status)) = client::ask(&socket, &Request::Status).await
                && status.phase == Phase::Idle
                && status.queued == 0
            {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

fn end() -> GatewayFrame {
    GatewayFrame::EndSession(EndSession { id: "end".into() })
}

#[tokio::test]
async fn a_conversation_through_the_gateway_ends_the_same_wherever_its_runner_was_killed() {
    // Sent while the first turn runs.
    let says = ["FOLLOW"];
    let all = points_of_a_conversation(&says).await;
    assert!(all.iter().any(|point| point.starts_with("answered:")), "{all:?}");
    futures::stream::iter(chosen(&all))
        .for_each_concurrent(4, async |points| {
            let (world, name) = talked_through(&says, points).await;
            crate::resume::assert_said_once(&world.session, &name);
        })
        .await;
}

#[tokio::test]
async fn a_conversation_is_cleared_once_wherever_its_runner_was_killed() {
    let says = ["/clear", "AFTER"];
    let all = points_of_a_conversation(&says).await;
    futures::stream::iter(chosen(&all))
        .for_each_concurrent(4, async |points| {
            let (world, name) = talked_through(&says, points).await;
            let requests = world.session.model.requests();
            let asked: Vec<_> = requests.iter().filter(|request| request.asks_for_message()).collect();
            let counts = |request: &Logged| ["MARK", "AFTER"].map(|marker| request.user_messages_with(marker));
            for request in &asked {
                let [before, after] = counts(request);
                assert!(
                    before + after == 1,
                    "{name}: {before} {after} {:#?}",
                    request.messages()
                );
            }
            assert_eq!(counts(asked.last().unwrap()), [0, 1], "{name}");
        })
        .await;
}

async fn points_of_a_conversation(says: &[&str]) -> Vec<String> {
    let world = World::interactive().await;
    let log = world.session.state().join("passed");
    let whole = world.conversation(1, says, Some((LOG, log.to_str().unwrap()))).await;
    assert_eq!(whole.code, Some(0), "{}{}", whole.stdout, whole.stderr);
    world.assert_ended("nobody was killed", Outcome::EndedByRequest);
    passed(&log)
}

async fn talked_through(says: &[&str], (point, then): (String, Option<String>)) -> (World, String) {
    let world = World::interactive().await;
    let name = format!("{point}, {then:?}");
    let mut attempt = 0;
    for at in [Some(point), then].into_iter().flatten() {
        attempt += 1;
        let killed = world.conversation(attempt, says, Some((VARIABLE, &at))).await;
        assert!(
            matches!(killed.code, None | Some(0)),
            "{name}: {}{}",
            killed.stdout,
            killed.stderr
        );
    }
    let last = world.conversation(attempt + 1, says, None).await;
    assert_eq!(last.code, Some(0), "{name}: {}{}", last.stdout, last.stderr);
    world.assert_ended(&name, Outcome::EndedByRequest);
    (world, name)
}
