//! What may be done on what the watches have told, which may be behind.
//!
//! To rest; to tell of progress, which the API server refuses when the session is another by now; to tell of the end that a pod's
//! report tells of, since a container that has ended says the same for ever; and to let go of pods whose report is recorded, since
//! what is recorded stays so. Whatever else makes, takes away or ends is decided once more on live reads.

#[cfg(test)]
mod tests;

use crds::{AgenticSession, AgenticSessionStatus, Phase};
use jiff::Timestamp;
use kube::ResourceExt as _;

use protocol::Reason;

use super::{
    Basis, Decided, Error, Found, LOOK_FOR_POD, Settled, apply, build, carry_out, decide, gate,
    memory::Known,
    observe, observed,
    observed::{Observed, PodSeen},
    plan::Plan,
    record,
    validate::{Claim, Request},
};
use crate::{context::Context, project_settings};

/// How long a Job's pod is waited for, seconds, before status tells of the Job alone.
const POD_PATIENCE: i64 = 2;

/// What follows from a plan that was made on what is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is nothing to do.
    Rest,
    /// The status is written: it tells of progress, and of nothing that ends.
    Tell,
    /// A Job was just made. Its pod comes within a moment, and the status tells of both at once.
    Await,
    /// Something should have come further by now. Why, and whether that is over, stands in Events alone, which are not remembered.
    Ask,
    /// The status is written: it tells of the end that the attempt's own report tells of.
    Conclude,
    /// Pods are let go whose report is recorded.
    Release,
    /// A session of which no attempt was made so far gets what it needs.
    Begin,
    /// It is decided on live reads.
    ReadLive,
}

/// What a plan rests on besides what was observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude each other")]
pub(super) struct Ground {
    /// A status must not be built on what is remembered.
    pub cut: bool,
    /// No attempt of the session was made so far, and it has no children.
    pub untouched: bool,
    /// Something of it should have come further by now.
    pub silent: bool,
    /// The pod that status names has ended and left a report that says why.
    pub reported: bool,
    /// All that is let go are pods of attempts.
    pub of_attempts: bool,
    /// The Job of an attempt that status does not tell of.
    pub made: Made,
}

/// The Job of an attempt that status does not tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// There is none that lives.
    No,
    /// It was made a moment ago, and has no pod yet.
    Just,
    /// It has a pod, or should have.
    Yes,
}

impl Made {
    fn of(observed: &Observed, now: Timestamp) -> Self {
        let Some(job) = observed.next_job.ours().filter(|job| !job.finished && !job.deleting) else {
            return Self::No;
        };
        let has_pod = observed.pods.iter().any(|pod| pod.job_uid == job.uid);
        // By the API server's clock, in whole seconds.
        let age = job.created.map(|created| now.duration_since(created).as_secs());
        if age.is_some_and(|age| (-1..POD_PATIENCE).contains(&age)) && !has_pod && !job.suspended {
            Self::Just
        } else {
            Self::Yes
        }
    }
}

impl Ground {
    /// `childless` of a session that has neither Jobs nor pods and had none, `newborn` of one that nobody has done anything about.
    fn of(observed: &Observed, plan: &Plan, (cut, newborn, childless): (bool, bool, bool), now: Timestamp) -> Self {
        let status = &observed.session.status;
        let waits = status.attempt.is_none() && status.reason.as_deref() == Some(Reason::Queued.as_str());
        let its_own = |pod: &&PodSeen| Some(pod.attempt) == status.attempt && Some(&pod.uid) == status.pod_uid.as_ref();
        // Repositories are not remembered.
        let said = |pod: &PodSeen| {
            let report = pod.last_word().filter(|report| report.attempt == pod.attempt);
            report.is_some_and(|report| report.repos.is_empty())
        };
        let of_attempts = |uid: &String| observed.pods.iter().any(|pod| pod.uid == *uid);
        Self {
            cut,
            untouched: childless && (newborn || waits),
            silent: observe::is_silent(observed, now),
            reported: observed.pods.iter().find(its_own).is_some_and(said),
            of_attempts: plan.release.iter().all(|(_, uid)| of_attempts(uid)),
            made: Made::of(observed, now),
        }
    }
}

