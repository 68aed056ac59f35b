//! What holds of each change of status, whatever happened: the rules that users are told, not how they are kept.

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::{SignedDuration, Timestamp};
use protocol::Reason;

use crate::session::{
    observed::{ClaimSeen, Observed, PodSeen, RunnerSeen},
    validate::DEFAULT_MAX_ATTEMPTS,
};

/// Attempts of a run that the cluster may end without their counting.
const FREE_ATTEMPTS: u32 = 10;
/// What ends an attempt without its counting.
const FREE: [Reason; 3] = [Reason::Evicted, Reason::Preempted, Reason::NodeLost];
/// What ends an attempt, and another may do better. It counts.
const PASSING: [Reason; 5] = [
    Reason::ModelUnavailable,
    Reason::OutcomeUnknown,
    Reason::PodDeleted,
    Reason::RateLimited,
    Reason::RunnerCrashed,
];

/// Attempts of the present run that are over, as somebody counts them who watches.
#[derive(Debug, Default)]
pub struct Tally {
    /// Whose end counts.
    counted: u32,
    /// Whose end does not.
    free: u32,
}

/// What a run is held to.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Running time, seconds.
    pub timeout: u64,
    /// The workspace goes with the pod.
    pub ephemeral: bool,
    /// How long the model API asks to wait, seconds.
    pub retry_after: Option<u64>,
}

impl Tally {
    /// Counts what a change tells of, and holds the run to its attempts, its time and its waits.
    pub fn follow(
        &mut self,
        before: &AgenticSessionStatus,
        after: &AgenticSessionStatus,
        terms: Terms,
        now: Timestamp,
    ) {
        if after.run != before.run {
            *self = Self::default();
        }
        if !is_live(before) || is_live(after) {
            return;
        }
        let waits = after.phase == Phase::Pending;
        let why = why_over(after);
        if waits && why == Reason::Queued.as_str() {
            assert_eq!(after.next_attempt_time, None, "whoever admits Jobs says when");
            return;
        }
        let free = is_one_of(&FREE, why);
        if free {
            self.free += 1;
        } else {
            self.counted += 1;
        }
        let given_up = free || is_one_of(&PASSING, why);
        if waits || given_up && !terms.ephemeral {
            assert_eq!(after.free_retries.unwrap_or(0), self.free, "{why} is free or is not");
        }
        let left = if free {
            self.free <= FREE_ATTEMPTS
        } else {
            self.counted < DEFAULT_MAX_ATTEMPTS
        };
        let ran = after.running_seconds.unwrap_or(0);
        if waits {
            assert!(left, "another attempt after {self:?}");
            assert!(
                ran < terms.timeout,
                "another attempt after {ran} s of {}",
                terms.timeout
            );
            let doubled = 10 << (self.counted + self.free - 1).min(10);
            let at = after
                .next_attempt_time
                .as_ref()
                .map(|at| at.0.duration_since(now).as_secs());
            let asked = terms.retry_after.map(|asked| asked.min(3_600).cast_signed());
            assert_eq!(at, asked.or(Some(doubled.min(300))), "the wait after {self:?}");
        } else if given_up && !terms.ephemeral {
            assert!(!left, "given up for {why} after {self:?}");
        }
    }
}

fn is_one_of(reasons: &[Reason], word: &str) -> bool {
    reasons.iter().any(|reason| reason.as_str() == word)
}

/// Why the attempt is over.
fn why_over(after: &AgenticSessionStatus) -> &str {
    if after.phase == Phase::Pending {
        let started = after.conditions.iter().find(|c| c.type_ == condition::RUNNER_STARTED);
        return &started.unwrap().reason;
    }
    after.reason.as_deref().unwrap()
}

pub fn is_live(status: &AgenticSessionStatus) -> bool {
    matches!(status.phase, Phase::Creating | Phase::Running | Phase::Stopping)
}

/// What holds of every status after another, however old the news that led to it.
pub fn check_change(before: &AgenticSessionStatus, after: &AgenticSessionStatus) {
    if before.phase.is_terminal() && before.run == after.run {
        assert_eq!(
            (
                before.phase,
                &before.reason,
                before.attempt,
                before.completion_time.clone()
            ),
            (after.phase, &after.reason, after.attempt, after.completion_time.clone()),
            "an ended run stays ended"
        );
    }
    assert!(after.attempt >= before.attempt && after.run >= before.run);
    if after.phase == Phase::Completed {
        assert_ne!(before.phase, Phase::Creating, "`Running` is never skipped");
    }
    let finished = after.conditions.iter().any(|c| c.type_ == condition::FINISHED);
    assert_eq!(
        finished,
        after.phase.is_terminal(),
        "the condition and the phase say the same"
    );
    assert_eq!(after.completion_time.is_some(), after.phase.is_terminal());
    assert!(
        after.reason.is_some() && after.message.is_some(),
        "there is always a why"
    );
}

/// What holds of the status that follows a look at all that is.
pub fn check_look(seen: &Observed, after: &AgenticSessionStatus, now: Timestamp) {
    let before = &seen.session.status;
    check_change(before, after);
    runs_begin_when_asked(seen, after);
    requests_are_handled(seen, after);
    running_time_is_the_runners(seen, after, now);
    what_ran_was_let_run(seen, after);
    if is_live(before) {
        an_attempt_is_one_pod(seen, after);
    }
}

fn asks(seen: &Observed) -> bool {
    let requested = &seen.session.start_requested;
    requested.is_some() && *requested != seen.session.status.handled_start_request
}

