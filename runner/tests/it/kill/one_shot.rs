//! A one-shot with a repository, whose change is pushed at the end.

use std::collections::BTreeSet;

use futures::StreamExt as _;
use protocol::{Kind, Outcome};
use runner::kill_point::{LOG, VARIABLE};

use super::{World, chosen, is_an_attempt, passed};
use crate::common::{bash, script, text};
use crate::git::Scene;

/// The test that is an attempt where the environment says so.
pub(super) const IN_A_PROCESS: &str =
    "kill::one_shot::with_a_repository_a_gateway_and_a_trace_a_one_shot_ends_the_same_wherever_its_runner_was_killed";
/// Where something outlives the runner that the next one must know of: a bundle in the workspace, a branch that is pushed.
const ALWAYS: [&str; 2] = ["bundled:1", "pushed:1"];
const BRANCH: &str = "sessions/hello-6fa459ea";

impl World {
    async fn one_shot() -> Self {
        let scene = Scene::new().await;
        scene.server.repository("one", &[("README.md", "hello\n")]).unwrap();
        // The CLI's transcript is behind its stdout by some milliseconds; a round of a real model takes longer.
        let round = || bash("echo more > new.txt; sleep 0.3");
        // Said twice: killed between the answer and the CLI's result, the CLI is told to go on.
        let prompt = script("MARK", &[round(), round(), text("Done."), text("Done.")]);
        Self::new(Some(scene), prompt, false).await
    }

    fn assert_pushed(&self, point: &str) {
        let server = &self.scene.as_ref().unwrap().server;
        self.session.assert_prompt_once("MARK");
        let report = self.session.report();
        assert_eq!(report.result, "Done.", "{point}");
        let head = server.git("one", &["rev-parse", BRANCH]).unwrap();
        assert_eq!(
            (report.repos[0].pushed, &report.repos[0].commit),
            (true, &head),
            "{point}"
        );
        let changed = server.git(
            "one",
            &["log", "--format=", "--name-status", &format!("main..{BRANCH}")],
        );
        assert_eq!(changed.unwrap(), "A\tnew.txt", "{point}: in one commit");
        let left: Vec<_> = std::fs::read_dir(self.session.workspace())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["one"], "{point}: nothing of ours is left in the workspace");
    }
}

#[tokio::test]
async fn with_a_repository_a_gateway_and_a_trace_a_one_shot_ends_the_same_wherever_its_runner_was_killed() {
    if is_an_attempt().await {
        return;
    }
    let world = World::one_shot().await;
    let log = world.session.state().join("passed");
    let whole = world.attempt(1, Some((LOG, log.to_str().unwrap()))).await;
    assert_eq!(whole.code, Some(0), "{}{}", whole.stdout, whole.stderr);
    let all = passed(&log);
    let places: BTreeSet<_> = all.iter().map(|point| point.split(':').next().unwrap()).collect();
    for place in [
        "fence",
        "lease-renamed",
        "segment",
        "durable",
        "hello",
        "records",
        "acked",
        "forward",
        "opened",
        "sent",
        "placed",
        "marked",
        "bundled",
        "taken",
        "pushing",
        "pushed",
        "push-known",
        "ended",
        "traced",
        "report",
        "released",
    ] {
        assert!(places.contains(place), "{place}: {places:?}");
    }
    world.assert_ended("nobody was killed", Outcome::Succeeded);
    world.assert_pushed("nobody was killed");
    let always = ALWAYS.map(|point| (point.to_owned(), None));
    futures::stream::iter(always.into_iter().chain(chosen(&all)))
        .for_each_concurrent(4, one_shot_killed_at)
        .await;
}

async fn one_shot_killed_at((point, then): (String, Option<String>)) {
    let world = World::one_shot().await;
    let name = format!("{point}, {then:?}");
    let mut attempt = 0;
    for at in [Some(point), then].into_iter().flatten() {
        attempt += 1;
        let killed = world.attempt(attempt, Some((VARIABLE, &at))).await;
        // Not every attempt passes everywhere.
        assert!(
            matches!(killed.code, None | Some(0)),
            "{name}: {}{}",
            killed.stdout,
            killed.stderr
        );
    }
    let over = world
        .session
        .bodies(Kind::Cli)
        .iter()
        .any(|line| line["type"] == "result");
    let asked = world.session.model.requests().len();
    let last = world.attempt(attempt + 1, None).await;
    assert_eq!(last.code, Some(0), "{name}: {}{}", last.stdout, last.stderr);
    world.assert_ended(&name, Outcome::Succeeded);
    world.assert_pushed(&name);
    if over {
        let now = world.session.model.requests().len();
        assert_eq!(now, asked, "{name}: nothing is asked of the model again");
    }
}
