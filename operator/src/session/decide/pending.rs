//! Whether and how an attempt begins.

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::{SignedDuration, Timestamp};
use protocol::Reason;

use super::{
    Hindered, Hindrance, LOOK_AGAIN, LOOK_LATER, LOOK_OFTEN, LOOK_SELDOM, held, hindrance::hindrance, next_attempt,
};
use crate::session::{
    build, conditions, deadline, drain,
    observed::{ClaimSeen, JobSeen, Observed, PodSeen, Trouble},
    plan::{Attempt, Plan},
    transition,
    validate::{Invalid, Request},
};

/// Nothing runs, and the run is not over.
pub fn decide(mut plan: Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
    let status = &seen.session.status;
    let attempt = next_attempt(status);
    if status.run.is_none() {
        plan.status = transition::first_run(plan.status, &seen.session);
    }
    if let Some(job) = unrecorded(seen, attempt, request) {
        // Made a moment ago, or by a reconcile that did not live to record it. Whatever else is the case now, it is recorded first.
        plan.status = transition::creating(&plan.status, attempt, &job, seen.claim, now);
        let suspended = seen.next_job.ours().is_some_and(|job| job.suspended);
        plan.status = begun(plan.status, suspended.then(|| held(&job)).as_ref(), seen.claim, now);
        if let Some(pod) = first_pod(seen, attempt) {
            plan.status = transition::named(plan.status, pod);
        }
        return plan;
    }
    let in_a_run = status.attempt.is_some_and(|a| a >= status.first_attempt.unwrap_or(a));
    plan.status = transition::note_start_request(plan.status, &seen.session);
    if let Err(invalid) = request
        && !invalid.heals()
    {
        let why = invalid.to_string();
        plan.status = transition::finish(&plan.status, Phase::Failed, Reason::ConfigError, &why, now);
        return plan;
    }
    // What it asks for matters when it may go on; until then the condition alone says that it may not have it.
    if seen.session.suspend {
        plan.status = if in_a_run {
            transition::suspended_between_attempts(&plan.status, now)
        } else {
            transition::suspended_before_the_first(&plan.status)
        };
        return plan;
    }
    let requested = request;
    let request = match request {
        Ok(request) => request,
        // The admin's word, which may change; nothing is held meanwhile.
        Err(invalid) => {
            plan.status = transition::waiting(&plan.status, Reason::ConfigError, &invalid.to_string());
            transition::not_tried(&mut plan.status);
            if let Invalid::NoSettings(_) = invalid {
                // Of a right that is given back no watch tells.
                let said = conditions::find(&plan.status, condition::SPEC_ACCEPTED);
                let lasted = said.map_or(SignedDuration::ZERO, |said| {
                    now.duration_since(said.last_transition_time.0)
                });
                let who = &*seen.session.uid;
                plan.wake_in(deadline::patience(lasted, (LOOK_AGAIN, LOOK_SELDOM), who, now));
            }
            return plan;
        }
    };
    if let Some(wait) = status
        .next_attempt_time
        .as_ref()
        .map(|t| t.0.duration_since(now))
        .filter(SignedDuration::is_positive)
        .filter(|_| !is_worth_a_try(seen))
    {
        plan.wake = Some(wait);
        return plan;
    }
    match drain::hindrance(&mut plan, seen, now).or_else(|| hindrance(seen, &request.name)) {
        None => {
            plan.create_claim = seen.claim == ClaimSeen::Missing;
            plan.create_job = Some(attempt);
            let job = build::job_name(&request.name, attempt.number);
            plan.status = transition::creating(&plan.status, attempt, &job, seen.claim, now);
            let waits = attempt.held || request.queue.is_some();
            plan.status = begun(plan.status, waits.then(|| held(&job)).as_ref(), seen.claim, now);
        }
        Some(Hindrance {
            reason,
            message,
            delete,
        }) => {
            plan.delete.extend(delete);
            let (least, most, is_final) = match reason {
                // What is missing may be made; for as long as a pod may take to start.
                Reason::ConfigError => (LOOK_AGAIN, LOOK_SELDOM, true),
                Reason::NameConflict => (LOOK_LATER, LOOK_SELDOM, false),
                _ => (LOOK_AGAIN, LOOK_OFTEN, false),
            };
            let hindered = Hindered::by(seen, requested, &plan.status, (reason, &message), now);
            if is_final && hindered.is_over() {
                plan.status = transition::finish(&plan.status, Phase::Failed, reason, &message, now);
            } else {
                plan.wake_in(hindered.patience((least, most), &request.uid, now));
                plan.status = hindered.status;
            }
        }
    }
    plan
}

/// What was refused may not be, by now: somebody has changed the session.
fn is_worth_a_try(seen: &Observed) -> bool {
    let status = &seen.session.status;
    status.reason.as_deref() != Some(Reason::Retrying.as_str()) && status.observed_generation != seen.session.generation
}

/// An attempt that has its Job, and may run or is held.
fn begun(
    mut status: AgenticSessionStatus,
    held: Option<&Trouble>,
    claim: ClaimSeen,
    now: Timestamp,
) -> AgenticSessionStatus {
    if held.is_some() {
        status = transition::progress(&status, None, held, claim, now);
    }
    transition::admitted(status, held, now)
}

/// The first pod of the next attempt's Job.
fn first_pod(seen: &Observed, attempt: Attempt) -> Option<&PodSeen> {
    let job = seen.next_job.ours()?;
    let its_own = |pod: &&PodSeen| pod.attempt == attempt.number && pod.job_uid == job.uid;
    seen.pods.iter().filter(its_own).min_by_key(|pod| pod.created)
}

/// Name of the next attempt's Job, if that was made: it is there, or a pod of it is, which stays until its report is read.
fn unrecorded(seen: &Observed, attempt: Attempt, request: &Result<Request, Invalid>) -> Option<String> {
    if let JobSeen::Ours(job) = &seen.next_job {
        return Some(job.name.clone());
    }
    let left = seen.pods.iter().any(|pod| pod.attempt == attempt.number);
    left.then(|| {
        request.as_ref().map_or_else(
            |_| String::new(),
            |request| build::job_name(&request.name, attempt.number),
        )
    })
}
