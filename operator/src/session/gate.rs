//! Around the ledger of places: reads a namespace into it, and has those looked at whose turn it is.

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crds::{AgenticSession, AgenticSessionStatus, Phase, condition};
use futures::{Stream, StreamExt as _, stream};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{ApiResource, ListParams},
    core::Object,
};
use protocol::{
    Reason,
    names::{component, label},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, mpsc},
    time::Instant,
};

use super::{
    admission::{Answer, Change, EXACT, Ledger, Place, message},
    conditions,
    decide::queued,
    memory::{Key, Memory},
    observed::Observed,
    plan::Plan,
    validate::{Invalid, Request},
};
use crate::context::{Context, PAGE};

/// How soon it is looked again for what others do.
const POLL: Duration = Duration::from_millis(50);
/// How soon a session comes again whose namespace another look reads. It takes none of the places of those who have something to do.
pub const COME_AGAIN: SignedDuration = SignedDuration::from_secs(1);
/// How often those at the head of the queue are told their place.
const TELL: SignedDuration = SignedDuration::from_secs(15);
/// Between two of those who only have something to be told.
const PACE: Duration = Duration::from_millis(5);
/// How long they wait at most for those whose turn it is.
const GIVE_WAY: Duration = Duration::from_mins(1);

/// Sessions to look at.
type Nudges = mpsc::UnboundedReceiver<Key>;

/// The ledger, and the way to have sessions looked at.
pub struct Gate {
    ledger: Mutex<Ledger>,
    limits: Mutex<HashMap<String, usize>>,
    now: mpsc::UnboundedSender<Key>,
    later: mpsc::UnboundedSender<Key>,
    /// Those who are in `later`, each once: settings may change faster than all can be told.
    to_tell: Mutex<HashSet<Key>>,
    receivers: Mutex<Option<(Nudges, Nudges)>>,
    /// Namespaces are read one after another: pages of several would not fit the memory.
    reading: Semaphore,
}

impl Default for Gate {
    fn default() -> Self {
        let (now, to_see) = mpsc::unbounded_channel();
        let (later, to_see_later) = mpsc::unbounded_channel();
        Self {
            ledger: Mutex::default(),
            limits: Mutex::default(),
            now,
            later,
            to_tell: Mutex::default(),
            receivers: Mutex::new(Some((to_see, to_see_later))),
            reading: Semaphore::new(1),
        }
    }
}

/// Nobody panics with a lock held but by exhaustion of memory; what is kept is whole after every line.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// Sessions to look at; for the controller, once.
    pub fn nudges(self: &Arc<Self>) -> impl Stream<Item = Key> + use<> {
        let received = held(&self.receivers).take();
        let gate = self.clone();
        stream::iter(received).flat_map(move |(now, later)| {
            let gate = gate.clone();
            let in_turn = received_by(later).then(move |session| {
                let gate = gate.clone();
                async move {
                    gate.give_way(&session.0).await;
                    held(&gate.to_tell).remove(&session);
                    session
                }
            });
            stream::select(received_by(now), in_turn)
        })
    }

    /// Waits while there are some whose turn it is: what others have to be told is of less hurry than what these begin.
    async fn give_way(&self, namespace: &str) {
        let admits = || {
            let limit = held(&self.limits).get(namespace).copied();
            limit.is_some_and(|limit| !held(&self.ledger).next(namespace, limit).is_empty())
        };
        let since = Instant::now();
        while admits() && since.elapsed() < GIVE_WAY {
            tokio::time::sleep(POLL).await;
        }
        tokio::time::sleep(PACE).await;
    }

    /// The settings of a namespace are others now, and bound its sessions so: all are looked at whom that may concern, those first
    /// whose turn it is.
    pub fn settings_changed(&self, namespace: &str, limit: Option<u32>) {
        let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        if let Some(known) = held(&self.limits).get_mut(namespace) {
            *known = limit;
        }
        let ledger = held(&self.ledger);
        let (refused, next, later) = (
            ledger.refused(namespace),
            ledger.next(namespace, limit),
            ledger.later(namespace, limit),
        );
        drop(ledger);
        nudge(&self.now, namespace, next);
        nudge(&self.now, namespace, refused);
        self.look_at(namespace, later);
    }

    /// These are looked at, one after another, behind those whose turn it is.
    pub fn look_at(&self, namespace: &str, mut names: Vec<String>) {
        let mut to_tell = held(&self.to_tell);
        names.retain(|name| to_tell.insert((namespace.to_owned(), name.clone())));
        drop(to_tell);
        nudge(&self.later, namespace, names);
    }

    /// Namespaces in which some may wait for what the admin decides.
    pub fn namespaces(&self) -> Vec<String> {
        let mut namespaces: HashSet<_> = held(&self.limits).keys().cloned().collect();
        namespaces.extend(held(&self.ledger).refusing());
        namespaces.into_iter().collect()
    }

    /// Takes over how many attempts are left of sessions that are gone.
    pub fn remains(&self, memory: &Memory) {
        let mut ledger = held(&self.ledger);
        // Asked with the lock held: what two ask for is taken over in the order in which they were told.
        let mut changed = memory.remains();
        changed.retain(|(namespace, count)| ledger.remains(namespace, *count));
        drop(ledger);
        for (namespace, _) in changed {
            self.nudge_next(&namespace);
        }
    }

    /// Forgets namespaces that have nothing any more.
    pub fn keep(&self, occupied: &HashSet<String>) {
        held(&self.limits).retain(|namespace, _| occupied.contains(namespace));
        held(&self.ledger).keep_namespaces(occupied);
    }

    /// A session is gone.
    pub fn gone(&self, namespace: &str, name: &str) {
        self.change(namespace, name, Timestamp::MAX, Place::None);
    }

    /// Whether a session may have a place that others could have.
    pub fn may_hold(&self, namespace: &str, name: &str) -> bool {
        held(&self.ledger).may_hold(namespace, name)
    }

    /// A session could not be looked at.
    pub fn stumbled(&self, namespace: &str, name: &str) {
        if held(&self.ledger).stumble(namespace, name) {
            self.nudge_next(namespace);
        }
    }

    /// Asks for a place among `limit`. Those before it should have come, if there is one for them: the first is looked at, and has it or
    /// waits no more.
    fn ask(&self, namespace: &str, name: &str, created: Timestamp, limit: usize) -> Answer {
        let mut ledger = held(&self.ledger);
        let answer = ledger.ask(namespace, name, created, limit);
        let first = ledger.first(namespace, limit);
        drop(ledger);
        if let Answer::Wait(_) = answer {
            nudge(&self.now, namespace, first);
        }
        answer
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
            nudge(&self.now, namespace, next);
        }
    }
}

