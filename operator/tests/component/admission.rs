//! Who may run now: the namespace's places, and whoever else admits Jobs.

use crds::{AgenticSessionStatus, Phase};
use kube::{
    ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use protocol::{Outcome, names::annotation::RESOLVED};
use serde_json::json;

use crate::{
    plane::jobs_created,
    world::{World, report, session, until},
};

// As Kueue documents them.
const QUEUE: &str = "kueue.x-k8s.io/queue-name";
const PRIORITY: &str = "kueue.x-k8s.io/priority-class";

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_runs_first_and_the_others_are_told_their_place() {
    let world = World::new("places").await;
    world
        .settings_of_the_namespace(json!({"maxConcurrentSessions": 1}))
        .await;
    world.create("first", json!({"prompt": "p"})).await;
    let pod = world.pod("first", 1).await;
    // Creation times have whole seconds; equal ones go by name.
    world.create("second", json!({"prompt": "p"})).await;
    let queued = world
        .status_when("second", |s| s.reason.as_deref() == Some("Queued"))
        .await;
    assert_eq!(queued.phase, Phase::Pending);
    assert!(queued.message.unwrap().contains("number 1 in the queue"));
    let admitted = queued.conditions.iter().find(|c| c.type_ == "Admitted").unwrap();
    assert_eq!((&*admitted.status, &*admitted.reason), ("False", "Queued"));
    // It cannot begin: it holds nobody up.
    world
        .create(
            "second-stuck",
            json!({"prompt": "p", "pod": {"image": "evil.example/x"}}),
        )
        .await;
    world
        .status_when("second-stuck", |s| s.reason.as_deref() == Some("ConfigError"))
        .await;
    world.create("third", json!({"prompt": "p"})).await;
    let queued = world
        .status_when("third", |s| s.reason.as_deref() == Some("Queued"))
        .await;
    assert!(queued.message.unwrap().contains("number 2 in the queue"));
    assert_eq!(jobs_created(&world.namespace), ["first-job"]);

    world.start(&pod).await;
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("first", Phase::Completed).await;
    let pod = world.pod("second", 1).await;
    let admitted = |s: &AgenticSessionStatus| s.conditions.iter().any(|c| c.type_ == "Admitted" && c.status == "True");
    world.status_when("second", admitted).await;
    assert_eq!(
        jobs_created(&world.namespace),
        ["first-job", "second-job"],
        "one after the other"
    );

    // A session that is deleted gives its place back.
    world
        .sessions()
        .delete("second", &kube::api::DeleteParams::default())
        .await
        .unwrap();
    world.pod("third", 1).await;
    drop(pod);
}

#[tokio::test(flavor = "multi_thread")]
async fn places_are_kept_over_a_restart_of_the_operator_and_a_raised_bound_acts_at_once() {
    let mut world = World::new("places-restart").await;
    world
        .settings_of_the_namespace(json!({"maxConcurrentSessions": 2}))
        .await;
    for name in ["a", "b", "c", "d"] {
        world.create(name, json!({"prompt": "p"})).await;
        world
            .status_when(name, |s| {
                s.phase == Phase::Creating || s.reason.as_deref() == Some("Queued")
            })
            .await;
    }
    world.kill_operator().await;
    world.create("e", json!({"prompt": "p"})).await;
    world.start_operator().await;
    world.status_when("e", |s| s.reason.as_deref() == Some("Queued")).await;
    assert_eq!(jobs_created(&world.namespace), ["a-job", "b-job"]);
    world
        .settings_of_the_namespace(json!({"maxConcurrentSessions": 3}))
        .await;
    world.phase("c", Phase::Creating).await;
    assert_eq!(jobs_created(&world.namespace), ["a-job", "b-job", "c-job"]);
    world.settings_of_the_namespace(json!({})).await;
    for name in ["d", "e"] {
        world.phase(name, Phase::Creating).await;
    }
}

/// Makes session `poem` with labels, and waits until it waits to be admitted.
async fn create_queued(world: &World, labels: &[(&str, &str)]) -> AgenticSessionStatus {
    let mut poem = session("poem", json!({"prompt": "p"}));
    let labels = labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
    poem.metadata.labels = Some(labels.collect());
    world.sessions().create(&PostParams::default(), &poem).await.unwrap();
    world
        .status_when("poem", |s| s.reason.as_deref() == Some("Queued"))
        .await
}

async fn suspend_job(world: &World, name: &str, suspend: bool) {
    let patch = json!({"spec": {"suspend": suspend}});
    world
        .jobs()
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_with_a_queue_waits_for_kueue_also_when_its_job_is_suspended_in_mid_run() {
    let world = World::new("kueue").await;
    world
        .settings_of_the_namespace(json!({"allowedPriorityClasses": ["low"]}))
        .await;
    let queued = create_queued(&world, &[(QUEUE, "night"), (PRIORITY, "low")]).await;
    assert!(queued.message.unwrap().contains("poem-job is suspended"));
    let job = world.jobs().get("poem-job").await.unwrap();
    assert_eq!(job.spec.unwrap().suspend, Some(true));
    let labels = job.metadata.labels.unwrap();
    assert_eq!(labels[QUEUE], "night");
    assert_eq!(labels[PRIORITY], "low");

    suspend_job(&world, "poem-job", false).await;
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    let running = world.phase("poem", Phase::Running).await;
    assert!(
        running
            .conditions
            .iter()
            .any(|c| c.type_ == "Admitted" && c.status == "True")
    );

    suspend_job(&world, "poem-job", true).await;
    world.obey_deletion(&pod, Some(&report(Outcome::Stopped, 1))).await;
    let next = until("the next attempt's Job", async || {
        world.jobs().get_opt("poem-job-2").await.unwrap()
    })
    .await;
    assert_eq!(next.spec.unwrap().suspend, Some(true), "it waits for Kueue too");
    let waits = world.status_when("poem", |s| s.attempt == Some(2)).await;
    assert_eq!((waits.reason.as_deref(), waits.turns), (Some("Queued"), Some(3)));
    suspend_job(&world, "poem-job-2", false).await;
    let pod = world.pod("poem", 2).await;
    world.start(&pod).await;
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world.phase("poem", Phase::Completed).await;
    assert_eq!(
        (done.free_retries.unwrap_or(0), done.run),
        (0, Some(1)),
        "no try was used up"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_waits_is_moved_to_another_queue_by_its_label_and_one_that_may_run_is_not() {
    let world = World::new("kueue-moved").await;
    world
        .settings_of_the_namespace(json!({"allowedPriorityClasses": ["low"]}))
        .await;
    create_queued(&world, &[(QUEUE, "night")]).await;
    let change = async |change| {
        let sessions = world.sessions();
        let change = Patch::Merge(change);
        sessions.patch("poem", &PatchParams::default(), &change).await.unwrap();
    };
    change(json!({"metadata": {"labels": {QUEUE: "day", PRIORITY: "low"}}})).await;
    let moved = until("the Job to be moved", async || {
        let job = world.jobs().get("poem-job").await.unwrap();
        (job.labels()[QUEUE] == "day").then_some(job)
    })
    .await;
    assert_eq!(moved.labels()[PRIORITY], "low");
    assert_eq!(moved.spec.unwrap().suspend, Some(true), "it waits there");

    suspend_job(&world, "poem-job", false).await;
    world.pod("poem", 1).await;
    // The timeout shows that the change was seen.
    change(json!({"metadata": {"labels": {QUEUE: "dusk"}}, "spec": {"timeout": 77}})).await;
    let told = until("the Job to be told", async || {
        let job = world.jobs().get("poem-job").await.unwrap();
        job.annotations()[RESOLVED].contains("77").then_some(job)
    })
    .await;
    assert_eq!(told.labels()[QUEUE], "day");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_suspended_and_let_go_on_while_nobody_looked_costs_no_try() {
    let mut world = World::new("kueue-unseen").await;
    world.create("poem", json!({"prompt": "p"})).await;
    let first = world.pod("poem", 1).await;
    world.start(&first).await;
    world.phase("poem", Phase::Running).await;
    world.kill_operator().await;
    suspend_job(&world, "poem-job", true).await;
    world.obey_deletion(&first, Some(&report(Outcome::Stopped, 1))).await;
    until("the Job to be stopped", async || {
        let job = world.jobs().get("poem-job").await.unwrap();
        (job.status?.active.unwrap_or(0) == 0).then_some(())
    })
    .await;
    suspend_job(&world, "poem-job", false).await;
    let second = until("the Job's second pod", async || {
        let pods = world.pods().list(&kube::api::ListParams::default()).await.unwrap();
        pods.items
            .into_iter()
            .find(|pod| pod.metadata.uid != first.metadata.uid)
    })
    .await;
    world.start(&second).await;
    world.start_operator().await;
    world.obey_deletion(&second, Some(&report(Outcome::Stopped, 1))).await;
    let next = world.pod("poem", 2).await;
    world.start(&next).await;
    world.end(&next, 2, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world.phase("poem", Phase::Completed).await;
    assert_eq!((done.free_retries, done.run, done.attempt), (Some(1), Some(1), Some(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_waits_for_kueue_takes_no_place_and_waits_for_none_and_has_one_while_it_runs() {
    let world = World::new("kueue-places").await;
    world
        .settings_of_the_namespace(json!({"maxConcurrentSessions": 1}))
        .await;
    create_queued(&world, &[(QUEUE, "night")]).await;
    world.create("first", json!({"prompt": "p"})).await;
    let first = world.pod("first", 1).await;
    world.start(&first).await;
    world.phase("first", Phase::Running).await;
    suspend_job(&world, "poem-job", false).await;
    let poem = world.pod("poem", 1).await;
    world.start(&poem).await;
    world.phase("poem", Phase::Running).await;

    world.create("second", json!({"prompt": "p"})).await;
    let is_queued = |s: &AgenticSessionStatus| s.reason.as_deref() == Some("Queued");
    world.status_when("second", is_queued).await;
    world.end(&first, 2, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("first", Phase::Completed).await;
    let looks = world.looks().await;
    until("more looks", async || {
        let now = world.looks().await;
        let look = json!({"metadata": {"annotations": {"look": now.to_string()}}});
        world.patch("second", look).await;
        (now > looks + 2).then_some(())
    })
    .await;
    assert!(is_queued(&world.status("second").await));
    assert_eq!(jobs_created(&world.namespace), ["first-job", "poem-job"]);
    world.end(&poem, 2, Some(&report(Outcome::Succeeded, 1))).await;
    world.pod("second", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_sessions_agent_has_its_place_until_it_is_over() {
    let mut world = World::new("places-grace").await;
    world
        .settings_of_the_namespace(json!({"maxConcurrentSessions": 1}))
        .await;
    world.create("deleted", json!({"prompt": "p"})).await;
    let pod = world.pod("deleted", 1).await;
    world.start(&pod).await;
    world.phase("deleted", Phase::Running).await;
    let now = kube::api::DeleteParams::default();
    world.sessions().delete("deleted", &now).await.unwrap();
    until("the pod to be told to stop", async || {
        let pod = world.pod_now(&pod).await?;
        pod.metadata.deletion_timestamp
    })
    .await;
    // Whoever asks, and whoever leads: of its own name, too.
    for name in ["deleted", "next"] {
        world.create(name, json!({"prompt": "p"})).await;
        world.status_when(name, |s| s.reason.as_deref() == Some("Queued")).await;
        world.kill_operator().await;
        world.start_operator().await;
    }
    // Of those of one second the order is that of the names.
    world.create("third", json!({"prompt": "p"})).await;
    let third = world
        .status_when("third", |s| s.reason.as_deref() == Some("Queued"))
        .await;
    assert!(third.message.unwrap().contains("number 3 in the queue"));
    assert_eq!(jobs_created(&world.namespace), ["deleted-job"], "one agent at a time");

    world.obey_deletion(&pod, Some(&report(Outcome::Stopped, 1))).await;
    // The oldest, unless the claim of its name is still being deleted: then it holds up nobody.
    until("one of them to have the place", async || {
        let all = world.sessions().list(&ListParams::default()).await.ok()?;
        let mut phases = all.iter().filter_map(|session| Some(session.status.as_ref()?.phase));
        phases.any(|phase| phase == Phase::Creating).then_some(())
    })
    .await;
    assert_eq!(jobs_created(&world.namespace).len(), 2, "one agent at a time");
}
