//! Whom news concern, and what is answered to those who ask about more than one session.

use futures::FutureExt as _;
use protocol::names::label;
use rstest::rstest;
use serde_json::{Value, json};

use super::world::{Happening, NAME, NAMESPACE, World, job_name, read};
use crate::session::memory::{Key, Look, Memory, told::Told};

fn key() -> Key {
    (NAMESPACE.to_owned(), NAME.to_owned())
}

fn job_told(memory: &Memory, told: Told, job: Option<Value>) -> Vec<Key> {
    memory.job_event(told.about(job.map(read)))
}

fn pod_told(memory: &Memory, told: Told, pod: Option<Value>) -> Vec<Key> {
    memory.pod_event(told.about(pod.map(read)))
}

/// A session that is there, of which all is told.
fn world() -> World {
    let mut world = World::default();
    world.happen(Happening::Made);
    (0..3).for_each(|kind| world.list(kind, None));
    world
}

/// The same with a Job and its pod, of which nothing is told yet.
fn world_with_children() -> (World, Value, Value) {
    let mut world = world();
    world.happen(Happening::JobMade { dies: true });
    world.happen(Happening::PodMade);
    let job = world.there[1].values().next().unwrap().clone();
    let pod = world.there[2].values().next().unwrap().clone();
    (world, job, pod)
}

#[test]
fn news_of_children_concern_their_session_and_what_is_known_already_nobody() {
    let (world, job, pod) = world_with_children();
    let memory = &world.memory;
    for _ in 0..2 {
        for (told, concerned) in [
            (Told::Apply, vec![key()]),
            (Told::Apply, vec![]),
            (Told::Delete, vec![key()]),
            (Told::Delete, vec![]),
        ] {
            assert_eq!(job_told(memory, told, Some(job.clone())), concerned);
            assert_eq!(pod_told(memory, told, Some(pod.clone())), concerned);
        }
    }
    let none = World::default().memory;
    assert_eq!(job_told(&none, Told::Apply, Some(job)), [], "there is no such session");
    assert_eq!(pod_told(&none, Told::Apply, Some(pod)), []);
}

#[test]
fn a_child_that_went_while_nobody_watched_concerns_its_session_and_nothing_is_kept_of_it() {
    let (world, job, pod) = world_with_children();
    let memory = &world.memory;
    let size = memory.size();
    job_told(memory, Told::Apply, Some(job.clone()));
    job_told(memory, Told::Init, None);
    job_told(memory, Told::InitApply, Some(job));
    assert_eq!(job_told(memory, Told::InitDone, None), [], "it is there");
    job_told(memory, Told::Init, None);
    assert_eq!(job_told(memory, Told::InitDone, None), [key()]);
    pod_told(memory, Told::Apply, Some(pod));
    pod_told(memory, Told::Init, None);
    assert_eq!(pod_told(memory, Told::InitDone, None), [key()]);
    assert_eq!(memory.size(), size);
}

#[test]
fn a_pod_whose_job_was_taken_away_concerns_its_session_whatever_it_goes_through_and_anothers_does_not() {
    let (world, _, mut pod) = world_with_children();
    let memory = &world.memory;
    pod["metadata"]["ownerReferences"][0]["kind"] = json!("ReplicaSet");
    assert_eq!(pod_told(memory, Told::Apply, Some(pod.clone())), []);
    pod["metadata"]["ownerReferences"] = json!([]);
    assert_eq!(pod_told(memory, Told::Apply, Some(pod.clone())), [key()]);
    assert_eq!(pod_told(memory, Told::Apply, Some(pod.clone())), [key()]);
    assert_eq!(pod_told(memory, Told::Delete, Some(pod)), []);
}

