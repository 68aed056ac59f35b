//! From what was observed to what is done about it: pure and total.
//!
//! Two rules make every line safe to die at. A Job is made before status speaks of its attempt, under a name that is a
//! function of the session, so that the next reconcile finds and adopts it. And what takes something away (a pod deleted, a
//! report's finalizer removed) is planned only when the status that justifies it is already recorded.

mod ended;
mod hindrance;
mod live;
mod pending;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use protocol::Reason;

use super::{
    apply::Refusal,
    conditions, deadline, drain,
    observed::{Observed, PodSeen, Trouble},
    plan::{Attempt, Plan, Target},
    pod::Grace,
    transition,
    validate::{Invalid, Request},
};

pub use hindrance::Hindrance;

/// How soon to look again at something that no watch tells of, the first time.
const LOOK_AGAIN: SignedDuration = SignedDuration::from_secs(5);
/// The same for a pod that should have started by then.
const START_SLOW: SignedDuration = SignedDuration::from_secs(11);
/// The same for what takes a person.
const LOOK_LATER: SignedDuration = SignedDuration::from_secs(30);
/// The same when it has lasted for long. No watch tells of quotas, claims and Secrets: it is how long a session may stay unhealed.
const LOOK_SELDOM: SignedDuration = SignedDuration::from_mins(5);
/// The same for what the cluster does by itself.
const LOOK_OFTEN: SignedDuration = SignedDuration::from_mins(1);
/// Ended attempts of a session of which Job, pod and log are kept. All are read at once, and each may be half a megabyte: whoever asks
/// for one run after another must fill neither the API server nor the operator.
const KEPT: usize = 5;

/// Decides.
pub fn decide(seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
    let mut plan = Plan::nothing(seen.session.status.clone());
    plan.status.observed_generation = seen.session.generation;
    if let Some(ended) = transition::overwritten(&plan.status) {
        // Before anything is done that only a run may do which is not over.
        plan.status = ended;
        return plan;
    }
    plan.release = recorded_pods(seen);
    if !seen.session.status.phase.is_terminal() {
        let why_not = request.as_ref().err().map(ToString::to_string);
        transition::accepted(&mut plan.status, why_not.as_deref(), now);
    }
    let mut plan = match seen.session.status.phase {
        Phase::Pending => pending::decide(plan, seen, request, now),
        Phase::Creating | Phase::Running | Phase::Stopping => live::decide(plan, seen, request, now),
        Phase::Completed | Phase::Failed | Phase::Stopped => ended::decide(plan, seen, request, now),
    };
    clean_up(&mut plan, seen, now);
    end_bare(&mut plan, seen);
    tidy(&mut plan);
    if !seen.policy.clock_is_sure {
        // What is due by then is not done.
        plan.wake = plan.wake.map(|wake| wake.max(LOOK_LATER));
    }
    plan
}

/// Jobs of attempts whose outcome is recorded go when they have been kept for long enough or are too many, and with them pod and log.
fn clean_up(plan: &mut Plan, seen: &Observed, now: Timestamp) {
    let kept = SignedDuration::from_secs(seen.policy.timing.job_retention.into());
    let live = is_live(seen.session.status.phase);
    let judged = seen.job.ours().filter(|_| !live);
    let ended = seen.earlier.iter().chain(judged);
    let mut ended: Vec<_> = ended.filter(|job| job.finished && !job.deleting).collect();
    // Of those of one second the longer name, and then the greater, is of the later attempt.
    ended.sort_by_key(|job| Reverse((job.created, job.name.len(), job.name.clone())));
    for (newer, job) in ended.into_iter().enumerate() {
        // Without a time it was finished by somebody who gave none; then it is not kept.
        let end = job.finished_at.map_or(Some(now), |at| at.saturating_add(kept).ok());
        let left = end.unwrap_or(Timestamp::MAX).duration_since(now);
        let target = Target::Job(job.name.clone(), job.uid.clone());
        if newer < KEPT && (left.is_positive() || !seen.policy.clock_is_sure) {
            plan.wake_in(left);
        } else if !plan.delete.contains(&target) {
            plan.delete.push(target);
        }
    }
}

