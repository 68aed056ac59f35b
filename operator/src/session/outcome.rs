//! What became of an attempt: a function of what its pod and Job say.

#[cfg(test)]
mod tests;

use protocol::{Outcome, Reason, Report};

use super::observed::{JobSeen, OurJob, PodSeen, RunnerSeen};

/// What an ended attempt left behind.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// Number of the attempt.
    pub attempt: u32,
    /// Why the operator stopped it, if it did: reason and message of `Stopping`.
    pub stopping: Option<(Reason, &'a str)>,
    /// Its pod, unless it is gone.
    pub pod: Option<&'a PodSeen>,
    /// Its Job.
    pub job: &'a JobSeen,
    /// The Job has made another pod since.
    pub followed: bool,
}

/// How an attempt ended, and what follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The task is done.
    Completed,
    /// The session was stopped; workspace and conversation are kept.
    Stopped,
    /// The run is over without its task being done.
    Failed,
    /// Another attempt may succeed.
    Again {
        /// The cluster's doing: it does not count as a try.
        free: bool,
        /// Seconds that the model API asked to wait.
        retry_after: Option<u64>,
    },
    /// Whoever admits Jobs took its place away: it waits to be admitted again, and nothing is counted.
    Queued,
}

/// The judgement over an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What follows.
    pub end: End,
    /// Why.
    pub reason: Reason,
    /// Why, for people.
    pub message: String,
    /// What the runner left.
    pub report: Option<Report>,
}

/// Judges an attempt whose pod is judgeable or gone.
///
/// A report alone leads to `Completed`: a pod that is gone, or an exit code of 0, is no proof that the task is done.
pub fn judge(evidence: &Evidence<'_>) -> Verdict {
    let report = evidence.pod.and_then(|pod| match &pod.runner {
        RunnerSeen::Ended {
            report: Some(report), ..
        } if report.attempt == evidence.attempt => Some(&**report),
        _ => None,
    });
    let (end, reason, message) = report
        .and_then(|report| by_report(report, evidence.stopping.is_some()))
        .map(|finding| with_what_the_node_saw(finding, evidence))
        .or_else(|| evidence.stopping.map(by_stop))
        .unwrap_or_else(|| by_circumstance(evidence));
    Verdict {
        end,
        reason,
        message,
        report: report.cloned(),
    }
}

type Finding = (End, Reason, String);

/// What the runner says, where it says why. One that failed for a passing cause while it was being stopped was stopped.
fn by_report(report: &Report, stopping: bool) -> Option<Finding> {
    let reason = report.outcome.reason()?;
    let message = |text: &str| {
        if report.message.is_empty() {
            text.to_owned()
        } else {
            report.message.clone()
        }
    };
    let (end, message) = match report.outcome {
        Outcome::Succeeded => (End::Completed, message("The agent finished its task.")),
        Outcome::EndedByRequest => (End::Completed, message("The session was ended on request.")),
        Outcome::Inactive => (End::Stopped, message("The session was idle.")),
        Outcome::StoppedByUser => (End::Stopped, message("The turn was interrupted.")),
        outcome if outcome.is_transient() && stopping => return None,
        outcome if outcome.is_transient() => (
            End::Again {
                free: false,
                retry_after: report.retry_after,
            },
            message("The cause may pass."),
        ),
        _ => (End::Failed, message("The agent's runner gave no details; see its log.")),
    };
    Some((end, reason, message))
}

/// A runner whose agent's first process was killed sees only that nobody is there any more; the node knows that it was for memory.
fn with_what_the_node_saw((end, reason, message): Finding, evidence: &Evidence<'_>) -> Finding {
    match evidence.pod {
        Some(pod) if reason == Reason::AgentLost && pod.agent_out_of_memory => (
            end,
            Reason::OOMKilled,
            format!(
                "The agent's container of pod {} was killed for memory: {message}; raise spec.resources.limits.memory",
                pod.name
            ),
        ),
        _ => (end, reason, message),
    }
}

/// The operator stopped it, and nothing better is known.
fn by_stop((reason, message): (Reason, &str)) -> Finding {
    match reason {
        Reason::StoppedByUser => (
            End::Stopped,
            reason,
            "Stopped by spec.suspend; set it to false to go on.".to_owned(),
        ),
        _ => (End::Failed, reason, message.to_owned()),
    }
}

/// The runner was told to stop by somebody else, died, or left nothing.
fn by_circumstance(evidence: &Evidence<'_>) -> Finding {
    let counts = || End::Again {
        free: false,
        retry_after: None,
    };
    let deleted = evidence.pod.and_then(|pod| pod.deleted);
    let timed_out = |job: &OurJob| job.deadline_exceeded || deleted.is_some_and(|at| job.is_past_its_deadline(at));
    if evidence.job.ours().is_some_and(timed_out) {
        return (
            End::Failed,
            Reason::Timeout,
            "The Job's deadline passed before the session ended.".to_owned(),
        );
    }
    if let Some(job) = evidence.job.ours().filter(|job| job.suspended) {
        let message = format!(
            "Job {} was suspended by whoever admits Jobs: the session waits for its turn.",
            job.name
        );
        return (End::Queued, Reason::Queued, message);
    }
    let Some(pod) = evidence.pod else {
        let message = format!("The pod of attempt {} is gone and left no report.", evidence.attempt);
        return (counts(), Reason::OutcomeUnknown, message);
    };
    if let Some(disruption) = &pod.disruption {
        let message = format!("Pod {} was ended by the cluster: {}", pod.name, disruption.message);
        return (
            End::Again {
                free: true,
                retry_after: None,
            },
            disruption.reason,
            message,
        );
    }
    if pod.deleting && evidence.followed {
        // Its Job would have failed with it (`backoffLimit` is 0) if nobody had suspended it.
        let message = format!(
            "Pod {} was ended when its Job was suspended, which has been let go on since by whoever admits Jobs.",
            pod.name
        );
        let free = End::Again {
            free: true,
            retry_after: None,
        };
        return (free, Reason::Preempted, message);
    }
    if pod.disk_full {
        let message = format!("Pod {} used more disk than it may: {}", pod.name, pod.message);
        return (counts(), Reason::DiskFull, message);
    }
    if let Some(said) = &pod.init_failed {
        let message = format!("Pod {} cannot be set up: {said}", pod.name);
        return (End::Failed, Reason::ConfigError, message);
    }
    match &pod.runner {
        RunnerSeen::Ended {
            out_of_memory: true, ..
        } => (
            counts(),
            Reason::OOMKilled,
            format!("The runner of pod {} was killed for memory.", pod.name),
        ),
        _ if pod.deleting => (counts(), Reason::PodDeleted, format!("Pod {} was deleted.", pod.name)),
        RunnerSeen::Ended { exit_code, said, .. } => {
            let message = format!(
                "The runner of pod {} ended with exit code {exit_code} and no final report. {said}",
                pod.name
            );
            (counts(), Reason::RunnerCrashed, message.trim_end().to_owned())
        }
        RunnerSeen::Waiting | RunnerSeen::Running { .. } => {
            let said = if pod.message.is_empty() {
                "no reason is given"
            } else {
                &pod.message
            };
            (
                counts(),
                Reason::RunnerCrashed,
                format!("Pod {} failed without a report: {said}", pod.name),
            )
        }
    }
}
