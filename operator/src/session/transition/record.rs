//! An attempt is over: what it left is kept, and the run ends or another attempt follows.

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use protocol::{Reason, Report};

use super::{admitted, finish, started, undelivered, waiting};
use crate::session::{
    conditions,
    observed::{ClaimSeen, PodSeen, Policy, Resolved, RunnerSeen},
    outcome::{End, Verdict},
};

/// Attempts of a run that the cluster may end without their counting.
pub const MAX_FREE_RETRIES: u32 = 10;
const LONGEST_WAIT: u64 = 300;
/// Longest that the model API's own word is taken for.
const LONGEST_RETRY_AFTER: u64 = 3_600;

/// Why what is missing will not come.
const GONE: &str = "the rest went with the pod (spec.workspace.ephemeral)";

/// What is there of an attempt that is over.
#[derive(Clone, Copy, Debug)]
pub struct Remains<'a> {
    /// Its pod, unless that is gone.
    pub pod: Option<&'a PodSeen>,
    /// The session's claim.
    pub claim: ClaimSeen,
    /// When the session was made.
    pub born: Option<Timestamp>,
    /// When its Job was over.
    pub over: Option<Timestamp>,
    /// A pod that nobody followed has run, and may have left records.
    pub unfollowed: bool,
}

/// The attempt is over: what it left is kept, and the run ends or another attempt follows.
pub fn record(
    status: &AgenticSessionStatus,
    verdict: Verdict,
    remains: &Remains<'_>,
    (terms, policy): (&Resolved, &Policy),
    now: Timestamp,
) -> AgenticSessionStatus {
    let Verdict {
        end,
        reason,
        message,
        report,
    } = verdict;
    let Remains { pod, claim, .. } = *remains;
    let mut next = status.clone();
    let gateway = policy.gateway;
    let was_stopping = status.phase == Phase::Stopping;
    let until = attempt_ran(&mut next, remains, now);
    match &report {
        Some(report) => keep(&mut next, report, gateway, now),
        None if remains.unfollowed || runner_started(&next).is_some() => {
            conditions::events(&mut next, None, gateway, now);
        }
        None => conditions::no_events(&mut next, gateway, now),
    }
    let (end, reason, message) = match claim {
        ClaimSeen::Ephemeral => last(&mut next, (end, reason, message), pod, now),
        _ => (end, reason, message),
    };
    if pod.is_some() && end != End::Queued {
        // Pods are made of what may run only, though nobody may have looked while it did.
        next = admitted(next, None, now);
    }
    match end {
        End::Completed => finish(&next, Phase::Completed, reason, &message, until),
        End::Failed => finish(&next, Phase::Failed, reason, &message, until),
        End::Stopped => {
            let mut next = finish(&next, Phase::Stopped, reason, &message, until);
            if was_stopping && reason == Reason::StoppedByUser && claim != ClaimSeen::Ephemeral {
                // Tells a stop by `suspend`, which ends with it, from an interrupt, which does not.
                conditions::set(
                    &mut next,
                    condition::FINISHED,
                    "True",
                    Reason::Suspended,
                    &message,
                    until,
                );
            }
            next
        }
        End::Again { free, retry_after } => {
            let first_wait = policy.timing.retry_first_wait.into();
            let wait = |made| {
                retry_after
                    .unwrap_or_else(|| doubling(first_wait, made))
                    .min(LONGEST_RETRY_AFTER)
            };
            again(next, (reason, &message), free, wait, terms, now)
        }
        End::Queued => queued(next, &message, now),
    }
}

/// The workspace was the pod's: what has not arrived will not, and no attempt follows one whose agent may have begun.
fn last(
    next: &mut AgenticSessionStatus,
    (end, reason, message): (End, Reason, String),
    pod: Option<&PodSeen>,
    now: Timestamp,
) -> (End, Reason, String) {
    // What happened on a node that was lost nobody knows.
    let waited = pod.is_some_and(|pod| pod.runner == RunnerSeen::Waiting) && reason != Reason::NodeLost;
    if waited && runner_started(next).is_none() {
        return (end, reason, message);
    }
    if undelivered(next) {
        conditions::lost(next, GONE, now);
    }
    let reason = match end {
        End::Again { .. } => reason,
        End::Queued => Reason::Preempted,
        End::Completed | End::Stopped | End::Failed => return (end, reason, message),
    };
    let message = format!("{message} No attempt follows, as the workspace went with the pod: create another session.");
    (End::Failed, reason, message)
}

/// Whoever admits Jobs took the place away: the attempt is not counted at all, and the next waits to be admitted.
fn queued(mut next: AgenticSessionStatus, message: &str, now: Timestamp) -> AgenticSessionStatus {
    next.first_attempt = next.first_attempt.map(|first| first.saturating_add(1));
    next = waiting(&next, Reason::Queued, message);
    // It may have been held back before it began: that time is none of the next start's.
    conditions::remove(&mut next, &[condition::RUNNER_STARTED]);
    conditions::set(
        &mut next,
        condition::RUNNER_STARTED,
        "False",
        Reason::Queued,
        message,
        now,
    );
    next
}

