//! From one status to the next: every way that a session's status changes.

mod drain;
mod record;
mod run;

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use protocol::Reason;

use super::{
    conditions,
    observed::{ClaimSeen, PodSeen, RunnerSeen, Trouble},
    plan::Attempt,
};

pub use drain::{drained, draining, lost, undelivered};
pub use record::{Remains, record};
pub use run::{first_run, next_run, note_start_request, start_request_is_new, was_suspended};

/// Nothing runs, for this reason.
pub fn waiting(status: &AgenticSessionStatus, reason: Reason, message: &str) -> AgenticSessionStatus {
    says(status, Phase::Pending, reason, message)
}

/// The Job of an attempt exists.
pub fn creating(
    status: &AgenticSessionStatus,
    attempt: Attempt,
    job_name: &str,
    claim: ClaimSeen,
    now: Timestamp,
) -> AgenticSessionStatus {
    let mut next = says(
        status,
        Phase::Creating,
        Reason::Creating,
        &format!("The pod of attempt {} is being made.", attempt.number),
    );
    next.attempt = Some(attempt.number);
    next.run = Some(attempt.run);
    next.first_attempt = Some(status.first_attempt.unwrap_or(attempt.number));
    next.job_name = Some(job_name.to_owned());
    (next.pod_name, next.pod_uid) = (None, None);
    (next.next_attempt_time, next.completion_time) = (None, None);
    (next.agent_restarts, next.next_drain_time) = (None, None);
    conditions::remove(&mut next, &[condition::FINISHED, condition::TRACES_DELIVERED]);
    if conditions::denied(&next, condition::EVENTS_DELIVERED).is_none() {
        // What is still missing stays said until an attempt has delivered it.
        conditions::remove(&mut next, &[condition::EVENTS_DELIVERED]);
    }
    let (ready, reason, message) = match claim {
        ClaimSeen::Ours { bound: true } => ("True", Reason::VolumeBound, "The volume is bound."),
        ClaimSeen::Ephemeral => (
            "True",
            Reason::Ephemeral,
            "There is no claim: the workspace goes with the pod.",
        ),
        _ => (
            "False",
            Reason::WaitingForVolume,
            "The volume is bound when the pod has a node.",
        ),
    };
    conditions::set(&mut next, condition::WORKSPACE_READY, ready, reason, message, now);
    conditions::set(
        &mut next,
        condition::RUNNER_STARTED,
        "False",
        Reason::Creating,
        "The pod is being made.",
        now,
    );
    next
}

/// The pod of the attempt.
pub fn named(mut status: AgenticSessionStatus, pod: &PodSeen) -> AgenticSessionStatus {
    status.pod_name = Some(pod.name.clone());
    status.pod_uid = Some(pod.uid.clone());
    status
}

/// What a live pod shows.
pub fn progress(
    status: &AgenticSessionStatus,
    pod: Option<&PodSeen>,
    trouble: Option<&Trouble>,
    claim: ClaimSeen,
    now: Timestamp,
) -> AgenticSessionStatus {
    let mut next = status.clone();
    let mut restarted = None;
    if let Some(pod) = pod {
        next = named(next, pod);
        // A kubelet that forgot begins anew; what was counted stays.
        let known = next.agent_restarts.unwrap_or(0);
        if pod.agent_restarts > known && matches!(pod.runner, RunnerSeen::Running { .. }) {
            next.agent_restarts = Some(pod.agent_restarts);
            let why = if pod.agent_out_of_memory {
                "ran out of memory"
            } else {
                "ended"
            };
            let message = format!(
                "The agent's container {why} and was started again, the {}. time.",
                pod.agent_restarts
            );
            restarted = Some(message);
        }
    }
    // One that left a report has run, however soon it ended.
    let ran = pod.map(|pod| &pod.runner);
    if let Some(
        RunnerSeen::Running { since }
        | RunnerSeen::Ended {
            since, report: Some(_), ..
        },
    ) = ran
    {
        if next.phase != Phase::Running {
            next = says(&next, Phase::Running, Reason::Running, "The agent works.");
            started(&mut next, *since, claim, now);
        }
        if let Some(message) = restarted {
            next = says(&next, Phase::Running, Reason::Running, &message);
        }
    } else if let Some(trouble) = trouble {
        next = says(&next, next.phase, trouble.reason, &trouble.message);
        // Since when, the condition keeps.
        if hindered_since(&next, trouble.reason).is_none() {
            conditions::remove(&mut next, &[condition::RUNNER_STARTED]);
        }
        conditions::set(
            &mut next,
            condition::RUNNER_STARTED,
            "False",
            trouble.reason,
            &trouble.message,
            now,
        );
    } else if next.phase == Phase::Creating && next.reason.as_deref() != Some(Reason::Creating.as_str()) {
        next = says(
            &next,
            Phase::Creating,
            Reason::Creating,
            "What hindered the pod's start is over.",
        );
        conditions::set(
            &mut next,
            condition::RUNNER_STARTED,
            "False",
            Reason::Creating,
            "The pod is being made.",
            now,
        );
    }
    next
}

