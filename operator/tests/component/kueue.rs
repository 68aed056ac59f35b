//! Sessions in the queues of a real Kueue, its webhooks included. To build it takes minutes, so these run with `cargo xtask kueue` alone.

use std::sync::OnceLock;

use crds::{AgenticSessionStatus, Phase};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use protocol::{
    Outcome,
    names::{
        annotation::RESOLVED,
        label::{KUEUE_PRIORITY, KUEUE_QUEUE},
    },
};
use serde_json::{Value, json};

use crate::{
    plane::{jobs_created, plane},
    world::{World, report, session, until},
};

/// What a session takes of a queue when it says nothing about it: its agent and its runner together.
const CPU: u32 = 550;
const MEBIBYTES: u32 = 1_088;

/// A namespace with an operator, where Kueue is at work.
async fn world(name: &str) -> World {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let install = || INSTALLED.get_or_init(|| plane().start_kueue().map_err(|error| format!("{error:#}")));
    let installed = tokio::task::spawn_blocking(install).await.unwrap();
    installed.as_ref().expect("Kueue starts");
    let world = World::new(name).await;
    apply(&world, "ResourceFlavor", "resourceflavors", "default", json!({})).await;
    for (name, value) in [("low", 10), ("high", 1_000)] {
        let class = json!({"value": value});
        apply(&world, "WorkloadPriorityClass", "workloadpriorityclasses", name, class).await;
    }
    world
        .settings_of_the_namespace(json!({"allowedPriorityClasses": ["low", "high"]}))
        .await;
    world
}

fn kind(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("kueue.x-k8s.io", "v1beta2", kind), plural)
}

/// Makes or changes an object of the cluster; `object` is all of it but its kind and name.
async fn apply(world: &World, kind_: &str, plural: &str, name: &str, mut object: Value) {
    object["apiVersion"] = json!("kueue.x-k8s.io/v1beta2");
    object["kind"] = json!(kind_);
    object["metadata"] = json!({"name": name});
    let api: Api<DynamicObject> = Api::all_with(world.client.clone(), &kind(kind_, plural));
    let as_admin = PatchParams::apply("admin").force();
    api.patch(name, &as_admin, &Patch::Apply(object)).await.unwrap();
}

/// The `ClusterQueue` behind a queue of this namespace.
fn behind(world: &World, queue: &str) -> String {
    format!("{}-{queue}", world.namespace)
}

/// Gives the queue room for so many sessions.
async fn room(world: &World, queue: &str, sessions: u32) {
    let spec = json!({
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": "default", "resources": [
            {"name": "cpu", "nominalQuota": format!("{}m", CPU * sessions)},
            {"name": "memory", "nominalQuota": format!("{}Mi", MEBIBYTES * sessions)},
        ]}]}],
    });
    let name = behind(world, queue);
    apply(world, "ClusterQueue", "clusterqueues", &name, json!({"spec": spec})).await;
}

/// What the queue's admin does to all that is in it.
async fn stop(world: &World, queue: &str, policy: &str) {
    let queues: Api<DynamicObject> = Api::all_with(world.client.clone(), &kind("ClusterQueue", "clusterqueues"));
    let patch = Patch::Merge(json!({"spec": {"stopPolicy": policy}}));
    let name = behind(world, queue);
    queues.patch(&name, &PatchParams::default(), &patch).await.unwrap();
}

/// Makes a queue with room for so many sessions.
async fn queue(world: &World, name: &str, sessions: u32) {
    room(world, name, sessions).await;
    let object = json!({
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "LocalQueue",
        "metadata": {"name": name},
        "spec": {"clusterQueue": behind(world, name)},
    });
    let queues: Api<DynamicObject> = Api::namespaced_with(
        world.client.clone(),
        &world.namespace,
        &kind("LocalQueue", "localqueues"),
    );
    let object = serde_json::from_value(object).unwrap();
    queues.create(&PostParams::default(), &object).await.unwrap();
}

fn workloads(world: &World) -> Api<DynamicObject> {
    Api::namespaced_with(world.client.clone(), &world.namespace, &kind("Workload", "workloads"))
}

