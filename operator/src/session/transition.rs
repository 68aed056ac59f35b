//! From one status to the next: every way that a session's status changes.

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use protocol::{Reason, Report};

use super::{
    conditions,
    decide::Attempt,
    observed::{ClaimSeen, PodSeen, Policy, Resolved, RunnerSeen, SessionSeen, Trouble},
    outcome::{End, Verdict},
};

/// Attempts of a run that the cluster may end without their counting.
pub const MAX_FREE_RETRIES: u32 = 10;
const LONGEST_WAIT: u64 = 300;
/// Longest that the model API's own word is taken for.
const LONGEST_RETRY_AFTER: u64 = 3_600;

/// Why what is missing will not come.
const GONE: &str = "the rest went with the pod (spec.workspace.ephemeral)";

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
        next.pod_name = Some(pod.name.clone());
        next.pod_uid = Some(pod.uid.clone());
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
    let started = status.conditions.iter().find(|c| c.type_ == condition::RUNNER_STARTED);
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

/// The attempt is over: what it left is kept, and the run ends or another attempt follows.
pub fn record(
    status: &AgenticSessionStatus,
    verdict: Verdict,
    pod: Option<&PodSeen>,
    claim: ClaimSeen,
    (terms, policy): (&Resolved, &Policy),
    now: Timestamp,
) -> AgenticSessionStatus {
    let Verdict {
        end,
        reason,
        message,
        report,
    } = verdict;
    let mut next = status.clone();
    let gateway = policy.gateway;
    let was_stopping = status.phase == Phase::Stopping;
    let until = attempt_ran(&mut next, pod, claim, now);
    match &report {
        Some(report) => keep(&mut next, report, gateway, now),
        None if runner_started(&next).is_some() => conditions::events(&mut next, None, gateway, now),
        None => conditions::no_events(&mut next, gateway, now),
    }
    let (end, reason, message) = match claim {
        ClaimSeen::Ephemeral => last(&mut next, (end, reason, message), pod, now),
        _ => (end, reason, message),
    };
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
fn attempt_ran(next: &mut AgenticSessionStatus, pod: Option<&PodSeen>, claim: ClaimSeen, now: Timestamp) -> Timestamp {
    let (since, until) = match pod.map(|pod| &pod.runner) {
        Some(RunnerSeen::Ended { since, until, .. }) => {
            // By a clock that is ahead it ended later than now.
            let until = until.unwrap_or(now);
            let ahead = until.duration_since(now).max(SignedDuration::ZERO);
            let earlier = |time: Timestamp| time.saturating_sub(ahead).unwrap_or(time);
            (since.map(earlier), earlier(until))
        }
        Some(RunnerSeen::Running { since }) => (*since, now),
        // A pod that is gone: from when its runner was seen to start.
        Some(RunnerSeen::Waiting) | None => (runner_started(next), now),
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
    let started = status
        .conditions
        .iter()
        .find(|c| c.type_ == condition::RUNNER_STARTED)?;
    (started.status == "True").then_some(started.last_transition_time.0)
}

/// Totals are the runner's, summed in its state on the volume: copied, never added.
///
/// A runner that ended before it could read that state (the lease of another, a volume that is full) has none to tell: what is
/// known stays.
fn keep(next: &mut AgenticSessionStatus, report: &Report, gateway: bool, now: Timestamp) {
    if report.last_seq >= next.last_seq.unwrap_or(0) {
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

// --- runs -----------------------------------------------------------------------------------------------------------

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

/// The API server refuses what an attempt needs.
///
/// It is not asked again before that time.
pub fn refused(
    status: &AgenticSessionStatus,
    reason: Reason,
    message: &str,
    not_before: Time,
    now: Timestamp,
) -> AgenticSessionStatus {
    let mut next = waiting(status, reason, message);
    next.next_attempt_time = Some(not_before);
    conditions::set(&mut next, condition::RUNNER_STARTED, "False", reason, message, now);
    next
}

/// Since when no runner started though nothing but the cluster kept it from starting, if that was said.
pub fn not_started_since(status: &AgenticSessionStatus) -> Option<Timestamp> {
    let said = status
        .conditions
        .iter()
        .find(|c| c.type_ == condition::RUNNER_STARTED)?;
    (said.status == "False").then_some(said.last_transition_time.0)
}

// --- drains ---------------------------------------------------------------------------------------------------------

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
    // One that could not read the volume's state knows nothing of it.
    if let Some(report) = report.filter(|report| report.last_seq >= next.last_seq.unwrap_or(0)) {
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

// --- small ----------------------------------------------------------------------------------------------------------

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

fn seconds(count: u64) -> SignedDuration {
    SignedDuration::from_secs(i64::try_from(count).unwrap_or(i64::MAX))
}
