//! What an attempt may not outlast: the grace of what hinders its start, the time to start, its running time.

use jiff::{SignedDuration, Timestamp};
use protocol::Reason;

use super::{
    observed::{Observed, OurJob, PodSeen, RunnerSeen, Trouble},
    pod::START_TIMEOUT,
    validate::{Invalid, Request},
};

/// Beyond the rest of `timeout`, how long a runner may take to end by itself.
const STOP_SLACK: SignedDuration = SignedDuration::from_mins(2);

/// Why the attempt must be stopped now, if it must.
pub fn passed(
    seen: &Observed,
    pod: Option<&PodSeen>,
    trouble: Option<&Trouble>,
    request: &Result<Request, Invalid>,
    now: Timestamp,
) -> Option<(Reason, String)> {
    if seen.session.suspend {
        return Some((
            Reason::StoppedByUser,
            "spec.suspend is true: the agent is being stopped.".to_owned(),
        ));
    }
    if let Some(RunnerSeen::Running { since: Some(since) }) = pod.map(|pod| &pod.runner) {
        let timeout = timeout(seen.job.ours(), request);
        let past = now >= backstop(*since, timeout, seen.session.status.running_seconds.unwrap_or(0));
        return past.then(|| {
            (
                Reason::Timeout,
                format!("The timeout of {timeout} s is used up and the runner did not end by itself."),
            )
        });
    }
    if let Some(trouble) = trouble
        && trouble_ends(trouble, seen.job.ours()).is_some_and(|end| now >= end)
    {
        return Some((trouble.reason, trouble.message.clone()));
    }
    let start = start_deadline(seen.job.ours()).filter(|end| now >= *end)?;
    if matches!(pod.map(|p| &p.runner), Some(RunnerSeen::Running { .. })) {
        return None;
    }
    Some(match trouble {
        Some(trouble) => (trouble.reason, trouble.message.clone()),
        None => (
            Reason::PodRejected,
            format!("The session's pod did not start until {start}; see the Events of its Job and pod."),
        ),
    })
}

/// When to look whether one has passed.
pub fn next(
    seen: &Observed,
    pod: Option<&PodSeen>,
    trouble: Option<&Trouble>,
    request: &Result<Request, Invalid>,
) -> Option<Timestamp> {
    let job = seen.job.ours();
    match pod.map(|pod| &pod.runner) {
        Some(RunnerSeen::Running { since }) => {
            let used = seen.session.status.running_seconds.unwrap_or(0);
            since.map(|since| backstop(since, timeout(job, request), used))
        }
        Some(RunnerSeen::Waiting | RunnerSeen::Ended { .. }) | None => {
            let trouble = trouble.and_then(|trouble| trouble_ends(trouble, job));
            trouble.into_iter().chain(start_deadline(job)).min()
        }
    }
}

fn trouble_ends(trouble: &Trouble, job: Option<&OurJob>) -> Option<Timestamp> {
    let since = trouble.since.or(job.and_then(|job| job.created))?;
    Some(since.saturating_add(trouble.grace).unwrap_or(Timestamp::MAX))
}

fn start_deadline(job: Option<&OurJob>) -> Option<Timestamp> {
    Some(job?.created?.saturating_add(START_TIMEOUT).unwrap_or(Timestamp::MAX))
}

fn backstop(since: Timestamp, timeout: u64, used: u64) -> Timestamp {
    let rest = SignedDuration::from_secs(timeout.saturating_sub(used).try_into().unwrap_or(i64::MAX));
    since
        .saturating_add(rest.saturating_add(STOP_SLACK))
        .unwrap_or(Timestamp::MAX)
}

/// The timeout that the attempt was made with.
pub fn timeout(job: Option<&OurJob>, request: &Result<Request, Invalid>) -> u64 {
    job.and_then(|job| job.resolved)
        .map(|resolved| resolved.timeout)
        .or(request.as_ref().ok().map(|request| request.timeout))
        .unwrap_or(super::validate::DEFAULT_TIMEOUT)
}
