//! What a pod says of its attempt.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition, PodStatus};
use kube::ResourceExt as _;
use protocol::{
    Reason, Report,
    names::{REPORT_FINALIZER, container},
};

/// How long a pod may take to start while what hinders it can still heal.
pub const START_TIMEOUT: SignedDuration = SignedDuration::from_hours(1);
/// How long an image may fail to be pulled, or a container to be made, before the attempt is given up.
pub const CONTAINER_GRACE: SignedDuration = SignedDuration::from_mins(5);

/// A pod of a session.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "four facts that do not exclude each other")]
pub struct PodSeen {
    /// Name.
    pub name: String,
    /// UID: deletes carry it as a precondition.
    pub uid: String,
    /// Attempt that it belongs to.
    pub attempt: u32,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// It is being deleted.
    pub deleting: bool,
    /// A node has taken it.
    pub scheduled: bool,
    /// All its containers have ended.
    pub terminal: bool,
    /// Our finalizer holds it.
    pub held: bool,
    /// Who ended it, when the cluster did.
    pub disruption: Option<Disruption>,
    /// The kubelet's or a controller's word on the pod as a whole.
    pub message: String,
    /// Its runner.
    pub runner: RunnerSeen,
    /// What hinders its start.
    pub trouble: Option<Trouble>,
}

/// The cluster's reason to end a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disruption {
    /// `Evicted`, `Preempted` or `NodeLost`.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// Something that hinders a start and may heal by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What it is.
    pub reason: Reason,
    /// Naming the object concerned.
    pub message: String,
    /// When the pod came to where it is hindered.
    pub since: Option<Timestamp>,
    /// How long it may last.
    pub grace: SignedDuration,
}

/// The runner container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunnerSeen {
    /// Not started.
    Waiting,
    /// At work.
    Running {
        /// Since when.
        since: Option<Timestamp>,
    },
    /// Over.
    Ended {
        /// When it started.
        since: Option<Timestamp>,
        /// When it ended.
        until: Option<Timestamp>,
        /// Its exit code.
        exit_code: i32,
        /// The kernel killed it for memory.
        out_of_memory: bool,
        /// What it left.
        report: Option<Box<Report>>,
    },
}

impl PodSeen {
    /// Reads a pod; `None` when it carries no attempt number and so is not of our making.
    pub fn of(pod: &Pod) -> Option<Self> {
        let nothing = PodStatus::default();
        let status = pod.status.as_ref().unwrap_or(&nothing);
        Some(Self {
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            attempt: super::observed::attempt_of(pod)?,
            created: pod.creation_timestamp().map(|t| t.0),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            scheduled: pod
                .spec
                .as_ref()
                .is_some_and(|s| s.node_name.as_deref().is_some_and(|n| !n.is_empty())),
            terminal: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            held: pod.finalizers().iter().any(|f| f == REPORT_FINALIZER),
            disruption: disruption(status),
            message: status.message.clone().unwrap_or_default(),
            runner: runner(status),
            trouble: trouble(pod, status),
        })
    }

    /// Nothing of it runs or will run. One that no node has taken when it is deleted never starts.
    pub fn is_over(&self) -> bool {
        self.terminal || (self.deleting && !self.scheduled)
    }

    /// What it has to say is said: it is over, or its runner said why it ended, and is never started again.
    ///
    /// A runner that did not say why is judged by its pod's circumstances, which are complete when the pod is over.
    pub fn is_judgeable(&self) -> bool {
        let said = match &self.runner {
            RunnerSeen::Ended {
                report: Some(report), ..
            } => report.outcome.reason().is_some(),
            RunnerSeen::Ended { report: None, .. } | RunnerSeen::Running { .. } | RunnerSeen::Waiting => false,
        };
        said || self.is_over()
    }
}

fn condition<'a>(status: &'a PodStatus, type_: &str) -> Option<&'a PodCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == type_)
}

