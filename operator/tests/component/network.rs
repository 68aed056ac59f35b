//! The `NetworkPolicy` of a namespace with sessions.

use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use protocol::{Outcome, names::label};
use serde_json::json;

use crate::{
    plane::operator_writes,
    world::{World, report, until},
};

const NAME: &str = "agentic-sessions";
/// No protocol: the API server fills it in, and what it makes of the operator's words must not look like somebody else's.
const EGRESS: &str = r#"[{"to": [{"namespaceSelector": {"matchLabels": {}}}], "ports": [{"port": 53}]}, {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": []}}]}]"#;

fn policies(world: &World) -> Api<NetworkPolicy> {
    Api::namespaced(world.client.clone(), &world.namespace)
}

async fn guarded(namespace: &str) -> World {
    let mut world = World::without_operator(namespace).await;
    world.egress = Some(EGRESS.parse().unwrap());
    world.timing.network_kept = 1;
    world
}

async fn policy(world: &World) -> NetworkPolicy {
    until("the policy", async || policies(world).get_opt(NAME).await.unwrap()).await
}

async fn events(world: &World) -> Vec<String> {
    let events: Api<k8s_openapi::api::core::v1::Event> = Api::namespaced(world.client.clone(), &world.namespace);
    let of_policies = ListParams::default().fields("involvedObject.kind=NetworkPolicy");
    let events = events.list(&of_policies).await.unwrap().items;
    events.into_iter().filter_map(|event| event.message).collect()
}

/// Index of the first write of this verb to this kind.
fn first(world: &World, verb: &str, kind: &str) -> usize {
    let writes = operator_writes(&world.namespace);
    let found = writes
        .iter()
        .position(|entry| entry["verb"] == verb && entry["objectRef"]["resource"] == kind);
    found.unwrap_or_else(|| panic!("no {verb} of {kind}"))
}

