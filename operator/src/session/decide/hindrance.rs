//! What stands in an attempt's way: an attempt before it, and objects that are not the session's.

use protocol::Reason;

use super::next_attempt;
use crate::session::{
    build,
    observed::{ClaimSeen, JobSeen, Observed},
    plan::Target,
};

/// Why an attempt cannot begin yet.
pub struct Hindrance {
    /// One word.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// What is in the way and goes.
    pub delete: Vec<Target>,
}

/// Why an attempt cannot begin yet.
pub fn hindrance(seen: &Observed, session: &str) -> Option<Hindrance> {
    let wait = |reason, message: String| {
        Some(Hindrance {
            reason,
            message,
            delete: Vec::new(),
        })
    };
    let reason_so_far = match seen.session.status.attempt {
        Some(_) => Reason::Retrying,
        None => Reason::WaitingForVolume,
    };
    if let Some(job) = seen.job.ours().filter(|job| !job.finished) {
        // A Job that has lost its pod, or has made another, must not go on. One whose pod is over is finished soon.
        let mut pods = seen.pods.iter().filter(|pod| pod.job_uid == job.uid).peekable();
        let goes_on = pods.peek().is_none() && !job.counted || pods.any(|pod| !pod.is_over() && !pod.deleting);
        let delete = (goes_on || job.suspended) && !job.deleting;
        return Some(Hindrance {
            reason: Reason::Retrying,
            message: format!("Waits for Job {} to end.", job.name),
            delete: delete
                .then(|| Target::Job(job.name.clone(), job.uid.clone()))
                .into_iter()
                .collect(),
        });
    }
    if let Some(pod) = seen.pods.iter().find(|pod| !pod.is_over()) {
        // One that its Job made beside the attempt's own, and forgot when it finished, would work on.
        let forgotten =
            seen.job.ours().is_some_and(|job| job.uid == pod.job_uid) && !pod.deleting && !pod.is_judgeable();
        return Some(Hindrance {
            reason: Reason::Retrying,
            message: format!("Waits for pod {} of attempt {} to end.", pod.name, pod.attempt),
            delete: forgotten
                .then(|| Target::Pod(pod.name.clone(), pod.uid.clone()))
                .into_iter()
                .collect(),
        });
    }
    if let Some(pod) = seen.bare.iter().find(|pod| !pod.is_over()) {
        let message = format!("Waits for pod {} to end, whose Job was taken away.", pod.name);
        return wait(Reason::Retrying, message);
    }
    match seen.claim {
        ClaimSeen::Missing | ClaimSeen::Ours { .. } | ClaimSeen::Ephemeral => {}
        ClaimSeen::Going => {
            return Some(Hindrance {
                reason: reason_so_far,
                message: "Waits for the claim of this name to be deleted.".to_owned(),
                delete: holders(seen),
            });
        }
        ClaimSeen::Absent => {
            let message =
                "The claim of spec.workspace.existingClaim does not exist: create it, or create another session.";
            return wait(Reason::ConfigError, message.to_owned());
        }
        ClaimSeen::Foreign => {
            let message = format!(
                "The persistent volume claim {}, which the session needs, exists and is not the session's: delete the claim, \
                 or create the session under another name, or name the claim in spec.workspace.existingClaim.",
                build::own_claim_name(session)
            );
            return wait(Reason::NameConflict, message);
        }
    }
    match seen.next_job {
        JobSeen::Missing | JobSeen::Ours(_) => None,
        JobSeen::Going => wait(
            reason_so_far,
            "Waits for the Job of an earlier session of this name to be deleted.".to_owned(),
        ),
        JobSeen::Foreign => {
            let message = format!(
                "The Job {}, which the session needs, exists and is not the session's: delete the Job, or create the session \
                 under another name.",
                build::job_name(session, next_attempt(&seen.session.status).number)
            );
            wait(Reason::NameConflict, message)
        }
    }
}