#[test]
fn a_session_with_a_pod_that_nothing_controls_is_read_live_until_that_is_done_with() {
    let (world, _, mut pod) = world_with_children();
    let memory = &world.memory;
    let size = memory.size();
    pod["metadata"]["labels"][label::MANAGED_BY] = json!(label::MANAGER);
    let mut known = |told: Told, at: &str, value: Value| {
        *pod.pointer_mut(at).unwrap() = value;
        pod_told(memory, told, Some(pod.clone()));
        world.look().is_some()
    };
    assert!(known(Told::Apply, "/spec", json!({})));
    assert!(!known(Told::Apply, "/metadata/ownerReferences", json!([])));
    assert!(known(Told::Apply, "/status", json!({"phase": "Failed"})));
    assert!(!known(Told::Apply, "/status", json!({})));
    assert!(known(Told::Delete, "/spec", json!({})));
    assert_eq!(memory.size(), size);
    assert!(!known(Told::Apply, "/spec", json!({})));
    pod_told(memory, Told::Init, None);
    assert_eq!(pod_told(memory, Told::InitDone, None), [key()]);
    assert!(world.look().is_some() && memory.size() == size);
}

#[test]
fn that_a_job_was_made_is_known_when_it_is_gone() {
    let (world, job, _) = world_with_children();
    assert!(!world.look().unwrap().begun);
    let uid = job["metadata"]["labels"][label::SESSION_UID].as_str().unwrap();
    world.memory.wrote(NAMESPACE, NAME, uid, None, vec![job_name(1)]);
    for told in [Told::Apply, Told::Delete] {
        job_told(&world.memory, told, Some(job.clone()));
    }
    let known = world.look().unwrap();
    assert!(known.begun && known.jobs.is_empty());
}

#[test]
fn a_job_of_ours_that_went_before_it_was_shown_is_not_waited_for() {
    let (mut world, job, _) = world_with_children();
    let wait = |world: &World| matches!(world.memory.look(NAMESPACE, NAME), Look::Behind);
    world.written(json!(1), vec![job_name(1)]);
    world.happen(Happening::Told(0, 9));
    assert!(wait(&world));
    assert_eq!(job_told(&world.memory, Told::Delete, Some(job)), [key()]);
    assert!(!wait(&world));
}

#[test]
fn a_job_that_was_shown_before_the_answer_to_its_making_is_not_waited_for() {
    let (mut world, job, _) = world_with_children();
    job_told(&world.memory, Told::Apply, Some(job));
    world.written(json!(1), vec![job_name(1)]);
    world.happen(Happening::Told(0, 9));
    assert!(matches!(world.memory.look(NAMESPACE, NAME), Look::Known(_)));
}

#[rstest]
#[case::at_work(json!({}), json!({}), 1)]
#[case::finished(json!({}), json!({"conditions": [{"type": "Complete", "status": "True"}]}), 0)]
#[case::held_back(json!({"suspend": true}), json!({}), 0)]
fn of_sessions_that_are_gone_those_jobs_have_places_that_may_work(
    #[case] spec: Value,
    #[case] status: Value,
    #[case] expected: usize,
) {
    let (_, mut job, _) = world_with_children();
    (job["spec"], job["status"]) = (spec, status);
    let mut drain = job.clone();
    (drain["metadata"]["name"], drain["metadata"]["uid"]) = (json!(format!("{NAME}-drain-1")), json!("drain"));
    let memory = Memory::default();
    job_told(&memory, Told::Init, None);
    job_told(&memory, Told::InitApply, Some(job));
    job_told(&memory, Told::InitApply, Some(drain));
    job_told(&memory, Told::InitDone, None);
    pod_told(&memory, Told::Init, None);
    pod_told(&memory, Told::InitDone, None);
    assert_eq!(
        (memory.remains(), memory.orphans()),
        (vec![], vec![]),
        "their session may be there"
    );
    memory.session_event(Told::Init.about(None));
    memory.session_event(Told::InitDone.about(None));
    let left: usize = memory.remains().iter().map(|(_, count)| count).sum();
    assert_eq!((left, memory.orphans().len()), (expected, 2));
}

#[tokio::test(start_paused = true)]
async fn the_first_lists_are_waited_for_until_all_are_complete_or_patience_ends() {
    let mut world = World::default();
    world.happen(Happening::Made);
    for kind in 0..3 {
        assert!(!world.memory.is_listed());
        let mut waiting = Box::pin(world.memory.listed(std::time::Duration::from_secs(9)));
        assert!(waiting.as_mut().now_or_never().is_none());
        tokio::time::advance(std::time::Duration::from_secs(9)).await;
        assert!(waiting.now_or_never().is_some(), "that is long enough");
        world.list(kind, None);
    }
    assert!(world.memory.is_listed());
    assert!(world.memory.listed(std::time::Duration::MAX).now_or_never().is_some());
}

