//! The operator dies at every write that it makes, or loses the answer to it: whatever a session lives through, it ends as it
//! would have without that, and the API server has seen each object made and deleted as often.
//!
//! All points are `CRASH_POINTS=all cargo test -p operator --test component crash::`, those of one life `CRASH_POINTS=Waits`;
//! otherwise a part is drawn, by `CRASH_SEED` if that is given.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use crds::{AgenticSessionStatus, Phase};
use futures::{FutureExt as _, StreamExt as _, stream};
use http::{Request, StatusCode};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams},
    client::Body,
};
use operator::TimingSettings;
use protocol::{
    Outcome, Report,
    names::{REPORT_FINALIZER, component, label},
    report::Delivery,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    plane::{broken_off, operator_config, writes},
    wire::{Fate, Wire, client_above_retries, is_write},
    world::{World, report, until},
};

/// Points that are tried when not all are.
const DRAWN: usize = 30;
/// Lives at once.
const AT_ONCE: usize = 14;

/// What happens at a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The process dies before it is sent.
    Before,
    /// The process dies when it is committed, before the answer arrives.
    After,
    /// The process lives; the answer, that it is done, is lost.
    Lost,
}

/// A fault at a write. Leases and Events are not counted: nothing rests on them.
#[derive(Clone)]
struct Crash {
    at: Option<(usize, Fault)>,
    writes: Arc<AtomicUsize>,
    happened: Arc<AtomicUsize>,
    dead: CancellationToken,
}

impl Wire for Crash {
    fn fate(&self, request: &Request<Body>) -> Fate {
        let number = if is_write(request) {
            self.writes.fetch_add(1, Ordering::SeqCst) + 1
        } else {
            0
        };
        let fault = self.at.filter(|(at, _)| *at == number).map(|(_, fault)| fault);
        if fault.is_some() {
            self.happened.fetch_add(1, Ordering::SeqCst);
        }
        match fault {
            // A dead process sends nothing more.
            _ if self.dead.is_cancelled() => Fate::Silence,
            Some(Fault::Before) => {
                self.dead.cancel();
                Fate::Silence
            }
            Some(Fault::After) => Fate::Unheard(self.dead.clone()),
            // The client's own retries would hide another.
            Some(Fault::Lost) => Fate::Garbled(StatusCode::INTERNAL_SERVER_ERROR),
            None => Fate::Pass,
        }
    }
}

/// What a session lives through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Life {
    Completes,
    Fails,
    Resumes,
    Retries,
    StartsAgain,
    Drains,
    IsKept,
    Expires,
    IsDeleted,
    Waits,
}

const LIVES: [Life; 10] = [
    Life::Completes,
    Life::Fails,
    Life::Resumes,
    Life::Retries,
    Life::StartsAgain,
    Life::Drains,
    Life::IsKept,
    Life::Expires,
    Life::IsDeleted,
    Life::Waits,
];

fn timing(life: Life) -> TimingSettings {
    TimingSettings {
        retry_first_wait: 1,
        drain_first_wait: 1,
        job_retention: if life == Life::IsKept { 1 } else { 3_600 },
        ..TimingSettings::default()
    }
}

/// What came of it.
#[derive(Debug, PartialEq)]
struct End {
    phase: Phase,
    reason: Option<String>,
    figures: [Option<u64>; 6],
    /// How often each object was made or deleted, whoever did it.
    counts: BTreeMap<String, u32>,
}

