//! The chart's pre-delete hook, with the rights that the chart gives it.

use k8s_openapi::api::{
    apps::v1::Deployment, authorization::v1::SelfSubjectAccessReview, batch::v1::Job, core::v1::Pod,
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, PostParams},
};
use operator::uninstall::{self, Args};
use protocol::{Outcome, names::REPORT_FINALIZER};
use serde_json::json;

use crate::{
    plane::{operator_config, try_apply},
    world::{World, report, until},
};

const NAMESPACE: &str = "uninstall";
const HOOK: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../manifests/uninstall/uninstall.yaml"
));
const OPERATOR: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/base/operator.yaml"));

/// Applies the documents of these kinds to the test's namespace.
fn install(manifests: &str, kinds: &[&str]) {
    let wanted = |document: &&str| kinds.iter().any(|kind| document.contains(&format!("\nkind: {kind}\n")));
    for document in manifests.split("\n---").filter(wanted) {
        try_apply(&document.replace("namespace: agentic-system", &format!("namespace: {NAMESPACE}"))).unwrap();
    }
}

/// The hook's rights on sessions, in the test's namespace only, so that the other tests keep their pods.
fn bound_here() -> String {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "agentic-uninstall", "namespace": NAMESPACE},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "agentic-uninstall"},
        "subjects": [{"kind": "ServiceAccount", "name": "agentic-uninstall", "namespace": NAMESPACE}],
    })
    .to_string()
}

/// The hook's program, connected as its service account.
async fn hook() -> (Client, Args) {
    let mut config = operator_config(NAMESPACE).await;
    config.auth_info.impersonate = Some(format!("system:serviceaccount:{NAMESPACE}:agentic-uninstall"));
    let args = Args {
        namespace: NAMESPACE.to_owned(),
        deployment: "agentic-operator".to_owned(),
        selector: "app.kubernetes.io/name=agentic-operator".to_owned(),
        watch_namespace: Some(NAMESPACE.to_owned()),
        timeout_seconds: 60,
    };
    let client = Client::try_from(config).unwrap();
    // The API server judges by what it has heard of roles and bindings, which is a moment later.
    let rights = [
        json!({"group": "apps", "resource": "deployments", "subresource": "scale", "name": "agentic-operator", "verb": "patch"}),
        json!({"group": "batch", "resource": "jobs", "verb": "delete"}),
    ];
    for mut right in rights {
        right["namespace"] = json!(NAMESPACE);
        let review = json!({"spec": {"resourceAttributes": right}});
        let review: SelfSubjectAccessReview = serde_json::from_value(review).unwrap();
        until("the hook's rights", async || {
            let judged = Api::all(client.clone()).create(&PostParams::default(), &review).await;
            judged.unwrap().status?.allowed.then_some(())
        })
        .await;
    }
    (client, args)
}

#[tokio::test(flavor = "multi_thread")]
async fn uninstalling_stops_what_runs_and_leaves_no_pod_that_waits_for_an_operator() {
    let mut world = World::without_operator(NAMESPACE).await;
    world.egress = Some("[]".parse().unwrap());
    world.start_operator().await;
    for name in ["running", "waiting", "done"] {
        world.create(name, json!({"prompt": "p"})).await;
    }
    let running = world.pod("running", 1).await;
    let waiting = world.pod("waiting", 1).await;
    let done = world.pod("done", 1).await;
    world.start(&running).await;
    world.kill_operator().await;
    // It ended while nobody looked: its report is not read, its finalizer still there.
    world.start(&done).await;
    world.end(&done, 3, Some(&report(Outcome::Succeeded, 1))).await;
    tokio::task::spawn_blocking(|| {
        install(OPERATOR, &["ServiceAccount", "Deployment"]);
        install(HOOK, &["ServiceAccount", "ClusterRole", "Role", "RoleBinding"]);
        try_apply(&bound_here()).unwrap();
    })
    .await
    .unwrap();

    let policies: Api<NetworkPolicy> = Api::namespaced(world.client.clone(), NAMESPACE);
    assert!(policies.get_opt("agentic-sessions").await.unwrap().is_some());
    let (client, args) = hook().await;
    let stopped = report(Outcome::Stopped, 1);
    let (uninstalled, ()) = tokio::join!(
        uninstall::run(client, args),
        world.obey_deletion(&running, Some(&stopped))
    );
    uninstalled.unwrap();

    let deployments: Api<Deployment> = Api::namespaced(world.client.clone(), NAMESPACE);
    let operator = deployments.get("agentic-operator").await.unwrap();
    assert_eq!(operator.spec.replicas, Some(0));
    assert!(
        policies.get_opt("agentic-sessions").await.unwrap().is_none(),
        "nobody would take it away"
    );
    for pod in [&running, &waiting] {
        until("the pod to be gone", async || {
            world.pod_now(pod).await.is_none().then_some(())
        })
        .await;
    }
    let left = world.pods().list(&ListParams::default()).await.unwrap().items;
    assert!(
        left.iter()
            .all(|pod: &Pod| !pod.finalizers().contains(&REPORT_FINALIZER.to_owned())),
        "{left:#?}"
    );
    let jobs: Vec<_> = world
        .jobs()
        .list(&ListParams::default())
        .await
        .unwrap()
        .iter()
        .map(Job::name_any)
        .collect();
    assert!(
        !jobs.contains(&"running-job".to_owned()) && !jobs.contains(&"waiting-job".to_owned()),
        "{jobs:?}"
    );
    assert!(
        world.sessions().get_opt("running").await.unwrap().is_some(),
        "sessions stay"
    );

    // Installed again, the operator goes on with them. Its old port may be somebody's by now.
    world.metrics.set_port(0);
    world.start_operator().await;
    assert_eq!(world.pod("running", 2).await.namespace().as_deref(), Some(NAMESPACE));
}
