//! Every way in which a pod does not come, or does not start × the operator up, down at that moment, and restarted in the middle:
//! it is final when the time to start is over, with what hindered it.

use crds::{AgenticSessionStatus, Phase};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Event, LimitRange, Pod, ResourceQuota};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use protocol::names::label;
use serde_json::{Value, json};

use crate::{
    outcomes::Operator,
    plane::jobs_created,
    world::{World, session, until},
};

/// Seconds that a start may take: long enough for a test to hinder it first.
const START: u64 = 20;

/// What hinders it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hindrance {
    /// Somebody who is asked about pods refuses this one.
    Admission,
    /// The namespace may have no pod more.
    Quota,
    /// No node takes it.
    NoNode,
    /// Its volume is not attached; the kubelet says so in an Event alone.
    NoVolume,
    /// A Secret that is to be mounted is not there; likewise.
    NoSecretToMount,
    /// One whose entries are to be variables.
    NoSecret,
}

use Hindrance::{Admission, NoNode, NoSecret, NoSecretToMount, NoVolume, Quota};

const ROWS: &[(&str, Hindrance, &str, &str)] = &[
    ("refused", Admission, "PodRejected", "no poets here"),
    ("no-node", NoNode, "Unschedulable", "0/3 nodes are available"),
    (
        "no-volume",
        NoVolume,
        "VolumeUnavailable",
        "timed out waiting for the condition",
    ),
    (
        "no-mount",
        NoSecretToMount,
        "ConfigError",
        "secret \"theirs\" not found",
    ),
    ("no-secret", NoSecret, "ConfigError", "secret \"theirs\" not found"),
];
const QUOTA: &[(&str, Hindrance, &str, &str)] = &[("quota", Quota, "QuotaExceeded", "exceeded quota")];

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_pod_from_starting_is_final_and_named_while_the_operator_is_there() {
    matrix("hindered-up", Operator::Up).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_pod_from_starting_is_final_and_named_when_the_operator_was_down() {
    matrix("hindered-down", Operator::Down).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_pod_from_starting_is_final_and_named_when_the_operator_restarts_in_the_middle() {
    matrix("hindered-restarted", Operator::Restarted).await;
}

async fn matrix(namespace: &str, operator: Operator) {
    let quota = format!("{namespace}-quota");
    let (some, other) = tokio::join!(live(namespace, ROWS, operator), live(&quota, QUOTA, operator));
    let wrong: Vec<_> = some.into_iter().chain(other).collect();
    println!("{operator:?}: {} rows, {} wrong", ROWS.len() + QUOTA.len(), wrong.len());
    assert!(wrong.is_empty(), "{operator:?}: {wrong:#?}");
}

async fn live(namespace: &str, rows: &[(&str, Hindrance, &str, &str)], operator: Operator) -> Vec<String> {
    let mut world = World::without_operator(namespace).await;
    world.settle(json!({"startTimeout": START})).await;
    for (_, hindrance, ..) in rows {
        prepare(&world, *hindrance).await;
    }
    world.start_operator().await;
    let kubelet = world.kubelet();
    let pods = join_all(rows.iter().map(|(name, hindrance, ..)| begin(&world, name, *hindrance))).await;
    if operator == Operator::Down {
        world.kill_operator().await;
    }
    join_all(
        rows.iter()
            .zip(&pods)
            .map(|((_, hindrance, _, said), pod)| hinder(&world, *hindrance, said, pod.as_ref())),
    )
    .await;
    if operator == Operator::Restarted {
        world.kill_operator().await;
        world.start_operator().await;
    }
    if operator == Operator::Down {
        world.start_operator().await;
    }
    let mut wrong = Vec::new();
    for (name, hindrance, reason, said) in rows {
        let failed = world.phase(name, Phase::Failed).await;
        if !is(&failed, reason, said) {
            wrong.push(format!("{name}: {hindrance:?}: {failed:#?}"));
        }
    }
    until("all pods to go", async || {
        let left = world.pods().list(&kube::api::ListParams::default()).await.unwrap();
        left.items.is_empty().then_some(())
    })
    .await;
    drop(kubelet);
    let mut expected: Vec<_> = rows.iter().map(|(name, ..)| format!("{name}-job")).collect();
    expected.sort();
    let mut created = jobs_created(namespace);
    created.sort();
    if created != expected {
        wrong.push(format!("{created:?} are made"));
    }
    wrong
}

fn is(status: &AgenticSessionStatus, reason: &str, said: &str) -> bool {
    let message = status.message.as_deref().unwrap_or_default();
    status.reason.as_deref() == Some(reason)
        && message.contains(said)
        && status.attempt == Some(1)
        && status.completion_time.is_some()
        && status.running_seconds.unwrap_or(0) == 0
}

/// What stands before the session is made.
async fn prepare(world: &World, hindrance: Hindrance) {
    match hindrance {
        Quota => {
            let quotas: Api<ResourceQuota> = Api::namespaced(world.client.clone(), &world.namespace);
            let none = json!({"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}});
            let none = serde_json::from_value(none).unwrap();
            quotas.create(&PostParams::default(), &none).await.unwrap();
            until("the quota to be counted", async || {
                quotas.get("none").await.unwrap().status?.used
            })
            .await;
        }
        Admission => refuse_pods(world).await,
        NoNode | NoVolume | NoSecretToMount | NoSecret => {}
    }
}

/// A policy that refuses the pods of one session.
async fn refuse_pods(world: &World) {
    let name = format!("no-poets-{}", world.namespace);
    let refused = format!(
        "object.metadata.?labels[?'{}'].orValue('') != 'refused'",
        label::SESSION
    );
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy", "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]},
            "validations": [{"expression": refused, "message": "no poets here"}],
        },
    });
    let only_here = json!({"matchLabels": {"kubernetes.io/metadata.name": world.namespace}});
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": only_here}},
    });
    for (plural, object) in [
        ("validatingadmissionpolicies", policy),
        ("validatingadmissionpolicybindings", binding),
    ] {
        post(
            world,
            &format!("/apis/admissionregistration.k8s.io/v1/{plural}"),
            &object,
        )
        .await
        .unwrap();
    }
    // It acts some time after it is made.
    let try_pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tries", "labels": {label::SESSION: "refused"}},
        "spec": {
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "c", "image": "i",
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    let path = format!("/api/v1/namespaces/{}/pods?dryRun=All", world.namespace);
    until("pods to be refused", async || {
        let said = post(world, &path, &try_pod).await.err()?.to_string();
        said.contains("no poets here").then_some(())
    })
    .await;
}