/// Kubernetes' own reasons of the condition `DisruptionTarget`, and the kubelet's older pod reasons.
fn disruption(status: &PodStatus) -> Option<Disruption> {
    let condition = condition(status, "DisruptionTarget").filter(|c| c.status == "True");
    let word = condition
        .and_then(|c| c.reason.as_deref())
        .or(status.reason.as_deref())?;
    let reason = match word {
        "PreemptionByScheduler" | "Preempting" => Reason::Preempted,
        "EvictionByEvictionAPI" | "TerminationByKubelet" | "Evicted" => Reason::Evicted,
        "DeletionByTaintManager" | "DeletionByPodGC" | "NodeLost" | "NodeShutdown" | "Terminated" => Reason::NodeLost,
        _ => return None,
    };
    let message = condition
        .and_then(|c| c.message.clone())
        .or(status.message.clone())
        .unwrap_or_default();
    Some(Disruption { reason, message })
}

fn runner(status: &PodStatus) -> RunnerSeen {
    let Some(seen) = status
        .container_statuses
        .iter()
        .flatten()
        .find(|c| c.name == container::RUNNER)
    else {
        return RunnerSeen::Waiting;
    };
    let state = seen.state.clone().unwrap_or_default();
    if let Some(ended) = state.terminated {
        return RunnerSeen::Ended {
            since: ended.started_at.map(|t| t.0),
            until: ended.finished_at.map(|t| t.0),
            exit_code: ended.exit_code,
            out_of_memory: ended.reason.as_deref() == Some("OOMKilled"),
            report: ended.message.and_then(|m| Report::from_message(&m).ok()).map(Box::new),
        };
    }
    match state.running {
        Some(running) => RunnerSeen::Running {
            since: running.started_at.map(|t| t.0),
        },
        None => RunnerSeen::Waiting,
    }
}

fn trouble(pod: &Pod, status: &PodStatus) -> Option<Trouble> {
    if let Some(unscheduled) = condition(status, "PodScheduled").filter(|c| c.status == "False") {
        return Some(Trouble {
            reason: Reason::Unschedulable,
            message: format!(
                "no node takes pod {}: {}",
                pod.name_any(),
                unscheduled.message.as_deref().unwrap_or("no reason is given")
            ),
            since: pod.creation_timestamp().map(|t| t.0),
            grace: START_TIMEOUT,
        });
    }
    let statuses = || {
        status
            .init_container_statuses
            .iter()
            .chain(&status.container_statuses)
            .flatten()
    };
    let (reason, grace, message) = statuses().find_map(hindered)?;
    // Volumes and sandbox are ready then, so what hinders is the container's own.
    let since = ["PodReadyToStartContainers", "PodScheduled"]
        .iter()
        .find_map(|type_| {
            condition(status, type_)
                .filter(|c| c.status == "True")?
                .last_transition_time
                .as_ref()
        })
        .map(|t| t.0)
        .or(pod.creation_timestamp().map(|t| t.0));
    Some(Trouble {
        reason,
        message,
        since,
        grace,
    })
}

/// The kubelet's words for a container that it cannot start.
fn hindered(seen: &ContainerStatus) -> Option<(Reason, SignedDuration, String)> {
    let waiting = seen.state.as_ref()?.waiting.as_ref()?;
    let word = waiting.reason.as_deref()?;
    let (reason, grace) = match word {
        "ErrImagePull"
        | "ImagePullBackOff"
        | "ErrImageNeverPull"
        | "InvalidImageName"
        | "ImageInspectError"
        | "RegistryUnavailable"
        | "SignatureValidationFailed" => (Reason::ImagePullFailed, CONTAINER_GRACE),
        // A Secret or ConfigMap that does not exist yet.
        "CreateContainerConfigError" => (Reason::ConfigError, START_TIMEOUT),
        "CreateContainerError"
        | "RunContainerError"
        | "StartError"
        | "CrashLoopBackOff"
        | "PreCreateHookError"
        | "PreStartHookError"
        | "PostStartHookError" => (Reason::ConfigError, CONTAINER_GRACE),
        _ => return None,
    };
    let last = seen
        .last_state
        .as_ref()
        .and_then(|s| s.terminated.as_ref())
        .and_then(|t| t.message.as_deref());
    let said = match (word, last) {
        ("CrashLoopBackOff", Some(last)) => last,
        _ => waiting.message.as_deref().unwrap_or_default(),
    };
    Some((
        reason,
        grace,
        format!("container {} (image {}): {word}: {said}", seen.name, seen.image),
    ))
}
