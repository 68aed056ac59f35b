//! Around the ledger of places: reads a namespace into it, and has those looked at whose turn it is.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crds::{AgenticSession, Phase};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{ApiResource, ListParams},
    core::{Object, PartialObjectMeta},
    runtime::reflector::{ObjectRef, Store},
};
use protocol::{
    Reason,
    names::{component, label},
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    admission::{Answer, Change, EXACT, Ledger, Place, message},
    decide::{Plan, queued},
    observed::Observed,
    validate::{Invalid, Request},
};
use crate::context::Context;

type Meta = PartialObjectMeta<AgenticSession>;

/// Objects of one answer when a namespace is read.
const PAGE: u32 = 500;
/// How soon a namespace that another reconcile reads is asked for again.
const POLL: Duration = Duration::from_millis(50);
/// How often those at the head of the queue are told their place.
const TELL: SignedDuration = SignedDuration::from_secs(15);

/// The ledger, and the way to have sessions looked at.
pub struct Gate {
    ledger: Mutex<Ledger>,
    limits: Mutex<std::collections::HashMap<String, usize>>,
    sender: mpsc::UnboundedSender<ObjectRef<Meta>>,
    receiver: Mutex<Option<mpsc::UnboundedReceiver<ObjectRef<Meta>>>>,
}

impl Default for Gate {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            ledger: Mutex::default(),
            limits: Mutex::default(),
            sender,
            receiver: Mutex::new(Some(receiver)),
        }
    }
}

/// Nobody panics with a lock held but by exhaustion of memory; what is kept is whole after every line.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// Sessions to look at; for the controller, once.
    pub fn nudges(&self) -> Option<mpsc::UnboundedReceiver<ObjectRef<Meta>>> {
        held(&self.receiver).take()
    }

    /// The settings of a namespace are others now.
    pub fn settings_changed(&self, namespace: &str) {
        let unsettled = held(&self.ledger).unsettled(namespace);
        self.nudge(namespace, unsettled);
    }

    /// A session is gone.
    pub fn gone(&self, namespace: &str, name: &str) {
        self.change(namespace, name, Timestamp::MAX, Place::None);
    }

    /// A session could not be looked at.
    pub fn stumbled(&self, namespace: &str, name: &str) {
        if held(&self.ledger).stumble(namespace, name) {
            self.nudge_next(namespace);
        }
    }

    fn change(&self, namespace: &str, name: &str, created: Timestamp, place: Place) {
        let change = Change {
            name: name.to_owned(),
            created,
            place,
        };
        let freed = held(&self.ledger).change(namespace, change);
        if freed {
            self.nudge_next(namespace);
        }
    }

    fn nudge_next(&self, namespace: &str) {
        let limit = held(&self.limits).get(namespace).copied();
        if let Some(limit) = limit {
            let next = held(&self.ledger).next(namespace, limit);
            self.nudge(namespace, next);
        }
    }

    fn nudge(&self, namespace: &str, names: Vec<String>) {
        for name in names {
            // Nobody listens any more when the operator is stopping.
            let _ = self.sender.send(ObjectRef::new(&name).within(namespace));
        }
    }
}