/// Lives it under an operator with one fault; answers how many writes there were, whether the fault came, and the end.
async fn live(life: Life, namespace: &str, at: Option<(usize, Fault)>) -> (usize, bool, End) {
    let mut world = World::without_operator(namespace).await;
    world.timing = timing(life);
    let crash = Crash {
        at,
        writes: Arc::default(),
        happened: Arc::default(),
        dead: CancellationToken::new(),
    };
    let doomed = client_above_retries(operator_config(namespace).await, crash.clone());
    let mut settings = world.settings();
    // Any: one that was free may be taken before the next operator listens, and nobody asks here.
    settings.metrics_address.set_port(0);
    let operators = tokio::spawn({
        let (dead, namespace) = (crash.dead.clone(), namespace.to_owned());
        async move {
            let never = CancellationToken::new;
            tokio::select! {
                ended = operator::run(doomed, settings.clone(), never()) => panic!("the operator ended: {ended:?}"),
                () = dead.cancelled() => {}
            }
            let next = Client::try_from(operator_config(&namespace).await).unwrap();
            operator::run(next, settings, never()).await.unwrap();
        }
    });
    let kubelet = world.kubelet();
    let status = Box::pin(script(&world, life)).await;
    settled(&world, life).await;
    let point = crash.writes.load(Ordering::SeqCst);
    let happened = crash.happened.load(Ordering::SeqCst) == 1;
    operators.abort();
    drop(kubelet);
    let figure = |n: Option<u32>| n.map(u64::from);
    let end = End {
        phase: status.phase,
        reason: status.reason,
        figures: [
            figure(status.run),
            figure(status.attempt),
            figure(status.free_retries),
            figure(status.drains),
            status.acked_seq,
            status.running_seconds,
        ],
        counts: counts(namespace),
    };
    (point, happened, end)
}

/// From creation to the end; every wait is for what the status says, so that the operator has seen each step.
async fn script(world: &World, life: Life) -> AgenticSessionStatus {
    let ode = if life == Life::Waits {
        Some(occupied(world).await)
    } else {
        None
    };
    let ttl = if life == Life::Expires { json!(1) } else { json!(null) };
    world
        .create(
            "poem",
            json!({"prompt": "write a poem", "ttlSecondsAfterFinished": ttl}),
        )
        .await;
    if let Some(ode) = ode {
        world
            .status_when("poem", |s| s.reason.as_deref() == Some("Queued"))
            .await;
        world.end(&ode, 3, Some(&report(Outcome::Succeeded, 1))).await;
    }
    let first = running(world, 1).await;
    let done = |run: u32| move |s: &AgenticSessionStatus| s.phase == Phase::Completed && s.run == Some(run);
    match life {
        Life::Expires => {
            world.end(&first, 4, Some(&report(Outcome::Succeeded, 1))).await;
            until("the session to go", async || {
                let session = world.sessions().get_opt("poem").await.unwrap();
                session.is_none().then_some(())
            })
            .await;
            AgenticSessionStatus::default()
        }
        Life::IsDeleted => {
            let now = DeleteParams::default();
            world.sessions().delete("poem", &now).await.unwrap();
            until("the session to go", async || {
                let session = world.sessions().get_opt("poem").await.unwrap();
                session.is_none().then_some(())
            })
            .await;
            AgenticSessionStatus::default()
        }
        Life::Completes | Life::IsKept | Life::Waits => {
            world.end(&first, 4, Some(&report(Outcome::Succeeded, 1))).await;
            world.status_when("poem", done(1)).await
        }
        Life::Fails => {
            world.end(&first, 4, Some(&report(Outcome::AgentError, 1))).await;
            world.phase("poem", Phase::Failed).await
        }
        Life::Resumes => {
            world.patch("poem", json!({"spec": {"suspend": true}})).await;
            world.phase("poem", Phase::Stopped).await;
            world.patch("poem", json!({"spec": {"suspend": false}})).await;
            let second = running(world, 2).await;
            world.end(&second, 4, Some(&report(Outcome::Succeeded, 2))).await;
            world.status_when("poem", done(2)).await
        }
        Life::Retries => {
            world
                .pods()
                .delete(&first.name_any(), &DeleteParams::default())
                .await
                .unwrap();
            let second = running(world, 2).await;
            world.end(&second, 4, Some(&report(Outcome::Succeeded, 2))).await;
            world.status_when("poem", done(1)).await
        }
        Life::StartsAgain => {
            world.end(&first, 4, Some(&report(Outcome::Succeeded, 1))).await;
            world.status_when("poem", done(1)).await;
            let click = json!({"metadata": {"annotations": {"ambient-code.io/start-requested-at": "now"}}});
            world.patch("poem", click).await;
            let second = running(world, 2).await;
            world.end(&second, 4, Some(&report(Outcome::Succeeded, 2))).await;
            world.status_when("poem", done(2)).await
        }
        Life::Drains => {
            let left = Report {
                events: Delivery::Failed,
                acked_seq: 4,
                ..report(Outcome::Succeeded, 1)
            };
            world.end(&first, 4, Some(&left)).await;
            world.status_when("poem", done(1)).await;
            let drain = drain(world).await;
            world.start(&drain).await;
            world.end(&drain, 3, Some(&report(Outcome::Succeeded, 1))).await;
            world.status_when("poem", |s| s.acked_seq == Some(17)).await
        }
    }
}

