//! Every way that an attempt ends × the operator up, down at that moment, and restarted in the middle.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use crds::{AgenticSessionStatus, Phase};
use futures::{TryStreamExt as _, future::join_all};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher},
};
use operator::TimingSettings;
use protocol::{Outcome, Report, names::REPORT_FINALIZER};
use serde_json::json;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    plane::jobs_created,
    world::{PATIENCE, World, report, until},
};

/// What happens to an attempt.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// Its runner says how it ended.
    Says(Outcome),
    /// Its runner is killed, and leaves its last report between two turns.
    Killed,
    /// Its runner is killed for memory and leaves nothing.
    OutOfMemory,
    /// The cluster ends its pod, and says so in the condition `DisruptionTarget`.
    Disrupted(&'static str),
    /// The kubelet ends it: the node is short of something.
    NodePressure,
    /// The kubelet ends it: it uses more disk than it may.
    DiskLimit,
    /// The kubelet of its node does not admit it.
    Refused,
    /// Somebody deletes its pod.
    PodDeleted,
    /// Somebody takes its pod away, finalizers and all.
    PodForced,
    /// Somebody deletes its Job.
    JobDeleted,
    /// Its Job's deadline passes.
    JobDeadline,
    /// Its session is suspended.
    Suspended,
    /// A container does not start, in this state, and is given up.
    Hindered(&'static str),
    /// Somebody who admits Jobs takes its place away.
    JobSuspended,
}

/// What follows from it.
#[derive(Clone, Copy, Debug)]
enum Follows {
    /// The run is over, and so is the session.
    Over(Phase, &'static str),
    /// Another attempt, which counts.
    Counts(&'static str),
    /// Another attempt, free of charge.
    Free(&'static str),
    /// It waits to be admitted again.
    Waits,
}

use Event::{
    DiskLimit, Disrupted, Hindered, JobDeadline, JobDeleted, JobSuspended, Killed, NodePressure, OutOfMemory,
    PodDeleted, PodForced, Refused, Says, Suspended,
};
use Follows::{Counts, Free, Over, Waits};

const ROWS: &[(&str, Event, Follows)] = &[
    (
        "succeeded",
        Says(Outcome::Succeeded),
        Over(Phase::Completed, "Completed"),
    ),
    (
        "ended",
        Says(Outcome::EndedByRequest),
        Over(Phase::Completed, "Completed"),
    ),
    (
        "agent-error",
        Says(Outcome::AgentError),
        Over(Phase::Failed, "AgentError"),
    ),
    ("max-turns", Says(Outcome::MaxTurns), Over(Phase::Failed, "MaxTurns")),
    (
        "budget",
        Says(Outcome::BudgetExceeded),
        Over(Phase::Failed, "BudgetExceeded"),
    ),
    ("timeout", Says(Outcome::Timeout), Over(Phase::Failed, "Timeout")),
    (
        "no-credentials",
        Says(Outcome::NoCredentials),
        Over(Phase::Failed, "NoCredentials"),
    ),
    (
        "bad-credentials",
        Says(Outcome::InvalidCredentials),
        Over(Phase::Failed, "InvalidCredentials"),
    ),
    (
        "config-error",
        Says(Outcome::ConfigError),
        Over(Phase::Failed, "ConfigError"),
    ),
    (
        "unavailable",
        Says(Outcome::ModelUnavailable),
        Counts("ModelUnavailable"),
    ),
    ("rate-limited", Says(Outcome::RateLimited), Counts("RateLimited")),
    ("clone-network", Says(Outcome::CloneUnreachable), Counts("CloneFailed")),
    (
        "clone-refused",
        Says(Outcome::CloneRefused),
        Over(Phase::Failed, "CloneFailed"),
    ),
    ("push-network", Says(Outcome::PushUnreachable), Counts("PushFailed")),
    (
        "push-refused",
        Says(Outcome::PushRefused),
        Over(Phase::Failed, "PushFailed"),
    ),
    (
        "agent-oom",
        Says(Outcome::OutOfMemory),
        Over(Phase::Failed, "OOMKilled"),
    ),
    ("agent-lost", Says(Outcome::AgentLost), Over(Phase::Failed, "AgentLost")),
    ("volume", Says(Outcome::VolumeUnavailable), Counts("VolumeUnavailable")),
    ("disk-full", Says(Outcome::DiskFull), Counts("DiskFull")),
    ("superseded", Says(Outcome::Superseded), Counts("RunnerCrashed")),
    ("runner-error", Says(Outcome::RunnerError), Counts("RunnerCrashed")),
    ("inactive", Says(Outcome::Inactive), Over(Phase::Stopped, "Inactivity")),
    (
        "interrupted",
        Says(Outcome::StoppedByUser),
        Over(Phase::Stopped, "StoppedByUser"),
    ),
    ("killed", Killed, Counts("RunnerCrashed")),
    ("out-of-memory", OutOfMemory, Counts("OOMKilled")),
    ("drained", Disrupted("EvictionByEvictionAPI"), Free("Evicted")),
    ("preempted", Disrupted("PreemptionByScheduler"), Free("Preempted")),
    ("tainted", Disrupted("DeletionByTaintManager"), Free("NodeLost")),
    ("shutdown", Disrupted("TerminationByKubelet"), Free("Evicted")),
    ("pressure", NodePressure, Free("Evicted")),
    ("disk-limit", DiskLimit, Counts("DiskFull")),
    ("refused", Refused, Free("PodRejected")),
    ("pod-deleted", PodDeleted, Counts("PodDeleted")),
    ("pod-forced", PodForced, Counts("OutcomeUnknown")),
    ("job-deleted", JobDeleted, Counts("PodDeleted")),
    ("job-deadline", JobDeadline, Over(Phase::Failed, "Timeout")),
    ("suspended", Suspended, Over(Phase::Stopped, "StoppedByUser")),
    (
        "no-image",
        Hindered("ImagePullBackOff"),
        Over(Phase::Failed, "ImagePullFailed"),
    ),
    (
        "bad-image-name",
        Hindered("InvalidImageName"),
        Over(Phase::Failed, "ImagePullFailed"),
    ),
    (
        "create-error",
        Hindered("CreateContainerError"),
        Over(Phase::Failed, "ConfigError"),
    ),
    (
        "start-error",
        Hindered("StartError"),
        Over(Phase::Failed, "ConfigError"),
    ),
    ("job-suspended", JobSuspended, Waits),
];

/// What the operator goes through meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    Up,
    Down,
    Restarted,
}

#[tokio::test(flavor = "multi_thread")]
async fn each_outcome_is_recorded_as_what_it_is_while_the_operator_is_there() {
    matrix("outcomes-up", Operator::Up).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_outcome_is_recorded_as_what_it_is_when_the_operator_was_down() {
    matrix("outcomes-down", Operator::Down).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_outcome_is_recorded_as_what_it_is_when_the_operator_restarts_in_the_middle() {
    matrix("outcomes-restarted", Operator::Restarted).await;
}

/// What a session has said.
#[derive(Clone, Default)]
struct Told {
    last: AgenticSessionStatus,
    /// Of ends that another attempt follows.
    retrying: String,
}

/// What all sessions have said, by a watch: what is said until the next attempt begins may be missed by who looks now and then.
struct Listener {
    told: Arc<Mutex<BTreeMap<String, Told>>>,
    _task: AbortOnDropHandle<()>,
}

impl Listener {
    fn new(world: &World) -> Self {
        let told: Arc<Mutex<BTreeMap<String, Told>>> = Arc::default();
        let (sessions, all) = (world.sessions(), told.clone());
        let task = tokio::spawn(async move {
            let changes = watcher(sessions, watcher::Config::default())
                .default_backoff()
                .applied_objects();
            let mut changes = std::pin::pin!(changes);
            loop {
                let session = match changes.try_next().await {
                    Ok(Some(session)) => session,
                    Ok(None) => return,
                    // It is begun anew.
                    Err(_) => continue,
                };
                let mut told = all.lock().unwrap();
                let told = told.entry(session.name_any()).or_default();
                told.last = session.status.unwrap_or_default();
                if told.last.reason.as_deref() == Some("Retrying") {
                    told.retrying += told.last.message.as_deref().unwrap_or_default();
                }
            }
        });
        Self {
            told,
            _task: AbortOnDropHandle::new(task),
        }
    }

    fn told(&self, session: &str) -> Told {
        self.told.lock().unwrap().get(session).cloned().unwrap_or_default()
    }
}

async fn matrix(namespace: &str, operator: Operator) {
    let mut world = World::without_operator(namespace).await;
    let listener = Listener::new(&world);
    world.timing = TimingSettings {
        container_grace: 3,
        retry_first_wait: 2,
        ..TimingSettings::default()
    };
    world.start_operator().await;
    let _kubelet = world.kubelet();
    join_all(ROWS.iter().map(|(name, event, _)| begin(&world, name, *event))).await;
    if operator == Operator::Down {
        world.kill_operator().await;
    }
    let pods: Vec<Pod> = join_all(ROWS.iter().map(|(name, ..)| world.pod(name, 1))).await;
    let rows = || ROWS.iter().zip(&pods);
    join_all(rows().map(|((name, event, _), pod)| first_half(&world, name, *event, pod))).await;
    if operator == Operator::Restarted {
        world.kill_operator().await;
        world.start_operator().await;
    }
    join_all(rows().map(|((name, event, _), pod)| second_half(&world, name, *event, pod))).await;
    if operator == Operator::Down {
        world.start_operator().await;
    }
    let wrong: Vec<_> = join_all(rows().map(|(row, pod)| judged(&world, &listener, row, pod)))
        .await
        .into_iter()
        .flatten()
        .collect();
    println!("{operator:?}: {} outcomes, {} wrong", ROWS.len(), wrong.len());
    assert!(wrong.is_empty(), "{operator:?}: {wrong:#?}");
    let created = jobs_created(namespace);
    let mut once = created.clone();
    once.dedup();
    assert_eq!(created, once, "no Job is made twice");
}

async fn begin(world: &World, name: &str, event: Event) {
    world.create(name, json!({"prompt": "write"})).await;
    let pod = world.pod(name, 1).await;
    world.status_when(name, |s| s.pod_uid == pod.uid()).await;
    if matches!(event, Hindered(_) | Refused) {
        world.bind(&pod).await;
    } else {
        world.start(&pod).await;
        world.phase(name, Phase::Running).await;
    }
}

async fn first_half(world: &World, name: &str, event: Event, pod: &Pod) {
    match event {
        Says(outcome) => world.end_runner(pod, 7, Some(&report(outcome, 1))).await,
        Killed => world.end_runner(pod, 7, Some(&report(Outcome::Running, 1))).await,
        OutOfMemory => world.end_runner_with(pod, 7, "OOMKilled", None).await,
        Disrupted(reason) => {
            // One without a time is stale to the disruption controller, which takes it back.
            let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let target = json!({"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "by the test", "lastTransitionTime": now});
            world.set_pod_status(pod, json!({"conditions": [target]})).await;
        }
        NodePressure | DiskLimit => world.end_runner(pod, 7, Some(&report(Outcome::Stopped, 1))).await,
        PodDeleted => {
            world
                .pods()
                .delete(&pod.name_any(), &DeleteParams::default())
                .await
                .unwrap();
        }
        PodForced | Refused => {}
        JobDeleted => {
            let job = format!("{name}-job");
            world.jobs().delete(&job, &DeleteParams::background()).await.unwrap();
        }
        JobDeadline => set_job(world, name, json!({"activeDeadlineSeconds": 1})).await,
        Suspended => world.patch(name, json!({"spec": {"suspend": true}})).await,
        JobSuspended => set_job(world, name, json!({"suspend": true})).await,
        Hindered(why) => {
            let state = if why == "StartError" {
                json!({"terminated": {"exitCode": 128, "reason": why, "message": "exec: runner: not found"}})
            } else {
                json!({"waiting": {"reason": why, "message": "it does not work"}})
            };
            let agent = json!({"name": "agent", "image": "registry.test/runner:7", "imageID": "", "ready": false, "restartCount": 0, "state": state});
            let since = "2026-01-01T00:00:00Z";
            let conditions = json!([
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": since},
                {"type": "PodReadyToStartContainers", "status": "True", "lastTransitionTime": since},
            ]);
            world
                .set_pod_status(pod, json!({"conditions": conditions, "initContainerStatuses": [agent]}))
                .await;
        }
    }
}

async fn set_job(world: &World, name: &str, spec: serde_json::Value) {
    let jobs: Api<Job> = world.jobs();
    let patch = Patch::Merge(json!({"spec": spec}));
    jobs.patch(&format!("{name}-job"), &PatchParams::default(), &patch)
        .await
        .unwrap();
}

async fn second_half(world: &World, _: &str, event: Event, pod: &Pod) {
    match event {
        Says(outcome) => {
            let phase = if outcome.exit_code() == 0 {
                "Succeeded"
            } else {
                "Failed"
            };
            world.set_pod_status(pod, json!({"phase": phase})).await;
        }
        Killed | OutOfMemory => world.set_pod_status(pod, json!({"phase": "Failed"})).await,
        Disrupted(_) => {
            let _ = world.pods().delete(&pod.name_any(), &DeleteParams::default()).await;
        }
        NodePressure => {
            let said = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 20Mi.";
            let target = json!({"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": said});
            let status = json!({"phase": "Failed", "reason": "Evicted", "message": said, "conditions": [target]});
            world.set_pod_status(pod, status).await;
        }
        DiskLimit => {
            let said = "Pod ephemeral local storage usage exceeds the total limit of containers 2Gi. ";
            world
                .set_pod_status(pod, json!({"phase": "Failed", "reason": "Evicted", "message": said}))
                .await;
        }
        Refused => {
            let said =
                "Pod was rejected: Node didn't have enough resource: cpu, requested: 500, used: 7800, capacity: 8000";
            world
                .set_pod_status(pod, json!({"phase": "Failed", "reason": "OutOfcpu", "message": said}))
                .await;
        }
        PodForced => {
            let none = Patch::Merge(json!({"metadata": {"finalizers": null}}));
            world
                .pods()
                .patch(&pod.name_any(), &PatchParams::default(), &none)
                .await
                .unwrap();
            let now = DeleteParams::default().grace_period(0);
            world.pods().delete(&pod.name_any(), &now).await.unwrap();
        }
        PodDeleted | JobDeleted | JobDeadline | Suspended | JobSuspended | Hindered(_) => {}
    }
}

/// What is wrong with what the operator made of it, if anything.
async fn judged(
    world: &World,
    listener: &Listener,
    (name, event, follows): &(&str, Event, Follows),
    pod: &Pod,
) -> Option<String> {
    let is = |status: &AgenticSessionStatus| match *follows {
        Over(phase, reason) => {
            status.phase == phase && status.reason.as_deref() == Some(reason) && status.attempt == Some(1)
        }
        Counts(_) | Free(_) | Waits => status.attempt == Some(2),
    };
    let seen = tokio::time::timeout(PATIENCE / 10 * 9, async {
        while !is(&listener.told(name).last) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let Told {
        last: status,
        retrying: said,
    } = listener.told(name);
    if seen.is_err() {
        return Some(format!("{name}: {event:?} {follows:?}: stays {status:#?}"));
    }
    let free = status.free_retries.unwrap_or(0);
    let right = match *follows {
        Over(..) => status.completion_time.is_some(),
        Counts(reason) => free == 0 && said.contains(reason),
        Free(reason) => free == 1 && said.contains(reason),
        Waits => free == 0 && status.first_attempt == Some(2),
    };
    if !right {
        return Some(format!("{name}: {event:?} {follows:?}: said {said:?}: {status:#?}"));
    }
    // Usage that a report told of is kept, whatever the end.
    if matches!(event, Says(_) | Killed | PodDeleted | Disrupted(_)) && status.turns != Some(3) {
        return Some(format!(
            "{name}: {event:?}: what the attempt did is not known: {status:#?}"
        ));
    }
    until("the report to be let go", async || {
        let pod = world.pod_now(pod).await;
        pod.is_none_or(|pod| !pod.finalizers().iter().any(|f| f == REPORT_FINALIZER))
            .then_some(())
    })
    .await;
    None
}

/// A report of a runner that was about to end has all that it did.
#[tokio::test(flavor = "multi_thread")]
async fn totals_do_not_fall_when_a_later_attempt_ends_before_it_could_read_them() {
    let mut world = World::without_operator("totals").await;
    world.timing.retry_first_wait = 1;
    world.start_operator().await;
    world.create("tally", json!({"prompt": "count"})).await;
    let first = world.pod("tally", 1).await;
    world.start(&first).await;
    world.end(&first, 7, Some(&report(Outcome::ModelUnavailable, 1))).await;
    let second = world.pod("tally", 2).await;
    world.start(&second).await;
    world
        .end(&second, 1, Some(&Report::new(Outcome::NoCredentials, 2)))
        .await;
    let failed = world.phase("tally", Phase::Failed).await;
    assert_eq!(
        (failed.turns, failed.cost_usd.as_deref(), failed.last_seq),
        (Some(3), Some("0.012345"), Some(17))
    );
}
