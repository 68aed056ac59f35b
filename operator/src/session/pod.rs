//! What a pod says of its attempt.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition, PodStatus,
};
use kube::ResourceExt as _;
use protocol::{
    Reason, Report,
    names::{REPORT_FINALIZER, annotation, container},
    spec::LiveLimits,
};

/// A pod of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "four facts that do not exclude each other")]
pub struct PodSeen {
    /// Name.
    pub name: String,
    /// UID: deletes carry it as a precondition.
    pub uid: String,
    /// Attempt that it belongs to.
    pub attempt: u32,
    /// UID of the Job that controls it.
    pub job_uid: String,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// It is being deleted.
    pub deleting: bool,
    /// When that was asked for.
    pub deleted: Option<Timestamp>,
    /// A node has taken it.
    pub scheduled: bool,
    /// All its containers have ended.
    pub terminal: bool,
    /// Our finalizer holds it.
    pub held: bool,
    /// Who ended it, when the cluster did.
    pub disruption: Option<Disruption>,
    /// It used more of its own disk than it may.
    pub disk_full: bool,
    /// An init container failed for good: its name and last words.
    pub init_failed: Option<String>,
    /// The kubelet's or a controller's word on the pod as a whole.
    pub message: String,
    /// Its runner.
    pub runner: RunnerSeen,
    /// What hinders its start.
    pub trouble: Option<Trouble>,
    /// What was told to it of its limits.
    pub limits: Option<LiveLimits>,
    /// How often the agent's container was started again.
    pub agent_restarts: u32,
    /// Whether that was for memory, the last time.
    pub agent_out_of_memory: bool,
}

/// The cluster's reason to end a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disruption {
    /// `Evicted`, `Preempted`, `NodeLost`, or `PodRejected` when the node would not have it.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// So many restarts before the runner has started tell that a sidecar does not work, though it runs just now.
const SUSPICIOUS_RESTARTS: i32 = 3;

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
    pub grace: Grace,
}

/// How long something that hinders a start may last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grace {
    /// A few minutes: an image or a container of the pod does not work.
    Container,
    /// As long as a start may take: others have to do something.
    Start,
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
        /// The kubelet's word on its end, when the runner itself left none.
        said: String,
        /// What it left.
        report: Option<Box<Report>>,
    },
}

impl RunnerSeen {
    /// A node whose clock is behind tells of a start before the pod was made. Its times are taken as late as they must be.
    fn not_before(self, created: Option<Timestamp>) -> Self {
        let behind = |since: Option<Timestamp>| match (since, created) {
            (Some(since), Some(created)) if since < created => created.duration_since(since),
            _ => SignedDuration::ZERO,
        };
        let later = |time: Option<Timestamp>, by| time.map(|time: Timestamp| time.saturating_add(by).unwrap_or(time));
        match self {
            Self::Waiting => Self::Waiting,
            Self::Running { since } => Self::Running {
                since: later(since, behind(since)),
            },
            Self::Ended {
                since,
                until,
                exit_code,
                out_of_memory,
                said,
                report,
            } => Self::Ended {
                since: later(since, behind(since)),
                until: later(until, behind(since)),
                exit_code,
                out_of_memory,
                said,
                report,
            },
        }
    }
}

