//! An attempt under way: followed, stopped, judged.

use crds::Phase;
use jiff::{SignedDuration, Timestamp};

use super::{LOOK_AGAIN, LOOK_LATER, LOOK_SELDOM, START_SLOW, held};
use crate::session::{
    deadline, drain,
    observed::{InQueue, Observed, OurJob, PodSeen, RunnerSeen},
    outcome::{Evidence, judge},
    plan::{Plan, Target, Tuned},
    repos, transition,
    transition::Remains,
    validate::{Invalid, Request},
};

/// The attempt's Job was made, and its end is not recorded.
pub fn decide(mut plan: Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
    // The reconcile that recorded the last drain may have begun the run too: what is left of that drain goes now.
    drain::clean(&mut plan, seen);
    let recorded = &seen.session.status;
    let attempt = recorded.attempt.unwrap_or(1);
    // An attempt is one pod. When somebody takes it away, finalizers and all, its Job makes another, which is not followed.
    let first = recorded.pod_uid.as_deref();
    let mut pods: Vec<&PodSeen> = seen
        .pods
        .iter()
        .filter(|pod| pod.attempt == attempt && first.is_none_or(|uid| pod.uid == uid))
        .collect();
    // One that lives speaks for the attempt; then one with a report.
    pods.sort_by_key(|pod| (pod.is_judgeable(), !has_report(pod), std::cmp::Reverse(pod.created)));
    let pod = pods.first().copied();
    let stopping = recorded.phase == Phase::Stopping;
    if !stopping {
        plan.status = transition::note_start_request(plan.status, &seen.session);
    }

    let over = match pod {
        Some(pod) => pod.is_judgeable(),
        None => first.is_some() || seen.job.ours().is_none_or(|job| job.finished || job.deleting),
    };
    if over && recorded.phase == Phase::Creating && pod.is_some_and(has_report) {
        // Watchers are promised every phase: what ended before anybody looked is first recorded as running.
        plan.status = transition::progress(&plan.status, pod, None, seen.claim, now);
        return plan;
    }
    if over {
        let message = recorded.message.clone().unwrap_or_default();
        let verdict = judge(&Evidence {
            attempt,
            stopping: stopping.then(|| (transition::recorded_reason(recorded), &*message)),
            pod,
            job: &seen.job,
            followed: pod.is_some_and(|pod| {
                let later = |other: &PodSeen| other.job_uid == pod.job_uid && other.created >= pod.created;
                seen.pods.iter().any(|other| other.uid != pod.uid && later(other))
            }),
        });
        let terms = (&deadline::terms(seen, request), &seen.policy);
        let remains = Remains {
            pod,
            claim: seen.claim,
            born: seen.session.created,
            over: seen.job.ours().and_then(|job| job.finished_at),
            unfollowed: seen.bare.iter().any(|pod| pod.runner != RunnerSeen::Waiting),
        };
        plan.status = transition::record(&plan.status, verdict, &remains, terms, now);
        if let Some(RunnerSeen::Ended {
            report: Some(report), ..
        }) = pod.map(|pod| &pod.runner)
        {
            repos::record(&mut plan.status.repos, &seen.session.repos, &report.repos);
        }
        return plan;
    }
    if stopping {
        plan.delete = stop_targets(&pods, seen.job.ours());
        plan.wake = Some(LOOK_LATER);
        return plan;
    }
    let trouble = pod.and_then(|pod| pod.trouble.as_ref()).or(seen.unsaid.as_ref());
    if let Some((reason, message)) = deadline::passed(seen, pod, trouble, request, now) {
        plan.status = transition::stopping(&plan.status, reason, &message);
        return plan;
    }
    let held = seen
        .job
        .ours()
        .filter(|job| job.suspended && pod.is_none())
        .map(|job| held(&job.name));
    plan.status = transition::progress(&plan.status, pod, held.as_ref().or(trouble), seen.claim, now);
    plan.status = transition::admitted(plan.status, held.as_ref(), now);
    plan.tune = tuned(seen, pod, request);
    plan.wake = deadline::next(seen, pod, trouble, request, now).map(|at| at.duration_since(now));
    // Why a Job has no pod, or what a pod waits for, may be said in Events alone, which nobody watches.
    let (least, since) = match pod {
        // What holds it back shows on the Job, which is watched.
        None if held.is_some() => (None, None),
        None => (
            Some(LOOK_AGAIN),
            seen.job.ours().and_then(|job| job.started.or(job.created)),
        ),
        Some(pod) if pod.scheduled && pod.runner == RunnerSeen::Waiting => (Some(START_SLOW), pod.created),
        Some(_) => (None, None),
    };
    let soon = least.map(|least| {
        let lasted = since.map_or(SignedDuration::ZERO, |since| now.duration_since(since));
        let who = seen.job.ours().map_or("", |job| &*job.uid);
        deadline::patience(lasted, (least, LOOK_SELDOM), who, now)
    });
    plan.wake = plan.wake.into_iter().chain(soon).min();
    plan
}

/// What the attempt is held to by now and was not told yet. The Job comes first: it is what later decisions read.
fn tuned(seen: &Observed, pod: Option<&PodSeen>, request: &Result<Request, Invalid>) -> Vec<Tuned> {
    let terms = deadline::terms(seen, request);
    let mut tuned: Vec<_> = moved(seen, pod, request).into_iter().collect();
    if let Some(job) = seen.job.ours().filter(|job| !job.deleting && !job.finished)
        && (request.is_ok() || job.resolved.is_some())
        && job
            .resolved
            .is_none_or(|told| (told.limits, told.asked) != (terms.limits, terms.asked))
    {
        tuned.push(Tuned::Job(job.name.clone(), job.uid.clone(), terms));
    }
    if let Some(pod) = pod.filter(|pod| !pod.is_over())
        && (request.is_ok() || pod.limits.is_some())
        && pod.limits != Some(terms.limits)
    {
        tuned.push(Tuned::Pod(pod.name.clone(), pod.uid.clone(), terms.limits));
    }
    tuned
}

/// To where a Job is moved that waits in another queue than the session has by now. One that may run stays in its own: what it runs on is
/// taken from there. A priority stays until the next attempt when the session has none any more: Kueue's webhook lets it be changed, but
/// not removed ("`WorkloadPriorityClass` cannot be removed from a workload"), and would refuse the other queue with it.
fn moved(seen: &Observed, pod: Option<&PodSeen>, request: &Result<Request, Invalid>) -> Option<Tuned> {
    let job = seen.job.ours()?;
    let request = request.as_ref().ok()?;
    let there = job.queue.as_deref();
    let queue = InQueue {
        name: request.queue.clone()?,
        priority: request.queue_priority.clone().or_else(|| there?.priority.clone()),
    };
    let waits = job.suspended && !job.deleting && !job.finished && pod.is_none();
    (waits && there != Some(&queue)).then(|| Tuned::Queue(job.name.clone(), job.uid.clone(), queue))
}

fn has_report(pod: &PodSeen) -> bool {
    matches!(pod.runner, RunnerSeen::Ended { report: Some(_), .. })
}

fn stop_targets(pods: &[&PodSeen], job: Option<&OurJob>) -> Vec<Target> {
    if pods.is_empty() {
        let target = job.map(|job| Target::Job(job.name.clone(), job.uid.clone()));
        return target.into_iter().collect();
    }
    pods.iter()
        .filter(|pod| !pod.deleting && !pod.is_over())
        .map(|pod| Target::Pod(pod.name.clone(), pod.uid.clone()))
        .collect()
}
