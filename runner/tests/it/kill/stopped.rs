//! A session that is told to stop in mid-tool.

use futures::StreamExt as _;
use protocol::Outcome;
use runner::kill_point::{LOG, VARIABLE};
use tokio::process::Child;
use tokio::time::Duration;

use super::{PATIENCE, World, chosen, passed};
use crate::common::{Ended, bash, script, text};

#[tokio::test]
async fn told_to_stop_a_session_goes_on_the_same_wherever_its_runner_was_killed_meanwhile() {
    let world = World::stopped().await;
    let log = world.session.state().join("passed");
    let (runner, _container) = world.start(1, Some((LOG, log.to_str().unwrap())));
    let before = world.told_to_stop(&runner, &log).await;
    let whole = world.end(runner).await;
    assert_eq!(world.session.report().outcome, Outcome::Stopped, "{}", whole.stderr);
    let all: Vec<String> = passed(&log).split_off(before);
    assert!(all.iter().any(|point| point.starts_with("ended:")), "{all:?}");
    world.goes_on("nobody was killed", 2).await;
    futures::stream::iter(chosen(&all))
        .for_each_concurrent(4, async |(point, _)| {
            let world = World::stopped().await;
            let (runner, _container) = world.start(1, Some((VARIABLE, &point)));
            world.told_to_stop(&runner, &log).await;
            world.end(runner).await;
            world.goes_on(&point, 2).await;
        })
        .await;
}

impl World {
    pub(super) async fn stopped() -> Self {
        // The interrupt itself counts as an answer for the mock.
        let steps = [
            bash("touch began; [ -e go ] || sleep 100"),
            text("On."),
            text("On."),
            text("On."),
        ];
        Self::new(None, script("MARK", &steps), false).await
    }

    /// Tells the runner to stop in mid-tool; says how many points it had passed by then.
    async fn told_to_stop(&self, runner: &Child, log: &std::path::Path) -> usize {
        let began = self.session.workspace().join("began");
        let deadline = tokio::time::Instant::now() + PATIENCE;
        // It may die before.
        while !began.exists() && alive(runner) {
            assert!(tokio::time::Instant::now() < deadline, "the tool runs");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let passed = if log.exists() { passed(log).len() } else { 0 };
        std::fs::write(self.session.workspace().join("go"), "").unwrap();
        if alive(runner) {
            crate::common::signal(runner, rustix::process::Signal::TERM);
        }
        passed
    }

    async fn goes_on(&self, point: &str, attempt: u32) {
        let last = self.attempt(attempt, None).await;
        self.assert_gone_on(point, &last);
    }

    /// The turn that was cut was gone on with, once.
    pub(super) fn assert_gone_on(&self, point: &str, last: &Ended) {
        assert_eq!(last.code, Some(0), "{point}: {}{}", last.stdout, last.stderr);
        self.assert_ended(point, Outcome::Succeeded);
        assert_eq!(self.session.report().result, "On.", "{point}");
        self.session.assert_prompt_once("MARK");
        let last = self.session.model.requests().pop().unwrap();
        assert!(last.user_messages_with(runner::drive::CONTINUE) <= 1, "{point}");
    }
}

fn alive(runner: &Child) -> bool {
    let stat = runner
        .id()
        .and_then(|id| std::fs::read_to_string(format!("/proc/{id}/stat")).ok());
    stat.is_some_and(|stat| !stat.contains(") Z "))
}
