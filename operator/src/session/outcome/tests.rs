//! The outcome table, row by row.

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

/// One that was deleted, and whose runner stopped as it was told.
fn stopped() -> PodSeen {
    PodSeen {
        deleting: true,
        ..pod(ended(143, Some(Report::new(Outcome::Stopped, 4))))
    }
}

fn judged(pod: Option<&PodSeen>, stopping: Option<(Reason, &str)>) -> Verdict {
    judge(&Evidence {
        attempt: 4,
        stopping,
        pod,
        job: &JobSeen::Missing,
        followed: false,
    })
}

/// What is judged of a pod whose Job says this.
fn judged_by_job(pod: &PodSeen, job: OurJob) -> Verdict {
    judge(&Evidence {
        attempt: 4,
        stopping: None,
        pod: Some(pod),
        job: &JobSeen::Ours(job),
        followed: false,
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
    let deleted = stopped();
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
    let job = OurJob {
        finished: true,
        deadline_exceeded: true,
        ..OurJob::default()
    };
    let verdict = judged_by_job(&stopped(), job);
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
    let job = OurJob {
        started: Some("2026-01-02T03:00:00Z".parse().unwrap()),
        deadline: Some(60),
        ..OurJob::default()
    };
    let pod = PodSeen {
        deleted: Some(deleted.parse().unwrap()),
        ..stopped()
    };
    let verdict = judged_by_job(&pod, job);
    assert_eq!((verdict.end, verdict.reason), (end, reason));
}

#[test]
fn a_pod_beyond_its_own_disk_limit_counts_as_a_try() {
    let full = PodSeen {
        disk_full: true,
        message: "Usage of EmptyDir volume \"tmp\" exceeds the limit \"1Gi\".".into(),
        ..stopped()
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
    let job = OurJob {
        suspended: true,
        ..OurJob::default()
    };
    let verdict = judged_by_job(&stopped(), job);
    assert_eq!((verdict.end, verdict.reason), (End::Queued, Reason::Queued));
    assert!(verdict.report.is_some(), "what it did is known");
}

#[test]
fn a_deleted_pod_whose_job_made_another_was_ended_by_whoever_admits_jobs() {
    let of = |followed: bool, pod: &PodSeen| {
        let verdict = judge(&Evidence {
            attempt: 4,
            stopping: None,
            pod: Some(pod),
            job: &JobSeen::Ours(OurJob::default()),
            followed,
        });
        (verdict.end, verdict.reason)
    };
    assert_eq!(of(true, &stopped()), (FREE, Reason::Preempted));
    assert_eq!(of(false, &stopped()), (COUNTS, Reason::PodDeleted));
    let crashed = pod(ended(1, None));
    assert_eq!(
        of(true, &crashed),
        (COUNTS, Reason::RunnerCrashed),
        "nobody took it away"
    );
}
