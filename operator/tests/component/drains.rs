//! What a run left on its volume is delivered by drain Jobs, never beside an attempt.

use crds::{AgenticSessionStatus, Phase, condition};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use operator::TimingSettings;
use protocol::{
    Outcome, Report,
    names::{annotation, component, label},
    report::Delivery,
};
use serde_json::json;

use crate::{
    plane::jobs_created,
    world::{World, report, until},
};

/// A report that leaves records on the volume.
fn undelivered(outcome: Outcome, attempt: u32, acked_seq: u64) -> Report {
    Report {
        events: Delivery::Failed,
        acked_seq,
        ..report(outcome, attempt)
    }
}

async fn world(name: &str, timing: TimingSettings) -> World {
    let mut world = World::without_operator(name).await;
    world.timing = timing;
    world.start_operator().await;
    world
}

fn quick() -> TimingSettings {
    TimingSettings {
        drain_first_wait: 1,
        ..TimingSettings::default()
    }
}

/// Creates a session whose run ends with records on its volume.
async fn leave(world: &World, name: &str) -> AgenticSessionStatus {
    world.create(name, json!({"prompt": "write"})).await;
    let pod = world.pod(name, 1).await;
    world.start(&pod).await;
    world.end(&pod, 7, Some(&undelivered(Outcome::Succeeded, 1, 4))).await;
    world.phase(name, Phase::Completed).await
}

async fn drain_pod(world: &World, session: &str, number: u32) -> Pod {
    let drains = ListParams::default().labels(&format!(
        "{}={session},{}={}",
        label::SESSION,
        label::COMPONENT,
        component::DRAIN
    ));
    let job = format!("{session}-drain-{number}");
    until("a drain's pod", async || {
        let pods = world.pods().list(&drains).await.unwrap().items;
        pods.into_iter().find(|pod| pod.labels().get("job-name") == Some(&job))
    })
    .await
}