/// A namespace with one place, which another session has.
async fn occupied(world: &World) -> Pod {
    world.settle(json!({"maxConcurrentSessions": 1})).await;
    world.create("ode", json!({"prompt": "write an ode"})).await;
    let pod = world.pod("ode", 1).await;
    world.start(&pod).await;
    world.phase("ode", Phase::Running).await;
    pod
}

async fn running(world: &World, attempt: u32) -> Pod {
    let pod = world.pod("poem", attempt).await;
    world.status_when("poem", |s| s.pod_uid == pod.uid()).await;
    world.start(&pod).await;
    world
        .status_when("poem", |s| s.phase == Phase::Running && s.attempt == Some(attempt))
        .await;
    pod
}

async fn drain(world: &World) -> Pod {
    let drains = ListParams::default().labels(&format!("{}={}", label::COMPONENT, component::DRAIN));
    let pod = until("the drain's pod", async || {
        world.pods().list(&drains).await.unwrap().items.into_iter().next()
    })
    .await;
    world.status_when("poem", |s| s.pod_uid == pod.uid()).await;
    pod
}

/// Nothing is left to do: no finalizer of ours, no Job of a drain, none that was kept for long enough.
async fn settled(world: &World, life: Life) {
    until("all to settle", async || {
        let pods = world.pods().list(&ListParams::default()).await.unwrap().items;
        let held = pods
            .iter()
            .any(|pod| pod.finalizers().iter().any(|f| f == REPORT_FINALIZER));
        let jobs = world.jobs().list(&ListParams::default()).await.unwrap().items;
        let finished = jobs.iter().all(|job| {
            job.status
                .as_ref()
                .is_some_and(|s| s.conditions.as_ref().is_some_and(|c| !c.is_empty()))
        });
        let of_drain = |name: String| name.contains("-drain-");
        let drains = jobs.iter().any(|job| of_drain(job.name_any())) || pods.iter().any(|pod| of_drain(pod.name_any()));
        let goes = matches!(life, Life::IsKept | Life::Expires | Life::IsDeleted);
        let kept = goes && !(jobs.is_empty() && pods.is_empty());
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &world.namespace);
        let claimed = !claims.list(&ListParams::default()).await.unwrap().items.is_empty();
        let stays = matches!(life, Life::Expires | Life::IsDeleted) && claimed;
        (!held && finished && !drains && !kept && !stays).then_some(())
    })
    .await;
}

/// Of the session's objects, by the audit log.
fn counts(namespace: &str) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for write in writes(namespace).iter().filter_map(counted) {
        *counts.entry(write).or_insert(0) += 1;
    }
    // An operator that dies hangs up on all its requests. A creation that was carried out all the same is not made again.
    for write in broken_off(namespace).iter().filter_map(counted) {
        if write.starts_with("create ") {
            counts.entry(write).or_insert(1);
        }
    }
    counts
}

