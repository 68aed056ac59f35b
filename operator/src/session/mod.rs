//! The controller of `AgenticSession`: one file a step.

mod admission;
mod allow;
mod apply;
mod build;
mod compact;
mod conditions;
pub mod controller;
mod deadline;
mod decide;
mod drain;
mod gate;
mod job;
mod lean;
mod mcp;
mod memory;
mod observe;
mod observed;
mod outcome;
mod plan;
mod pod;
mod quantity;
mod queue;
mod recall;
mod repos;
mod resolve;
mod status;
mod transition;
mod validate;

#[cfg(test)]
mod model;

use std::sync::Arc;

use crds::{AgenticSession, ProjectSettingsSpec, condition};
use jiff::{SignedDuration, Timestamp};
use kube::{Resource as _, ResourceExt as _};

use apply::Refusal;
use memory::Look;
use observed::Observed;
use plan::Plan;
use validate::{Invalid, Request};

pub use apply::{Error as ApplyError, create, release};
pub use gate::Gate;
pub use lean::Lean;
pub use memory::{Memory, Orphan};
pub use observe::{Error as ObserveError, Found, session as find};
pub use queue::Queue;
pub use status::Error as StatusError;

use crate::{context::Context, network, project_settings};

/// What a reconcile came to.
#[derive(Debug)]
pub enum Settled {
    /// The session is gone; garbage collection has its children, the pod controller their reports.
    Gone,
    /// It cannot be read; a change of it is waited for.
    Unreadable(String),
    /// It is over, and nothing is left to do about it.
    Over,
    /// It was observed, and what should go may not.
    Kept {
        /// What, and why not.
        why: String,
        /// When to look again though that is not tried again before.
        wake: Option<SignedDuration>,
    },
    /// It was observed.
    Live {
        /// When to look again though nothing changes.
        wake: Option<SignedDuration>,
    },
}

impl Settled {
    /// Nothing could be decided yet.
    const COME_AGAIN: Self = Self::Live {
        wake: Some(gate::COME_AGAIN),
    };
}

/// How soon to look for the pod of a Job that was just made; its watch is likely to tell first.
const LOOK_FOR_POD: SignedDuration = SignedDuration::from_secs(1);

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// A write of the plan failed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The settings of the namespace could not be read.
    #[error("failed to read the ProjectSettings of the namespace")]
    Settings(#[source] kube::Error),
    /// The namespace's sessions could not be read for their places.
    #[error("failed to read which sessions of the namespace run")]
    Gate(#[source] kube::Error),
    /// The status write failed.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// The API server did not answer in time.
    #[error("failed to reconcile the session in time: the API server is slow or does not answer")]
    TimedOut,
}

impl Error {
    /// Somebody was faster: to be observed again at once.
    pub fn is_race(&self) -> bool {
        match self {
            Self::Observe(_) | Self::Settings(_) | Self::Gate(_) | Self::TimedOut => false,
            Self::Apply(error) => error.is_race(),
            Self::Status(error) => error.is_race(),
        }
    }

    /// One word for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            _ if self.is_race() => "race",
            Self::Observe(_) => "observe",
            Self::Settings(_) => "settings",
            Self::Gate(_) => "gate",
            Self::Apply(_) => "apply",
            Self::Status(_) => "status",
            Self::TimedOut => "timeout",
        }
    }
}

/// One look at a session, and what it leads to.
///
/// Memory says whether there is something to do. What only tells of progress is written from there: the API server refuses it when
/// the session has changed. All else is decided once more on live reads.
pub async fn reconcile(context: &Context, namespace: &str, name: &str) -> Result<Settled, Error> {
    let now = context.clock.now().time;
    match context.memory.look(namespace, name) {
        Look::Unknown => {}
        Look::Gone => {
            context.gate.gone(namespace, name);
            return Ok(Settled::Gone);
        }
        Look::Behind => {
            let wake = Some(SignedDuration::from_secs(1));
            return Ok(Settled::Live { wake });
        }
        Look::Known(known) => {
            if let Some(settled) = Box::pin(recall::act(context, *known, now)).await? {
                return Ok(settled);
            }
        }
    }
    let session = match observe::session(&context.client, namespace, name).await? {
        Found::Gone => {
            context.gate.gone(namespace, name);
            return Ok(Settled::Gone);
        }
        Found::Unreadable { uid, why } => {
            // They may be many, after an upgrade all: what they do is read only where that may give others a place.
            if context.gate.may_hold(namespace, name) && observe::works(&context.client, namespace, name, &uid).await? {
                // As a list has it, it may wait for a place.
                context.gate.stumbled(namespace, name);
            } else {
                context.gate.gone(namespace, name);
            }
            return Ok(Settled::Unreadable(why));
        }
        Found::Live(session) => session,
    };
    let policy = observed::Policy::of(&context.settings, &context.clock);
    let observed = observe::children(&context.client, &session, policy, now).await?;
    context.memory.checked(namespace, name);
    carry_out(context, &session, &observed, Basis::Live, now).await
}

/// What is asked for, and what follows from it and what was observed.
struct Decided {
    request: Result<Request, Invalid>,
    plan: Plan,
}

/// How far what is decided on may be behind.
enum Basis {
    /// As far as the watches are.
    Remembered,
    /// Not at all.
    Live,
    /// The same, with the settings as they were read beside all else.
    Read(Result<Arc<ProjectSettingsSpec>, project_settings::Unknown>),
}