/// What Kueue made of a Job, once it is as it should be.
async fn workload(world: &World, job: &str, is: impl Fn(&Value) -> bool) -> Value {
    let last = std::cell::RefCell::new(Value::Null);
    let wait = until("a Workload", async || {
        let all = workloads(world).list(&ListParams::default()).await.unwrap();
        let found = all
            .into_iter()
            .find(|w| w.owner_references().iter().any(|o| o.name == job))?;
        let found = serde_json::to_value(found).unwrap();
        last.replace(found.clone());
        is(&found).then_some(found)
    });
    tokio::select! {
        found = wait => found,
        () = tokio::time::sleep(crate::world::PATIENCE / 10 * 9) => panic!("the Workload of {job} stays {:#}", last.borrow()),
    }
}

fn condition<'a>(workload: &'a Value, type_: &str) -> Option<&'a Value> {
    let conditions = workload["status"]["conditions"].as_array()?;
    conditions.iter().find(|c| c["type"] == type_)
}

fn is(workload: &Value, type_: &str, status: &str) -> bool {
    condition(workload, type_).is_some_and(|c| c["status"] == status)
}

/// Waits until Kueue counts so many sessions in a queue.
async fn taken(world: &World, queue: &str, sessions: u32) {
    let queues: Api<DynamicObject> = Api::all_with(world.client.clone(), &kind("ClusterQueue", "clusterqueues"));
    let expected = match sessions {
        0 => "0".to_owned(),
        n => format!("{}m", CPU * n),
    };
    until("the use of the queue", async || {
        let queue = queues.get(&behind(world, queue)).await.unwrap();
        let usage = &queue.data["status"]["flavorsUsage"][0]["resources"];
        let cpu = usage.as_array()?.iter().find(|r| r["name"] == "cpu")?;
        (cpu["total"] == *expected).then_some(())
    })
    .await;
}

async fn create(world: &World, name: &str, labels: &[(&str, &str)]) {
    let mut session = session(name, json!({"prompt": "p"}));
    let labels = labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
    session.metadata.labels = Some(labels.collect());
    world.sessions().create(&PostParams::default(), &session).await.unwrap();
}

async fn waits(world: &World, name: &str) -> AgenticSessionStatus {
    world
        .status_when(name, |s| {
            s.phase == Phase::Creating && s.reason.as_deref() == Some("Queued")
        })
        .await
}

/// The attempt is let go by Kueue, and runs.
async fn runs(world: &World, name: &str, attempt: u32) -> k8s_openapi::api::core::v1::Pod {
    let pod = world.pod(name, attempt).await;
    world.start(&pod).await;
    let running = world
        .status_when(name, |s| s.phase == Phase::Running && s.attempt == Some(attempt))
        .await;
    assert_eq!(admitted(&running), ("True".into(), "Admitted".into()));
    pod
}

async fn completes(world: &World, name: &str, attempt: u32) -> AgenticSessionStatus {
    let pod = runs(world, name, attempt).await;
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, attempt))).await;
    world.phase(name, Phase::Completed).await
}

fn admitted(status: &AgenticSessionStatus) -> (String, String) {
    let found = status.conditions.iter().find(|c| c.type_ == "Admitted").unwrap();
    (found.status.clone(), found.reason.clone())
}

/// No webhook keeps an attempt from what its session says by now.
fn nothing_is_refused(status: &AgenticSessionStatus) {
    let accepted = status.conditions.iter().find(|c| c.type_ == "SpecAccepted");
    assert!(accepted.is_none_or(|c| c.status == "True"), "{accepted:?}");
}

/// Nobody lets a Job go that has to wait.
async fn is_held(world: &World, job: &str) {
    let job = world.jobs().get(job).await.unwrap();
    assert_eq!(job.spec.unwrap().suspend, Some(true));
}

