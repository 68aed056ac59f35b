//! Nothing hangs: not on a node that is lost, not on a namespace that goes, not on a session that cannot be read.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crds::Phase;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use protocol::{Outcome, names::REPORT_FINALIZER};
use rstest::rstest;
use serde_json::json;

use crate::{
    plane::{jobs_created, operator_config},
    wire::{self, Fate, Wire, is_watch},
    world::{World, report, until},
};

/// A node of a test's own.
struct TheNode {
    nodes: Api<Node>,
    name: String,
}

impl TheNode {
    async fn new(world: &World) -> Self {
        let (nodes, name) = (Api::all(world.client.clone()), format!("node-{}", world.namespace));
        let node = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
        nodes.create(&PostParams::default(), &node).await.unwrap();
        let node = Self { nodes, name };
        node.ready("True").await;
        node
    }

    /// What the node controller writes when the kubelet's heartbeat stops or comes back; the component plane has none.
    async fn ready(&self, is: &str) {
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let ready = json!({"type": "Ready", "status": is, "reason": "NodeStatusUnknown", "lastTransitionTime": now, "lastHeartbeatTime": now});
        let patch = Patch::Merge(json!({"status": {"conditions": [ready]}}));
        self.nodes
            .patch_status(&self.name, &PatchParams::default(), &patch)
            .await
            .unwrap();
    }
}