/// Pods that were left without their Job before status named them go: the next attempt waits for that.
fn end_bare(plan: &mut Plan, seen: &Observed) {
    let alive = seen.bare.iter().filter(|pod| !pod.is_over() && !pod.deleting);
    plan.delete
        .extend(alive.map(|pod| Target::Pod(pod.name.clone(), pod.uid.clone())));
}

fn is_live(phase: Phase) -> bool {
    matches!(phase, Phase::Creating | Phase::Running | Phase::Stopping)
}

/// Pods whose report has been read: of earlier attempts, and of this one when it has been judged. And those whose report nobody reads.
fn recorded_pods(seen: &Observed) -> Vec<(String, String)> {
    let status = &seen.session.status;
    let judged = !is_live(status.phase);
    let current = status.attempt.unwrap_or(0);
    let recorded = |pod: &&PodSeen| pod.attempt < current || (judged && pod.attempt == current);
    seen.pods
        .iter()
        .filter(recorded)
        .chain(seen.bare.iter().filter(|pod| pod.is_over()))
        .filter(|pod| pod.held)
        .map(|pod| (pod.name.clone(), pod.uid.clone()))
        .collect()
}

/// What a Job waits for that is suspended.
fn held(job: &str) -> Trouble {
    Trouble {
        reason: Reason::Queued,
        message: format!("Job {job} is suspended: the session waits for whoever admits Jobs."),
        since: None,
        grace: Grace::Start,
    }
}

/// What is left to do when the API server refuses what an attempt needs: to say so, and to try again, since it may be healed.
pub fn refused(
    seen: &Observed,
    request: &Result<Request, Invalid>,
    (kind, name, said): (&str, &str, &str),
    now: Timestamp,
) -> Plan {
    let reason = if said.contains("exceeded quota") {
        Reason::QuotaExceeded
    } else {
        Reason::ConfigError
    };
    let message = format!("The API server refuses {kind} {name}: {said}");
    let who = request.as_ref().map_or("", |request| &*request.uid);
    // Recorded, or the write of these very words would have it tried again at once: they may be others each time.
    let at = |wait| Some(Time(now.saturating_add(wait).unwrap_or(Timestamp::MAX)));
    if seen.session.status.phase != Phase::Pending {
        // A drain's: it has time, and the session's end stays as it is.
        let mut plan = Plan::nothing(seen.session.status.clone());
        plan.status.observed_generation = seen.session.generation;
        let ended = seen.session.status.completion_time.as_ref().map_or(now, |time| time.0);
        let wait = deadline::patience(now.duration_since(ended), (LOOK_LATER, LOOK_SELDOM), who, now);
        plan.wake = Some(wait);
        plan.status.next_drain_time = at(wait);
        conditions::held_up(&mut plan.status, &message, now);
        return plan;
    }
    let mut plan = waits(seen, request.as_ref().err(), now);
    let hindered = Hindered::by(seen, request, &plan.status, (reason, &message), now);
    if hindered.is_over() {
        plan.status = transition::finish(&plan.status, Phase::Failed, reason, &message, now);
        return plan;
    }
    let wait = hindered.patience((LOOK_LATER, LOOK_SELDOM), who, now);
    plan.wake_in(wait);
    plan.status = hindered.status;
    plan.status.next_attempt_time = at(wait);
    plan
}

/// What is left to do when an attempt under way cannot be told of what changed: to say so, and to try again, since it may be healed.
pub fn untold(mut plan: Plan, seen: &Observed, refusal: &Refusal, now: Timestamp) -> Plan {
    let why = words(seen, condition::SPEC_ACCEPTED, refusal);
    transition::accepted(&mut plan.status, Some(&why), now);
    plan.wake_in(LOOK_SELDOM);
    plan
}