/// An ended run is followed by another when a start is asked for, or when what was suspended no longer is; and by none else.
fn runs_begin_when_asked(seen: &Observed, after: &AgenticSessionStatus) {
    let before = &seen.session.status;
    let Some(run) = before.run else { return };
    let suspended = was_suspended(before);
    let wanted = !seen.session.suspend && (suspended || asks(seen) && seen.claim != ClaimSeen::Ephemeral);
    if !(before.phase.is_terminal() && wanted) {
        assert_eq!(after.run, Some(run), "a run that nobody asked for");
        return;
    }
    assert_eq!(after.run, Some(run + 1), "the run that was asked for");
    assert_eq!(after.free_retries, None, "each run has its own");
    let goes_on = suspended && !asks(seen);
    let kept = before.running_seconds.filter(|_| goes_on);
    assert_eq!(
        after.running_seconds, kept,
        "what goes on has what is left of its time, what begins anew all of it"
    );
}

fn was_suspended(status: &AgenticSessionStatus) -> bool {
    let finished = status.conditions.iter().find(|c| c.type_ == condition::FINISHED);
    status.phase == Phase::Stopped && finished.is_some_and(|c| c.reason == Reason::Suspended.as_str())
}

/// A request is handled by the run that it begins, or when there is nothing to do about it; one that comes while the agent is being
/// stopped is kept.
fn requests_are_handled(seen: &Observed, after: &AgenticSessionStatus) {
    let (before, requested) = (&seen.session.status, &seen.session.start_requested);
    let handled = match before.phase {
        Phase::Stopping => false,
        // An attempt that is there already is recorded before anything else.
        Phase::Pending => after.phase != Phase::Creating || before.run.is_none(),
        Phase::Creating | Phase::Running => true,
        Phase::Completed | Phase::Failed | Phase::Stopped => {
            after.run != before.run || seen.session.suspend || seen.claim == ClaimSeen::Ephemeral
        }
    };
    if handled && requested.is_some() {
        assert_eq!(after.handled_start_request, *requested, "in {}", before.phase);
    }
    if before.phase == Phase::Stopping {
        assert_eq!(after.handled_start_request, before.handled_start_request, "it is kept");
    }
}

/// The run's time is that of its runners, from each one's start to its end, and is added when the attempt is over.
fn running_time_is_the_runners(seen: &Observed, after: &AgenticSessionStatus, now: Timestamp) {
    let before = &seen.session.status;
    if after.run != before.run {
        return;
    }
    let so_far = before.running_seconds.unwrap_or(0);
    let expected = if is_live(before) && !is_live(after) {
        let Ok(ran) = ran(seen, now) else { return };
        so_far + u64::try_from(ran.as_secs()).unwrap()
    } else {
        so_far
    };
    assert_eq!(after.running_seconds.unwrap_or(0), expected);
}

/// How long the attempt's runner ran; nobody can say of which pod when there were several.
fn ran(seen: &Observed, now: Timestamp) -> Result<SignedDuration, usize> {
    let before = &seen.session.status;
    let pods: Vec<&PodSeen> = of_attempt(seen).collect();
    if pods.len() > 1 {
        return Err(pods.len());
    }
    let was_seen_to_start = before
        .conditions
        .iter()
        .find(|c| c.type_ == condition::RUNNER_STARTED && c.status == "True")
        .map(|started| started.last_transition_time.0);
    let since_until = match pods.first().map(|pod| &pod.runner) {
        Some(RunnerSeen::Ended { since, until, .. }) => since.or(was_seen_to_start).zip(until.or(Some(now))),
        Some(RunnerSeen::Running { since }) => since.zip(Some(now)),
        Some(RunnerSeen::Waiting) | None => {
            let over = seen.job.ours().and_then(|job| job.finished_at);
            let in_this_life = |since: Timestamp| since.max(seen.session.created.unwrap());
            was_seen_to_start
                .map(in_this_life)
                .zip(Some(over.map_or(now, |over| over.min(now))))
        }
    };
    Ok(since_until.map_or(SignedDuration::ZERO, |(since, until)| until.duration_since(since)))
}

/// Pods of the attempt that is recorded: the one that is recorded, too, if one is.
fn of_attempt(seen: &Observed) -> impl Iterator<Item = &PodSeen> {
    let before = &seen.session.status;
    let is_it = |pod: &&PodSeen| before.pod_uid.as_ref().is_none_or(|uid| pod.uid == *uid);
    seen.pods
        .iter()
        .filter(|pod| Some(pod.attempt) == before.attempt)
        .filter(is_it)
}

/// A runner that started proves that the session was admitted; one whose Job was then taken its place is not any more.
fn what_ran_was_let_run(seen: &Observed, after: &AgenticSessionStatus) {
    let ran = of_attempt(seen).any(|pod| pod.runner != RunnerSeen::Waiting);
    if ran && is_live(&seen.session.status) && after.phase.is_terminal() {
        let admitted = after.conditions.iter().find(|c| c.type_ == condition::ADMITTED);
        assert_eq!(admitted.map(|c| &*c.status), Some("True"));
    }
}

/// An attempt ends with its pod: not while that works, and at once when it is gone, whatever other pod its Job has made.
fn an_attempt_is_one_pod(seen: &Observed, after: &AgenticSessionStatus) {
    let pods: Vec<&PodSeen> = of_attempt(seen).collect();
    if pods.iter().any(|pod| !pod.is_over() && pod.last_word().is_none()) {
        assert!(is_live(after), "the attempt is over while its pod lives");
    }
    if pods.is_empty() && seen.session.status.pod_uid.is_some() {
        assert!(!is_live(after), "the attempt goes on without its pod");
    }
}
