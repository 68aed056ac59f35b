//! What the watches have told of sessions and their children, reduced to what decisions rest on.
//!
//! Memory says whether there is something to do; it may lag. So nothing is decided on it before it has our own writes, and what
//! takes away or ends is decided again on live reads.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crds::{AgenticSession, Phase};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Resource, ResourceExt as _, core::PartialObjectMeta, runtime::reflector::ObjectRef, runtime::watcher::Event,
};
use protocol::names::label;
use tokio::sync::watch;

use super::{
    lean::{self, Lean},
    observed::{JobFor, OurJob, PodSeen, pod_of},
};
use crate::backoff::jittered;

/// What triggers name: a session.
pub type Meta = PartialObjectMeta<AgenticSession>;

/// A watch that is so far behind our own write is not waited for.
const BEHIND: Duration = Duration::from_secs(5);
/// How often a session that is not over is read live though no watch told of a change: watches may miss.
const SAFETY: Duration = Duration::from_mins(10);
/// Why something is silent is asked for after these, doubling.
const ASK: (Duration, Duration) = (Duration::from_secs(4), Duration::from_mins(1));
/// In the place of texts that are not remembered.
const CUT: &str = "-";

/// Namespace and name.
type Key = (String, String);

/// Memory of all watched sessions.
#[derive(Debug)]
pub struct Memory {
    inner: Mutex<Inner>,
    /// Bits of the kinds whose first list is complete.
    listed: watch::Sender<u8>,
}

#[derive(Debug, Default)]
struct Inner {
    sessions: HashMap<Key, Kept>,
    children: HashMap<Key, Children>,
    /// Names seen in a list that is not complete, by kind.
    listing: [HashSet<(String, String)>; 3],
    /// Sessions to be looked at, and since when.
    queue: HashMap<Key, Instant>,
}

#[derive(Debug)]
struct Kept {
    uid: String,
    version: u64,
    deleting: bool,
    phase: Phase,
    /// The result is not remembered: a status built on this would lose it.
    cut: bool,
    /// Seen to be made, and not looked at by anybody yet.
    born: Option<Instant>,
    /// Read live the last time.
    checked: Instant,
    /// How often it was asked why something of it is silent, and when the last time.
    asked: (u32, Option<Instant>),
    own: Option<Own>,
    /// JSON: a tenth of what the parsed object takes.
    content: Result<Box<[u8]>, String>,
}

/// What we have written and no watch has shown yet.
#[derive(Debug)]
struct Own {
    version: u64,
    jobs: Vec<String>,
    since: Instant,
}

#[derive(Debug, Default)]
struct Children {
    jobs: HashMap<String, KeptJob>,
    pods: HashMap<String, KeptPod>,
}

#[derive(Debug)]
struct KeptJob {
    owner: Option<String>,
    job: OurJob,
}

#[derive(Debug)]
struct KeptPod {
    session_uid: String,
    what: JobFor,
    pod: PodSeen,
}

/// What is remembered of a session.
pub enum Look {
    /// Nothing, or a live look is due.
    Unknown,
    /// It lags behind our own writes; the watch will tell.
    Behind,
    /// It is gone or going.
    Gone,
    /// It is known.
    Known(Box<Known>),
}

/// A session and its children as the watches have told.
pub struct Known {
    /// The session, without long texts.
    pub session: AgenticSession,
    /// A status must not be built on this: the result is not remembered.
    pub cut: bool,
    /// It was seen to be made, and nobody has done anything about it.
    pub newborn: bool,
    /// Its Jobs.
    pub jobs: Vec<OurJob>,
    /// Its pods.
    pub pods: Vec<(JobFor, PodSeen)>,
}

#[derive(Clone, Copy)]
enum Kind {
    Sessions = 0,
    Jobs = 1,
    Pods = 2,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            listed: watch::Sender::new(0),
        }
    }
}

impl Memory {
    /// Waits until the first lists are complete; at most for `patience`.
    pub async fn listed(&self, patience: Duration) {
        let mut listed = self.listed.subscribe();
        let complete = listed.wait_for(|kinds| *kinds == 0b111);
        // Without them looks go to the API server.
        let _ = tokio::time::timeout(patience, complete).await;
    }