fn started(next: &mut AgenticSessionStatus, since: Option<Timestamp>, claim: ClaimSeen, now: Timestamp) {
    let since = since.unwrap_or(now);
    next.start_time.get_or_insert(Time(since));
    conditions::set(
        next,
        condition::RUNNER_STARTED,
        "True",
        Reason::Running,
        "The runner has started.",
        since,
    );
    if claim == (ClaimSeen::Ours { bound: true }) {
        conditions::set(
            next,
            condition::WORKSPACE_READY,
            "True",
            Reason::VolumeBound,
            "The volume is bound.",
            now,
        );
    }
}

/// The agent is being stopped, for this reason, which becomes the session's when nothing better is known at the end.
pub fn stopping(status: &AgenticSessionStatus, reason: Reason, message: &str) -> AgenticSessionStatus {
    says(status, Phase::Stopping, reason, message)
}

/// Suspended before the run's first attempt. What hindered that is looked at anew when it may begin.
pub fn suspended_before_the_first(status: &AgenticSessionStatus) -> AgenticSessionStatus {
    let message = "Not started: spec.suspend is true; set it to false to start.";
    let mut next = waiting(status, Reason::Suspended, message);
    if !was_held(&next) {
        conditions::remove(&mut next, &[condition::RUNNER_STARTED]);
    }
    next
}

/// Suspended while nothing ran.
pub fn suspended_between_attempts(status: &AgenticSessionStatus, now: Timestamp) -> AgenticSessionStatus {
    let mut next = finish(
        status,
        Phase::Stopped,
        Reason::StoppedByUser,
        "Stopped by spec.suspend; set it to false to go on.",
        now,
    );
    conditions::set(
        &mut next,
        condition::FINISHED,
        "True",
        Reason::Suspended,
        "Stopped by spec.suspend.",
        now,
    );
    next
}

/// Whether the last attempt was ended, or held back, by whoever admits Jobs.
pub fn was_held(status: &AgenticSessionStatus) -> bool {
    let started = conditions::find(status, condition::RUNNER_STARTED);
    started.is_some_and(|c| c.reason == Reason::Queued.as_str())
}

/// Whether an attempt under way is let to run.
pub fn admitted(mut status: AgenticSessionStatus, held: Option<&Trouble>, now: Timestamp) -> AgenticSessionStatus {
    let (value, reason, message) = match held {
        Some(held) => ("False", Reason::Queued, &*held.message),
        None => ("True", Reason::Admitted, "The session may run."),
    };
    conditions::set(&mut status, condition::ADMITTED, value, reason, message, now);
    status
}

/// Whether what the spec asks for by now is allowed. Said only while it is not.
pub fn accepted(status: &mut AgenticSessionStatus, why_not: Option<&str>, now: Timestamp) {
    match why_not {
        None => conditions::remove(status, &[condition::SPEC_ACCEPTED]),
        Some(why_not) => conditions::set(
            status,
            condition::SPEC_ACCEPTED,
            "False",
            Reason::ConfigError,
            why_not,
            now,
        ),
    }
}