async fn post(world: &World, path: &str, object: &Value) -> kube::Result<String> {
    let request = http::Request::post(path)
        .header("content-type", "application/json")
        .body(object.to_string().into_bytes())
        .unwrap();
    world.client.request_text(request).await
}

/// The session is made, and its pod where there will be one.
async fn begin(world: &World, name: &str, hindrance: Hindrance) -> Option<Pod> {
    let object = session(name, json!({"prompt": "write"}));
    world.sessions().create(&PostParams::default(), &object).await.unwrap();
    world.phase(name, Phase::Creating).await;
    if matches!(hindrance, Admission | Quota) {
        return None;
    }
    let pod = world.pod(name, 1).await;
    world.status_when(name, |s| s.pod_uid == pod.uid()).await;
    Some(pod)
}

async fn hinder(world: &World, hindrance: Hindrance, said: &str, pod: Option<&Pod>) {
    let Some(pod) = pod else { return };
    match hindrance {
        NoNode => {
            let condition =
                json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said});
            world.set_pod_status(pod, json!({"conditions": [condition]})).await;
        }
        NoSecret => {
            world.bind(pod).await;
            let waiting = json!({"waiting": {"reason": "CreateContainerConfigError", "message": said}});
            let runner = json!({"name": "runner", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": waiting});
            world.set_pod_status(pod, json!({"containerStatuses": [runner]})).await;
        }
        NoVolume | NoSecretToMount => {
            world.bind(pod).await;
            let said = match hindrance {
                NoVolume => format!("Unable to attach or mount volumes: unmounted volumes=[workspace]: {said}"),
                _ => format!("MountVolume.SetUp failed for volume \"mcp\" : {said}"),
            };
            let at = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let event: Event = serde_json::from_value(json!({
                "metadata": {"generateName": "mount-"}, "type": "Warning", "reason": "FailedMount", "message": said,
                "firstTimestamp": at, "lastTimestamp": at,
                "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": pod.name_any(), "namespace": world.namespace, "uid": pod.uid()},
            }))
            .unwrap();
            let events: Api<Event> = Api::namespaced(world.client.clone(), &world.namespace);
            events.create(&PostParams::default(), &event).await.unwrap();
        }
        Admission | Quota => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_pod_from_starting_is_final_when_the_time_to_start_is_over() {
    let world = World::without_operator("start-timeout").await;
    world.settle(json!({"startTimeout": START})).await;
    let mut world = world;
    world.start_operator().await;
    let _kubelet = world.kubelet();
    let rows = [
        ("unschedulable", "Unschedulable", "0/3 nodes are available"),
        ("no-secret", "ConfigError", "secret \"theirs\" not found"),
    ];
    for (name, _, said) in rows {
        world.create(name, json!({"prompt": "write"})).await;
        let pod = world.pod(name, 1).await;
        if name == "unschedulable" {
            let condition =
                json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said});
            world.set_pod_status(&pod, json!({"conditions": [condition]})).await;
        } else {
            world.bind(&pod).await;
            let waiting = json!({"waiting": {"reason": "CreateContainerConfigError", "message": said}});
            let runner = json!({"name": "runner", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": waiting});
            world.set_pod_status(&pod, json!({"containerStatuses": [runner]})).await;
        }
    }
    for (name, reason, said) in rows {
        let failed = world.phase(name, Phase::Failed).await;
        assert_eq!((failed.reason.as_deref(), failed.attempt), (Some(reason), Some(1)));
        assert!(failed.message.unwrap().contains(said));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_a_limit_range_refuses_is_explained_and_heals_or_is_final() {
    for (namespace, heals) in [("limit-range-heals", true), ("limit-range-stays", false)] {
        let world = World::without_operator(namespace).await;
        let ranges: Api<LimitRange> = Api::namespaced(world.client.clone(), namespace);
        let range = json!({"metadata": {"name": "small"}, "spec": {"limits": [{"type": "Container", "max": {"memory": "1Mi"}}]}});
        let range = serde_json::from_value(range).unwrap();
        ranges.create(&PostParams::default(), &range).await.unwrap();
        world
            .settle(json!({"startTimeout": if heals { 3_600 } else { START }}))
            .await;
        let mut world = world;
        world.start_operator().await;
        world.create("fable", json!({"prompt": "write"})).await;
        let seen = world
            .status_when("fable", |s| s.reason.as_deref() == Some("PodRejected"))
            .await;
        assert!(seen.message.unwrap().contains("maximum memory usage per Container"));
        if heals {
            ranges.delete("small", &DeleteParams::default()).await.unwrap();
            world.pod("fable", 1).await;
            world
                .status_when("fable", |s| s.reason.as_deref() == Some("Creating"))
                .await;
        } else {
            let failed = world.phase("fable", Phase::Failed).await;
            assert_eq!(failed.reason.as_deref(), Some("PodRejected"));
        }
    }
}