    /// What is remembered of a session.
    pub fn look(&self, namespace: &str, name: &str) -> Look {
        if *self.listed.borrow() != 0b111 {
            return Look::Unknown;
        }
        let key = (namespace.to_owned(), name.to_owned());
        let mut inner = self.locked();
        let Inner { sessions, children, .. } = &mut *inner;
        let Some(kept) = sessions.get_mut(&key) else {
            return Look::Unknown;
        };
        if kept.deleting {
            return Look::Gone;
        }
        let children = children.get(&key);
        if let Some(own) = &kept.own {
            let has = |job: &String| children.is_some_and(|children| children.jobs.contains_key(job));
            if kept.version < own.version || !own.jobs.iter().all(has) {
                return if own.since.elapsed() < BEHIND {
                    Look::Behind
                } else {
                    Look::Unknown
                };
            }
            kept.own = None;
        }
        let over = kept.phase.is_terminal();
        let Ok(Ok(session)) = kept
            .content
            .as_ref()
            .map(|json| serde_json::from_slice::<AgenticSession>(json))
        else {
            return Look::Unknown;
        };
        if !over && kept.checked.elapsed() >= SAFETY {
            return Look::Unknown;
        }
        let jobs = children.into_iter().flat_map(|c| c.jobs.values());
        let pods = children.into_iter().flat_map(|c| c.pods.values());
        Look::Known(Box::new(Known {
            cut: kept.cut,
            newborn: kept.born.is_some(),
            jobs: jobs
                .filter(|kept_job| kept_job.owner.as_deref() == Some(&*kept.uid))
                .map(|kept_job| kept_job.job.clone())
                .collect(),
            pods: pods
                .filter(|pod| pod.session_uid == kept.uid)
                .map(|pod| (pod.what, pod.pod.clone()))
                .collect(),
            session,
        }))
    }

    /// The session was read live.
    pub fn checked(&self, namespace: &str, name: &str) {
        if let Some(kept) = self.locked().sessions.get_mut(&(namespace.to_owned(), name.to_owned())) {
            kept.checked = Instant::now();
            kept.own = None;
        }
    }

    /// Whether it is time to ask why something of the session is silent; then it counts as asked.
    pub fn ask(&self, namespace: &str, name: &str) -> bool {
        let mut inner = self.locked();
        let Some(kept) = inner.sessions.get_mut(&(namespace.to_owned(), name.to_owned())) else {
            return true;
        };
        let (times, last) = kept.asked;
        let wait = ASK.0.saturating_mul(1 << times.min(8)).min(ASK.1);
        if last.is_some_and(|last| last.elapsed() < wait) {
            return false;
        }
        kept.asked = (times.saturating_add(1), Some(Instant::now()));
        true
    }

    /// We wrote the session, which has this version now, and made these Jobs: nothing is decided until the watches show both.
    pub fn wrote(&self, namespace: &str, name: &str, version: Option<&str>, jobs: Vec<String>) {
        if let Some(kept) = self.locked().sessions.get_mut(&(namespace.to_owned(), name.to_owned())) {
            kept.own = Some(Own {
                version: version.map_or(0, number),
                jobs,
                since: Instant::now(),
            });
        }
    }

    /// How long ago a session was seen to be made, if nobody had done anything about it so far.
    pub fn age(&self, namespace: &str, name: &str) -> Option<Duration> {
        let inner = self.locked();
        let kept = inner.sessions.get(&(namespace.to_owned(), name.to_owned()))?;
        kept.born.map(|born| born.elapsed())
    }

