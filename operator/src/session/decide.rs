//! From what was observed to what is done about it: pure and total.
//!
//! Two rules make every line safe to die at. A Job is made before status speaks of its attempt, under a name that is a
//! function of the session, so that the next reconcile finds and adopts it. And what takes something away (a pod deleted, a
//! report's finalizer removed) is planned only when the status that justifies it is already recorded.

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use protocol::{Reason, spec::LiveLimits};

use super::{
    build, conditions, deadline, drain,
    observed::{ClaimSeen, JobSeen, Observed, OurJob, PodSeen, Resolved, RunnerSeen, Trouble},
    outcome::{Evidence, judge},
    pod::Grace,
    repos, transition,
    validate::{Invalid, Request},
};

/// How soon to look again at something that no watch tells of.
const LOOK_AGAIN: SignedDuration = SignedDuration::from_secs(5);
/// The same for a pod that should have started by then.
const START_SLOW: SignedDuration = SignedDuration::from_secs(11);
/// The same for what takes a person.
const LOOK_LATER: SignedDuration = SignedDuration::from_secs(30);
/// The same for what has taken a person long already.
const LOOK_SELDOM: SignedDuration = SignedDuration::from_mins(2);

/// A new attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Its number.
    pub number: u32,
    /// The run that it belongs to.
    pub run: u32,
    /// Running time that the run has used, seconds.
    pub used_seconds: u64,
    /// The last one was held back by whoever admits Jobs: this one waits for them too.
    pub held: bool,
}

/// A new drain Job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Its number.
    pub number: u32,
    /// The last attempt, whose run it delivers.
    pub attempt: Attempt,
}

/// Limits that changed while an attempt is under way; by name and UID of what is changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tuned {
    /// The Job's resolved values, and with them its deadline.
    Job(String, String, Resolved),
    /// The annotation that the pod's runner reads.
    Pod(String, String, LiveLimits),
}

/// Something that is deleted, if it still is what was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A pod, by name and UID.
    Pod(String, String),
    /// A Job, by name and UID.
    Job(String, String),
}

/// What is done about what was observed.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The claim is made.
    pub create_claim: bool,
    /// The Job of an attempt is made.
    pub create_job: Option<Attempt>,
    /// A drain Job is made.
    pub create_drain: Option<Drain>,
    /// What is changed of the attempt under way.
    pub tune: Vec<Tuned>,
    /// What is deleted; only what the recorded status already justifies.
    pub delete: Vec<Target>,
    /// The session itself is deleted: its time after the end is over.
    pub delete_session: bool,
    /// Pods, by name and UID, whose report is recorded: their finalizer is removed.
    pub release: Vec<(String, String)>,
    /// What status then says.
    pub status: AgenticSessionStatus,
    /// When to look again though nothing changes.
    pub wake: Option<SignedDuration>,
}

impl Plan {
    /// To do nothing.
    fn nothing(status: AgenticSessionStatus) -> Self {
        Self {
            create_claim: false,
            create_job: None,
            create_drain: None,
            tune: Vec::new(),
            delete: Vec::new(),
            delete_session: false,
            release: Vec::new(),
            status,
            wake: None,
        }
    }

    /// Status is all that it may change.
    pub fn only_tells(&self) -> bool {
        let Self {
            create_claim,
            create_job,
            create_drain,
            tune,
            delete,
            delete_session,
            release,
            status: _,
            wake: _,
        } = self;
        let makes = *create_claim || create_job.is_some() || create_drain.is_some() || !tune.is_empty();
        !makes && delete.is_empty() && !delete_session && release.is_empty()
    }

    /// To let go of pods is all that it does; status apart.
    pub fn only_lets_go(&self) -> bool {
        let rest = Self {
            release: Vec::new(),
            ..self.clone()
        };
        !self.release.is_empty() && rest.only_tells()
    }

