//! Delivering what an ended run left on its volume: when a drain Job is made, and what comes of it.
//!
//! A session has one writer at a time: no drain begins before the attempt's pod is over, and a new run first takes the drain's
//! Job away and waits for its pod.

use crds::AgenticSessionStatus;
use jiff::{SignedDuration, Timestamp};

use super::{
    build, conditions,
    decide::{Hindrance, next_attempt},
    observed::{ClaimSeen, Observed, OurJob, PodSeen, RunnerSeen},
    plan::{Drain, Plan, Target},
    transition,
    validate::{Invalid, Request},
};
use protocol::{Reason, Report};

/// After the run's end: begins, follows and records drains.
pub fn advance(plan: &mut Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) {
    adopt(plan, seen);
    if plan.status.drain_job_name.is_some() {
        follow(plan, seen, now);
    } else if seen.policy.gateway && transition::undelivered(&plan.status) {
        begin(plan, seen, request, now);
    }
    clean(plan, seen);
}

/// Before a run's first attempt: no drain may write any more.
pub fn hindrance(plan: &mut Plan, seen: &Observed, now: Timestamp) -> Option<Hindrance> {
    adopt(plan, seen);
    if let Some(pod) = seen.drain_pods.iter().find(|pod| !pod.is_over()) {
        let message = format!("Waits for pod {}, which delivers records, to end.", pod.name);
        return Some(Hindrance {
            reason: Reason::Retrying,
            message,
            delete: seen.drains.iter().filter_map(|(_, job)| unless_deleting(job)).collect(),
        });
    }
    if let Some((_, job)) = seen.drains.iter().find(|(_, job)| !job.finished) {
        return Some(Hindrance {
            reason: Reason::Retrying,
            message: format!("Waits for Job {}, which delivers records, to be deleted.", job.name),
            delete: unless_deleting(job).into_iter().collect(),
        });
    }
    if plan.status.drain_job_name.is_some() {
        follow(plan, seen, now);
        plan.status.next_drain_time = None;
    }
    clean(plan, seen);
    None
}

/// A Job, or its pod, that was made by a reconcile which did not live to record it.
fn adopt(plan: &mut Plan, seen: &Observed) {
    let known = plan.status.drains.unwrap_or(0);
    let jobs = seen.drains.iter().map(|(number, job)| (*number, job.name.clone()));
    let pods = seen.drain_pods.iter().map(|pod| (pod.attempt, String::new()));
    let newest = jobs.chain(pods).filter(|(number, _)| *number > known).max();
    if let Some((number, name)) = newest {
        plan.status = transition::draining(&plan.status, number, &name, None);
    }
}

fn pod_of(seen: &Observed, number: u32) -> Option<&PodSeen> {
    let ours = seen.drain_pods.iter().filter(|pod| pod.attempt == number);
    ours.min_by_key(|pod| (pod.is_over(), report(pod).is_none()))
}

fn report(pod: &PodSeen) -> Option<&Report> {
    match &pod.runner {
        RunnerSeen::Ended { report, .. } => report.as_deref(),
        RunnerSeen::Waiting | RunnerSeen::Running { .. } => None,
    }
}

fn follow(plan: &mut Plan, seen: &Observed, now: Timestamp) {
    let number = plan.status.drains.unwrap_or(0);
    let job = seen.drains.iter().find(|(n, _)| *n == number).map(|(_, job)| job);
    let pod = pod_of(seen, number);
    let over = match pod {
        Some(pod) => pod.is_over(),
        None => job.is_none_or(|job| job.finished || job.deleting),
    };
    if !over {
        let name = plan.status.drain_job_name.clone().unwrap_or_default();
        plan.status = transition::draining(&plan.status, number, &name, pod);
        if let (None, Some(job)) = (pod, job.filter(|job| job.suspended)) {
            hold(plan, seen, job, now);
        }
        return;
    }
    plan.status = transition::drained(&plan.status, pod.and_then(report), now);
    if transition::undelivered(&plan.status) {
        let at = now
            .saturating_add(wait(seen, &plan.status, now))
            .unwrap_or(Timestamp::MAX);
        plan.status.next_drain_time = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at));
        plan.wake = plan.wake.into_iter().chain([at.duration_since(now)]).min();
    }
}