    /// How many sessions are in each phase.
    pub fn phases(&self) -> BTreeMap<&'static str, i64> {
        let mut phases = BTreeMap::new();
        for kept in self.locked().sessions.values() {
            *phases.entry(kept.phase.as_str()).or_default() += 1;
        }
        phases
    }

    /// How many sessions wait to be looked at.
    pub fn queue_depth(&self) -> usize {
        self.locked().queue.len()
    }

    /// A session is looked at now; answers for how long it waited.
    pub fn taken(&self, namespace: &str, name: &str) -> Option<Duration> {
        let since = self.locked().queue.remove(&(namespace.to_owned(), name.to_owned()));
        since.map(|since| since.elapsed())
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        // Every change is whole: one that panicked elsewhere did no harm here.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// --- what watches tell ----------------------------------------------------------------------------------------------

impl Memory {
    /// Remembers a session; answers the same event about its bare name.
    pub fn session_event(&self, event: Event<lean::Session>) -> Event<Meta> {
        let mut inner = self.locked();
        match event {
            Event::Init => {
                inner.listing[Kind::Sessions as usize].clear();
                Event::Init
            }
            Event::InitApply(session) => {
                inner.listing[Kind::Sessions as usize].insert(key(&session.metadata));
                Event::InitApply(inner.see_session(session, false))
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut inner.listing[Kind::Sessions as usize]);
                inner.sessions.retain(|key, _| listed.contains(key));
                inner.queue.retain(|key, _| listed.contains(key));
                drop(inner);
                self.listed.send_modify(|kinds| *kinds |= 1 << Kind::Sessions as u8);
                Event::InitDone
            }
            Event::Apply(session) => Event::Apply(inner.see_session(session, true)),
            Event::Delete(session) => {
                let key = key(&session.metadata);
                inner.sessions.remove(&key);
                inner.queue.remove(&key);
                Event::Delete(bare(&session.metadata))
            }
        }
    }

    /// Remembers a Job; answers the sessions that it concerns.
    pub fn job_event(&self, event: Event<Lean<Job>>) -> Vec<ObjectRef<Meta>> {
        self.child_event(Kind::Jobs, event, |children, job, there| {
            let name = job.name_any();
            if !there {
                children.jobs.remove(&name);
                return;
            }
            let owner = job.owner_references().iter().find(|o| o.controller == Some(true));
            let kept = KeptJob {
                owner: owner.map(|o| o.uid.clone()),
                job: OurJob::from(job),
            };
            children.jobs.insert(name, kept);
        })
    }

    /// Remembers a pod; answers the sessions that it concerns.
    pub fn pod_event(&self, event: Event<Lean<Pod>>) -> Vec<ObjectRef<Meta>> {
        self.child_event(Kind::Pods, event, |children, pod, there| {
            let session = pod.labels().get(label::SESSION).cloned().unwrap_or_default();
            let session_uid = pod.labels().get(label::SESSION_UID).cloned().unwrap_or_default();
            match pod_of(pod, &session).filter(|_| there) {
                None => drop(children.pods.remove(&pod.name_any())),
                Some((what, pod)) => {
                    let kept = KeptPod { session_uid, what, pod };
                    children.pods.insert(kept.pod.name.clone(), kept);
                }
            }
        })
    }

    fn child_event<K: Resource>(
        &self,
        kind: Kind,
        event: Event<Lean<K>>,
        keep: impl Fn(&mut Children, &K, bool),
    ) -> Vec<ObjectRef<Meta>> {
        let mut inner = self.locked();
        let (object, there) = match event {
            Event::Init => {
                inner.listing[kind as usize].clear();
                return Vec::new();
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut inner.listing[kind as usize]);
                let vanished = inner.forget_unlisted(kind, &listed);
                drop(inner);
                self.listed.send_modify(|kinds| *kinds |= 1 << kind as u8);
                return vanished;
            }
            Event::InitApply(Lean(object)) => {
                inner.listing[kind as usize].insert(key(object.meta()));
                (object, true)
            }
            Event::Apply(Lean(object)) => (object, true),
            Event::Delete(Lean(object)) => (object, false),
        };
        let meta = object.meta();
        let session = meta
            .labels
            .as_ref()
            .and_then(|labels| labels.get(label::SESSION))
            .cloned();
        let (Some(namespace), Some(session)) = (meta.namespace.clone(), session) else {
            return Vec::new();
        };
        let key = (namespace, session);
        let children = inner.children.entry(key.clone()).or_default();
        keep(children, &object, there);
        if children.jobs.is_empty() && children.pods.is_empty() {
            inner.children.remove(&key);
        }
        inner.trigger(key).into_iter().collect()
    }
}

