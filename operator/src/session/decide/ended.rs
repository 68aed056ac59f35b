//! What is left to do about a run that is over.

use jiff::{SignedDuration, Timestamp};

use crate::session::{
    drain,
    observed::{ClaimSeen, Observed},
    plan::Plan,
    transition,
    validate::{Invalid, Request},
};

/// An ended run stays ended until a start is asked for, or what `suspend` stopped is no longer suspended.
pub fn decide(mut plan: Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
    let suspended = transition::was_suspended(&seen.session.status);
    // What went with the pod is not gone on with.
    let over = seen.claim == ClaimSeen::Ephemeral && !suspended;
    if seen.session.suspend || over {
        plan.status = transition::note_start_request(plan.status, &seen.session);
    } else {
        let asked = transition::start_request_is_new(&seen.session);
        if asked || suspended {
            plan.status = transition::next_run(&plan.status, &seen.session, !asked);
            return plan;
        }
    }
    drain::advance(&mut plan, seen, request, now);
    expire(&mut plan, seen, request, now);
    plan
}

/// Deletes the session when its time is over and nothing is left to be delivered. What is only suspended is not over.
fn expire(plan: &mut Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) {
    let ttl = request.as_ref().ok().and_then(|request| request.ttl);
    let status = &seen.session.status;
    let (Some(ttl), Some(ended)) = (ttl, status.completion_time.as_ref()) else {
        return;
    };
    let waits = transition::was_suspended(status) || transition::undelivered(status) && seen.policy.gateway;
    if waits || plan.status != *status {
        return;
    }
    let ttl = SignedDuration::from_secs(i64::try_from(ttl).unwrap_or(i64::MAX));
    let left = ended
        .0
        .saturating_add(ttl)
        .unwrap_or(Timestamp::MAX)
        .duration_since(now);
    if left.is_positive() || !seen.policy.clock_is_sure {
        plan.wake_in(left);
    } else {
        plan.delete_session = true;
    }
}