fn nudge(sender: &mpsc::UnboundedSender<Key>, namespace: &str, names: impl IntoIterator<Item = String>) {
    for name in names {
        // Nobody listens any more when the operator is stopping.
        let _ = sender.send((namespace.to_owned(), name));
    }
}

fn received_by(nudges: Nudges) -> impl Stream<Item = Key> {
    stream::unfold(nudges, |mut nudges| async {
        nudges.recv().await.map(|nudge| (nudge, nudges))
    })
}

/// Lets a plan through that begins an attempt, if there is a place for it; else makes one that waits. `None` while another reads
/// the namespace.
pub async fn pass(
    context: &Context,
    session: &AgenticSession,
    plan: Plan,
    observed: &Observed,
    request: &Result<Request, Invalid>,
    limit: Option<u32>,
    now: Timestamp,
) -> kube::Result<Option<Plan>> {
    let (Some(attempt), Some(limit), Ok(request)) = (plan.create_job, limit, request) else {
        return Ok(Some(plan));
    };
    if attempt.held || request.queue.is_some() {
        // Somebody else admits it.
        return Ok(Some(plan));
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let gate = &context.gate;
    held(&gate.limits).insert(request.namespace.clone(), limit);
    // Of a session that was deleted a moment ago the watches have told by now that its pod is left.
    gate.remains(&context.memory);
    let created = session.creation_timestamp().map_or(now, |time| time.0);
    loop {
        match gate.ask(&request.namespace, &request.name, created, limit) {
            Answer::Admitted => return Ok(Some(plan)),
            Answer::Wait(before) => {
                let mut plan = queued(observed, &message(before, limit), now);
                if before < EXACT {
                    plan.wake_in(TELL);
                }
                return Ok(Some(plan));
            }
            Answer::Unknown if held(&gate.ledger).begin(&request.namespace) => {
                let reading = Reading {
                    ledger: &gate.ledger,
                    namespace: &request.namespace,
                };
                // Never closed.
                let _turn = gate.reading.acquire().await;
                let is_unreadable = |name: &str| context.memory.is_unreadable(&request.namespace, name);
                let found = read(&context.client, &request.namespace, is_unreadable).await?;
                reading.done(found);
            }
            Answer::Unknown => return Ok(None),
        }
    }
}

/// A namespace that is being read. Should that fail, or be given up in the middle, the next who asks reads it.
struct Reading<'a> {
    ledger: &'a Mutex<Ledger>,
    namespace: &'a str,
}

impl Reading<'_> {
    fn done(self, found: Vec<Change>) {
        held(self.ledger).load(self.namespace, found);
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        held(self.ledger).give_up(self.namespace);
    }
}