fn delivered(status: &AgenticSessionStatus) -> (String, String, String) {
    let found = status
        .conditions
        .iter()
        .find(|c| c.type_ == condition::EVENTS_DELIVERED);
    let condition = found.expect("the condition is there");
    (
        condition.status.clone(),
        condition.reason.clone(),
        condition.message.clone(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_a_run_left_are_delivered_by_drains_until_all_are_there() {
    let world = world("drained", quick()).await;
    let left = leave(&world, "ledger").await;
    let (is, reason, message) = delivered(&left);
    assert_eq!((&*is, &*reason), ("False", "Undelivered"));
    assert!(message.contains("Acknowledged to 4 of 17"), "{message}");

    let first = drain_pod(&world, "ledger", 1).await;
    let speaks = world.status_when("ledger", |s| s.pod_uid == first.uid()).await;
    assert_eq!(
        (speaks.drains, speaks.drain_job_name.as_deref()),
        (Some(1), Some("ledger-drain-1"))
    );
    assert_eq!((speaks.phase, speaks.attempt), (Phase::Completed, Some(1)));
    world.start(&first).await;
    world
        .end(&first, 3, Some(&undelivered(Outcome::Undelivered, 1, 9)))
        .await;
    let more = world.status_when("ledger", |s| s.acked_seq == Some(9)).await;
    assert_eq!(more.phase, Phase::Completed);

    let second = drain_pod(&world, "ledger", 2).await;
    world.start(&second).await;
    world.end(&second, 3, Some(&report(Outcome::Succeeded, 1))).await;
    let done = world.status_when("ledger", |s| delivered(s).0 == "True").await;
    assert_eq!((done.acked_seq, done.last_seq), (Some(17), Some(17)));
    assert_eq!(
        (done.drain_job_name.clone(), done.next_drain_time.clone()),
        (None, None)
    );
    assert_eq!(
        (done.turns, done.result.as_deref()),
        (Some(3), Some("a haiku")),
        "the run's figures stay"
    );
    until("the drains' Jobs and pods to go", async || {
        let jobs = world.jobs().list(&ListParams::default()).await.unwrap().items;
        let held = [world.pod_now(&first).await, world.pod_now(&second).await];
        let held = held.iter().flatten().any(|pod| !pod.finalizers().is_empty());
        (jobs.len() == 1 && !held).then_some(())
    })
    .await;
    assert_eq!(
        jobs_created(&world.namespace),
        ["ledger-drain-1", "ledger-drain-2", "ledger-job"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_went_with_an_ephemeral_workspace_is_said_to_be_lost_and_nothing_goes_on_with_it() {
    let world = world("thrown-away", quick()).await;
    let spec =
        json!({"prompt": "write", "workspace": {"ephemeral": true, "size": "1Gi"}, "ttlSecondsAfterFinished": 600});
    world.create("note", spec).await;
    let pod = world.pod("note", 1).await;
    let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
    let workspace = volumes.iter().find(|volume| volume.name == "workspace").unwrap();
    assert_eq!(
        workspace.empty_dir.as_ref().unwrap().size_limit.as_ref().unwrap().0,
        "1Gi"
    );
    world.start(&pod).await;
    world
        .end(&pod, 75, Some(&undelivered(Outcome::ModelUnavailable, 1, 4)))
        .await;
    let ended = world.phase("note", Phase::Failed).await;
    assert_eq!(
        ended.reason.as_deref(),
        Some("ModelUnavailable"),
        "no attempt follows: {ended:?}"
    );
    let (is, reason, message) = delivered(&ended);
    assert_eq!((&*is, &*reason), ("False", "Lost"));
    assert!(message.contains("Acknowledged to 4 of 17"), "{message}");
    let ask = json!({"metadata": {"annotations": {annotation::START_REQUESTED_AT: "again"}}});
    world.patch("note", ask).await;
    let answered = world
        .status_when("note", |s| s.handled_start_request.as_deref() == Some("again"))
        .await;
    assert_eq!((answered.phase, answered.run), (Phase::Failed, Some(1)));
    until("the pod to be let go", async || {
        let held = world.pod_now(&pod).await;
        held.is_none_or(|pod| pod.finalizers().is_empty()).then_some(())
    })
    .await;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &world.namespace);
    assert!(claims.list(&ListParams::default()).await.unwrap().items.is_empty());
    assert_eq!(jobs_created(&world.namespace), ["note-job"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_without_a_final_report_is_drained_too() {
    let mut timing = quick();
    timing.retry_first_wait = 1;
    let world = world("drained-after-a-crash", timing).await;
    world.create("diary", json!({"prompt": "write"})).await;
    for attempt in 1..=3 {
        let pod = world.pod("diary", attempt).await;
        world.start(&pod).await;
        world.end(&pod, 1, None).await;
    }
    let failed = world.phase("diary", Phase::Failed).await;
    assert!(delivered(&failed).2.contains("no final report"), "{failed:#?}");
    let pod = drain_pod(&world, "diary", 1).await;
    world.start(&pod).await;
    world.end(&pod, 3, Some(&report(Outcome::Succeeded, 3))).await;
    let done = world.status_when("diary", |s| delivered(s).0 == "True").await;
    assert_eq!((done.last_seq, done.phase), (Some(17), Phase::Failed));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_delivered_in_time_is_lost_with_both_numbers() {
    let timing = TimingSettings {
        // Long enough for the first drain to come to its end.
        drain_bound: 20,
        ..quick()
    };
    let world = world("lost", timing).await;
    leave(&world, "letter").await;
    let pod = drain_pod(&world, "letter", 1).await;
    world.start(&pod).await;
    world.end(&pod, 3, Some(&undelivered(Outcome::Undelivered, 1, 9))).await;
    let _kubelet = world.kubelet();
    // Later drains find nobody to deliver to, and leave nothing.
    let ends = async {
        for number in 2.. {
            let pod = drain_pod(&world, "letter", number).await;
            world.end(&pod, 0, None).await;
        }
    };
    let lost = world.status_when("letter", |s| delivered(s).1 == "Lost");
    let lost = tokio::select! { lost = lost => lost, () = ends => unreachable!() };
    let (is, _, message) = delivered(&lost);
    assert_eq!(is, "False");
    assert!(message.contains("Acknowledged to 9 of 17"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_run_first_ends_the_drain_and_waits_for_its_pod() {
    let world = world("drain-and-run", quick()).await;
    leave(&world, "novella").await;
    let drain = drain_pod(&world, "novella", 1).await;
    world.start(&drain).await;
    world.status_when("novella", |s| s.pod_uid == drain.uid()).await;
    world
        .patch(
            "novella",
            json!({"metadata": {"annotations": {"ambient-code.io/start-requested-at": "now"}}}),
        )
        .await;
    let waiting = world
        .status_when("novella", |s| {
            s.message.as_ref().is_some_and(|m| m.contains(&drain.name_any()))
        })
        .await;
    assert_eq!((waiting.phase, waiting.run), (Phase::Pending, Some(2)));
    until("the drain to be told to stop", async || {
        let pod = world.pod_now(&drain).await?;
        pod.metadata.deletion_timestamp
    })
    .await;
    assert_eq!(jobs_created(&world.namespace), ["novella-drain-1", "novella-job"]);
    // It delivers some of it on its way out.
    world
        .end(&drain, 3, Some(&undelivered(Outcome::Undelivered, 1, 11)))
        .await;
    let _kubelet = world.kubelet();
    let second = world.pod("novella", 2).await;
    let creating = world.status_when("novella", |s| s.pod_uid == second.uid()).await;
    assert_eq!(
        (creating.acked_seq, creating.drain_job_name.as_deref()),
        (Some(11), None)
    );
    until("the drain's pod to go", async || {
        world.pod_now(&drain).await.is_none().then_some(())
    })
    .await;
    world.start(&second).await;
    world.end(&second, 3, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world.phase("novella", Phase::Completed).await;
    assert_eq!(delivered(&done).0, "True");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_runner_never_started_has_nothing_to_deliver() {
    let timing = TimingSettings {
        container_grace: 1,
        ..quick()
    };
    let world = world("nothing-to-deliver", timing).await;
    let _kubelet = world.kubelet();
    world.create("blank", json!({"prompt": "write"})).await;
    let pod = world.pod("blank", 1).await;
    world.bind(&pod).await;
    let waiting = json!({"waiting": {"reason": "InvalidImageName", "message": "?"}});
    let agent =
        json!({"name": "agent", "image": "?", "imageID": "", "ready": false, "restartCount": 0, "state": waiting});
    world
        .set_pod_status(&pod, json!({"initContainerStatuses": [agent]}))
        .await;
    let failed = world.phase("blank", Phase::Failed).await;
    assert_eq!(delivered(&failed).0, "True");
    assert_eq!(jobs_created(&world.namespace), ["blank-job"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_deleted_takes_its_drain_along() {
    let world = world("drain-deleted", quick()).await;
    leave(&world, "memo").await;
    let drain = drain_pod(&world, "memo", 1).await;
    world.start(&drain).await;
    let _kubelet = world.kubelet();
    world.sessions().delete("memo", &DeleteParams::default()).await.unwrap();
    until("all to be gone", async || {
        let all = ListParams::default();
        let left =
            world.jobs().list(&all).await.unwrap().items.len() + world.pods().list(&all).await.unwrap().items.len();
        (left == 0).then_some(())
    })
    .await;
}