/// Lets a plan through that begins an attempt, if there is a place for it; else makes one that waits.
pub async fn pass(
    context: &Context,
    session: &AgenticSession,
    plan: Plan,
    observed: &Observed,
    request: &Result<Request, Invalid>,
    limit: Option<u32>,
    now: Timestamp,
) -> kube::Result<Plan> {
    let (Some(attempt), Some(limit), Ok(request)) = (plan.create_job, limit, request) else {
        return Ok(plan);
    };
    if attempt.held || request.queue.is_some() {
        // Somebody else admits it.
        return Ok(plan);
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let gate = &context.gate;
    held(&gate.limits).insert(request.namespace.clone(), limit);
    let created = session.creation_timestamp().map_or(now, |time| time.0);
    loop {
        let answer = held(&gate.ledger).ask(&request.namespace, &request.name, created, limit);
        match answer {
            Answer::Admitted => return Ok(plan),
            Answer::Wait(before) => {
                let mut plan = queued(observed, &message(before, limit), now);
                plan.wake = (before < EXACT).then_some(TELL);
                return Ok(plan);
            }
            Answer::Unknown if held(&gate.ledger).begin(&request.namespace) => {
                match read(&context.client, &request.namespace).await {
                    Ok(found) => held(&gate.ledger).load(&request.namespace, found),
                    Err(error) => {
                        held(&gate.ledger).give_up(&request.namespace);
                        return Err(error);
                    }
                }
            }
            Answer::Unknown => tokio::time::sleep(POLL).await,
        }
    }
}

/// Notes what a session is after it was looked at.
pub fn settle(context: &Context, session: &AgenticSession, plan: &Plan, request: &Result<Request, Invalid>) {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let status = &plan.status;
    let is_held = status
        .conditions
        .iter()
        .any(|c| c.type_ == crds::condition::ADMITTED && c.status == "False");
    let live = matches!(status.phase, Phase::Creating | Phase::Running | Phase::Stopping);
    let place = match request {
        Err(invalid) if invalid.heals() && !live => Place::Refused,
        _ if live && !is_held => Place::Holds,
        // Only the gate itself makes these.
        Ok(request) if status.phase == Phase::Pending && is_held && request.queue.is_none() => {
            if status.reason.as_deref() == Some(Reason::Queued.as_str()) {
                Place::Waits
            } else {
                Place::None
            }
        }
        _ => Place::None,
    };
    let created = session.creation_timestamp().map_or(Timestamp::MAX, |time| time.0);
    context.gate.change(&namespace, &name, created, place);
}

/// Forgets sessions that went without anybody noticing.
pub fn sweep(context: &Context, sessions: &Store<Meta>) {
    let namespaces: Vec<_> = held(&context.gate.limits).keys().cloned().collect();
    for namespace in namespaces {
        let exists = |name: &str| sessions.get(&ObjectRef::new(name).within(&namespace)).is_some();
        let forgot = held(&context.gate.ledger).keep(&namespace, exists);
        if forgot {
            context.gate.nudge_next(&namespace);
        }
    }
}

/// What of a session is read: prompts and results are not.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct SlimSpec {
    #[serde(default)]
    suspend: bool,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct SlimStatus {
    #[serde(default)]
    phase: Phase,
    #[serde(default)]
    reason: Option<String>,
}

/// Who holds a place and who waited for one, as a predecessor left it.
async fn read(client: &Client, namespace: &str) -> kube::Result<Vec<Change>> {
    let kind = ApiResource::erase::<AgenticSession>(&());
    let sessions: Api<Object<SlimSpec, SlimStatus>> = Api::namespaced_with(client.clone(), namespace, &kind);
    let mut found = Vec::new();
    let mut next = ListParams::default().limit(PAGE);
    loop {
        let page = sessions.list(&next).await?;
        for session in page.items {
            let status = session.status.unwrap_or_default();
            let reason = status.reason.as_deref();
            let waited = reason.is_none() || reason == Some(Reason::Queued.as_str());
            let place = match status.phase {
                Phase::Creating | Phase::Running | Phase::Stopping => Place::Holds,
                Phase::Pending if waited && !session.spec.suspend => Place::Waits,
                Phase::Pending | Phase::Completed | Phase::Failed | Phase::Stopped => Place::None,
            };
            found.push(Change {
                name: session.metadata.name.unwrap_or_default(),
                created: session
                    .metadata
                    .creation_timestamp
                    .map_or(Timestamp::MAX, |time| time.0),
                place,
            });
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => next = next.continue_token(&token),
            None => break,
        }
    }
    begun(client, namespace, &mut found).await?;
    Ok(found)
}

/// A Job that was made by a reconcile which did not live to record it holds a place too.
async fn begun(client: &Client, namespace: &str, found: &mut [Change]) -> kube::Result<()> {
    let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
    let attempts = format!(
        "{}={},{}={}",
        label::MANAGED_BY,
        label::MANAGER,
        label::COMPONENT,
        component::ATTEMPT
    );
    let mut next = ListParams::default().labels(&attempts).limit(PAGE);
    let mut live = std::collections::HashSet::new();
    loop {
        let page = jobs.list(&next).await?;
        for job in &page.items {
            let status = job.status.clone().unwrap_or_default();
            let over =
                status.completion_time.is_some() || status.conditions.iter().flatten().any(|c| c.type_ == "Failed");
            let suspended = job.spec.as_ref().and_then(|spec| spec.suspend).unwrap_or_default();
            if !over && !suspended {
                live.extend(
                    job.meta()
                        .labels
                        .as_ref()
                        .and_then(|labels| labels.get(label::SESSION))
                        .cloned(),
                );
            }
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => next = next.continue_token(&token),
            None => break,
        }
    }
    for change in found.iter_mut().filter(|change| change.place == Place::Waits) {
        if live.contains(&change.name) {
            change.place = Place::Holds;
        }
    }
    Ok(())
}
