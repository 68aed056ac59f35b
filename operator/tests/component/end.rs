//! What stays and what goes: restarts of the operator, deletion, quiet.

use crds::Phase;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, PersistentVolumeClaim},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use protocol::Outcome;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    plane::{jobs_created, operator_config, operator_writes},
    world::{World, report, until},
};

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_killed_in_the_middle_goes_on_where_it_was() {
    let mut world = World::new("operator-killed").await;
    world.create("poem", json!({"prompt": "write a poem"})).await;
    let first = world.pod("poem", 1).await;
    world.start(&first).await;
    world.phase("poem", Phase::Running).await;
    world.kill_operator().await;

    world.delete_pod(&first, Some(&report(Outcome::Stopped, 1))).await;
    let held = world
        .pod_now(&first)
        .await
        .expect("the pod waits for its report to be read");
    assert!(held.metadata.deletion_timestamp.is_some());
    assert_eq!(world.status("poem").await.phase, Phase::Running);

    world.start_operator().await;
    let second = world.pod("poem", 2).await;
    until("the first pod to go", async || {
        world.pod_now(&first).await.is_none().then_some(())
    })
    .await;
    world.start(&second).await;
    world.phase("poem", Phase::Running).await;
    world.kill_operator().await;
    world.end(&second, 4, Some(&report(Outcome::Succeeded, 2))).await;
    world.start_operator().await;
    let done = world.phase("poem", Phase::Completed).await;
    assert_eq!(done.attempt, Some(2));
    assert_eq!(jobs_created(&world.namespace), ["poem-job", "poem-job-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_session_takes_its_job_pod_and_volume_along() {
    let world = World::new("deleted").await;
    world.create("ballad", json!({"prompt": "write a ballad"})).await;
    let pod = world.pod("ballad", 1).await;
    world.start(&pod).await;
    world.phase("ballad", Phase::Running).await;
    world
        .sessions()
        .delete("ballad", &DeleteParams::default())
        .await
        .unwrap();
    world.obey_deletion(&pod, Some(&report(Outcome::Stopped, 1))).await;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &world.namespace);
    until("all to be gone", async || {
        let all = ListParams::default();
        let left = world.jobs().list(&all).await.unwrap().items.len()
            + world.pods().list(&all).await.unwrap().items.len()
            + claims.list(&all).await.unwrap().items.len();
        (left == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_deleted_in_the_foreground_goes_too() {
    let world = World::new("deleted-in-the-foreground").await;
    world.create("ballad", json!({"prompt": "write a ballad"})).await;
    let pod = world.pod("ballad", 1).await;
    world.start(&pod).await;
    world.phase("ballad", Phase::Running).await;
    world
        .sessions()
        .delete("ballad", &DeleteParams::foreground())
        .await
        .unwrap();
    world.obey_deletion(&pod, Some(&report(Outcome::Stopped, 1))).await;
    until("the session to be gone", async || {
        world
            .sessions()
            .get_opt("ballad")
            .await
            .unwrap()
            .is_none()
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_deleted_while_no_operator_is_there_and_its_session_too_is_freed_at_the_next_start() {
    let mut world = World::new("orphaned-pod").await;
    world.create("dirge", json!({"prompt": "write a dirge"})).await;
    let pod = world.pod("dirge", 1).await;
    world.start(&pod).await;
    world.phase("dirge", Phase::Running).await;
    world.stop_operator().await;
    world
        .sessions()
        .delete("dirge", &DeleteParams::default())
        .await
        .unwrap();
    world.obey_deletion(&pod, None).await;
    assert!(world.pod_now(&pod).await.is_some(), "held by the report's finalizer");
    world.start_operator().await;
    until("the pod to go", async || {
        world.pod_now(&pod).await.is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_the_same_name_waits_until_its_predecessors_objects_are_gone() {
    let world = World::new("same-name").await;
    world.create("sonnet", json!({"prompt": "write a sonnet"})).await;
    let old = world.pod("sonnet", 1).await;
    world.start(&old).await;
    world.phase("sonnet", Phase::Running).await;
    world
        .sessions()
        .delete("sonnet", &DeleteParams::default())
        .await
        .unwrap();
    let new = world.create("sonnet", json!({"prompt": "write another"})).await;
    world.obey_deletion(&old, None).await;
    let status = world.phase("sonnet", Phase::Creating).await;
    assert_eq!(status.attempt, Some(1));
    let pod = until("the new session's pod", async || {
        let pod = world.pod("sonnet", 1).await;
        (pod.labels()["vteam.ambient-code/session-uid"] == new.uid().unwrap()).then_some(pod)
    })
    .await;
    world.start(&pod).await;
    world.end(&pod, 1, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("sonnet", Phase::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_for_a_session_that_has_settled() {
    let world = World::new("settled").await;
    world.create("prose", json!({"prompt": "write prose"})).await;
    let pod = world.pod("prose", 1).await;
    world.start(&pod).await;
    world.phase("prose", Phase::Running).await;
    // While it runs, and after its end.
    unchanged_by_another_look(&world, "one").await;
    world.end(&pod, 1, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("prose", Phase::Completed).await;
    until("the finalizer to go", async || {
        world
            .pod_now(&pod)
            .await
            .is_none_or(|p| p.finalizers().is_empty())
            .then_some(())
    })
    .await;
    unchanged_by_another_look(&world, "two").await;
}

/// Makes the operator look at the session twice, which must not make it write.
async fn unchanged_by_another_look(world: &World, value: &str) {
    // What it wrote for the last transition is all written when it has looked once more.
    for round in ["first", "second"] {
        let writes = operator_writes(&world.namespace).len();
        let looks = world.looks().await;
        world
            .patch(
                "prose",
                json!({"metadata": {"annotations": {"look": format!("{value} {round}")}}}),
            )
            .await;
        until("another look", async || (world.looks().await > looks).then_some(())).await;
        if round == "second" {
            assert_eq!(operator_writes(&world.namespace).len(), writes);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_is_told_to_stop_gives_the_lease_back() {
    let mut world = World::new("lease").await;
    let leases: Api<Lease> = Api::namespaced(world.client.clone(), &world.namespace);
    let holder = async || leases.get_opt("agentic-operator").await.unwrap()?.spec?.holder_identity;
    until("the lease to be held", async || {
        holder().await.filter(|h| h == "operator-of-the-test")
    })
    .await;
    world.stop_operator().await;
    assert_eq!(holder().await.as_deref(), Some(""));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_whose_lease_is_taken_ends_and_another_works_when_it_is_free() {
    let mut world = World::without_operator("lease-taken").await;
    let client = Client::try_from(operator_config(&world.namespace).await).unwrap();
    let mut rival = world.settings();
    rival.lease.identity = "rival".into();
    let task = tokio::spawn(operator::run(client, rival, CancellationToken::new()));
    let leases: Api<Lease> = Api::namespaced(world.client.clone(), &world.namespace);
    let holder = async || leases.get_opt("agentic-operator").await.unwrap()?.spec?.holder_identity;
    until("the rival to lead", async || holder().await.filter(|h| h == "rival")).await;
    let taken = json!({"spec": {"holderIdentity": "somebody-else", "leaseDurationSeconds": 1}});
    leases
        .patch("agentic-operator", &PatchParams::default(), &Patch::Merge(taken))
        .await
        .unwrap();
    let ended = task.await.unwrap().unwrap_err();
    assert!(ended.to_string().contains("somebody-else"), "{ended}");

    // Whoever took it is silent: a second later it is free.
    world.start_operator().await;
    until("the next to lead", async || {
        holder().await.filter(|h| h == "operator-of-the-test")
    })
    .await;
    world.create("duet", json!({"prompt": "write a duet"})).await;
    world.pod("duet", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_of_each_transition() {
    let world = World::new("events").await;
    world.create("song", json!({"prompt": "write a song"})).await;
    let pod = world.pod("song", 1).await;
    world.start(&pod).await;
    world.phase("song", Phase::Running).await;
    world.end(&pod, 1, Some(&report(Outcome::AgentError, 1))).await;
    world.phase("song", Phase::Failed).await;
    let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(world.client.clone(), &world.namespace);
    let told = until("three Events", async || {
        let of_session = ListParams::default();
        let mut told: Vec<_> = events
            .list(&of_session)
            .await
            .unwrap()
            .items
            .into_iter()
            .filter(|e| {
                e.regarding
                    .as_ref()
                    .is_some_and(|r| r.kind.as_deref() == Some("AgenticSession"))
            })
            .collect();
        told.sort_by_key(|e| e.event_time.as_ref().map(|t| t.0));
        let told: Vec<_> = told
            .into_iter()
            .map(|e| (e.type_.unwrap(), e.reason.unwrap()))
            .collect();
        (told.len() >= 3).then_some(told)
    })
    .await;
    let expected = [("Normal", "Creating"), ("Normal", "Running"), ("Warning", "AgentError")];
    assert_eq!(told.iter().map(|(a, b)| (&**a, &**b)).collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_is_ready_when_its_crd_is_there() {
    let world = World::new("ready").await;
    let (code, _) = until("an answer", async || {
        world.page("/readyz").await.filter(|(code, _)| *code == 200)
    })
    .await;
    assert_eq!(code, 200);
    assert_eq!(world.page("/healthz").await.unwrap().0, 200);
    let (_, metrics) = until("leading", async || {
        world
            .page("/metrics")
            .await
            .filter(|(_, text)| text.contains("agentic_operator_leader 1"))
    })
    .await;
    assert!(metrics.contains("# EOF"));
}

/// Objects of other applications that happen to carry nothing of ours are none of our business.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ours_is_left_alone() {
    let world = World::new("not-ours").await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), &world.namespace);
    maps.create(
        &PostParams::default(),
        &serde_json::from_value(json!({"metadata": {"name": "theirs"}})).unwrap(),
    )
    .await
    .unwrap();
    world.create("aria", json!({"prompt": "write an aria"})).await;
    world.pod("aria", 1).await;
    let touched: Vec<_> = operator_writes(&world.namespace)
        .iter()
        .map(|w| w["objectRef"]["resource"].as_str().unwrap().to_owned())
        .collect();
    assert!(
        touched
            .iter()
            .all(|r| ["agenticsessions", "jobs", "persistentvolumeclaims", "pods"].contains(&&**r)),
        "{touched:?}"
    );
}