    /// To look again at that time at the latest.
    fn wake_in(&mut self, wait: SignedDuration) {
        self.wake = self.wake.into_iter().chain([wait]).min();
    }
}

/// Decides.
pub fn decide(seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
    let mut plan = Plan::nothing(seen.session.status.clone());
    plan.status.observed_generation = seen.session.generation;
    plan.release = recorded_pods(seen);
    if !seen.session.status.phase.is_terminal() {
        let why_not = request.as_ref().err().map(ToString::to_string);
        transition::accepted(&mut plan.status, why_not.as_deref(), now);
    }
    let mut plan = match seen.session.status.phase {
        Phase::Pending => pending(plan, seen, request, now),
        Phase::Creating | Phase::Running | Phase::Stopping => live(plan, seen, request, now),
        Phase::Completed | Phase::Failed | Phase::Stopped => ended(plan, seen, request, now),
    };
    clean_up(&mut plan, seen, now);
    plan
}

/// Jobs of attempts whose outcome is recorded go when they have been kept for long enough, and with them pod and log.
fn clean_up(plan: &mut Plan, seen: &Observed, now: Timestamp) {
    let kept = SignedDuration::from_secs(seen.policy.timing.job_retention.into());
    let live = is_live(seen.session.status.phase);
    let judged = seen.job.ours().filter(|_| !live);
    for job in seen.earlier.iter().chain(judged).filter(|job| !job.deleting) {
        // Without a time it was finished by somebody who gave none; then it is not kept.
        let Some(left) = job.finished.then(|| {
            let end = job.finished_at.map_or(Some(now), |at| at.saturating_add(kept).ok());
            end.unwrap_or(Timestamp::MAX).duration_since(now)
        }) else {
            continue;
        };
        let target = Target::Job(job.name.clone(), job.uid.clone());
        if left.is_positive() {
            plan.wake_in(left);
        } else if !plan.delete.contains(&target) {
            plan.delete.push(target);
        }
    }
}

fn is_live(phase: Phase) -> bool {
    matches!(phase, Phase::Creating | Phase::Running | Phase::Stopping)
}

/// Pods whose report has been read: of earlier attempts, and of this one when it has been judged.
fn recorded_pods(seen: &Observed) -> Vec<(String, String)> {
    let status = &seen.session.status;
    let judged = !is_live(status.phase);
    let current = status.attempt.unwrap_or(0);
    seen.pods
        .iter()
        .filter(|pod| pod.held && (pod.attempt < current || (judged && pod.attempt == current)))
        .map(|pod| (pod.name.clone(), pod.uid.clone()))
        .collect()
}

// --- no attempt is live ---------------------------------------------------------------------------------------------

fn pending(mut plan: Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
    let status = &seen.session.status;
    let attempt = next_attempt(status);
    if status.run.is_none() {
        plan.status = transition::first_run(plan.status, &seen.session);
    }
    if let Some(job) = unrecorded(seen, attempt, request) {
        // Made by a reconcile that did not live to record it. Whatever else is the case now, it is recorded first.
        plan.status = transition::creating(&plan.status, attempt, &job, seen.claim, now);
        let suspended = seen.next_job.ours().is_some_and(|job| job.suspended);
        plan.status = begun(plan.status, suspended.then(|| held(&job)).as_ref(), seen.claim, now);
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
            transition::waiting(
                &plan.status,
                Reason::Suspended,
                "Not started: spec.suspend is true; set it to false to start.",
            )
        };
        return plan;
    }
    let request = match request {
        Ok(request) => request,
        // The admin's word, which may change; nothing is held meanwhile.
        Err(invalid) => {
            plan.status = transition::waiting(&plan.status, Reason::ConfigError, &invalid.to_string());
            return plan;
        }
    };
    if let Some(wait) = status
        .next_attempt_time
        .as_ref()
        .map(|t| t.0.duration_since(now))
        .filter(SignedDuration::is_positive)
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
            plan.status = transition::waiting(&plan.status, reason, &message);
            plan.delete.extend(delete);
            plan.wake = Some(if reason == Reason::NameConflict {
                LOOK_LATER
            } else {
                LOOK_AGAIN
            });
        }
    }
    plan
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