/// Notes what a session is after it was looked at.
pub fn settle(context: &Context, session: &AgenticSession, plan: &Plan, request: &Result<Request, Invalid>) {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let created = session.creation_timestamp().map_or(Timestamp::MAX, |time| time.0);
    context
        .gate
        .change(&namespace, &name, created, place(&plan.status, request));
}

/// What a session with this status is to those who wait.
fn place(status: &AgenticSessionStatus, request: &Result<Request, Invalid>) -> Place {
    let is_held = conditions::denied(status, condition::ADMITTED).is_some();
    let live = matches!(status.phase, Phase::Creating | Phase::Running | Phase::Stopping);
    match request {
        Err(invalid) if invalid.heals() && !live => Place::Refused,
        // Others must do something, perhaps the admin.
        Ok(_) if is_hindered(status) => Place::Refused,
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
    }
}

/// An object that it needs is missing, refused, or somebody else's.
fn is_hindered(status: &AgenticSessionStatus) -> bool {
    let reasons = [Reason::ConfigError, Reason::NameConflict, Reason::QuotaExceeded];
    let said = status.reason.as_deref();
    status.phase == Phase::Pending && reasons.iter().any(|reason| said == Some(reason.as_str()))
}

/// Forgets sessions that went without anybody noticing.
pub fn sweep(context: &Context) {
    if context.memory.is_listed() {
        context
            .backoff
            .keep(|namespace, name| context.memory.has(namespace, name));
        context.gate.keep(&context.memory.occupied());
    }
    let namespaces: Vec<_> = held(&context.gate.limits).keys().cloned().collect();
    for namespace in namespaces {
        let exists = |name: &str| context.memory.has(&namespace, name);
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

/// Words, whatever they are: one session that says something odd must not keep a namespace from being read.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct SlimStatus {
    #[serde(default)]
    phase: Option<String>,
    #[serde(default)]
    reason: Option<String>,
}

impl SlimStatus {
    /// `None` for a phase that is none of ours.
    fn phase(&self) -> Option<Phase> {
        match self.phase.as_deref() {
            None => Some(Phase::default()),
            Some(said) => Phase::ALL.into_iter().find(|phase| phase.as_str() == said),
        }
    }
}

/// Who holds a place and who waited for one, as a predecessor left it.
async fn read(client: &Client, namespace: &str, is_unreadable: impl Fn(&str) -> bool) -> kube::Result<Vec<Change>> {
    let kind = ApiResource::erase::<AgenticSession>(&());
    let sessions: Api<Object<SlimSpec, SlimStatus>> = Api::namespaced_with(client.clone(), namespace, &kind);
    let (mut found, mut held_back) = (Vec::new(), HashSet::new());
    let mut next = ListParams::default().limit(PAGE);
    loop {
        let page = sessions.list(&next).await?;
        for session in page.items {
            let name = session.metadata.name.unwrap_or_default();
            let status = session.status.unwrap_or_default();
            let reason = status.reason.as_deref();
            let waited = reason.is_none() || reason == Some(Reason::Queued.as_str());
            let place = match status.phase() {
                // As status has it: whoever admits Jobs has not let it begin.
                Some(Phase::Creating) if reason == Some(Reason::Queued.as_str()) => {
                    held_back.insert(name.clone());
                    Place::None
                }
                // Nobody will record its end.
                Some(Phase::Creating | Phase::Running | Phase::Stopping) if is_unreadable(&name) => {
                    held_back.insert(name.clone());
                    Place::None
                }
                Some(Phase::Creating | Phase::Running | Phase::Stopping) => Place::Holds,
                Some(Phase::Pending) if waited && !session.spec.suspend => Place::Waits,
                Some(Phase::Pending | Phase::Completed | Phase::Failed | Phase::Stopped) | None => Place::None,
            };
            found.push(Change {
                name,
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
    begun(client, namespace, &held_back, &mut found).await?;
    Ok(found)
}

/// A Job that was made by a reconcile which did not live to record it holds a place too, and one that was let go unseen.
async fn begun(
    client: &Client,
    namespace: &str,
    held_back: &HashSet<String>,
    found: &mut [Change],
) -> kube::Result<()> {
    let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
    let attempts = format!(
        "{}={},{}={}",
        label::MANAGED_BY,
        label::MANAGER,
        label::COMPONENT,
        component::ATTEMPT
    );
    let mut next = ListParams::default().labels(&attempts).limit(PAGE);
    let mut live = HashSet::new();
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
    for change in found {
        let may_have_begun = change.place == Place::Waits || held_back.contains(&change.name);
        if may_have_begun && live.contains(&change.name) {
            change.place = Place::Holds;
        }
    }
    Ok(())
}