#[tokio::test(start_paused = true)]
async fn what_is_asked_about_all_sessions_and_of_one_by_its_name_is_as_the_watches_have_told() {
    let mut world = World::default();
    (0..3).for_each(|kind| world.list(kind, None));
    let memory = |world: &World| {
        let memory = &world.memory;
        let namespaces: Vec<_> = memory.occupied().into_iter().collect();
        let phases: Vec<_> = memory.phases().into_iter().collect();
        (
            namespaces.join(" "),
            phases,
            memory.has(NAMESPACE, NAME),
            memory.uid(NAMESPACE, NAME),
            memory.is_new(&key()),
            memory.age(NAMESPACE, NAME).map(|age| age.as_secs()),
        )
    };
    let nothing = (String::new(), vec![], false, None, false, None);
    assert_eq!(memory(&world), nothing);
    world.happen(Happening::Made);
    world.tell_all();
    tokio::time::advance(std::time::Duration::from_secs(3)).await;
    let uid = world.session_uid();
    let poets = NAMESPACE.to_owned();
    assert_eq!(
        memory(&world),
        (poets.clone(), vec![("Pending", 1)], true, uid.clone(), true, Some(3))
    );
    // Made, and not told of by any status.
    world.happen(Happening::JobMade { dies: true });
    world.tell_all();
    assert_eq!(
        memory(&world),
        (poets.clone(), vec![("Pending", 1)], true, uid.clone(), false, Some(3))
    );
    world.change_session("phase", json!("Running"));
    world.change_session("run", json!(1));
    world.tell_all();
    assert_eq!(
        memory(&world),
        (poets.clone(), vec![("Running", 1)], true, uid, false, None)
    );
    world.happen(Happening::Gone);
    world.tell_all();
    let left = (poets, vec![], false, None, false, None);
    assert_eq!(memory(&world), left, "its Job is there");
    world.happen(Happening::JobGone);
    world.tell_all();
    assert_eq!(memory(&world), nothing);
}

#[test]
fn a_pod_that_we_let_go_is_known_to_be_before_any_watch_tells() {
    let (world, _, mut pod) = world_with_children();
    pod["metadata"]["finalizers"] = json!([protocol::names::REPORT_FINALIZER]);
    pod_told(&world.memory, Told::Apply, Some(pod.clone()));
    let mut other = pod.clone();
    (other["metadata"]["name"], other["metadata"]["uid"]) = (json!("other"), json!("other"));
    pod_told(&world.memory, Told::Apply, Some(other));
    let held = || {
        let known = world.look().unwrap();
        known
            .pods
            .iter()
            .filter(|(_, pod)| pod.held)
            .map(|(_, pod)| pod.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(held().len(), 2);
    world
        .memory
        .released(NAMESPACE, NAME, pod["metadata"]["uid"].as_str().unwrap());
    assert_eq!(held(), ["other"]);
    assert_eq!(pod["metadata"]["labels"][label::SESSION], json!(NAME));
}

#[test]
fn a_job_is_an_orphan_whose_session_is_gone_going_or_another_and_none_that_goes_itself() {
    let (world, job, _) = world_with_children();
    let orphans = |change: fn(&mut Value)| {
        let mut job = job.clone();
        change(&mut job);
        job_told(&world.memory, Told::Apply, Some(job));
        world
            .memory
            .orphans()
            .into_iter()
            .map(|orphan| orphan.job)
            .collect::<Vec<_>>()
    };
    assert_eq!(orphans(|_| {}), [""; 0]);
    assert_eq!(
        orphans(|job| *job.pointer_mut("/metadata/ownerReferences/0/uid").unwrap() = json!("namesake")),
        [job_name(1)]
    );
    assert_eq!(
        orphans(|job| job["metadata"]["ownerReferences"] = json!([])),
        [job_name(1)]
    );
    let mut going = world.session().unwrap().clone();
    going["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
    world.deliver(0, Told::Apply, Some(going));
    assert_eq!(orphans(|_| {}), [job_name(1)]);
    assert_eq!(
        orphans(|job| job["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z")),
        [""; 0]
    );
}