/// What a Job waits for that is suspended.
fn held(job: &str) -> Trouble {
    Trouble {
        reason: Reason::Queued,
        message: format!("Job {job} is suspended: the session waits for whoever admits Jobs."),
        since: None,
        grace: Grace::Start,
    }
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
    let mut plan = Plan::nothing(seen.session.status.clone());
    plan.status.observed_generation = seen.session.generation;
    // Recorded, or the write of these very words would have it tried again at once: they may be others each time.
    let wait = deadline::refused_for(seen, now).clamp(LOOK_LATER, LOOK_SELDOM);
    let at = Time(now.saturating_add(wait).unwrap_or(Timestamp::MAX));
    plan.wake = Some(wait);
    if seen.session.status.phase != Phase::Pending {
        // A drain's: it has time, and the session's end stays as it is.
        plan.status.next_drain_time = Some(at);
        conditions::held_up(&mut plan.status, &message, now);
        return plan;
    }
    if plan.status.run.is_none() {
        plan.status = transition::first_run(plan.status, &seen.session);
    }
    let end = deadline::refusal_ends(seen, request);
    plan.status = if end.is_some_and(|end| now >= end) {
        transition::finish(&plan.status, Phase::Failed, reason, &message, now)
    } else {
        transition::refused(&plan.status, reason, &message, at, now)
    };
    plan
}

