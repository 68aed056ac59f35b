//! What is read of a Job.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{api::batch::v1::Job, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::ResourceExt as _;
use protocol::names::{annotation, label};

use super::{
    build,
    observed::{Owner, Resolved, owner},
};

/// A Job of a name that a session needs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "two of them live for one reconcile")]
pub enum JobSeen {
    /// There is none.
    Missing,
    /// It is the session's.
    Ours(OurJob),
    /// It waits for garbage collection: the name will be free.
    Going,
    /// It belongs to somebody else.
    Foreign,
}

/// Where Kueue has a Job wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InQueue {
    /// The queue.
    pub name: String,
    /// The Job's priority among those that wait there.
    pub priority: Option<String>,
}

impl InQueue {
    /// What the labels of a Job say.
    fn of(job: &Job) -> Option<Self> {
        let labels = job.labels();
        Some(Self {
            name: labels.get(label::KUEUE_QUEUE)?.clone(),
            priority: labels.get(label::KUEUE_PRIORITY).cloned(),
        })
    }
}

/// A Job of the session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude each other")]
pub struct OurJob {
    /// Name.
    pub name: String,
    /// UID: deletes carry it as a precondition.
    pub uid: String,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Since when it may make pods; later than `created` for one that was suspended.
    pub started: Option<Timestamp>,
    /// It is held back, or was stopped, by whoever admits Jobs.
    pub suspended: bool,
    /// Where it waits, if it is held back. In a box: few are.
    pub queue: Option<Box<InQueue>>,
    /// It is being deleted.
    pub deleting: bool,
    /// It will make no more pods.
    pub finished: bool,
    /// Since when.
    pub finished_at: Option<Timestamp>,
    /// A pod of it has ended and is counted: it will be finished soon, and makes no other.
    pub counted: bool,
    /// It was ended by its `activeDeadlineSeconds`, and says so.
    pub deadline_exceeded: bool,
    /// Its `activeDeadlineSeconds`.
    pub deadline: Option<i64>,
    /// What was resolved when it was made.
    pub resolved: Option<Resolved>,
}

impl OurJob {
    /// Whether its deadline had passed at a moment. The Job controller deletes the pod first and says why afterwards.
    pub fn is_past_its_deadline(&self, at: Timestamp) -> bool {
        let deadline = self.started.zip(self.deadline);
        let deadline =
            deadline.and_then(|(started, seconds)| started.checked_add(SignedDuration::from_secs(seconds)).ok());
        deadline.is_some_and(|deadline| at >= deadline)
    }
}

impl JobSeen {
    /// What `job` is to `session`.
    pub fn of(job: Option<&Job>, session: &ObjectMeta) -> Self {
        let Some(job) = job else { return Self::Missing };
        match owner(&job.metadata, session) {
            Owner::Foreign => Self::Foreign,
            Owner::Predecessor => Self::Going,
            Owner::Ours => Self::Ours(OurJob::from(job)),
        }
    }

    /// The same, for keeps.
    pub fn into_ours(self) -> Option<OurJob> {
        match self {
            Self::Ours(job) => Some(job),
            Self::Missing | Self::Going | Self::Foreign => None,
        }
    }

    /// The Job, if it is the session's.
    pub fn ours(&self) -> Option<&OurJob> {
        match self {
            Self::Ours(job) => Some(job),
            Self::Missing | Self::Going | Self::Foreign => None,
        }
    }
}

impl From<&Job> for OurJob {
    fn from(job: &Job) -> Self {
        let status = job.status.as_ref();
        let conditions = || {
            status
                .iter()
                .flat_map(|s| s.conditions.iter().flatten())
                .filter(|c| c.status == "True")
        };
        // The targets are set as soon as the Job controller has decided; it makes no pod after them.
        let ends = || {
            conditions().filter(|c| {
                matches!(
                    &*c.type_,
                    "Complete" | "Failed" | "FailureTarget" | "SuccessCriteriaMet"
                )
            })
        };
        let resolved = job.annotations().get(annotation::RESOLVED);
        let spec = job.spec.as_ref();
        let suspended = spec.and_then(|s| s.suspend).unwrap_or_default();
        Self {
            name: job.name_any(),
            uid: job.uid().unwrap_or_default(),
            created: job.creation_timestamp().map(|t| t.0),
            started: status.and_then(|s| s.start_time.as_ref()).map(|t| t.0),
            suspended,
            queue: InQueue::of(job).filter(|_| suspended).map(Box::new),
            deleting: job.metadata.deletion_timestamp.is_some(),
            finished: ends().next().is_some(),
            // The first stays as it is when the other comes.
            finished_at: ends().filter_map(|c| Some(c.last_transition_time.as_ref()?.0)).min(),
            counted: status.is_some_and(|s| {
                let uncounted = s.uncounted_terminated_pods.as_ref();
                let waiting = uncounted.map_or(0, |u| {
                    u.failed.as_ref().map_or(0, Vec::len) + u.succeeded.as_ref().map_or(0, Vec::len)
                });
                s.failed.unwrap_or(0) + s.succeeded.unwrap_or(0) > 0 || waiting > 0
            }),
            deadline_exceeded: conditions().any(|c| c.reason.as_deref() == Some("DeadlineExceeded")),
            deadline: spec.and_then(|s| s.active_deadline_seconds),
            resolved: resolved.and_then(|json| serde_json::from_str(json).ok()),
        }
    }
}

/// What of a session a Job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobFor {
    /// The attempt of this number.
    Attempt(u32),
    /// The drain of this number.
    Drain(u32),
}

impl JobFor {
    /// Reads it from the Job's name, which is a function of the session and the number.
    pub fn of(job: &str, session: &str) -> Option<Self> {
        let rest = job.strip_prefix(session)?;
        let found = if let Some(number) = rest.strip_prefix("-drain-") {
            Self::Drain(number.parse().ok()?)
        } else if rest == "-job" {
            Self::Attempt(1)
        } else {
            Self::Attempt(rest.strip_prefix("-job-")?.parse().ok()?)
        };
        let name = match found {
            Self::Attempt(n) => build::job_name(session, n),
            Self::Drain(n) => build::drain_name(session, n),
        };
        (name == job).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_job_was_over_when_the_job_controller_had_decided_so_also_when_its_last_pod_goes_later() {
        let target = json!({"type": "FailureTarget", "status": "True", "lastTransitionTime": "2026-11-22T06:00:00Z"});
        let failed = json!({"type": "Failed", "status": "True", "lastTransitionTime": "2026-11-22T06:00:30Z"});
        for conditions in [json!([target]), json!([target, failed])] {
            let job = json!({"metadata": {"name": "poem-job"}, "status": {"conditions": conditions}});
            let job = OurJob::from(&serde_json::from_value::<Job>(job).unwrap());
            assert_eq!(job.finished_at, Some("2026-11-22T06:00:00Z".parse().unwrap()));
        }
    }
}