async fn nothing_is_left(world: &World) {
    until("no Workload", async || {
        let all = workloads(world).list(&ListParams::default()).await.unwrap();
        all.items.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "builds Kueue: cargo xtask kueue"]
async fn a_session_waits_for_quota_takes_what_its_containers_request_and_gives_it_back_to_the_next() {
    let world = world("real-kueue").await;
    queue(&world, "night", 0).await;
    create(&world, "first", &[(KUEUE_QUEUE, "night")]).await;
    let queued = waits(&world, "first").await;
    assert!(queued.message.as_deref().unwrap().contains("first-job is suspended"));
    assert_eq!(admitted(&queued), ("False".into(), "Queued".into()));
    let waiting = workload(&world, "first-job", |w| is(w, "QuotaReserved", "False")).await;
    println!(
        "without quota Kueue says: {}",
        condition(&waiting, "QuotaReserved").unwrap()
    );
    is_held(&world, "first-job").await;

    room(&world, "night", 1).await;
    let pod = runs(&world, "first", 1).await;
    let running = workload(&world, "first-job", |w| is(w, "Admitted", "True")).await;
    let counted = &running["status"]["admission"]["podSetAssignments"][0];
    println!("Kueue counts {}", counted["resourceUsage"]);
    let (cpu, memory) = (format!("{CPU}m"), format!("{MEBIBYTES}Mi"));
    assert_eq!(counted["resourceUsage"], json!({"cpu": cpu, "memory": memory}));
    taken(&world, "night", 1).await;

    create(&world, "second", &[(KUEUE_QUEUE, "night")]).await;
    waits(&world, "second").await;
    let waiting = workload(&world, "second-job", |w| is(w, "QuotaReserved", "False")).await;
    println!(
        "behind another Kueue says: {}",
        condition(&waiting, "QuotaReserved").unwrap()
    );
    is_held(&world, "second-job").await;

    world.end(&pod, 2, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("first", Phase::Completed).await;
    workload(&world, "first-job", |w| is(w, "Finished", "True")).await;
    completes(&world, "second", 1).await;
    taken(&world, "night", 0).await;
    assert_eq!(jobs_created(&world.namespace), ["first-job", "second-job"]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "builds Kueue: cargo xtask kueue"]
async fn who_is_preempted_goes_on_when_there_is_room_again_and_has_used_up_no_try() {
    let world = world("real-kueue-preempts").await;
    let _kubelet = world.kubelet();
    queue(&world, "night", 1).await;
    create(&world, "poem", &[(KUEUE_QUEUE, "night"), (KUEUE_PRIORITY, "low")]).await;
    runs(&world, "poem", 1).await;
    create(&world, "alarm", &[(KUEUE_QUEUE, "night"), (KUEUE_PRIORITY, "high")]).await;
    let alarm = runs(&world, "alarm", 1).await;
    let again = world
        .status_when("poem", |s| {
            s.attempt == Some(2) && s.reason.as_deref() == Some("Queued")
        })
        .await;
    assert_eq!(again.turns, Some(3), "what the first attempt did is counted");
    is_held(&world, "poem-job-2").await;
    world.end(&alarm, 2, Some(&report(Outcome::Succeeded, 1))).await;
    let done = completes(&world, "poem", 2).await;
    assert_eq!((done.free_retries.unwrap_or(0), done.run), (0, Some(1)));
    taken(&world, "night", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "builds Kueue: cargo xtask kueue"]
async fn who_is_put_out_by_hand_goes_on_in_another_attempt_and_waits_while_the_queue_is_stopped() {
    let world = world("real-kueue-put-out").await;
    let _kubelet = world.kubelet();
    queue(&world, "night", 1).await;
    create(&world, "poem", &[(KUEUE_QUEUE, "night")]).await;
    let pod = runs(&world, "poem", 1).await;
    let admitted = workload(&world, "poem-job", |w| is(w, "Admitted", "True")).await;
    let name = admitted["metadata"]["name"].as_str().unwrap();
    let inactive = Patch::Merge(json!({"spec": {"active": false}}));
    workloads(&world)
        .patch(name, &PatchParams::default(), &inactive)
        .await
        .unwrap();
    until("the pod to go", async || {
        world.pod_now(&pod).await.is_none().then_some(())
    })
    .await;
    // The next Job has a Workload of its own, which is active.
    runs(&world, "poem", 2).await;
    stop(&world, "night", "HoldAndDrain").await;
    world
        .status_when("poem", |s| {
            s.attempt == Some(3) && s.reason.as_deref() == Some("Queued")
        })
        .await;
    workload(&world, "poem-job-3", |w| is(w, "QuotaReserved", "False")).await;
    is_held(&world, "poem-job-3").await;
    stop(&world, "night", "None").await;
    let done = completes(&world, "poem", 3).await;
    assert_eq!((done.free_retries.unwrap_or(0), done.run), (0, Some(1)));
    taken(&world, "night", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "builds Kueue: cargo xtask kueue"]
async fn a_session_that_waits_is_moved_with_its_labels_and_keeps_a_priority_that_kueue_lets_nobody_remove() {
    let world = world("real-kueue-moved").await;
    queue(&world, "night", 0).await;
    queue(&world, "day", 0).await;
    create(&world, "poem", &[(KUEUE_QUEUE, "night")]).await;
    workload(&world, "poem-job", |w| w["spec"]["queueName"] == "night").await;
    let label = async |queue: &str, priority: Value| {
        let labels = json!({KUEUE_QUEUE: queue, KUEUE_PRIORITY: priority});
        world.patch("poem", json!({"metadata": {"labels": labels}})).await;
    };
    let is_in = |queue: &'static str, priority: &'static str| {
        move |w: &Value| w["spec"]["queueName"] == queue && w["spec"]["priorityClassRef"]["name"] == priority
    };
    label("day", json!("low")).await;
    workload(&world, "poem-job", is_in("day", "low")).await;
    label("night", json!("high")).await;
    workload(&world, "poem-job", is_in("night", "high")).await;

    let told = async |timeout: &str| {
        until("the Job to be told", async || {
            let job = world.jobs().get("poem-job").await.unwrap();
            job.annotations()[RESOLVED].contains(timeout).then_some(())
        })
        .await;
    };

    // What is said when somebody tries.
    let change = async |labels: Value| {
        let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
        let changed = world.jobs().patch("poem-job", &PatchParams::default(), &patch).await;
        changed.map(drop).map_err(|error| error.to_string())
    };
    let said = change(json!({KUEUE_PRIORITY: null})).await.unwrap_err();
    println!("a priority is removed: {said}");
    assert!(said.contains("cannot be removed"), "{said}");

    label("day", Value::Null).await;
    workload(&world, "poem-job", is_in("day", "high")).await;
    world.patch("poem", json!({"spec": {"timeout": 77}})).await;
    told("77").await;
    nothing_is_refused(&waits(&world, "poem").await);

    room(&world, "day", 1).await;
    let pod = runs(&world, "poem", 1).await;
    let said = change(json!({KUEUE_QUEUE: "night"})).await.unwrap_err();
    println!("one that runs is moved: {said}");
    assert!(said.contains("immutable"), "{said}");
    // It stays where it is, and nothing of it is refused.
    label("night", json!("low")).await;
    world.patch("poem", json!({"spec": {"timeout": 88}})).await;
    told("88").await;
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, 1))).await;
    nothing_is_refused(&world.phase("poem", Phase::Completed).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "builds Kueue: cargo xtask kueue"]
async fn a_session_that_is_deleted_leaves_no_workload_whether_it_waited_or_ran() {
    let world = world("real-kueue-deleted").await;
    let _kubelet = world.kubelet();
    queue(&world, "night", 1).await;
    create(&world, "runs", &[(KUEUE_QUEUE, "night")]).await;
    runs(&world, "runs", 1).await;
    create(&world, "waits", &[(KUEUE_QUEUE, "night")]).await;
    workload(&world, "waits-job", |w| is(w, "QuotaReserved", "False")).await;
    for name in ["waits", "runs"] {
        world.sessions().delete(name, &DeleteParams::default()).await.unwrap();
    }
    nothing_is_left(&world).await;
    taken(&world, "night", 0).await;
    create(&world, "next", &[(KUEUE_QUEUE, "night")]).await;
    completes(&world, "next", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "builds Kueue: cargo xtask kueue"]
async fn a_session_waits_for_a_queue_that_does_not_exist_and_goes_on_when_it_is_made() {
    let world = world("real-kueue-nowhere").await;
    create(&world, "poem", &[(KUEUE_QUEUE, "night")]).await;
    let waiting = workload(&world, "poem-job", |w| is(w, "QuotaReserved", "False")).await;
    let said = condition(&waiting, "QuotaReserved").unwrap();
    println!("without a queue Kueue says: {said}");
    assert!(said["message"].as_str().unwrap().contains("night"), "{said}");
    waits(&world, "poem").await;
    is_held(&world, "poem-job").await;
    queue(&world, "night", 1).await;
    completes(&world, "poem", 1).await;
}
