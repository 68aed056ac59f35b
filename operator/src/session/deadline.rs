//! What an attempt may not outlast: the grace of what hinders its start, the time to start, its running time.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use jiff::{SignedDuration, Timestamp};
use protocol::{Reason, spec::LiveLimits};

use super::{
    observed::{Observed, PodSeen, Resolved, RunnerSeen, Trouble},
    pod::Grace,
    resolve, transition,
    validate::{DEFAULT_TIMEOUT, Invalid, Request},
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
    if !seen.policy.clock_is_sure {
        return None;
    }
    if let Some(RunnerSeen::Running { since: Some(since) }) = pod.map(|pod| &pod.runner) {
        let timeout = terms(seen, request).timeout();
        let past = now >= backstop(*since, timeout, seen.session.status.running_seconds.unwrap_or(0));
        return past.then(|| {
            (
                Reason::Timeout,
                format!("The timeout of {timeout} s is used up and the runner did not end by itself."),
            )
        });
    }
    // One that has started may have ended, while its pod has not yet. What it left is judged when that has.
    if pod.is_some_and(|pod| pod.runner != RunnerSeen::Waiting) {
        return None;
    }
    if let Some(trouble) = trouble
        && trouble_ends(trouble, seen, request, now).is_some_and(|end| now >= end)
    {
        return Some((trouble.reason, trouble.message.clone()));
    }
    let start = start_deadline(seen, request).filter(|end| now >= *end)?;
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
    now: Timestamp,
) -> Option<Timestamp> {
    match pod.map(|pod| &pod.runner) {
        Some(RunnerSeen::Running { since }) => {
            let used = seen.session.status.running_seconds.unwrap_or(0);
            since.map(|since| backstop(since, terms(seen, request).timeout(), used))
        }
        Some(RunnerSeen::Ended { .. }) => None,
        Some(RunnerSeen::Waiting) | None => {
            let trouble = trouble.and_then(|trouble| trouble_ends(trouble, seen, request, now));
            trouble.into_iter().chain(start_deadline(seen, request)).min()
        }
    }
}

fn trouble_ends(
    trouble: &Trouble,
    seen: &Observed,
    request: &Result<Request, Invalid>,
    now: Timestamp,
) -> Option<Timestamp> {
    match trouble.grace {
        // A start's own deadline is looked at beside.
        Grace::Start => start_deadline(seen, request),
        Grace::Container => {
            let since = trouble.since.or(seen.job.ours().and_then(|job| job.created))?;
            // That is when it could have begun. A pull that takes long and then fails has just failed.
            let told = transition::hindered_since(&seen.session.status, trouble.reason).unwrap_or(now);
            Some(after(since.max(told), u64::from(seen.policy.timing.container_grace)))
        }
    }
}

/// Counts from when the Job may make its pod: being held back in a queue is not starting.
fn start_deadline(seen: &Observed, request: &Result<Request, Invalid>) -> Option<Timestamp> {
    let job = seen.job.ours().filter(|job| !job.suspended)?;
    Some(after(job.started.or(job.created)?, terms(seen, request).start_timeout))
}

/// When what hinders an attempt since then is final.
pub fn hindrance_ends(since: Timestamp, seen: &Observed, request: &Result<Request, Invalid>) -> Timestamp {
    let terms = || terms(seen, request).start_timeout;
    let start_timeout = request
        .as_ref()
        .map_or_else(|_| terms(), |request| request.start_timeout);
    after(since, start_timeout)
}

/// How long to wait before it is looked for what nothing tells of: as long as it has lasted, so that waits double, between two bounds.
/// Up to a fifth less, so that those who began together do not come together.
pub fn patience(
    lasted: SignedDuration,
    (least, most): (SignedDuration, SignedDuration),
    who: &str,
    now: Timestamp,
) -> SignedDuration {
    let mut hasher = DefaultHasher::new();
    (who, now.as_second()).hash(&mut hasher);
    let wait = lasted.clamp(least, most).as_secs();
    let less = i64::try_from(hasher.finish() % 20).unwrap_or_default();
    SignedDuration::from_secs((wait - wait * less / 100).max(1))
}

fn after(since: Timestamp, seconds: u64) -> Timestamp {
    since
        .saturating_add(SignedDuration::from_secs(seconds.try_into().unwrap_or(i64::MAX)))
        .unwrap_or(Timestamp::MAX)
}

fn backstop(since: Timestamp, timeout: u64, used: u64) -> Timestamp {
    let rest = SignedDuration::from_secs(timeout.saturating_sub(used).try_into().unwrap_or(i64::MAX));
    since
        .saturating_add(rest.saturating_add(STOP_SLACK))
        .unwrap_or(Timestamp::MAX)
}

/// What the live attempt is held to: what was resolved when its Job was made, and the limits of a later generation of the
/// session. A change of the namespace's settings does not reach an attempt that is under way.
pub fn terms(seen: &Observed, request: &Result<Request, Invalid>) -> Resolved {
    let resolved = seen.job.ours().and_then(|job| job.resolved);
    match (resolved, request) {
        (Some(resolved), Ok(request)) if request.generation > resolved.generation => Resolved {
            generation: request.generation,
            limits: match resolved.asked {
                Some(before) => resolve::changed(resolved.limits, (before, request.asked), request.limits),
                None => request.limits,
            },
            asked: Some(request.asked),
            ..resolved
        },
        (Some(resolved), Ok(_) | Err(_)) => resolved,
        (None, Ok(request)) => Resolved {
            generation: request.generation,
            used_seconds: seen.session.status.running_seconds.unwrap_or(0),
            start_timeout: request.start_timeout,
            max_attempts: request.max_attempts,
            limits: request.limits,
            asked: Some(request.asked),
        },
        // Its Job was taken away from above it.
        (None, Err(_)) => Resolved {
            limits: told(seen).unwrap_or_default(),
            ..Resolved::default()
        },
    }
}

/// The limits that the attempt's pod was told of.
fn told(seen: &Observed) -> Option<LiveLimits> {
    let its_own = |pod: &&PodSeen| Some(&pod.uid) == seen.session.status.pod_uid.as_ref();
    seen.pods.iter().find(its_own)?.limits
}

impl Resolved {
    /// Running time over all attempts of the run, seconds.
    pub fn timeout(&self) -> u64 {
        self.limits.timeout.unwrap_or(DEFAULT_TIMEOUT)
    }
}