impl Inner {
    fn see_session(&mut self, session: lean::Session, live: bool) -> Meta {
        let meta = bare(&session.metadata);
        let key = key(&session.metadata);
        let version = session.metadata.resource_version.as_deref().map_or(0, number);
        let before = self
            .sessions
            .remove(&key)
            .filter(|kept| Some(&kept.uid) == session.metadata.uid.as_ref());
        let status = session
            .content
            .as_ref()
            .ok()
            .and_then(|session| session.status.as_ref());
        let untouched = status.is_none_or(|status| status.run.is_none() && status.reason.is_none());
        let cut = status.is_some_and(|status| status.result.is_some());
        let phase = status.map(|status| status.phase).unwrap_or_default();
        // Seen from its beginning: no earlier process of ours can have done anything about it.
        let born = match &before {
            None => (live && untouched && session.metadata.generation == Some(1)).then(Instant::now),
            Some(before) => before.born.filter(|_| untouched),
        };
        let kept = Kept {
            uid: session.metadata.uid.clone().unwrap_or_default(),
            version,
            deleting: session.metadata.deletion_timestamp.is_some(),
            phase,
            cut,
            born,
            checked: before.as_ref().map_or_else(first_check, |before| before.checked),
            asked: before.as_ref().map_or((0, None), |before| before.asked),
            own: before.and_then(|before| before.own),
            content: session.content.map(compact),
        };
        self.sessions.insert(key.clone(), kept);
        self.trigger(key);
        meta
    }

    /// What was deleted while nobody watched.
    fn forget_unlisted(&mut self, kind: Kind, listed: &HashSet<Key>) -> Vec<ObjectRef<Meta>> {
        let mut concerned = Vec::new();
        self.children.retain(|(namespace, session), children| {
            let before = children.jobs.len() + children.pods.len();
            let there = |name: &String| listed.contains(&(namespace.clone(), name.clone()));
            match kind {
                Kind::Jobs => children.jobs.retain(|name, _| there(name)),
                Kind::Pods => children.pods.retain(|name, _| there(name)),
                Kind::Sessions => {}
            }
            let after = children.jobs.len() + children.pods.len();
            if after < before {
                concerned.push((namespace.clone(), session.clone()));
            }
            after > 0
        });
        concerned.into_iter().filter_map(|key| self.trigger(key)).collect()
    }

    /// A session is to be looked at; one that is not there is not.
    fn trigger(&mut self, key: Key) -> Option<ObjectRef<Meta>> {
        self.sessions.contains_key(&key).then(|| {
            let session = ObjectRef::new(&key.1).within(&key.0);
            self.queue.entry(key).or_insert_with(Instant::now);
            session
        })
    }
}

/// Not all that a start has found are due at one time.
fn first_check() -> Instant {
    let now = Instant::now();
    now.checked_sub(SAFETY.saturating_sub(jittered(SAFETY).mul_f64(0.8)))
        .unwrap_or(now)
}

fn key(meta: &kube::core::ObjectMeta) -> Key {
    (
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

fn bare(meta: &kube::core::ObjectMeta) -> Meta {
    PartialObjectMeta {
        types: None,
        metadata: kube::core::ObjectMeta {
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            uid: meta.uid.clone(),
            resource_version: meta.resource_version.clone(),
            ..Default::default()
        },
        _phantom: std::marker::PhantomData,
    }
}

/// Versions of one kind are numbers that grow; one that is not is older than all.
fn number(version: &str) -> u64 {
    version.parse().unwrap_or(0)
}

/// A session without the texts that are long and decide nothing.
fn compact(mut session: Box<AgenticSession>) -> Box<[u8]> {
    for text in [&mut session.spec.prompt, &mut session.spec.initial_prompt]
        .into_iter()
        .flatten()
    {
        CUT.clone_into(text);
    }
    if let Some(status) = &mut session.status {
        status.result = None;
    }
    // A struct of strings and numbers serialises; nothing is read back as unknown.
    serde_json::to_vec(&*session).unwrap_or_default().into_boxed_slice()
}
