//! What drains deliver after a run's end.

use crds::{AgenticSessionStatus, condition};
use jiff::Timestamp;
use protocol::{Reason, Report};

use crate::session::{conditions, observed::PodSeen};

/// A drain Job exists, and its pod when that is there; the pod may speak for the session.
pub fn draining(
    status: &AgenticSessionStatus,
    number: u32,
    job_name: &str,
    pod: Option<&PodSeen>,
) -> AgenticSessionStatus {
    let mut next = status.clone();
    next.drains = Some(number);
    next.drain_job_name = Some(job_name.to_owned());
    next.next_drain_time = None;
    if let Some(pod) = pod {
        next.pod_uid = Some(pod.uid.clone());
    }
    next
}

/// A drain is over: its numbers are the session's.
pub fn drained(status: &AgenticSessionStatus, report: Option<&Report>, now: Timestamp) -> AgenticSessionStatus {
    let mut next = status.clone();
    next.drain_job_name = None;
    // One that could not read the volume's state knows nothing of it. One that found nothing there says the same, and is right where
    // nothing is known of records.
    let none_known = next.last_seq.unwrap_or_default() == 0;
    if let Some(report) = report.filter(|report| report.has_read() || none_known) {
        next.last_seq = Some(report.last_seq);
        next.acked_seq = Some(report.acked_seq);
        conditions::events(&mut next, Some(report), true, now);
    }
    next
}

/// Whether records wait on the volume for a drain.
pub fn undelivered(status: &AgenticSessionStatus) -> bool {
    conditions::denied(status, condition::EVENTS_DELIVERED) == Some(Reason::Undelivered.as_str())
}

/// What was not delivered is given up.
pub fn lost(status: &AgenticSessionStatus, why: &str, now: Timestamp) -> AgenticSessionStatus {
    let mut next = status.clone();
    next.next_drain_time = None;
    conditions::lost(&mut next, why, now);
    next
}
