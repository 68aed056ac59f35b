//! A session's life.

use crds::Phase;
use k8s_openapi::api::core::v1::{Event, PersistentVolumeClaim, Pod, ResourceQuota};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use protocol::{Outcome, Report, names::REPORT_FINALIZER};
use serde_json::{Value, json};

use crate::{
    plane::{jobs_created, operator_writes},
    world::{World, report, until},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_session_runs_to_its_end_and_its_status_says_what_came_of_it() {
    let world = World::new("runs-to-its-end").await;
    let created = world.create("poem", json!({"prompt": "write a haiku"})).await;
    assert_eq!(
        created.status.unwrap().phase,
        Phase::Pending,
        "the answer to the create has a phase"
    );

    let creating = world.phase("poem", Phase::Creating).await;
    assert_eq!(
        (creating.attempt, creating.run, creating.job_name.as_deref()),
        (Some(1), Some(1), Some("poem-job"))
    );
    let pod = world.pod("poem", 1).await;
    assert!(pod.finalizers().iter().any(|f| f == REPORT_FINALIZER));
    let seen = world.status_when("poem", |status| status.pod_uid.is_some()).await;
    assert_eq!((seen.pod_uid, seen.pod_name), (pod.uid(), Some(pod.name_any())));

    world.start(&pod).await;
    let running = world.phase("poem", Phase::Running).await;
    assert!(running.start_time.is_some());

    world.end_runner(&pod, 5, Some(&report(Outcome::Succeeded, 1))).await;
    let status = world.phase("poem", Phase::Completed).await;
    world.end(&pod, 5, Some(&report(Outcome::Succeeded, 1))).await;
    assert_eq!(status.reason.as_deref(), Some("Completed"));
    assert_eq!((status.turns, status.cost_usd.as_deref()), (Some(3), Some("0.012345")));
    assert_eq!(status.usage.unwrap().cache_read_input_tokens, 33);
    assert_eq!((status.last_seq, status.acked_seq), (Some(17), Some(17)));
    assert_eq!(status.result.as_deref(), Some("a haiku"));
    assert_eq!(status.sdk_session_id.as_deref(), Some("conversation-1"));
    assert_eq!(status.trace_id.as_deref(), Some("trace-1"));
    assert_eq!(status.running_seconds, Some(5));
    assert!(status.completion_time.is_some());
    assert_eq!(status.observed_generation, Some(1));
    let conditions: Vec<_> = status
        .conditions
        .iter()
        .map(|c| (&*c.type_, &*c.status, &*c.reason))
        .collect();
    assert!(
        conditions.contains(&("Finished", "True", "Completed")),
        "{conditions:?}"
    );
    assert!(
        conditions.contains(&("RunnerStarted", "True", "Running")),
        "{conditions:?}"
    );

    let claims: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &world.namespace);
    let claim = claims.get("ambient-workspace-poem").await.unwrap();
    assert_eq!(claim.owner_references()[0].api_version, "vteam.ambient-code/v1alpha1");

    until("the report's finalizer to go", async || {
        world
            .pod_now(&pod)
            .await
            .is_none_or(|pod| pod.finalizers().is_empty())
            .then_some(())
    })
    .await;
    assert_eq!(jobs_created(&world.namespace), ["poem-job"]);
    let writes = operator_writes(&world.namespace);
    let short: Vec<_> = writes
        .iter()
        .map(|w| {
            format!(
                "{} {}/{}",
                w["verb"], w["objectRef"]["resource"], w["objectRef"]["subresource"]
            )
        })
        .collect();
    assert!(writes.len() <= 8, "{short:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_pod_was_deleted_is_tried_again_and_completes() {
    let world = World::new("pod-deleted").await;
    world
        .create("ode", json!({"prompt": "write an ode", "timeout": 600}))
        .await;
    let first = world.pod("ode", 1).await;
    world.start(&first).await;
    world.phase("ode", Phase::Running).await;
    world.delete_pod(&first, Some(&report(Outcome::Stopped, 1))).await;

    let waiting = world.status_when("ode", |s| s.next_attempt_time.is_some()).await;
    assert_eq!(
        (waiting.phase, waiting.reason.as_deref()),
        (Phase::Pending, Some("Retrying"))
    );
    assert!(waiting.message.unwrap().contains("PodDeleted"));
    assert_eq!(waiting.turns, Some(3), "what the attempt did is known");
    until("the deleted pod to go", async || {
        world.pod_now(&first).await.is_none().then_some(())
    })
    .await;

    let second = world.pod("ode", 2).await;
    let spec = environment(&second, "AGENTIC_SPEC_JSON");
    let spec: Value = serde_json::from_str(&spec).unwrap();
    assert_eq!((&spec["run"], &spec["usedSeconds"]), (&json!(1), &json!(7)));
    assert_eq!(environment(&second, "ATTEMPT"), "2");
    world.start(&second).await;
    let running = world.phase("ode", Phase::Running).await;
    assert_eq!((running.attempt, running.pod_uid.clone()), (Some(2), second.uid()));
    world.end(&second, 4, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world.phase("ode", Phase::Completed).await;
    assert_eq!(
        (done.attempt, done.running_seconds, done.run),
        (Some(2), Some(11), Some(1))
    );
    assert_eq!(jobs_created(&world.namespace), ["ode-job", "ode-job-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_session_stops_and_goes_on_in_another_attempt_with_the_seconds_it_used() {
    let world = World::new("suspended").await;
    world.create("saga", json!({"prompt": "write a saga"})).await;
    let first = world.pod("saga", 1).await;
    world.start(&first).await;
    world.phase("saga", Phase::Running).await;
    world.patch("saga", json!({"spec": {"suspend": true}})).await;
    let stopping = world.phase("saga", Phase::Stopping).await;
    assert_eq!(stopping.reason.as_deref(), Some("StoppedByUser"));
    world.obey_deletion(&first, Some(&report(Outcome::Stopped, 1))).await;
    let stopped = world.phase("saga", Phase::Stopped).await;
    assert_eq!(
        (stopped.reason.as_deref(), stopped.running_seconds),
        (Some("StoppedByUser"), Some(7))
    );
    assert_eq!(stopped.observed_generation, Some(2));

    world.patch("saga", json!({"spec": {"suspend": false}})).await;
    let second = world.pod("saga", 2).await;
    let spec: Value = serde_json::from_str(&environment(&second, "AGENTIC_SPEC_JSON")).unwrap();
    assert_eq!((&spec["run"], &spec["usedSeconds"]), (&json!(2), &json!(7)));
    world.start(&second).await;
    world.phase("saga", Phase::Running).await;
    world.end(&second, 3, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world.phase("saga", Phase::Completed).await;
    assert_eq!(
        (done.run, done.attempt, done.running_seconds),
        (Some(2), Some(2), Some(10))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_suspended_at_its_creation_waits() {
    let world = World::new("suspended-at-creation").await;
    world
        .create("limerick", json!({"prompt": "write a limerick", "suspend": true}))
        .await;
    let waiting = world.status_when("limerick", |s| s.reason.is_some()).await;
    assert_eq!(
        (waiting.phase, waiting.reason.as_deref()),
        (Phase::Pending, Some("Suspended"))
    );
    assert!(jobs_created(&world.namespace).is_empty());
    world.patch("limerick", json!({"spec": {"suspend": false}})).await;
    world.pod("limerick", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_stopped_before_its_pod_started_stops() {
    let world = World::new("stopped-early").await;
    world.create("epic", json!({"prompt": "write an epic"})).await;
    let pod = world.pod("epic", 1).await;
    world.patch("epic", json!({"spec": {"suspend": true}})).await;
    let stopped = world.phase("epic", Phase::Stopped).await;
    assert_eq!(stopped.running_seconds, None);
    until("our finalizer to go", async || {
        world
            .pod_now(&pod)
            .await
            .is_none_or(|pod| !pod.finalizers().iter().any(|f| f == REPORT_FINALIZER))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_credentials_end_a_session_with_the_runners_message() {
    let world = World::new("no-credentials").await;
    world.create("elegy", json!({"prompt": "write an elegy"})).await;
    let pod = world.pod("elegy", 1).await;
    world.start(&pod).await;
    let said = "No credential: put one into Secret ambient-runner-secrets or ambient-non-vertex-integrations.";
    let report = Report {
        message: said.into(),
        ..Report::new(Outcome::NoCredentials, 1)
    };
    world.end(&pod, 0, Some(&report)).await;
    let failed = world.phase("elegy", Phase::Failed).await;
    assert_eq!(
        (failed.reason.as_deref(), failed.message.as_deref()),
        (Some("NoCredentials"), Some(said))
    );
    assert_eq!(jobs_created(&world.namespace), ["elegy-job"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_runner_is_tried_three_times_and_then_the_session_fails() {
    let world = World::new("crashes").await;
    world.create("farce", json!({"prompt": "write a farce"})).await;
    for attempt in 1..=3 {
        let pod = world.pod("farce", attempt).await;
        world.start(&pod).await;
        world.end(&pod, 1, None).await;
    }
    let failed = world.phase("farce", Phase::Failed).await;
    assert_eq!(
        (failed.reason.as_deref(), failed.attempt),
        (Some("RunnerCrashed"), Some(3))
    );
    assert!(failed.message.unwrap().contains("No attempt is left after 3"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hinders_a_pod_is_said_at_once() {
    let world = World::new("hindered").await;
    world.create("riddle", json!({"prompt": "write a riddle"})).await;
    let pod = world.pod("riddle", 1).await;
    let unschedulable = json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}]});
    world.set_pod_status(&pod, unschedulable).await;
    let seen = world
        .status_when("riddle", |s| s.reason.as_deref() == Some("Unschedulable"))
        .await;
    assert_eq!(seen.phase, Phase::Creating);
    assert!(seen.message.unwrap().contains("0/3 nodes are available"));

    world.bind(&pod).await;
    let pulling = json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}});
    let agent = json!({"name": "agent", "image": "registry.test/runner:7", "imageID": "", "ready": false, "restartCount": 0, "state": pulling});
    world
        .set_pod_status(
            &pod,
            json!({"conditions": [{"type": "PodScheduled", "status": "True"}], "initContainerStatuses": [agent]}),
        )
        .await;
    let seen = world
        .status_when("riddle", |s| s.reason.as_deref() == Some("ImagePullFailed"))
        .await;
    assert!(
        seen.message.as_ref().unwrap().contains("registry.test/runner:7"),
        "{seen:?}"
    );

    world.start(&pod).await;
    let running = world.phase("riddle", Phase::Running).await;
    assert_eq!(running.reason.as_deref(), Some("Running"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_the_api_server_refuses_is_explained() {
    let world = World::without_operator("refused").await;
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "no-pods"}, "spec": {"hard": {"pods": "0"}}});
    let quotas: Api<ResourceQuota> = Api::namespaced(world.client.clone(), &world.namespace);
    quotas
        .create(&PostParams::default(), &serde_json::from_value(quota).unwrap())
        .await
        .unwrap();
    until("the quota to hold", async || {
        quotas.get("no-pods").await.unwrap().status?.hard.map(|_| ())
    })
    .await;
    let mut world = world;
    world.start_operator().await;
    world.create("fable", json!({"prompt": "write a fable"})).await;
    let seen = world
        .status_when("fable", |s| s.reason.as_deref() == Some("QuotaExceeded"))
        .await;
    assert_eq!(seen.phase, Phase::Creating);
    assert!(seen.message.unwrap().contains("no-pods"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_deleted_leaves_the_outcome_unknown_or_what_its_pod_reports() {
    let world = World::new("job-deleted").await;
    world.create("hymn", json!({"prompt": "write a hymn"})).await;
    let pod = world.pod("hymn", 1).await;
    world.start(&pod).await;
    world.phase("hymn", Phase::Running).await;
    world
        .jobs()
        .delete("hymn-job", &DeleteParams::background())
        .await
        .unwrap();
    world.obey_deletion(&pod, Some(&report(Outcome::Stopped, 1))).await;
    let waiting = world.status_when("hymn", |s| s.next_attempt_time.is_some()).await;
    assert!(waiting.message.unwrap().contains("PodDeleted"));
    world.pod("hymn", 2).await;
    assert_eq!(jobs_created(&world.namespace), ["hymn-job", "hymn-job-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_request_begins_the_next_run_of_an_ended_session_and_of_no_other() {
    let world = World::new("start-request").await;
    world.create("verse", json!({"prompt": "write a verse"})).await;
    let first = world.pod("verse", 1).await;
    world
        .patch(
            "verse",
            json!({"metadata": {"annotations": {"ambient-code.io/start-requested-at": "too early"}}}),
        )
        .await;
    let noted = world.status_when("verse", |s| s.handled_start_request.is_some()).await;
    assert_eq!(noted.run, Some(1));
    world.start(&first).await;
    world.end(&first, 9, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("verse", Phase::Completed).await;

    world
        .patch(
            "verse",
            json!({"metadata": {"annotations": {"ambient-code.io/start-requested-at": "now"}}}),
        )
        .await;
    let second = world.pod("verse", 2).await;
    let spec: Value = serde_json::from_str(&environment(&second, "AGENTIC_SPEC_JSON")).unwrap();
    assert_eq!((&spec["run"], &spec["usedSeconds"]), (&json!(2), &json!(0)));
    world.start(&second).await;
    world.end(&second, 2, Some(&report(Outcome::Succeeded, 2))).await;
    let done = world
        .status_when("verse", |s| s.phase == Phase::Completed && s.run == Some(2))
        .await;
    assert_eq!(done.handled_start_request.as_deref(), Some("now"));
    assert_eq!(done.running_seconds, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_a_needed_name_that_are_somebody_elses_are_named_and_left_alone() {
    let world = World::new("name-conflict").await;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &world.namespace);
    let foreign = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "ambient-workspace-psalm"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}});
    claims
        .create(&PostParams::default(), &serde_json::from_value(foreign).unwrap())
        .await
        .unwrap();
    world.create("psalm", json!({"prompt": "write a psalm"})).await;
    let waiting = world.status_when("psalm", |s| s.reason.is_some()).await;
    assert_eq!(
        (waiting.phase, waiting.reason.as_deref()),
        (Phase::Pending, Some("NameConflict"))
    );
    assert!(jobs_created(&world.namespace).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_beyond_the_quota_is_explained_and_made_when_there_is_room() {
    let world = World::new("volume-quota").await;
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "little-room"}, "spec": {"hard": {"requests.storage": "1Gi"}}});
    let quotas: Api<ResourceQuota> = Api::namespaced(world.client.clone(), &world.namespace);
    quotas
        .create(&PostParams::default(), &serde_json::from_value(quota).unwrap())
        .await
        .unwrap();
    until("the quota to hold", async || {
        quotas.get("little-room").await.unwrap().status?.hard.map(|_| ())
    })
    .await;
    world
        .create(
            "novel",
            json!({"prompt": "write a novel", "workspace": {"size": "2Gi"}}),
        )
        .await;
    let waiting = world.status_when("novel", |s| s.reason.is_some()).await;
    assert_eq!(
        (waiting.phase, waiting.reason.as_deref()),
        (Phase::Pending, Some("QuotaExceeded"))
    );
    assert!(waiting.message.unwrap().contains("little-room"));
    quotas.delete("little-room", &DeleteParams::default()).await.unwrap();
    world.pod("novel", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_mounted_is_named() {
    let world = World::new("volume").await;
    world.create("canto", json!({"prompt": "write a canto"})).await;
    let pod = world.pod("canto", 1).await;
    world.bind(&pod).await;
    let scheduled = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]});
    world.set_pod_status(&pod, scheduled).await;
    let events: Api<Event> = Api::namespaced(world.client.clone(), &world.namespace);
    let event = json!({
        "metadata": {"name": "canto-mount"},
        "involvedObject": {"kind": "Pod", "name": pod.name_any(), "namespace": world.namespace, "uid": pod.uid()},
        "reason": "FailedMount", "message": "MountVolume.SetUp failed for volume pvc-1: no such device", "type": "Warning",
        "lastTimestamp": "2099-01-01T00:00:00Z",
    });
    let event = serde_json::from_value(event).unwrap();
    events.create(&PostParams::default(), &event).await.unwrap();
    let seen = world
        .status_when("canto", |s| s.reason.as_deref() == Some("VolumeUnavailable"))
        .await;
    assert_eq!(seen.phase, Phase::Creating);
    assert!(seen.message.unwrap().contains("no such device"));
    world.start(&pod).await;
    world.phase("canto", Phase::Running).await;
}

/// A variable of the runner, as its process sees it.
pub fn environment(pod: &Pod, name: &str) -> String {
    let variables = pod.spec.as_ref().unwrap().containers[0].env.as_ref().unwrap();
    variables
        .iter()
        .find(|v| v.name == name)
        .unwrap()
        .value
        .clone()
        .unwrap()
        .replace("$$", "$")
}