/// The run is over.
pub fn finish(
    status: &AgenticSessionStatus,
    phase: Phase,
    reason: Reason,
    message: &str,
    now: Timestamp,
) -> AgenticSessionStatus {
    let mut next = says(status, phase, reason, message);
    next.next_attempt_time = None;
    next.completion_time = Some(Time(now));
    conditions::set(&mut next, condition::FINISHED, "True", reason, message, now);
    next
}

/// What the status of an ended run said, if its phase is of one that is not over: somebody else has written that. An ended run stays
/// ended; from such a phase another attempt would follow, beyond those it has.
pub fn overwritten(status: &AgenticSessionStatus) -> Option<AgenticSessionStatus> {
    let finished = conditions::find(status, condition::FINISHED);
    let finished = finished.filter(|_| !status.phase.is_terminal() && status.completion_time.is_some())?;
    let is = |reason: Reason| finished.reason == reason.as_str();
    let (phase, reason) = if is(Reason::Completed) {
        (Phase::Completed, &*finished.reason)
    } else if is(Reason::Suspended) {
        (Phase::Stopped, Reason::StoppedByUser.as_str())
    } else if is(Reason::StoppedByUser) || is(Reason::Inactivity) {
        (Phase::Stopped, &*finished.reason)
    } else {
        (Phase::Failed, &*finished.reason)
    };
    Some(AgenticSessionStatus {
        phase,
        reason: Some(reason.to_owned()),
        message: Some(finished.message.clone()),
        ..status.clone()
    })
}

/// No attempt can begin, for a reason that others must do something about. Since when, the condition keeps.
pub fn hindered(status: &AgenticSessionStatus, reason: Reason, message: &str, now: Timestamp) -> AgenticSessionStatus {
    let mut next = waiting(status, reason, message);
    let said = conditions::denied(&next, condition::RUNNER_STARTED);
    // Why the last attempt ended stays said while what is left of it goes, and so does that the next waits to be admitted.
    if was_held(&next) || (reason == Reason::Retrying && said.is_some()) {
        return next;
    }
    // Two that take turns are no two starts.
    let goes_on = said == Some(reason.as_str()) || (is_refused(reason.as_str()) && said.is_some_and(is_refused));
    if !goes_on {
        conditions::remove(&mut next, &[condition::RUNNER_STARTED]);
    }
    conditions::set(&mut next, condition::RUNNER_STARTED, "False", reason, message, now);
    next
}

/// Whether this keeps an attempt from beginning only for as long as a start may take.
fn is_refused(reason: &str) -> bool {
    [Reason::ConfigError, Reason::QuotaExceeded]
        .iter()
        .any(|refused| refused.as_str() == reason)
}

/// Nothing was tried, and so nothing refused: the time to wait for others, or for a place, is none of a start's.
pub fn not_tried(status: &mut AgenticSessionStatus) {
    if conditions::denied(status, condition::RUNNER_STARTED).is_some_and(is_refused) {
        conditions::remove(status, &[condition::RUNNER_STARTED]);
    }
}

/// Since when this keeps the runner from starting, if it was said.
pub fn hindered_since(status: &AgenticSessionStatus, reason: Reason) -> Option<Timestamp> {
    let said = conditions::find(status, condition::RUNNER_STARTED)?;
    (said.status == "False" && said.reason == reason.as_str()).then_some(said.last_transition_time.0)
}

/// Since when no runner started though nothing but the cluster kept it from starting, if that was said.
pub fn not_started_since(status: &AgenticSessionStatus) -> Option<Timestamp> {
    let said = conditions::find(status, condition::RUNNER_STARTED)?;
    (said.status == "False").then_some(said.last_transition_time.0)
}

/// The reason that a status of ours carries.
pub fn recorded_reason(status: &AgenticSessionStatus) -> Reason {
    status
        .reason
        .as_deref()
        .and_then(|reason| serde_json::from_value(serde_json::Value::from(reason)).ok())
        .unwrap_or(Reason::OutcomeUnknown)
}

fn says(status: &AgenticSessionStatus, phase: Phase, reason: Reason, message: &str) -> AgenticSessionStatus {
    AgenticSessionStatus {
        phase,
        reason: Some(reason.as_str().to_owned()),
        message: Some(conditions::bounded(message)),
        ..status.clone()
    }
}