fn again(
    mut next: AgenticSessionStatus,
    (reason, message): (Reason, &str),
    free: bool,
    wait: impl Fn(u32) -> u64,
    terms: &Resolved,
    now: Timestamp,
) -> AgenticSessionStatus {
    let timeout = terms.timeout();
    let attempt = next.attempt.unwrap_or(1);
    let before = next.free_retries.unwrap_or(0);
    if free {
        next.free_retries = Some(before.saturating_add(1));
    }
    let made = attempt
        .saturating_sub(next.first_attempt.unwrap_or(attempt))
        .saturating_add(1);
    let counted = made.saturating_sub(next.free_retries.unwrap_or(0));
    let used_up = if free {
        before >= MAX_FREE_RETRIES
    } else {
        counted >= terms.max_attempts
    };
    if used_up {
        return finish(
            &next,
            Phase::Failed,
            reason,
            &format!("{message} No attempt is left after {made}."),
            now,
        );
    }
    if next.running_seconds.unwrap_or(0) >= timeout {
        return finish(
            &next,
            Phase::Failed,
            Reason::Timeout,
            &format!("{message} The timeout of {timeout} s is used up."),
            now,
        );
    }
    let at = now.saturating_add(seconds(wait(made))).unwrap_or(Timestamp::MAX);
    next = waiting(
        &next,
        Reason::Retrying,
        &format!("Attempt {attempt} ended: {reason}: {message} Another follows at {at}."),
    );
    next.next_attempt_time = Some(Time(at));
    conditions::set(&mut next, condition::RUNNER_STARTED, "False", reason, message, now);
    next
}

/// Doubling, at most 5 min.
fn doubling(first_wait: u64, made: u32) -> u64 {
    first_wait
        .saturating_mul(1_u64.checked_shl(made.saturating_sub(1)).unwrap_or(u64::MAX))
        .min(LONGEST_WAIT)
}

/// Adds the attempt's running time; answers when it ended.
fn attempt_ran(next: &mut AgenticSessionStatus, remains: &Remains<'_>, now: Timestamp) -> Timestamp {
    let Remains {
        pod, claim, born, over, ..
    } = *remains;
    let (since, until) = match pod.map(|pod| &pod.runner) {
        Some(RunnerSeen::Ended { since, until, .. }) => {
            // By a clock that is ahead it ended later than now.
            let until = until.unwrap_or(now);
            let ahead = until.duration_since(now).max(SignedDuration::ZERO);
            let earlier = |time: Timestamp| time.saturating_sub(ahead).unwrap_or(time);
            // Of a pod that it evicts the kubelet forgets when its containers began.
            (since.map(earlier).or_else(|| runner_started(next)), earlier(until))
        }
        Some(RunnerSeen::Running { since }) => (*since, now),
        // A pod that is gone: from when its runner was seen to start, though not in another life, for as long as it can have run.
        Some(RunnerSeen::Waiting) | None => {
            let started = runner_started(next).map(|since| born.map_or(since, |born| since.max(born)));
            (started, over.map_or(now, |over| over.min(now)))
        }
    };
    if let Some(pod) = pod {
        next.pod_name = Some(pod.name.clone());
        next.pod_uid = Some(pod.uid.clone());
    }
    if let Some(since) = since {
        if runner_started(next).is_none() {
            started(next, Some(since), claim, now);
        }
        let ran = u64::try_from(until.duration_since(since).as_secs()).unwrap_or(0);
        next.running_seconds = Some(next.running_seconds.unwrap_or(0).saturating_add(ran));
    }
    until
}

fn runner_started(status: &AgenticSessionStatus) -> Option<Timestamp> {
    let started = conditions::find(status, condition::RUNNER_STARTED)?;
    (started.status == "True").then_some(started.last_transition_time.0)
}

/// Totals are the runner's, summed in its state on the volume: copied, never added.
///
/// A runner that ended before it could read that state (the lease of another, a volume that is full) has none to tell: what is
/// known stays.
fn keep(next: &mut AgenticSessionStatus, report: &Report, gateway: bool, now: Timestamp) {
    if report.has_read() || next.last_seq.is_none() {
        next.turns = Some(report.turns);
        next.usage = Some(report.usage.into());
        next.cost_usd = report.cost_usd.map(|cost| cost.to_string());
        next.last_seq = Some(report.last_seq);
        next.acked_seq = Some(report.acked_seq);
        conditions::deliveries(next, report, gateway, now);
    } else {
        conditions::events(next, None, gateway, now);
    }
    let keep = |old: &mut Option<String>, new: Option<String>| *old = new.or(old.take());
    keep(&mut next.sdk_session_id, report.sdk_session_id.clone());
    keep(&mut next.trace_id, report.trace_id.clone());
    keep(
        &mut next.result,
        Some(report.result.clone()).filter(|text| !text.is_empty()),
    );
}

fn seconds(count: u64) -> SignedDuration {
    SignedDuration::from_secs(i64::try_from(count).unwrap_or(i64::MAX))
}