/// A write that is counted, as its verb and object. A pod's name ends in letters that differ; deletions that the kubelet's
/// stand-in makes again and again are its own.
fn counted(write: &Value) -> Option<String> {
    let (verb, resource) = (write["verb"].as_str()?, write["objectRef"]["resource"].as_str()?);
    let ours = ["jobs", "pods", "persistentvolumeclaims", "agenticsessions"].contains(&resource)
        && write["objectRef"]["subresource"].is_null();
    let user = write["user"]["username"].as_str().unwrap_or_default();
    let by_test = write["impersonatedUser"].is_null() && !user.starts_with("system:");
    if !ours || by_test || !["create", "delete"].contains(&verb) {
        return None;
    }
    let name = write["objectRef"]["name"].as_str().unwrap_or_default();
    let name = if resource == "pods" {
        name.rsplit_once('-').map_or(name, |(job, _)| job)
    } else {
        name
    };
    Some(format!("{verb} {resource}/{name}"))
}

/// Which of so many are drawn, the same for a seed.
fn drawn<T: Clone>(all: &[T], seed: u64) -> Vec<T> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let mut order: Vec<_> = all.iter().map(|point| (next(), point.clone())).collect();
    order.sort_by_key(|(key, _)| *key);
    order.into_iter().take(DRAWN).map(|(_, point)| point).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_the_operator_dies_or_loses_an_answer_a_session_ends_as_it_would_have() {
    static PLAIN: OnceLock<BTreeMap<Life, (usize, End)>> = OnceLock::new();
    let plain: BTreeMap<_, _> = stream::iter(LIVES)
        .map(async |life| {
            let namespace = format!("crash-{life:?}-never").to_lowercase();
            let (writes, _, end) = Box::pin(live(life, &namespace, None)).await;
            (life, (writes, end))
        })
        .buffer_unordered(LIVES.len())
        .collect()
        .await;
    let plain = PLAIN.get_or_init(|| plain);
    let mut points = Vec::new();
    for (life, (writes, end)) in plain {
        println!("{life:?}: {writes} writes, {end:?}");
        let faults = [Fault::Before, Fault::After, Fault::Lost];
        points.extend((1..=*writes).flat_map(|at| faults.map(|fault| (*life, at, fault))));
    }
    let all = points.len();
    let seed = std::env::var("CRASH_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap());
    match std::env::var("CRASH_POINTS").as_deref() {
        Ok("all") => {}
        Ok(life) => points.retain(|(of, ..)| format!("{of:?}") == life),
        Err(_) => points = drawn(&points, seed),
    }
    println!("{} of {all} points, CRASH_SEED={seed}", points.len());
    let tried = points.len();
    let results: Vec<_> = stream::iter(points)
        .map(async |(life, at, fault)| {
            let namespace = format!("crash-{life:?}-{fault:?}-{at}").to_lowercase();
            // One that fails does not keep the others from being tried.
            let lived = AssertUnwindSafe(Box::pin(live(life, &namespace, Some((at, fault))))).catch_unwind();
            let what = format!("{life:?}, {fault:?} at write {at}");
            match lived.await {
                Ok((_, came, end)) if end == plain[&life].1 => Ok(came),
                Ok((_, _, end)) => Err(format!("{what}: {end:?}")),
                Err(_) => Err(format!("{what}: the test panicked, see above")),
            }
        })
        .buffer_unordered(AT_ONCE)
        .inspect(|result| {
            if let Err(failure) = result {
                println!("{failure}");
            }
        })
        .collect()
        .await;
    let failures: Vec<&String> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert!(
        failures.is_empty(),
        "{} of {tried} end otherwise, CRASH_SEED={seed}: {failures:#?}",
        failures.len()
    );
    // Two steps that are seen at once make one write less.
    let came = results.iter().filter(|result| matches!(result, Ok(true))).count();
    println!("the fault came at {came} of {tried}, all end as they would have");
    assert!(came * 10 >= tried * 9, "the fault came at {came} of {tried} only");
}