/// What is left to do when something that should go may not: to say so. It is tried again, as after every failure.
pub fn kept(mut plan: Plan, seen: &Observed, refusal: &Refusal, now: Timestamp) -> Plan {
    let why = words(seen, condition::CLEANED_UP, refusal);
    conditions::set(
        &mut plan.status,
        condition::CLEANED_UP,
        "False",
        Reason::ConfigError,
        &why,
        now,
    );
    plan
}

/// How a refusal is told. They may be other words each time: the first stay, or writing the next would have it tried again at once.
fn words(seen: &Observed, type_: &str, Refusal { what, said }: &Refusal) -> String {
    let what = format!("The API server refuses to {what}: ");
    let told = conditions::find(&seen.session.status, type_);
    match told.filter(|told| told.message.starts_with(&what)) {
        Some(told) => told.message.clone(),
        None => what + said,
    }
}

/// A session that cannot begin, and others must do something about that.
struct Hindered {
    /// What its status then says.
    status: AgenticSessionStatus,
    /// How long it has lasted.
    lasted: SignedDuration,
    /// How long until a start would have taken too long.
    left: SignedDuration,
}

impl Hindered {
    fn by(
        seen: &Observed,
        request: &Result<Request, Invalid>,
        status: &AgenticSessionStatus,
        (reason, message): (Reason, &str),
        now: Timestamp,
    ) -> Self {
        let status = transition::hindered(status, reason, message, now);
        let since = transition::not_started_since(&status).unwrap_or(now);
        // What hindered it in another life, of which a backup was taken, has not lasted since.
        let since = seen.session.created.map_or(since, |created| since.max(created));
        let end = deadline::hindrance_ends(since, seen, request);
        Self {
            status,
            lasted: now.duration_since(since),
            left: if seen.policy.clock_is_sure {
                end.duration_since(now)
            } else {
                SignedDuration::MAX
            },
        }
    }

    fn is_over(&self) -> bool {
        !self.left.is_positive()
    }

    /// When to look again: ever more seldom, and when it is over.
    fn patience(&self, bounds: (SignedDuration, SignedDuration), who: &str, now: Timestamp) -> SignedDuration {
        let wait = deadline::patience(self.lasted, bounds, who, now);
        if self.is_over() { wait } else { wait.min(self.left) }
    }
}

/// All that is done about a session that could begin, and does not yet.
fn waits(seen: &Observed, invalid: Option<&Invalid>, now: Timestamp) -> Plan {
    let mut plan = Plan::nothing(seen.session.status.clone());
    plan.status.observed_generation = seen.session.generation;
    plan.release = recorded_pods(seen);
    let why_not = invalid.map(ToString::to_string);
    transition::accepted(&mut plan.status, why_not.as_deref(), now);
    if plan.status.run.is_none() {
        plan.status = transition::first_run(plan.status, &seen.session);
    }
    plan.status = transition::note_start_request(plan.status, &seen.session);
    // It was allowed to begin: no drain is in its way, and what is left of the last one goes.
    drain::hindrance(&mut plan, seen, now);
    clean_up(&mut plan, seen, now);
    tidy(&mut plan);
    plan
}

/// What may not go is no longer said when there is nothing that should.
fn tidy(plan: &mut Plan) {
    if !plan.takes_away() {
        conditions::remove(&mut plan.status, &[condition::CLEANED_UP]);
    }
}

/// What is left to do for a session that has no place yet: to say so.
pub fn queued(seen: &Observed, message: &str, now: Timestamp) -> Plan {
    let mut plan = waits(seen, None, now);
    plan.status = transition::waiting(&plan.status, Reason::Queued, message);
    transition::not_tried(&mut plan.status);
    conditions::set(
        &mut plan.status,
        condition::ADMITTED,
        "False",
        Reason::Queued,
        message,
        now,
    );
    plan
}

/// The attempt that comes after what is recorded.
pub fn next_attempt(status: &AgenticSessionStatus) -> Attempt {
    Attempt {
        number: status.attempt.unwrap_or(0).saturating_add(1),
        run: status.run.unwrap_or(1),
        used_seconds: status.running_seconds.unwrap_or(0),
        held: transition::was_held(status),
    }
}