fn count(world: &World, verb: &str) -> usize {
    let writes = operator_writes(&world.namespace);
    let of_policies = writes
        .iter()
        .filter(|entry| entry["objectRef"]["resource"] == "networkpolicies");
    of_policies.filter(|entry| entry["verb"] == verb).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_is_there_before_the_first_job_is_put_right_and_goes_behind_the_last_session() {
    let mut world = guarded("policy").await;
    world.start_operator().await;
    assert!(policies(&world).get_opt(NAME).await.unwrap().is_none());
    for name in ["poem", "ode"] {
        world.create(name, json!({"prompt": "p"})).await;
        world.pod(name, 1).await;
    }
    assert!(
        first(&world, "create", "networkpolicies") < first(&world, "create", "jobs"),
        "a pod that starts is guarded"
    );
    let made = policy(&world).await;
    let spec = serde_json::to_value(made.spec.as_ref().unwrap()).unwrap();
    assert_eq!(
        spec["podSelector"]["matchLabels"],
        json!({label::MANAGED_BY: label::MANAGER})
    );
    let pod = world.pod("poem", 1).await;
    assert_eq!(pod.labels()[label::MANAGED_BY], label::MANAGER, "it is about the pods");
    assert_eq!(spec["policyTypes"], json!(["Ingress", "Egress"]));
    assert_eq!(
        (spec.get("ingress"), &spec["egress"][1]["to"][0]["ipBlock"]["cidr"]),
        (None, &json!("0.0.0.0/0"))
    );

    // Somebody opens it. What is written of it besides its spec is theirs to write.
    let open = json!({"metadata": {"annotations": {"note": "opened"}}, "spec": {"ingress": [{}], "egress": [{}]}});
    policies(&world)
        .patch(NAME, &PatchParams::default(), &Patch::Merge(open))
        .await
        .unwrap();
    let closed = until("the policy to be put right", async || {
        let policy = policies(&world).get(NAME).await.unwrap();
        (policy.spec == made.spec).then_some(policy)
    })
    .await;
    assert_eq!(closed.annotations()["note"], "opened");
    // Somebody takes it away.
    policies(&world).delete(NAME, &DeleteParams::default()).await.unwrap();
    until("a new policy", async || {
        let policy = policies(&world).get_opt(NAME).await.unwrap()?;
        (policy.uid() != made.uid()).then_some(())
    })
    .await;

    let kubelet = world.kubelet();
    world.sessions().delete("ode", &DeleteParams::default()).await.unwrap();
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    world.phase("poem", crds::Phase::Running).await;
    world.end(&pod, 3, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("poem", crds::Phase::Completed).await;
    assert_eq!(count(&world, "delete"), 0, "a session is there");
    world.sessions().delete("poem", &DeleteParams::default()).await.unwrap();
    until("the policy to go", async || {
        policies(&world).get_opt(NAME).await.unwrap().is_none().then_some(())
    })
    .await;
    let all = ListParams::default();
    assert!(world.sessions().list(&all).await.unwrap().items.is_empty());
    assert!(world.pods().list(&all).await.unwrap().items.is_empty());
    drop(kubelet);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_right_is_not_written_to_whatever_the_api_server_fills_in() {
    let mut world = guarded("policy-rests").await;
    world.start_operator().await;
    world.create("poem", json!({"prompt": "p"})).await;
    world.pod("poem", 1).await;
    let made = policy(&world).await;
    for life in 0..2 {
        let looks = async || {
            let policy = policies(&world).get(NAME).await.unwrap();
            assert_eq!(
                (policy.resource_version(), policy.metadata.generation),
                (made.resource_version(), made.metadata.generation),
                "life {life}"
            );
        };
        let ticks = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
        while tokio::time::Instant::now() < ticks {
            looks().await;
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        assert_eq!(count(&world, "update"), 0, "life {life}");
        world.kill_operator().await;
        world.start_operator().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_of_that_name_that_is_not_ours_stays_and_sessions_run_under_it() {
    let mut world = guarded("policy-foreign").await;
    let theirs = json!({"metadata": {"name": NAME}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}});
    let theirs: NetworkPolicy = serde_json::from_value(theirs).unwrap();
    let theirs = policies(&world).create(&PostParams::default(), &theirs).await.unwrap();
    world.start_operator().await;
    world.create("poem", json!({"prompt": "p"})).await;
    world.pod("poem", 1).await;
    until("an Event about it", async || {
        let said = events(&world).await;
        said.iter()
            .any(|text| text.contains("not the operator's and is left as it is"))
            .then_some(())
    })
    .await;
    let kubelet = world.kubelet();
    world.sessions().delete("poem", &DeleteParams::default()).await.unwrap();
    // One of another name goes when the last session has gone: the operator has looked at this one by then, too.
    until("the session's pod to go", async || {
        world
            .pods()
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .is_empty()
            .then_some(())
    })
    .await;
    let now = policies(&world).get(NAME).await.unwrap();
    assert_eq!(
        (now.uid(), now.resource_version()),
        (theirs.uid(), theirs.resource_version())
    );

    // Given to the operator, it is the operator's.
    world.create("ode", json!({"prompt": "p"})).await;
    let given = json!({"metadata": {"labels": {label::MANAGED_BY: label::MANAGER}}});
    policies(&world)
        .patch(NAME, &PatchParams::default(), &Patch::Merge(given))
        .await
        .unwrap();
    until("the policy to be put right", async || {
        let egress = policies(&world).get(NAME).await.unwrap().spec?.egress?;
        (egress.len() == 2).then_some(())
    })
    .await;
    drop(kubelet);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_the_api_server_refuses_holds_sessions_back_and_they_say_so() {
    let mut world = guarded("policy-refused").await;
    world.egress = Some(r#"[{"to": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]"#.parse().unwrap());
    world.start_operator().await;
    world.create("poem", json!({"prompt": "p"})).await;
    let waits = world.status_when("poem", |s| s.reason.is_some()).await;
    assert_eq!(
        (waits.phase, waits.reason.as_deref()),
        (crds::Phase::Pending, Some("ConfigError"))
    );
    let message = waits.message.unwrap();
    assert!(
        message.contains("NetworkPolicy agentic-sessions") && message.contains("10.0.0.0/33"),
        "{message}"
    );
    // Told otherwise, the next operator begins it.
    world.kill_operator().await;
    world.egress = None;
    world.start_operator().await;
    world.pod("poem", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_is_to_keep_no_policies_takes_its_own_away() {
    let mut world = guarded("policy-off").await;
    world.start_operator().await;
    world.create("poem", json!({"prompt": "p"})).await;
    policy(&world).await;
    world.kill_operator().await;
    world.egress = None;
    world.start_operator().await;
    until("the policy to go", async || {
        policies(&world).get_opt(NAME).await.unwrap().is_none().then_some(())
    })
    .await;
}
