//! A machine whose clock steps by hours.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use crds::Phase;
use jiff::{SignedDuration, Timestamp};
use kube::Client;
use operator::{Clock, Counted};
use protocol::Outcome;
use serde_json::json;

use crate::{
    plane::operator_config,
    world::{World, report, until},
};

const HOURS: i64 = 2 * 3_600;

/// An operator on a machine whose clock is this far ahead.
async fn start_by(world: &mut World, ahead: Arc<AtomicI64>) {
    let client = Client::try_from(operator_config(&world.namespace).await).unwrap();
    let clock = Clock::by(move || Timestamp::now() + SignedDuration::from_secs(ahead.load(Ordering::SeqCst)));
    world.start_operator_with(Counted::around(client, clock));
}

async fn clock_ahead(world: &World) -> Option<i64> {
    let (_, page) = world.page("/metrics").await?;
    let value = page
        .lines()
        .find_map(|line| line.strip_prefix("agentic_operator_clock_ahead_seconds "))?;
    value.trim().parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_steps_ahead_stops_gives_up_and_deletes_nothing() {
    let mut world = World::without_operator("clock-ahead").await;
    world.timing.retry_first_wait = 1;
    let ahead = Arc::new(AtomicI64::new(0));
    start_by(&mut world, ahead.clone()).await;
    let hour = json!({"prompt": "write", "timeout": 3_600, "ttlSecondsAfterFinished": 3_600});
    for name in ["runs", "ended", "waits", "tries"] {
        world.create(name, hour.clone()).await;
    }
    let ended = world.pod("ended", 1).await;
    world.start(&ended).await;
    world.end(&ended, 3, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("ended", Phase::Completed).await;
    let runs = world.pod("runs", 1).await;
    world.start(&runs).await;
    world.phase("runs", Phase::Running).await;
    world.phase("waits", Phase::Creating).await;
    let tries = world.pod("tries", 1).await;
    world.start(&tries).await;
    world.phase("tries", Phase::Running).await;

    ahead.store(HOURS, Ordering::SeqCst);
    until("the step to be known", async || {
        clock_ahead(&world).await.filter(|ahead| *ahead > HOURS - 60)
    })
    .await;
    world.end(&tries, 3, Some(&report(Outcome::ModelUnavailable, 1))).await;
    let again = world
        .status_when("tries", |s| s.next_attempt_time.is_some() || s.attempt == Some(2))
        .await;
    if let Some(at) = again.next_attempt_time {
        let wait = at.0.duration_since(Timestamp::now()).as_secs();
        assert!(wait < 600, "the next attempt waits {wait} s");
    }
    for name in ["runs", "ended", "waits"] {
        world.patch(name, json!({"spec": {"displayName": "looked at"}})).await;
        let seen = world.status_when(name, |s| s.observed_generation == Some(2)).await;
        let phase = match name {
            "runs" => Phase::Running,
            "ended" => Phase::Completed,
            _ => Phase::Creating,
        };
        assert_eq!(seen.phase, phase, "{name}: {seen:#?}");
    }
    assert!(
        world.jobs().get_opt("ended-job").await.unwrap().is_some(),
        "kept for an hour"
    );

    ahead.store(0, Ordering::SeqCst);
    until("the clocks to agree", async || {
        clock_ahead(&world).await.filter(|ahead| *ahead < 60)
    })
    .await;
    world.end(&runs, 3, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("runs", Phase::Completed).await;
    let second = world.pod("tries", 2).await;
    world.start(&second).await;
    world.end(&second, 3, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world.phase("tries", Phase::Completed).await;
    assert!(done.running_seconds.unwrap() < 600, "{done:#?}");
    let ended = world.sessions().get_opt("ended").await.unwrap();
    assert!(ended.is_some(), "its time to live is an hour");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_behind_dates_nothing() {
    let mut world = World::without_operator("clock-behind").await;
    start_by(&mut world, Arc::new(AtomicI64::new(-HOURS))).await;
    let before = Timestamp::now() - SignedDuration::from_mins(2);
    world.create("poem", json!({"prompt": "write", "timeout": 60})).await;
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    let running = world.phase("poem", Phase::Running).await;
    let admitted = running
        .conditions
        .iter()
        .find(|c| c.type_ == crds::condition::ADMITTED)
        .unwrap();
    assert!(admitted.last_transition_time.0 > before, "{admitted:?}");
    world.end(&pod, 3, Some(&report(Outcome::Succeeded, 1))).await;
    let done = world.phase("poem", Phase::Completed).await;
    assert!(done.completion_time.unwrap().0 > before);
    assert_eq!(done.running_seconds, Some(3));
}