impl PodSeen {
    /// Reads the pod of an attempt, or of a drain, of this number.
    pub fn of(pod: &Pod, number: u32, job_uid: &str) -> Self {
        let nothing = PodStatus::default();
        let status = pod.status.as_ref().unwrap_or(&nothing);
        let agent = status
            .init_container_statuses
            .iter()
            .flatten()
            .find(|c| c.name == container::AGENT);
        let disk_full = disk_full(status);
        let created = pod.creation_timestamp().map(|t| t.0);
        let runner = runner(status).not_before(created);
        let waits = runner == RunnerSeen::Waiting;
        Self {
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            attempt: number,
            job_uid: job_uid.to_owned(),
            created,
            deleting: pod.metadata.deletion_timestamp.is_some(),
            deleted: deleted(pod),
            scheduled: pod
                .spec
                .as_ref()
                .is_some_and(|s| s.node_name.as_deref().is_some_and(|n| !n.is_empty())),
            terminal: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            held: pod.finalizers().iter().any(|f| f == REPORT_FINALIZER),
            disruption: disruption(status).filter(|_| !disk_full),
            disk_full,
            init_failed: init_failed(pod, status),
            message: status.message.clone().unwrap_or_default(),
            runner,
            // What becomes of a sidecar later is not a start that is hindered.
            trouble: trouble(pod, status).filter(|_| waits),
            limits: pod
                .annotations()
                .get(annotation::LIMITS)
                .and_then(|json| serde_json::from_str(json).ok()),
            agent_restarts: agent.map_or(0, |c| u32::try_from(c.restart_count).unwrap_or(0)),
            agent_out_of_memory: agent
                .and_then(|c| c.last_state.as_ref()?.terminated.as_ref())
                .is_some_and(out_of_memory),
        }
    }

    /// Nothing of it runs or will run. One that no node has taken when it is deleted never starts.
    pub fn is_over(&self) -> bool {
        self.terminal || (self.deleting && !self.scheduled)
    }

    /// What it has to say is said: it is over, or its runner said why it ended, and is never started again.
    ///
    /// A runner that did not say why is judged by its pod's circumstances, which are complete when the pod is over.
    pub fn is_judgeable(&self) -> bool {
        self.last_word().is_some() || self.is_over()
    }

    /// The report in which its runner, which has ended, says why. Nothing changes that any more.
    pub fn last_word(&self) -> Option<&Report> {
        match &self.runner {
            RunnerSeen::Ended { report, .. } => report.as_deref().filter(|report| report.outcome.reason().is_some()),
            RunnerSeen::Running { .. } | RunnerSeen::Waiting => None,
        }
    }
}

/// The timestamp is when its grace ends.
fn deleted(pod: &Pod) -> Option<Timestamp> {
    let end = pod.metadata.deletion_timestamp.as_ref()?.0;
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    end.checked_sub(SignedDuration::from_secs(grace)).ok()
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
        _ if refused_by_the_node(status) => Reason::PodRejected,
        _ => return None,
    };
    let message = condition
        .and_then(|c| c.message.clone())
        .or(status.message.clone())
        .unwrap_or_default();
    Some(Disruption { reason, message })
}

/// The kubelet did not admit it (`rejectPod` of `pkg/kubelet/kubelet.go`): `OutOfcpu`, `NodeAffinity`, `UnexpectedAdmissionError` and
/// others. Nothing of it was started.
fn refused_by_the_node(status: &PodStatus) -> bool {
    status.phase.as_deref() == Some("Failed")
        && status
            .message
            .as_deref()
            .is_some_and(|said| said.starts_with("Pod was rejected"))
}

/// The kubelet's words (`pkg/kubelet/eviction/helpers.go`) when the pod and not its node is short of disk. Then there is no
/// condition `DisruptionTarget` either.
fn disk_full(status: &PodStatus) -> bool {
    let said = status.message.as_deref().unwrap_or_default();
    status.reason.as_deref() == Some("Evicted")
        && condition(status, "DisruptionTarget").is_none_or(|c| c.status != "True")
        && [
            "exceeded its local ephemeral storage limit",
            "exceeds the total limit of containers",
            "Usage of EmptyDir volume",
        ]
        .iter()
        .any(|words| said.contains(words))
}

/// An init container that is not started again (`restartPolicy: Never` of its pod) and failed.
fn init_failed(pod: &Pod, status: &PodStatus) -> Option<String> {
    let again = |name: &str| {
        let spec = pod.spec.as_ref().and_then(|s| s.init_containers.as_ref());
        let container = spec.and_then(|all| all.iter().find(|c| c.name == name));
        container.is_some_and(|c| c.restart_policy.as_deref() == Some("Always"))
    };
    status.init_container_statuses.iter().flatten().find_map(|seen| {
        let ended = seen.state.as_ref()?.terminated.as_ref()?;
        (ended.exit_code != 0 && !again(&seen.name)).then(|| last_words(seen, ended))
    })
}

