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
        return wait(
            Reason::Retrying,
            format!("Waits for pod {} of attempt {} to end.", pod.name, pod.attempt),
        );
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