/// Jobs of recorded attempts: a claim that is being deleted goes only when no pod that names it is left, ended or not.
fn holders(seen: &Observed) -> Vec<Target> {
    let jobs = seen.earlier.iter().chain(seen.job.ours());
    jobs.filter(|job| job.finished && !job.deleting)
        .map(|job| Target::Job(job.name.clone(), job.uid.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use protocol::{Outcome, Report};
    use rstest::rstest;

    use super::*;
    use crate::session::{
        model::{Happening, Model},
        observed::{OurJob, RunnerSeen},
        pod::PodSeen,
    };

    /// A session whose attempt is recorded, with a Job that is not finished and a pod.
    fn ended() -> (Observed, OurJob, PodSeen) {
        let mut model = Model::new();
        model.look(true);
        model.happen(Happening::JobController);
        let (_, job) = model.jobs[0].clone();
        let pod = model.pods[0].clone();
        (model.observed(), job, pod)
    }

    fn over(pod: &PodSeen) -> PodSeen {
        PodSeen {
            terminal: true,
            ..pod.clone()
        }
    }

    fn leaving(pod: &PodSeen) -> PodSeen {
        PodSeen {
            deleting: true,
            ..pod.clone()
        }
    }

    fn of_another(pod: &PodSeen) -> PodSeen {
        PodSeen {
            job_uid: "another".into(),
            ..pod.clone()
        }
    }

    #[rstest]
    #[case::without_a_pod(|_: &PodSeen| vec![], |_: &mut OurJob| {}, true)]
    #[case::whose_pod_was_counted(|_: &PodSeen| vec![], |job: &mut OurJob| job.counted = true, false)]
    #[case::whose_pod_is_over(|pod: &PodSeen| vec![over(pod)], |_: &mut OurJob| {}, false)]
    #[case::whose_pod_is_going(|pod: &PodSeen| vec![leaving(pod)], |_: &mut OurJob| {}, false)]
    #[case::with_a_pod_that_lives(|pod: &PodSeen| vec![pod.clone()], |_: &mut OurJob| {}, true)]
    #[case::with_a_second_pod_that_lives(|pod: &PodSeen| vec![over(pod), pod.clone()], |job: &mut OurJob| job.counted = true, true)]
    #[case::beside_a_pod_of_another(|pod: &PodSeen| vec![over(pod), of_another(pod)], |_: &mut OurJob| {}, false)]
    #[case::without_a_pod_of_its_own(|pod: &PodSeen| vec![of_another(pod)], |_: &mut OurJob| {}, true)]
    #[case::that_is_held_back(|pod: &PodSeen| vec![leaving(pod)], |job: &mut OurJob| job.suspended = true, true)]
    #[case::that_is_going(|_: &PodSeen| vec![], |job: &mut OurJob| job.deleting = true, false)]
    fn the_job_of_an_ended_attempt_is_waited_for_and_deleted_where_it_would_not_end(
        #[case] pods: fn(&PodSeen) -> Vec<PodSeen>,
        #[case] change: fn(&mut OurJob),
        #[case] deleted: bool,
    ) {
        let (mut seen, mut job, pod) = ended();
        change(&mut job);
        seen.pods = pods(&pod);
        let target = Target::Job(job.name.clone(), job.uid.clone());
        seen.job = JobSeen::Ours(job);
        let hindrance = hindrance(&seen, "write-poem").expect("it is waited for");
        assert_eq!(hindrance.message, "Waits for Job write-poem-job to end.");
        assert_eq!(
            hindrance.delete,
            deleted.then_some(target).into_iter().collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_pod_that_a_finished_job_forgot_is_deleted() {
        let (mut seen, job, pod) = ended();
        seen.job = JobSeen::Ours(OurJob { finished: true, ..job });
        let forgotten = Target::Pod(pod.name.clone(), pod.uid.clone());
        let mut deleted = |pods: Vec<PodSeen>| {
            seen.pods = pods;
            hindrance(&seen, "write-poem").expect("it is waited for").delete
        };
        assert_eq!(deleted(vec![over(&pod), pod.clone()]), [forgotten]);
        assert_eq!(
            deleted(vec![
                over(&pod),
                leaving(&PodSeen {
                    scheduled: true,
                    ..pod.clone()
                })
            ]),
            []
        );
        assert_eq!(deleted(vec![of_another(&pod)]), [], "that Job may still do it");
        let mut says_why = pod.clone();
        says_why.runner = RunnerSeen::Ended {
            since: None,
            until: None,
            exit_code: 0,
            out_of_memory: false,
            said: String::new(),
            report: Some(Box::new(Report::new(Outcome::Succeeded, 1))),
        };
        assert_eq!(deleted(vec![says_why]), [], "it ends by itself");
    }

    #[test]
    fn a_claim_that_is_going_has_the_jobs_deleted_whose_ended_pods_hold_it_and_no_other() {
        let (mut seen, job, _) = ended();
        let named = |name: &str, finished, deleting| OurJob {
            name: name.into(),
            uid: format!("uid-of-{name}"),
            finished,
            deleting,
            ..job.clone()
        };
        seen.claim = ClaimSeen::Going;
        seen.pods.clear();
        seen.earlier = vec![
            named("first", true, false),
            named("going", true, true),
            named("unfinished", false, false),
        ];
        seen.job = JobSeen::Ours(named("last", true, false));
        let deleted = hindrance(&seen, "write-poem").expect("it is waited for").delete;
        let target = |name: &str| Target::Job(name.into(), format!("uid-of-{name}"));
        assert_eq!(deleted, [target("first"), target("last")]);
        seen.claim = ClaimSeen::Missing;
        assert!(hindrance(&seen, "write-poem").is_none());
    }
}
