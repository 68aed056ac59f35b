//! Memory beside the truth: watches tell it late, each at its own pace, and sometimes only by a new list.

mod news;
mod world;

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::{BEHIND, Look, SAFETY};
use world::{Happening, NAME, NAMESPACE, World, happenings};

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn what_is_known_has_our_own_writes_and_becomes_the_truth(happenings in happenings()) {
        let mut world = World::default();
        prop_assert!(world.look().is_none(), "nothing is known before the first lists");
        (0..3).for_each(|kind| world.list(kind, None));
        let mut left = 0;
        for happening in happenings {
            world.happen(happening);
            world.check()?;
            left = world.memory.remains().last().map_or(left, |(_, count)| *count);
        }
        // The last write of all: a Job that went before any watch told of it is not waited for after it.
        world.written(json!(9), Vec::new());
        world.tell_all();
        world.check()?;
        left = world.memory.remains().last().map_or(left, |(_, count)| *count);
        prop_assert_eq!(left, world.left());
        match world.session() {
            None => prop_assert!(world.look().is_none()),
            Some(session) => {
                let known = world.look();
                prop_assert!(known.is_some(), "all is told, and the session is not known");
                let known = known.unwrap();
                prop_assert_eq!(known.session.metadata.resource_version.as_deref(), session["metadata"]["resourceVersion"].as_str());
                let mut jobs: Vec<_> = known.jobs.iter().map(|job| format!("{} ", job.uid)).collect();
                let mut pods: Vec<_> = known.pods.iter().map(|(_, pod)| format!("{} {}", pod.uid, pod.message)).collect();
                jobs.sort();
                pods.sort();
                prop_assert_eq!(jobs, world.truth(1));
                prop_assert_eq!(pods, world.truth(2));
            }
        }
        for kind in 0..3 {
            for name in world.there[kind].keys().cloned().collect::<Vec<_>>() {
                world.take(kind, &name);
            }
        }
        world.tell_all();
        prop_assert_eq!(world.memory.size(), 0, "of what is gone nothing is kept");
        prop_assert!(world.memory.remains().last().is_none_or(|(_, count)| *count == 0));
    }
}

/// A session that is there, and whose watches have told everything.
fn world() -> World {
    let mut world = World::default();
    world.happen(Happening::Made);
    (0..3).for_each(|kind| world.list(kind, None));
    world
}

#[tokio::test(start_paused = true)]
async fn watches_that_stay_behind_are_neither_waited_for_nor_believed() {
    let mut world = world();
    assert!(world.look().is_some());
    world.happen(Happening::JobMade { dies: false });
    assert!(matches!(world.memory.look(NAMESPACE, NAME), Look::Behind));
    tokio::time::advance(BEHIND).await;
    for _ in 0..2 {
        assert!(matches!(world.memory.look(NAMESPACE, NAME), Look::Unknown));
        world.memory.checked(NAMESPACE, NAME);
    }
    world.happen(Happening::Told(0, 9));
    assert!(world.look().is_none(), "the Job is not told of");
    world.happen(Happening::Told(1, 9));
    assert_eq!(world.look().unwrap().jobs.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_list_asked_for_after_our_write_ends_the_wait_for_a_job_that_is_gone() {
    let mut world = world();
    world.happen(Happening::JobMade { dies: false });
    world.happen(Happening::JobGone);
    world.happen(Happening::Told(0, 9));
    assert!(world.look().is_none());
    tokio::time::advance(Duration::from_millis(1)).await;
    world.list(1, None);
    assert!(world.look().unwrap().jobs.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_not_over_is_read_live_now_and_then() {
    let mut world = world();
    world.memory.checked(NAMESPACE, NAME);
    tokio::time::advance(SAFETY).await;
    assert!(matches!(world.memory.look(NAMESPACE, NAME), Look::Unknown));
    world.memory.checked(NAMESPACE, NAME);
    assert!(world.look().is_some());
    world.change_session("phase", json!("Completed"));
    world.tell_all();
    tokio::time::advance(SAFETY).await;
    assert!(world.look().is_some(), "an ended one is not");
}

#[tokio::test(start_paused = true)]
async fn why_something_is_silent_is_asked_ever_more_seldom_and_anew_after_an_answer() {
    let world = world();
    let asks = async |seconds: u64| {
        tokio::time::advance(Duration::from_secs(seconds)).await;
        world.memory.ask(NAMESPACE, NAME)
    };
    assert_eq!([asks(0).await, asks(3).await, asks(5).await], [true, false, true]);
    assert_eq!([asks(8).await, asks(8).await, asks(16).await], [false, true, false]);
    world.memory.answered(NAMESPACE, NAME);
    assert!(asks(0).await);
}

#[test]
fn a_session_is_newborn_only_when_its_beginning_was_seen_and_nothing_was_done() {
    let mut world = World::default();
    (0..3).for_each(|kind| world.list(kind, None));
    world.happen(Happening::Made);
    world.tell_all();
    assert!(world.look().unwrap().newborn);
    world.list(0, None);
    assert!(world.look().unwrap().newborn, "a list says nothing against it");
    world.change_session("reason", json!("Queued"));
    world.tell_all();
    assert!(!world.look().unwrap().newborn);

    let mut found = World::default();
    found.happen(Happening::Made);
    (0..3).for_each(|kind| found.list(kind, None));
    assert!(!found.look().unwrap().newborn, "a predecessor may have begun it");
}

#[test]
fn long_texts_are_not_kept_and_a_result_is_known_to_be_missing() {
    let mut world = world();
    assert!(!world.look().unwrap().cut);
    world.change_session("result", json!("five, seven, five"));
    world.tell_all();
    let known = world.look().unwrap();
    assert!(known.cut);
    assert_eq!(known.session.status.unwrap().result, None);
    assert_ne!(known.session.spec.prompt.as_deref(), Some("a haiku"));
}