/// A drain whose Job somebody suspends has no pod, and no deadline but that of all drains.
fn hold(plan: &mut Plan, seen: &Observed, job: &OurJob, now: Timestamp) {
    let why = format!(
        "Job {}, which delivers the rest, is suspended by whoever admits Jobs",
        job.name
    );
    conditions::held_up(&mut plan.status, &why, now);
    let rest = seconds(seen.policy.timing.drain_bound) - ended_for(&plan.status, now);
    if rest.is_positive() || !seen.policy.clock_is_sure {
        plan.wake_in(rest);
    } else {
        plan.delete.extend(unless_deleting(job));
    }
}

/// As long as it has lasted already, so that it doubles, between the bounds.
fn wait(seen: &Observed, status: &AgenticSessionStatus, now: Timestamp) -> SignedDuration {
    let timing = seen.policy.timing;
    let (least, most) = (seconds(timing.drain_first_wait), seconds(timing.drain_longest_wait));
    ended_for(status, now).clamp(least, most.max(least))
}

fn ended_for(status: &AgenticSessionStatus, now: Timestamp) -> SignedDuration {
    let since = status.completion_time.as_ref().map_or(now, |time| time.0);
    now.duration_since(since)
}

fn begin(plan: &mut Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) {
    if matches!(
        seen.claim,
        // What has its name by now is somebody else's.
        ClaimSeen::Missing | ClaimSeen::Absent | ClaimSeen::Foreign | ClaimSeen::Ephemeral
    ) {
        plan.status = transition::lost(&plan.status, "the session's volume is gone", now);
        return;
    }
    let bound = seconds(seen.policy.timing.drain_bound);
    let rest = bound - ended_for(&plan.status, now);
    if !rest.is_positive() && !seen.policy.clock_is_sure {
        plan.wake_in(rest);
        return;
    }
    if !rest.is_positive() {
        let why = format!("given up {} h after the run's end", bound.as_hours());
        plan.status = transition::lost(&plan.status, &why, now);
        return;
    }
    let due = plan
        .status
        .next_drain_time
        .as_ref()
        .map(|time| time.0.duration_since(now));
    if let Some(wait) = due.filter(SignedDuration::is_positive) {
        plan.wake = plan.wake.into_iter().chain([wait.min(rest)]).min();
        return;
    }
    // One writer: the attempt's pod is over, and of the last drain nothing is left.
    let mut pods = seen.pods.iter().chain(&seen.drain_pods).chain(&seen.bare);
    let alone = seen.drains.is_empty() && pods.all(PodSeen::is_over);
    let (Ok(request), true) = (request, alone) else {
        // The ends of pods and Jobs are watched, and so is the session; the bound is not.
        plan.wake = plan.wake.into_iter().chain([rest]).min();
        return;
    };
    let number = plan.status.drains.unwrap_or(0).saturating_add(1);
    let mut attempt = next_attempt(&plan.status);
    attempt.number = plan.status.attempt.unwrap_or(1);
    plan.create_drain = Some(Drain { number, attempt });
    plan.status = transition::draining(&plan.status, number, &build::drain_name(&request.name, number), None);
}

/// Recorded drains: their reports are let go, their Jobs deleted. What this very plan records is left to the next.
pub fn clean(plan: &mut Plan, seen: &Observed) {
    let recorded = |number: u32| {
        let status = &seen.session.status;
        let current = status.drain_job_name.is_some() && status.drains == Some(number);
        !current && status.drains.is_some_and(|last| number <= last)
    };
    for pod in seen.drain_pods.iter().filter(|pod| pod.held && recorded(pod.attempt)) {
        plan.release.push((pod.name.clone(), pod.uid.clone()));
    }
    let done = seen.drains.iter().filter(|(number, _)| recorded(*number));
    plan.delete.extend(done.filter_map(|(_, job)| unless_deleting(job)));
}

fn unless_deleting(job: &OurJob) -> Option<Target> {
    (!job.deleting).then(|| Target::Job(job.name.clone(), job.uid.clone()))
}

fn seconds(count: u32) -> SignedDuration {
    SignedDuration::from_secs(count.into())
}