async fn world(name: &str) -> World {
    let mut world = World::without_operator(name).await;
    world.timing.node_loss = 2;
    world.timing.retry_first_wait = 1;
    world.start_operator().await;
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_on_a_lost_node_is_ended_and_another_follows_free_of_charge() {
    let mut world = World::without_operator("node-lost").await;
    world.timing.node_loss = 2;
    // What is said of the end is said until the next attempt begins.
    world.timing.retry_first_wait = 10;
    world.start_operator().await;
    let node = TheNode::new(&world).await;
    world.create("elegy", json!({"prompt": "write"})).await;
    let pod = world.pod("elegy", 1).await;
    world.bind_to(&pod, &node.name).await;
    world.start(&pod).await;
    world.phase("elegy", Phase::Running).await;
    node.ready("Unknown").await;
    let waiting = world.status_when("elegy", |s| s.free_retries == Some(1)).await;
    assert_eq!(waiting.phase, Phase::Pending);
    let message = waiting.message.unwrap();
    assert!(
        message.contains("NodeLost") && message.contains(&node.name),
        "{message}"
    );
    until("the pod to go though no kubelet ends it", async || {
        world.pod_now(&pod).await.is_none().then_some(())
    })
    .await;
    world.pod("elegy", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_in_time_has_lost_nothing() {
    let mut world = World::without_operator("node-back").await;
    world.timing.node_loss = 3_600;
    world.start_operator().await;
    let node = TheNode::new(&world).await;
    world.create("idyll", json!({"prompt": "write"})).await;
    let pod = world.pod("idyll", 1).await;
    world.bind_to(&pod, &node.name).await;
    world.start(&pod).await;
    world.phase("idyll", Phase::Running).await;
    node.ready("Unknown").await;
    node.ready("True").await;
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, 1))).await;
    let done = world.phase("idyll", Phase::Completed).await;
    assert_eq!(done.attempt, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn suspending_and_deleting_do_not_hang_on_a_dead_node() {
    let world = world("dead-node").await;
    let node = TheNode::new(&world).await;
    let mut pods = Vec::new();
    for name in ["suspended", "deleted"] {
        world.create(name, json!({"prompt": "write"})).await;
        let pod = world.pod(name, 1).await;
        world.bind_to(&pod, &node.name).await;
        world.start(&pod).await;
        world.phase(name, Phase::Running).await;
        pods.push(pod);
    }
    node.ready("Unknown").await;
    world.patch("suspended", json!({"spec": {"suspend": true}})).await;
    world
        .sessions()
        .delete("deleted", &DeleteParams::foreground())
        .await
        .unwrap();
    world.phase("suspended", Phase::Stopped).await;
    until("session and pods to go", async || {
        let session = world.sessions().get_opt("deleted").await.unwrap();
        let (first, second) = (world.pod_now(&pods[0]).await, world.pod_now(&pods[1]).await);
        (session.is_none() && first.is_none() && second.is_none()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_deleted_goes_whatever_its_sessions_do() {
    let world = world("namespace-deleted").await;
    // Of its own, since the rights of the operator go with the namespace.
    let mut phases = Vec::new();
    for (name, started) in [("waits", false), ("works", true)] {
        world.create(name, json!({"prompt": "write"})).await;
        let pod = world.pod(name, 1).await;
        if started {
            world.start(&pod).await;
            world.phase(name, Phase::Running).await;
        }
        phases.push(pod);
    }
    world
        .create("sleeps", json!({"prompt": "write", "suspend": true}))
        .await;
    let _kubelet = world.kubelet();
    let sessions = world.sessions();
    sessions
        .delete_collection(&DeleteParams::default(), &ListParams::default())
        .await
        .unwrap();
    until("the pods to go", async || {
        let left = world.pods().list(&ListParams::default()).await.unwrap().items;
        left.is_empty().then_some(())
    })
    .await;
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    namespaces
        .delete(&world.namespace, &DeleteParams::default())
        .await
        .unwrap();
    until("the namespace to go", async || {
        namespaces
            .get_opt(&world.namespace)
            .await
            .unwrap()
            .is_none()
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_only_claims_to_be_a_sessions_is_not_believed() {
    let mut world = world("impostor").await;
    world.create("credo", json!({"prompt": "write"})).await;
    let real = world.pod("credo", 1).await;
    world.start(&real).await;
    world.phase("credo", Phase::Running).await;
    world.stop_operator().await;
    world.end(&real, 1, Some(&report(Outcome::RateLimited, 1))).await;
    let mut impostor: Pod = serde_json::from_value(json!({
        "metadata": {"name": "impostor", "labels": real.labels()},
        "spec": real.spec,
    }))
    .unwrap();
    let labels = impostor.labels_mut();
    labels.retain(|name, _| !name.contains("job") && !name.contains("controller-uid"));
    labels.insert("vteam.ambient-code/attempt".into(), "2".into());
    impostor.spec.as_mut().unwrap().node_name = None;
    world.pods().create(&PostParams::default(), &impostor).await.unwrap();
    world.start(&impostor).await;
    world.end(&impostor, 1, Some(&report(Outcome::Succeeded, 2))).await;
    world.start_operator().await;
    until("the real second attempt", async || {
        jobs_created(&world.namespace)
            .contains(&"credo-job-2".to_owned())
            .then_some(())
    })
    .await;
    let status = world.phase("credo", Phase::Creating).await;
    assert!(status.pod_name.is_none_or(|name| name != "impostor"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_deleted_in_every_phase_and_leaves_nothing() {
    let world = world("deleted-in-every-phase").await;
    let _kubelet = world.kubelet();
    let phases = [
        "suspended",
        "creating",
        "running",
        "stopping",
        "retrying",
        "completed",
        "failed",
    ];
    for name in phases {
        let suspend = name == "suspended";
        world.create(name, json!({"prompt": "write", "suspend": suspend})).await;
    }
    for name in &phases[1..] {
        let pod = world.pod(name, 1).await;
        if *name == "creating" {
            continue;
        }
        world.start(&pod).await;
        world.phase(name, Phase::Running).await;
        match *name {
            "stopping" => world.patch(name, json!({"spec": {"suspend": true}})).await,
            "retrying" => world.end(&pod, 1, Some(&report(Outcome::RateLimited, 1))).await,
            "completed" => world.end(&pod, 1, Some(&report(Outcome::Succeeded, 1))).await,
            "failed" => world.end(&pod, 1, Some(&report(Outcome::AgentError, 1))).await,
            _ => {}
        }
    }
    for name in phases {
        world.sessions().delete(name, &DeleteParams::default()).await.unwrap();
    }
    let claims: Api<k8s_openapi::api::core::v1::PersistentVolumeClaim> =
        Api::namespaced(world.client.clone(), &world.namespace);
    until("all to be gone", async || {
        let all = ListParams::default();
        let pods = world.pods().list(&all).await.unwrap().items;
        let held = pods.iter().any(|pod| {
            pod.finalizers().iter().any(|f| f == REPORT_FINALIZER) && pod.metadata.deletion_timestamp.is_none()
        });
        let left = world.jobs().list(&all).await.unwrap().items.len()
            + pods.len()
            + claims.list(&all).await.unwrap().items.len();
        (left == 0 && !held).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_cannot_be_read_holds_its_pod_for_a_while_and_stops_no_other() {
    let mut world = World::without_operator("unreadable").await;
    world.timing.hold_unreadable = 1;
    world.start_operator().await;
    world.create("cipher", json!({"prompt": "write"})).await;
    let pod = world.pod("cipher", 1).await;
    world.start(&pod).await;
    world.phase("cipher", Phase::Running).await;
    world.stop_operator().await;
    make_unreadable(&world, "cipher").await;
    world
        .pods()
        .delete(&pod.name_any(), &DeleteParams::default().grace_period(1))
        .await
        .unwrap();
    let _kubelet = world.kubelet();
    world.start_operator().await;
    world.create("clear", json!({"prompt": "write"})).await;
    let other = world.pod("clear", 1).await;
    until("the pod to be let go", async || {
        world.pod_now(&pod).await.is_none().then_some(())
    })
    .await;
    let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(world.client.clone(), &world.namespace);
    until("an Event that says so", async || {
        let all = events.list(&ListParams::default()).await.unwrap();
        all.items
            .into_iter()
            .find(|e| e.reason.as_deref() == Some("ReportLost"))
            .map(|e| e.note)
    })
    .await;
    world.start(&other).await;
    world.end(&other, 1, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("clear", Phase::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_cannot_be_read_keeps_nobody_from_a_place() {
    let mut world = World::without_operator("unreadable-first").await;
    world
        .settings_of_the_namespace(json!({"maxConcurrentSessions": 1}))
        .await;
    world.create("cipher", json!({"prompt": "write"})).await;
    make_unreadable(&world, "cipher").await;
    // Creation times have whole seconds; equal ones go by name.
    world.create("clear", json!({"prompt": "write"})).await;
    world.create("next", json!({"prompt": "write"})).await;
    world.start_operator().await;
    let pod = world.pod("clear", 1).await;
    let waits = world
        .status_when("next", |s| {
            s.message.as_ref().is_some_and(|m| m.contains("number 1 in the queue"))
        })
        .await;
    assert_eq!(waits.reason.as_deref(), Some("Queued"));
    // Nor does one that becomes so while it waits.
    make_unreadable(&world, "next").await;
    world.create("other", json!({"prompt": "write"})).await;
    world.start(&pod).await;
    world.end(&pod, 1, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("clear", Phase::Completed).await;
    world.pod("other", 1).await;
}

#[rstest]
#[case::at_work("unreadable-at-work", false)]
#[case::and_the_operator_was_down("unreadable-down", true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_cannot_be_read_has_its_place_for_as_long_as_its_attempt_works(
    #[case] namespace: &str,
    #[case] down: bool,
) {
    let mut world = World::without_operator(namespace).await;
    world.timing.hold_unreadable = 1;
    world
        .settings_of_the_namespace(json!({"maxConcurrentSessions": 1}))
        .await;
    world.start_operator().await;
    world.create("cipher", json!({"prompt": "write"})).await;
    let pod = world.pod("cipher", 1).await;
    world.start(&pod).await;
    world.phase("cipher", Phase::Running).await;
    make_unreadable(&world, "cipher").await;
    world.create("next", json!({"prompt": "write"})).await;
    world
        .status_when("next", |s| s.reason.as_deref() == Some("Queued"))
        .await;
    // Each of these has it looked at.
    for number in 0..3 {
        let looks = world.looks().await;
        world.set_pod_status(&pod, json!({"message": number.to_string()})).await;
        until("a look", async || (world.looks().await > looks).then_some(())).await;
    }
    let told = of_cipher(&world).await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(world.status("next").await.attempt, None, "an agent is at work");
    if down {
        world.kill_operator().await;
    }
    world
        .jobs()
        .delete("cipher-job", &DeleteParams::background())
        .await
        .unwrap();
    world.obey_deletion(&pod, None).await;
    if down {
        let free = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        world
            .pods()
            .patch(&pod.name_any(), &PatchParams::default(), &free)
            .await
            .unwrap();
        world.start_operator().await;
    }
    world.pod("next", 1).await;
}

/// Counts how often the children of a session are listed.
#[derive(Clone, Default)]
struct Lists(Arc<AtomicUsize>);

impl Wire for Lists {
    fn fate(&self, request: &http::Request<kube::client::Body>) -> Fate {
        let query = request.uri().query().unwrap_or_default();
        if query.contains("session-uid%3D") && !is_watch(request) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_session_does_that_cannot_be_read_is_not_asked_where_no_places_are_counted() {
    let mut world = World::without_operator("unreadable-unbound").await;
    world.create("cipher", json!({"prompt": "write"})).await;
    make_unreadable(&world, "cipher").await;
    let lists = Lists::default();
    world.start_operator_with(wire::client(operator_config("unreadable-unbound").await, lists.clone()));
    of_cipher(&world).await;
    assert_eq!(lists.0.load(Ordering::SeqCst), 0);
}

/// What is told of the session that cannot be read.
async fn of_cipher(world: &World) -> Vec<Option<String>> {
    let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(world.client.clone(), &world.namespace);
    until("an Event", async || {
        let all = events.list(&ListParams::default()).await.unwrap();
        let found: Vec<_> = all
            .items
            .into_iter()
            .filter(|event| event.reason.as_deref() == Some("ConfigError"))
            .map(|event| event.note)
            .collect();
        (!found.is_empty()).then_some(found)
    })
    .await
}

/// Puts into its status what the schema takes and no operator of this version has written.
async fn make_unreadable(world: &World, name: &str) {
    let odd = Patch::Merge(json!({"status": {"usage": {"inputTokens": -1}}}));
    let sessions: Api<kube::core::PartialObjectMeta<crds::AgenticSession>> =
        Api::namespaced(world.client.clone(), &world.namespace);
    sessions
        .patch_status(name, &PatchParams::default(), &odd)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ran_out_of_memory_is_told_of_and_goes_on() {
    let world = world("agent-restarted").await;
    world.create("opera", json!({"prompt": "write"})).await;
    let pod = world.pod("opera", 1).await;
    world.start(&pod).await;
    world.phase("opera", Phase::Running).await;
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let agent = json!({
        "name": "agent", "image": "i", "imageID": "i", "ready": true, "restartCount": 1,
        "state": {"running": {"startedAt": now}},
        "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
    });
    world
        .set_pod_status(&pod, json!({"initContainerStatuses": [agent]}))
        .await;
    let seen = world.status_when("opera", |s| s.agent_restarts == Some(1)).await;
    assert_eq!(seen.phase, Phase::Running);
    assert!(seen.message.unwrap().contains("out of memory"));
    let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(world.client.clone(), &world.namespace);
    until("an Event", async || {
        let all = events.list(&ListParams::default()).await.unwrap();
        all.items
            .into_iter()
            .find(|e| e.reason.as_deref() == Some("AgentRestarted"))
            .map(|e| e.note)
    })
    .await;
    world.end(&pod, 1, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("opera", Phase::Completed).await;
}
