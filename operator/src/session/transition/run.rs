//! Runs: what begins one, and what it begins with.

use crds::{AgenticSessionStatus, Phase, condition};
use protocol::Reason;

use super::waiting;
use crate::session::{conditions, observed::SessionSeen};

/// Whether the annotation asks for a run that has not been begun or refused yet.
pub fn start_request_is_new(session: &SessionSeen) -> bool {
    session.start_requested.is_some() && session.start_requested != session.status.handled_start_request
}

/// A request that there is nothing to do about is recorded as handled.
pub fn note_start_request(mut status: AgenticSessionStatus, session: &SessionSeen) -> AgenticSessionStatus {
    if start_request_is_new(session) {
        status.handled_start_request.clone_from(&session.start_requested);
    }
    status
}

/// The first run begins with the session's creation, and so handles the request as it then is.
pub fn first_run(mut status: AgenticSessionStatus, session: &SessionSeen) -> AgenticSessionStatus {
    status.run = Some(1);
    status.handled_start_request.clone_from(&session.start_requested);
    status
}

/// Whether the run was ended by `spec.suspend`.
pub fn was_suspended(status: &AgenticSessionStatus) -> bool {
    status.phase == Phase::Stopped
        && status
            .conditions
            .iter()
            .any(|c| c.type_ == condition::FINISHED && c.reason == Reason::Suspended.as_str())
}

/// The next run, on the same workspace and conversation. One that goes on after `suspend` keeps what it used of its time.
pub fn next_run(status: &AgenticSessionStatus, session: &SessionSeen, goes_on: bool) -> AgenticSessionStatus {
    let mut next = waiting(status, Reason::Creating, "The next run begins.");
    next.run = Some(status.run.unwrap_or(1).saturating_add(1));
    next.first_attempt = Some(status.attempt.unwrap_or(0).saturating_add(1));
    next.free_retries = None;
    (next.start_time, next.completion_time) = (None, None);
    next.handled_start_request.clone_from(&session.start_requested);
    if !goes_on {
        next.running_seconds = None;
    }
    next.next_drain_time = None;
    conditions::remove(&mut next, &[condition::FINISHED, condition::RUNNER_STARTED]);
    next
}