/// Decides what is done about a plan.
pub(super) fn step(before: &AgenticSessionStatus, plan: &Plan, ground: Ground) -> Step {
    let same = *before == plan.status;
    if !plan.only_tells() {
        return match plan.create_job {
            Some(_) if ground.untouched => Step::Begin,
            None if same && ground.of_attempts && plan.only_lets_go() => Step::Release,
            _ => Step::ReadLive,
        };
    }
    let concludes =
        before.phase == Phase::Running && before.attempt == plan.status.attempt && plan.status.phase.is_terminal();
    if before.phase == Phase::Pending && plan.status.phase == Phase::Creating {
        return match ground.made {
            Made::Just => Step::Await,
            Made::Yes if !ground.cut => Step::Tell,
            _ => Step::ReadLive,
        };
    }
    let progress = match before.phase {
        Phase::Pending => plan.status.phase == Phase::Pending,
        Phase::Creating => matches!(plan.status.phase, Phase::Creating | Phase::Running),
        _ => false,
    };
    match (same, progress) {
        (true, _) | (_, true) if ground.silent => Step::Ask,
        (true, _) => Step::Rest,
        (false, true) if !ground.cut => Step::Tell,
        (false, _) if concludes && ground.reported && !ground.cut => Step::Conclude,
        (false, _) => Step::ReadLive,
    }
}

/// Does what can be done on what is remembered; `None` when that is not enough.
pub(super) async fn act(context: &Context, known: Known, now: Timestamp) -> Result<Option<Settled>, Error> {
    let Known {
        session,
        cut,
        newborn,
        begun,
        jobs,
        pods,
    } = known;
    let session = &session;
    // The Job that we made may be gone, and its pod not.
    let known = (cut, newborn, !begun && jobs.is_empty() && pods.is_empty());
    let observed = observe::remembered(
        session,
        jobs,
        pods,
        observed::Policy::of(&context.settings, &context.clock),
    );
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let Some(Decided { request, mut plan }) = decide(context, session, &observed, Basis::Remembered, now).await? else {
        return Ok(Some(Settled::COME_AGAIN));
    };
    let ground = Ground::of(&observed, &plan, known, now);
    if !ground.silent {
        context.memory.answered(&namespace, &name);
    }
    let step = step(&observed.session.status, &plan, ground);
    match step {
        Step::Ask if context.memory.ask(&namespace, &name) => return Ok(None),
        Step::Rest | Step::Ask => {}
        Step::Await => plan.wake_in(LOOK_FOR_POD),
        Step::Tell | Step::Conclude => match record(context, session, &plan, Vec::new()).await {
            // The session is another by now, and the watch has not told yet.
            Err(error) if error.is_race() => return Ok(None),
            result => result?,
        },
        Step::Release => {
            for (pod, uid) in &plan.release {
                match apply::release(&context.client, &namespace, pod, uid).await {
                    // That is told of, which a whole look does.
                    Err(error) if error.refusal().is_some() => return Ok(None),
                    released => released?,
                }
                context.memory.released(&namespace, &name, uid);
            }
        }
        Step::Begin => {
            return match request {
                Ok(request) => begin(context, session, &request, now).await,
                Err(_) => Ok(None),
            };
        }
        Step::ReadLive => return Ok(None),
    }
    gate::settle(context, session, &plan, &request);
    let over = step == Step::Rest && plan.status.phase.is_terminal() && plan.wake.is_none();
    Ok(Some(if over {
        Settled::Over
    } else {
        Settled::Live { wake: plan.wake }
    }))
}

/// Begins a session that has nothing yet: its claim, if it has one, is made while it is read once more.
///
/// A predecessor may have made claim and Job and not lived to record them, too late for our first lists. Then the claim, or at the
/// latest the Job, is there under its name, and all is read.
async fn begin(
    context: &Context,
    remembered: &AgenticSession,
    request: &Request,
    now: Timestamp,
) -> Result<Option<Settled>, Error> {
    let (namespace, name) = (remembered.namespace().unwrap_or_default(), remembered.name_any());
    let claim = match &request.claim {
        Claim::Ephemeral { .. } => None,
        Claim::Own { .. } | Claim::Existing(_) => {
            let claim = build::claim(request).filter(|claim| claim.metadata.owner_references.is_some());
            let Some(claim) = claim else { return Ok(None) };
            Some(claim)
        }
    };
    let create = async {
        match &claim {
            Some(claim) => apply::create(&context.client, &namespace, "claim", claim).await,
            None => Ok(()),
        }
    };
    let (claim, session, settings) = tokio::join!(
        create,
        observe::session(&context.client, &namespace, &name),
        project_settings::read(&context.client, &namespace)
    );
    let Found::Live(session) = session? else {
        return Ok(None);
    };
    // Whatever is wrong with the claim is found out, and said, by a whole look.
    if claim.is_err() || session.metadata.resource_version != remembered.metadata.resource_version {
        return Ok(None);
    }
    let observed = observe::newborn(&session, observed::Policy::of(&context.settings, &context.clock));
    let basis = Basis::Read(settings.map_err(Error::Settings)?);
    match carry_out(context, &session, &observed, basis, now).await {
        // There is a Job of that name. Whose, and what follows, is found out by a whole look.
        Err(Error::Apply(error)) if error.is_race() => Ok(None),
        settled => settled.map(Some),
    }
}
