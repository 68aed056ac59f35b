//! What became of an attempt: a function of what its pod and Job say.

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

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::session::{observed::OurJob, pod::Disruption};

    fn pod(runner: RunnerSeen) -> PodSeen {
        PodSeen {
            name: "write-poem-job-x7".into(),
            uid: "pod-uid".into(),
            attempt: 4,
            job_uid: "job-uid".into(),
            created: None,
            deleting: false,
            deleted: None,
            scheduled: true,
            terminal: true,
            held: true,
            disruption: None,
            disk_full: false,
            init_failed: None,
            message: String::new(),
            runner,
            trouble: None,
            limits: None,
            agent_restarts: 0,
            agent_out_of_memory: false,
        }
    }

    fn ended(exit_code: i32, report: Option<Report>) -> RunnerSeen {
        RunnerSeen::Ended {
            since: None,
            until: None,
            exit_code,
            out_of_memory: false,
            said: String::new(),
            report: report.map(Box::new),
        }
    }

    fn judged(pod: Option<&PodSeen>, stopping: Option<(Reason, &str)>) -> Verdict {
        judge(&Evidence {
            attempt: 4,
            stopping,
            pod,
            job: &JobSeen::Missing,
        })
    }

    const COUNTS: End = End::Again {
        free: false,
        retry_after: None,
    };
    const FREE: End = End::Again {
        free: true,
        retry_after: None,
    };

    #[rstest]
    #[case(Outcome::Succeeded, End::Completed, Reason::Completed)]
    #[case(Outcome::Inactive, End::Stopped, Reason::Inactivity)]
    #[case(Outcome::AgentError, End::Failed, Reason::AgentError)]
    #[case(Outcome::NoCredentials, End::Failed, Reason::NoCredentials)]
    #[case(Outcome::InvalidCredentials, End::Failed, Reason::InvalidCredentials)]
    #[case(Outcome::Timeout, End::Failed, Reason::Timeout)]
    #[case(Outcome::ModelUnavailable, COUNTS, Reason::ModelUnavailable)]
    #[case(Outcome::RateLimited, COUNTS, Reason::RateLimited)]
    #[case(Outcome::CloneRefused, End::Failed, Reason::CloneFailed)]
    #[case(Outcome::CloneUnreachable, COUNTS, Reason::CloneFailed)]
    #[case(Outcome::RunnerError, COUNTS, Reason::RunnerCrashed)]
    #[case(Outcome::Running, COUNTS, Reason::RunnerCrashed)]
    #[case(Outcome::Superseded, COUNTS, Reason::RunnerCrashed)]
    fn a_report_decides_what_follows(#[case] outcome: Outcome, #[case] end: End, #[case] reason: Reason) {
        let pod = pod(ended(outcome.exit_code().into(), Some(Report::new(outcome, 4))));
        let verdict = judged(Some(&pod), None);
        assert_eq!((verdict.end, verdict.reason), (end, reason));
        assert_eq!(verdict.report.unwrap().outcome, outcome);
    }

    #[test]
    fn an_agent_that_was_lost_for_memory_is_said_to_be() {
        let report = Report {
            message: "the agent was lost 4 times".into(),
            ..Report::new(Outcome::AgentLost, 4)
        };
        let lost = pod(ended(1, Some(report)));
        let judged_with = |agent_out_of_memory| {
            judged(
                Some(&PodSeen {
                    agent_out_of_memory,
                    ..lost.clone()
                }),
                None,
            )
        };
        let (known, unknown) = (judged_with(true), judged_with(false));
        assert_eq!((known.end, known.reason), (unknown.end, Reason::OOMKilled));
        assert!(known.message.contains("lost 4 times") && known.message.contains("limits.memory"));
        assert_eq!(unknown.reason, Reason::AgentLost);
    }

    #[test]
    fn a_report_names_how_long_to_wait() {
        let report = Report {
            retry_after: Some(77),
            ..Report::new(Outcome::RateLimited, 4)
        };
        let verdict = judged(Some(&pod(ended(75, Some(report)))), None);
        assert_eq!(
            verdict.end,
            End::Again {
                free: false,
                retry_after: Some(77)
            }
        );
    }

    #[test]
    fn exit_code_0_without_a_report_is_not_success() {
        let verdict = judged(Some(&pod(ended(0, None))), None);
        assert_eq!((verdict.end, verdict.reason), (COUNTS, Reason::RunnerCrashed));
    }

    #[test]
    fn a_report_of_another_attempt_is_not_believed() {
        let verdict = judged(Some(&pod(ended(0, Some(Report::new(Outcome::Succeeded, 3))))), None);
        assert_eq!((verdict.end, verdict.reason), (COUNTS, Reason::RunnerCrashed));
    }

    #[test]
    fn a_pod_that_is_gone_leaves_the_outcome_unknown() {
        let verdict = judged(None, None);
        assert_eq!((verdict.end, verdict.reason), (COUNTS, Reason::OutcomeUnknown));
    }

    #[test]
    fn a_deleted_pod_counts_as_a_try_and_an_evicted_one_does_not() {
        let deleted = PodSeen {
            deleting: true,
            ..pod(ended(143, Some(Report::new(Outcome::Stopped, 4))))
        };
        assert_eq!(judged(Some(&deleted), None).end, COUNTS);
        assert_eq!(judged(Some(&deleted), None).reason, Reason::PodDeleted);
        let disruption = Some(Disruption {
            reason: Reason::Evicted,
            message: "node drained".into(),
        });
        let verdict = judged(Some(&PodSeen { disruption, ..deleted }), None);
        assert_eq!((verdict.end, verdict.reason), (FREE, Reason::Evicted));
    }

    #[rstest]
    #[case(Outcome::Stopped, End::Stopped, Reason::StoppedByUser)]
    #[case(Outcome::Running, End::Stopped, Reason::StoppedByUser)]
    #[case(Outcome::ModelUnavailable, End::Stopped, Reason::StoppedByUser)]
    #[case(Outcome::Succeeded, End::Completed, Reason::Completed)]
    #[case(Outcome::AgentError, End::Failed, Reason::AgentError)]
    fn what_an_attempt_reached_before_it_was_stopped_counts(
        #[case] outcome: Outcome,
        #[case] end: End,
        #[case] reason: Reason,
    ) {
        let pod = PodSeen {
            deleting: true,
            ..pod(ended(143, Some(Report::new(outcome, 4))))
        };
        let verdict = judged(Some(&pod), Some((Reason::StoppedByUser, "suspended")));
        assert_eq!((verdict.end, verdict.reason), (end, reason));
    }

    #[test]
    fn a_stop_by_the_backstop_is_a_timeout_even_when_the_pod_is_gone() {
        let verdict = judged(None, Some((Reason::Timeout, "too long")));
        assert_eq!(
            (verdict.end, verdict.reason, &*verdict.message),
            (End::Failed, Reason::Timeout, "too long")
        );
    }

    #[test]
    fn a_job_past_its_deadline_timed_out() {
        let job = JobSeen::Ours(OurJob {
            name: "j".into(),
            uid: "u".into(),
            finished: true,
            deadline_exceeded: true,
            ..OurJob::default()
        });
        let pod = PodSeen {
            deleting: true,
            ..pod(ended(143, Some(Report::new(Outcome::Stopped, 4))))
        };
        let verdict = judge(&Evidence {
            attempt: 4,
            stopping: None,
            pod: Some(&pod),
            job: &job,
        });
        assert_eq!((verdict.end, verdict.reason), (End::Failed, Reason::Timeout));
    }

    #[rstest]
    #[case::after_it("2026-01-02T03:01:00Z", End::Failed, Reason::Timeout)]
    #[case::before_it("2026-01-02T03:00:59Z", COUNTS, Reason::PodDeleted)]
    fn a_pod_that_was_deleted_at_its_jobs_deadline_timed_out_though_the_job_does_not_say_so_yet(
        #[case] deleted: &str,
        #[case] end: End,
        #[case] reason: Reason,
    ) {
        let job = JobSeen::Ours(OurJob {
            started: Some("2026-01-02T03:00:00Z".parse().unwrap()),
            deadline: Some(60),
            ..OurJob::default()
        });
        let pod = PodSeen {
            deleting: true,
            deleted: Some(deleted.parse().unwrap()),
            ..pod(ended(143, Some(Report::new(Outcome::Stopped, 4))))
        };
        let verdict = judge(&Evidence {
            attempt: 4,
            stopping: None,
            pod: Some(&pod),
            job: &job,
        });
        assert_eq!((verdict.end, verdict.reason), (end, reason));
    }

    #[test]
    fn a_pod_beyond_its_own_disk_limit_counts_as_a_try() {
        let full = PodSeen {
            disk_full: true,
            message: "Usage of EmptyDir volume \"tmp\" exceeds the limit \"1Gi\".".into(),
            ..pod(ended(143, Some(Report::new(Outcome::Stopped, 4))))
        };
        let verdict = judged(Some(&full), None);
        assert_eq!((verdict.end, verdict.reason), (COUNTS, Reason::DiskFull));
        assert!(verdict.message.contains("tmp"), "{}", verdict.message);
    }

    #[test]
    fn an_init_container_that_failed_for_good_is_the_sessions_configuration() {
        let broken = PodSeen {
            init_failed: Some("container tools (image u:1): Error, exit code 1: no bash".into()),
            ..pod(RunnerSeen::Waiting)
        };
        let verdict = judged(Some(&broken), None);
        assert_eq!((verdict.end, verdict.reason), (End::Failed, Reason::ConfigError));
        assert!(verdict.message.contains("no bash"));
    }

    #[test]
    fn an_attempt_whose_job_was_suspended_by_somebody_else_waits_again() {
        let job = JobSeen::Ours(OurJob {
            suspended: true,
            ..OurJob::default()
        });
        let deleted = PodSeen {
            deleting: true,
            ..pod(ended(143, Some(Report::new(Outcome::Stopped, 4))))
        };
        let verdict = judge(&Evidence {
            attempt: 4,
            stopping: None,
            pod: Some(&deleted),
            job: &job,
        });
        assert_eq!((verdict.end, verdict.reason), (End::Queued, Reason::Queued));
        assert!(verdict.report.is_some(), "what it did is known");
    }
}
