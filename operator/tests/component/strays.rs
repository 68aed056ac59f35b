//! Pods that somebody took their session's label off.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crds::Phase;
use http::{Method, Request, Response, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
    client::Body,
};
use protocol::{Outcome, names::label};
use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    faults::whole,
    plane::{jobs_created, operator_config},
    wire::{self, Fate, Wire},
    world::{World, report, until},
};

async fn unlabel(world: &World, pod: &Pod) {
    let bare = Patch::Merge(json!({"metadata": {"labels": {label::SESSION_UID: null}}}));
    world
        .pods()
        .patch(&pod.name_any(), &PatchParams::default(), &bare)
        .await
        .unwrap();
}

async fn running(world: &World, name: &str) -> Pod {
    let pod = world.pod(name, 1).await;
    world.start(&pod).await;
    world.phase(name, Phase::Running).await;
    pod
}

async fn labelled_again(world: &World, pod: &Pod) {
    let expected = pod.labels()[label::SESSION_UID].clone();
    until("the label", async || {
        let now = world.pod_now(pod).await.unwrap();
        (now.labels().get(label::SESSION_UID) == Some(&expected)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_lost_its_label_is_still_the_sessions_and_gets_it_back() {
    let mut world = World::new("strays").await;
    world.create("poem", json!({"prompt": "p"})).await;
    let pod = running(&world, "poem").await;
    unlabel(&world, &pod).await;
    labelled_again(&world, &pod).await;

    // Also when it happens while no operator is there; the next one must not take the attempt for lost before it has looked.
    world.kill_operator().await;
    unlabel(&world, &pod).await;
    world.metrics.set_port(0);
    world.start_operator().await;
    labelled_again(&world, &pod).await;
    world.end(&pod, 3, Some(&report(Outcome::Succeeded, 1))).await;
    let status = world.phase("poem", Phase::Completed).await;
    assert_eq!(status.attempt, Some(1));
    assert_eq!(jobs_created("strays"), ["poem-job"], "it was never taken for gone");
    until("the report to be let go", async || {
        world
            .pod_now(&pod)
            .await
            .unwrap()
            .finalizers()
            .iter()
            .all(|f| !f.contains("report"))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_lost_its_label_does_not_stay_behind_its_session() {
    let mut world = World::new("strays-deleted").await;
    let kubelet = world.kubelet();
    world.create("poem", json!({"prompt": "p"})).await;
    world.create("ode", json!({"prompt": "p"})).await;
    let (poem, ode) = (running(&world, "poem").await, running(&world, "ode").await);
    // At work: the label goes in the middle of the deletion.
    let hold = Patch::Merge(json!({"metadata": {"labels": {label::SESSION_UID: null}}}));
    world.sessions().delete("ode", &DeleteParams::default()).await.unwrap();
    let _ = world
        .pods()
        .patch(&ode.name_any(), &PatchParams::default(), &hold)
        .await;
    // And while nobody is there.
    world.kill_operator().await;
    unlabel(&world, &poem).await;
    world.sessions().delete("poem", &DeleteParams::default()).await.unwrap();
    until("the deletion of the pod", async || {
        world.pod_now(&poem).await?.metadata.deletion_timestamp
    })
    .await;
    until("the Job to go", async || {
        world.jobs().get_opt("poem-job").await.unwrap().is_none().then_some(())
    })
    .await;
    world.metrics.set_port(0);
    world.start_operator().await;
    for pod in [&poem, &ode] {
        until("the pod to go", async || {
            world.pod_now(pod).await.is_none().then_some(())
        })
        .await;
    }
    drop(kubelet);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_job_was_taken_away_from_above_it_is_followed_to_its_end() {
    let world = World::new("strays-bare").await;
    world.create("poem", json!({"prompt": "p"})).await;
    let pod = running(&world, "poem").await;
    take_away_the_job(&world, &pod).await;
    // It is looked at while it runs on, and once more when it ends.
    let looks = world.looks().await;
    world
        .patch("poem", json!({"metadata": {"annotations": {"look": "now"}}}))
        .await;
    until("a look", async || (world.looks().await > looks).then_some(())).await;
    world.end(&pod, 3, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("poem", Phase::Completed).await;
    assert_eq!(jobs_created("strays-bare"), ["poem-job"], "no other beside it");
}

/// Somebody else is always faster to write a status, while this is set.
#[derive(Clone, Default)]
struct TooLate(Arc<AtomicBool>);

impl Wire for TooLate {
    fn fate(&self, request: &Request<Body>) -> Fate {
        let writes = request.method() != Method::GET && request.uri().path().ends_with("/status");
        if !writes || !self.0.load(Ordering::SeqCst) {
            return Fate::Pass;
        }
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "it was changed", "reason": "Conflict", "code": 409});
        let mut answer = Response::new(whole(status.to_string()));
        *answer.status_mut() = StatusCode::CONFLICT;
        Fate::Instead(answer)
    }
}

#[rstest]
#[case::at_work("strays-early", json!({"ephemeral": true}), false)]
#[case::and_the_operator_was_down("strays-early-down", json!({}), true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_lost_its_job_before_status_named_it_ends_before_another_begins(
    #[case] namespace: &str,
    #[case] workspace: Value,
    #[case] down: bool,
) {
    let mut world = World::without_operator(namespace).await;
    let late = TooLate(Arc::new(AtomicBool::new(true)));
    world.start_operator_with(wire::client(operator_config(namespace).await, late.clone()));
    world
        .create("poem", json!({"prompt": "p", "workspace": workspace}))
        .await;
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    if down {
        world.kill_operator().await;
    }
    take_away_the_job(&world, &pod).await;
    assert_eq!(world.status("poem").await.pod_uid, None);
    if down {
        world.start_operator().await;
    } else {
        late.0.store(false, Ordering::SeqCst);
        world
            .patch("poem", json!({"metadata": {"annotations": {"look": "now"}}}))
            .await;
    }
    world
        .status_when("poem", |s| {
            let said = s.message.as_deref().unwrap_or_default();
            s.phase == Phase::Pending && said.contains(&format!("Waits for pod {}", pod.name_any()))
        })
        .await;
    assert_eq!(jobs_created(namespace), ["poem-job"], "no other beside it");
    world.obey_deletion(&pod, None).await;
    until("the pod to go", async || {
        world.pod_now(&pod).await.is_none().then_some(())
    })
    .await;
    let next = world.pod("poem", 1).await;
    world.start(&next).await;
    world.phase("poem", Phase::Running).await;
    world.end(&next, 3, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("poem", Phase::Completed).await;
}

async fn take_away_the_job(world: &World, pod: &Pod) {
    world.jobs().delete("poem-job", &orphaning()).await.unwrap();
    until("the Job to go", async || {
        world.jobs().get_opt("poem-job").await.unwrap().is_none().then_some(())
    })
    .await;
    until("the pod without a Job", async || {
        world.pod_now(pod).await?.owner_references().is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_does_not_work_on_for_a_session_that_is_gone_or_held_in_its_deletion() {
    let mut world = World::without_operator("strays-orphans").await;
    world.timing.orphan_grace = 1;
    world.start_operator().await;
    let kubelet = world.kubelet();
    for name in ["poem", "ode"] {
        world.create(name, json!({"prompt": "p"})).await;
    }
    let (poem, ode) = (running(&world, "poem").await, running(&world, "ode").await);
    // Its children are to be left; and its author holds it.
    world.sessions().delete("poem", &orphaning()).await.unwrap();
    world
        .patch("ode", json!({"metadata": {"finalizers": ["example.com/hold"]}}))
        .await;
    world.sessions().delete("ode", &DeleteParams::default()).await.unwrap();
    for (pod, job) in [(&poem, "poem-job"), (&ode, "ode-job")] {
        until("the pod to go", async || {
            world.pod_now(pod).await.is_none().then_some(())
        })
        .await;
        until("the Job to go", async || {
            world.jobs().get_opt(job).await.unwrap().is_none().then_some(())
        })
        .await;
    }
    assert!(world.sessions().get_opt("ode").await.unwrap().is_some(), "it is held");
    world.patch("ode", json!({"metadata": {"finalizers": null}})).await;
    drop(kubelet);
}

fn orphaning() -> DeleteParams {
    DeleteParams {
        propagation_policy: Some(kube::api::PropagationPolicy::Orphan),
        ..DeleteParams::default()
    }
}