fn out_of_memory(ended: &ContainerStateTerminated) -> bool {
    ended.reason.as_deref() == Some("OOMKilled")
}

/// The runtime could not start it, or nobody knows whether it did. Then the kubelet has a time of start that is none, such as 1970.
fn never_started(ended: &ContainerStateTerminated) -> bool {
    let said = ended.reason.as_deref().unwrap_or_default();
    let at = ended.started_at.as_ref().map_or(0, |time| time.0.as_second());
    at <= 0 || matches!(said, "StartError" | "ContainerCannotRun" | "ContainerStatusUnknown")
}

/// Who ended how, with its own words or the kubelet's.
fn last_words(seen: &ContainerStatus, ended: &ContainerStateTerminated) -> String {
    let said = ended.message.as_deref().map(str::trim).filter(|m| !m.is_empty());
    format!(
        "container {} (image {}): {}, exit code {}: {}",
        seen.name,
        seen.image,
        ended.reason.as_deref().unwrap_or("Error"),
        ended.exit_code,
        said.unwrap_or("no reason is given; see the container's log")
    )
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
        let report = ended.message.as_deref().and_then(|m| Report::from_message(m).ok());
        return RunnerSeen::Ended {
            since: ended
                .started_at
                .as_ref()
                .map(|t| t.0)
                .filter(|_| !never_started(&ended)),
            until: ended.finished_at.as_ref().map(|t| t.0),
            exit_code: ended.exit_code,
            out_of_memory: out_of_memory(&ended),
            said: match report {
                Some(_) => String::new(),
                None => last_words(seen, &ended),
            },
            report: report.map(Box::new),
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
            grace: Grace::Start,
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
fn hindered(seen: &ContainerStatus) -> Option<(Reason, Grace, String)> {
    let state = seen.state.as_ref()?;
    let Some(waiting) = state.waiting.as_ref() else {
        return ended_early(seen, state);
    };
    let word = waiting.reason.as_deref()?;
    let (reason, grace) = match word {
        "ErrImagePull"
        | "ImagePullBackOff"
        | "ErrImageNeverPull"
        | "InvalidImageName"
        | "ImageInspectError"
        | "RegistryUnavailable"
        | "SignatureValidationFailed" => (Reason::ImagePullFailed, Grace::Container),
        // A Secret or ConfigMap that does not exist yet.
        "CreateContainerConfigError" => (Reason::ConfigError, Grace::Start),
        "CreateContainerError"
        | "RunContainerError"
        | "StartError"
        | "CrashLoopBackOff"
        | "PreCreateHookError"
        | "PreStartHookError"
        | "PostStartHookError" => (Reason::ConfigError, Grace::Container),
        _ => return None,
    };
    if word == "CrashLoopBackOff"
        && let Some(last) = seen.last_state.as_ref().and_then(|s| s.terminated.as_ref())
    {
        return Some((reason, grace, last_words(seen, last)));
    }
    let said = waiting.message.as_deref().unwrap_or_default();
    let message = format!("container {} (image {}): {word}: {said}", seen.name, seen.image);
    Some((reason, grace, message))
}

/// A sidecar that ends before the runner starts, or that is tried again after it did: between two tries the kubelet shows it
/// as ended or running, which is no progress.
fn ended_early(seen: &ContainerStatus, state: &ContainerState) -> Option<(Reason, Grace, String)> {
    if seen.name != container::AGENT {
        return None;
    }
    let last = seen.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    let ended = match &state.terminated {
        Some(ended) => ended,
        // It may have come round; one that was started so often is not believed yet.
        None => last.filter(|_| seen.restart_count >= SUSPICIOUS_RESTARTS)?,
    };
    Some((Reason::ConfigError, Grace::Container, last_words(seen, ended)))
}

#[cfg(test)]
mod tests;
