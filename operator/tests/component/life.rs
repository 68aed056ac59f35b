//! A session's life.

use crds::Phase;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{Api, ResourceExt as _};
use protocol::{Outcome, names::REPORT_FINALIZER};
use serde_json::json;

use crate::{
    plane::{jobs_created, operator_writes},
    world::{World, report, until},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_session_runs_to_its_end_and_its_status_says_what_came_of_it() {
    let world = World::new("runs-to-its-end").await;
    let created = world.create("poem", json!({"prompt": "write a haiku"})).await;
    assert_eq!(created.status.unwrap().phase, Phase::Pending, "the answer to the create has a phase");

    let creating = world.phase("poem", Phase::Creating).await;
    assert_eq!((creating.attempt, creating.run, creating.job_name.as_deref()), (Some(1), Some(1), Some("poem-job")));
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
    assert_eq!((status.last_seq, status.acked_seq), (Some(17), Some(16)));
    assert_eq!(status.result.as_deref(), Some("a haiku"));
    assert_eq!(status.sdk_session_id.as_deref(), Some("conversation-1"));
    assert_eq!(status.trace_id.as_deref(), Some("trace-1"));
    assert_eq!(status.running_seconds, Some(5));
    assert!(status.completion_time.is_some());
    assert_eq!(status.observed_generation, Some(1));
    let conditions: Vec<_> = status.conditions.iter().map(|c| (&*c.type_, &*c.status, &*c.reason)).collect();
    assert!(conditions.contains(&("Finished", "True", "Completed")), "{conditions:?}");
    assert!(conditions.contains(&("RunnerStarted", "True", "Running")), "{conditions:?}");

    let claims: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &world.namespace);
    let claim = claims.get("ambient-workspace-poem").await.unwrap();
    assert_eq!(claim.owner_references()[0].api_version, "vteam.ambient-code/v1alpha1");

    until("the report's finalizer to go", async || {
        world.pod_now(&pod).await.is_none_or(|pod| pod.finalizers().is_empty()).then_some(())
    })
    .await;
    assert_eq!(jobs_created(&world.namespace), ["poem-job"]);
    let writes = operator_writes(&world.namespace);
    let short: Vec<_> = writes.iter().map(|w| format!("{} {}/{}", w["verb"], w["objectRef"]["resource"], w["objectRef"]["subresource"])).collect();
    assert!(writes.len() <= 8, "{short:#?}");
}