/// What is left to do for a session that has no place yet: to say so.
pub fn queued(seen: &Observed, message: &str, now: Timestamp) -> Plan {
    let mut plan = Plan::nothing(seen.session.status.clone());
    plan.status.observed_generation = seen.session.generation;
    plan.release = recorded_pods(seen);
    if plan.status.run.is_none() {
        plan.status = transition::first_run(plan.status, &seen.session);
    }
    plan.status = transition::waiting(&plan.status, Reason::Queued, message);
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

/// Why an attempt cannot begin yet.
pub struct Hindrance {
    /// One word.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// What is in the way and goes.
    pub delete: Vec<Target>,
}

/// Why an attempt cannot begin yet.
fn hindrance(seen: &Observed, session: &str) -> Option<Hindrance> {
    let wait = |reason, message: String| {
        Some(Hindrance {
            reason,
            message,
            delete: Vec::new(),
        })
    };
    let reason_so_far = match seen.session.status.attempt {
        Some(_) => Reason::Retrying,
        None => Reason::WaitingForVolume,
    };
    if let Some(job) = seen.job.ours().filter(|job| !job.finished) {
        // A Job that has lost its pod, or has made another, must not go on. One whose pod is over is finished soon.
        let mut pods = seen.pods.iter().filter(|pod| pod.job_uid == job.uid).peekable();
        let goes_on = pods.peek().is_none() && !job.counted || pods.any(|pod| !pod.is_over() && !pod.deleting);
        let delete = (goes_on || job.suspended) && !job.deleting;
        return Some(Hindrance {
            reason: Reason::Retrying,
            message: format!("Waits for Job {} to end.", job.name),
            delete: delete
                .then(|| Target::Job(job.name.clone(), job.uid.clone()))
                .into_iter()
                .collect(),
        });
    }
    if let Some(pod) = seen.pods.iter().find(|pod| !pod.is_over()) {
        return wait(
            Reason::Retrying,
            format!("Waits for pod {} of attempt {} to end.", pod.name, pod.attempt),
        );
    }
    match seen.claim {
        ClaimSeen::Missing | ClaimSeen::Ours { .. } | ClaimSeen::Ephemeral => {}
        ClaimSeen::Going => {
            return Some(Hindrance {
                reason: reason_so_far,
                message: "Waits for the claim of this name to be deleted.".to_owned(),
                delete: holders(seen),
            });
        }
        ClaimSeen::Absent => {
            let message =
                "The claim of spec.workspace.existingClaim does not exist: create it, or create another session.";
            return wait(Reason::ConfigError, message.to_owned());
        }
        ClaimSeen::Foreign => {
            let message = format!(
                "The persistent volume claim {}, which the session needs, exists and is not the session's: delete the claim, \
                 or create the session under another name, or name the claim in spec.workspace.existingClaim.",
                build::own_claim_name(session)
            );
            return wait(Reason::NameConflict, message);
        }
    }
    match seen.next_job {
        JobSeen::Missing | JobSeen::Ours(_) => None,
        JobSeen::Going => wait(
            reason_so_far,
            "Waits for the Job of an earlier session of this name to be deleted.".to_owned(),
        ),
        JobSeen::Foreign => {
            let message = format!(
                "The Job {}, which the session needs, exists and is not the session's: delete the Job, or create the session \
                 under another name.",
                build::job_name(session, next_attempt(&seen.session.status).number)
            );
            wait(Reason::NameConflict, message)
        }
    }
}

/// Jobs of recorded attempts: a claim that is being deleted goes only when no pod that names it is left, ended or not.
fn holders(seen: &Observed) -> Vec<Target> {
    let jobs = seen.earlier.iter().chain(seen.job.ours());
    jobs.filter(|job| job.finished && !job.deleting)
        .map(|job| Target::Job(job.name.clone(), job.uid.clone()))
        .collect()
}

/// An ended run stays ended until a start is asked for, or what `suspend` stopped is no longer suspended.
fn ended(mut plan: Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
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
    if left.is_positive() {
        plan.wake_in(left);
    } else {
        plan.delete_session = true;
    }
}

// --- an attempt is live ---------------------------------------------------------------------------------------------

fn live(mut plan: Plan, seen: &Observed, request: &Result<Request, Invalid>, now: Timestamp) -> Plan {
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
        });
        let terms = (&deadline::terms(seen, request), &seen.policy);
        plan.status = transition::record(&plan.status, verdict, pod, seen.claim, terms, now);
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
    plan.wake = deadline::next(seen, pod, trouble, request).map(|at| at.duration_since(now));
    // Why a Job has no pod, or what a pod waits for, may be said in Events alone, which nobody watches.
    let soon = match pod {
        None => Some(LOOK_AGAIN),
        Some(pod) if pod.scheduled && pod.runner == RunnerSeen::Waiting => Some(START_SLOW),
        Some(_) => None,
    };
    plan.wake = plan.wake.into_iter().chain(soon).min();
    plan
}

/// What the attempt is held to by now and was not told yet. The Job comes first: it is what later decisions read.
fn tuned(seen: &Observed, pod: Option<&PodSeen>, request: &Result<Request, Invalid>) -> Vec<Tuned> {
    let terms = deadline::terms(seen, request);
    let mut tuned = Vec::new();
    if let Some(job) = seen.job.ours().filter(|job| !job.deleting && !job.finished)
        && (request.is_ok() || job.resolved.is_some())
        && job.resolved.is_none_or(|told| told.limits != terms.limits)
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

fn has_report(pod: &PodSeen) -> bool {
    matches!(pod.runner, RunnerSeen::Ended { report: Some(_), .. })
}

fn stop_targets(pods: &[&PodSeen], job: Option<&OurJob>) -> Vec<Target> {
    if pods.is_empty() {
        return job
            .filter(|j| !j.deleting)
            .map(|j| Target::Job(j.name.clone(), j.uid.clone()))
            .into_iter()
            .collect();
    }
    pods.iter()
        .filter(|pod| !pod.deleting && !pod.is_over())
        .map(|pod| Target::Pod(pod.name.clone(), pod.uid.clone()))
        .collect()
}