/// `None` when nothing can be decided before another look has read who else of the namespace runs.
async fn decide(
    context: &Context,
    session: &AgenticSession,
    observed: &Observed,
    basis: Basis,
    now: Timestamp,
) -> Result<Option<Decided>, Error> {
    let namespace = session.namespace().unwrap_or_default();
    let judge = |settings: Result<Arc<ProjectSettingsSpec>, project_settings::Unknown>| {
        let settings = settings.map_err(Invalid::from);
        let limit = settings
            .as_ref()
            .ok()
            .and_then(|settings| settings.max_concurrent_sessions);
        let over = observed.session.status.phase.is_terminal();
        let judge = if over { validate::ended } else { validate::validate };
        let request = settings.and_then(|settings| judge(session, &settings));
        let plan = decide::decide(observed, &request, now);
        (request, limit, plan)
    };
    let (request, limit, plan) = match basis {
        Basis::Remembered => judge(context.projects.of(&namespace).await),
        Basis::Read(settings) => judge(settings),
        Basis::Live => {
            let judged = judge(context.projects.of(&namespace).await);
            if judged.2.create_job.is_none() {
                judged
            } else {
                // What an attempt begins with it keeps: nothing would tell it of what the admin decided before.
                let read = project_settings::read(&context.client, &namespace).await;
                judge(read.map_err(Error::Settings)?)
            }
        }
    };
    let plan = gate::pass(context, session, plan, observed, &request, limit, now)
        .await
        .map_err(Error::Gate)?;
    Ok(plan.map(|plan| Decided { request, plan }))
}

/// Decides, and does it.
async fn carry_out(
    context: &Context,
    session: &AgenticSession,
    observed: &Observed,
    basis: Basis,
    now: Timestamp,
) -> Result<Settled, Error> {
    let begins = matches!(basis, Basis::Read(_));
    let Some(Decided { request, plan }) = decide(context, session, observed, basis, now).await? else {
        return Ok(Settled::COME_AGAIN);
    };
    let settings = &context.settings.pod;
    let (mut made, mut kept) = (Vec::new(), None);
    let applied = async {
        if plan.create_job.is_some() || plan.create_drain.is_some() {
            network::ensure(context, &session.namespace().unwrap_or_default()).await?;
        }
        apply::apply(&context.client, session, &plan, request.as_ref().ok(), settings).await
    };
    let plan = match applied.await {
        Ok(refusals) => {
            let job = |attempt: plan::Attempt| build::job_name(&session.name_any(), attempt.number);
            made.extend(plan.create_job.map(job));
            let mut plan = plan;
            if let Some(refusal) = &refusals.untold {
                plan = decide::untold(plan, observed, refusal, now);
            }
            if let Some(refusal) = &refusals.kept {
                plan = decide::kept(plan, observed, refusal, now);
            }
            kept = refusals.kept;
            plan
        }
        // The session waits, and says for what.
        Err(ApplyError::Refused { kind, name, said }) => decide::refused(observed, &request, (kind, &name, &said), now),
        Err(error) => return Err(error.into()),
    };
    // Of one that others admit nobody knows when it has a pod.
    let waits = conditions::denied(&plan.status, condition::ADMITTED).is_some();
    let wake = if begins && !made.is_empty() && !waits {
        // Status tells of the Job together with its pod: one write instead of two. Until then the Job's name says whose it is.
        note(context, session, None, made);
        Some(LOOK_FOR_POD)
    } else {
        record(context, session, &plan, made).await?;
        plan.wake
    };
    gate::settle(context, session, &plan, &request);
    Ok(match kept {
        Some(Refusal { what, said }) => Settled::Kept {
            why: format!("the API server refuses to {what}: {said}"),
            wake,
        },
        None => Settled::Live { wake },
    })
}

/// Writes the status of a plan, if it says something new, and tells of it.
async fn record(context: &Context, session: &AgenticSession, plan: &Plan, made: Vec<String>) -> Result<(), Error> {
    let written = status::update(&context.client, session, &plan.status).await?;
    note(context, session, written.as_deref(), made);
    if written.is_some() {
        tell(context, session, plan);
    }
    Ok(())
}

/// Keeps in mind what was written, the version that the session then has, and what was made, until the watches show it.
fn note(context: &Context, session: &AgenticSession, written: Option<&str>, made: Vec<String>) {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    if !made.is_empty()
        && let Some(age) = context.memory.age(&namespace, &name)
    {
        context.metrics.job_made(age);
    }
    if written.is_some() || !made.is_empty() {
        let uid = session.uid().unwrap_or_default();
        context.memory.wrote(&namespace, &name, &uid, written, made);
    }
}

/// Metrics, log and Events of a status that was written.
fn tell(context: &Context, session: &AgenticSession, plan: &Plan) {
    let old = session.status.clone().unwrap_or_default();
    let next = &plan.status;
    context.metrics.status_written(&old, next);
    if old.phase != next.phase || old.attempt != next.attempt {
        tracing::info!(
            session = session.metadata.name,
            namespace = session.metadata.namespace,
            attempt = next.attempt,
            from = %old.phase,
            to = %next.phase,
            reason = next.reason,
            "phase"
        );
    }
    for note in status::notes(&old, next) {
        context.events.publish(&session.object_ref(&()), note);
    }
}
