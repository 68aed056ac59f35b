//! What the watches tell, and what of it is kept.

use std::collections::{BTreeMap, HashSet};

use crds::AgenticSession;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{Resource, ResourceExt as _, runtime::watcher::Event};
use protocol::names::label;
use tokio::time::Instant;

use super::{Children, Inner, Kept, KeptJob, KeptPod, Key, Kind, Memory, SAFETY, number};
use crate::{
    backoff::jittered,
    session::{
        lean::{self, Lean},
        observed::{LONGEST_START_REQUEST, OurJob, bare_pod_of, pod_of},
    },
};

impl Memory {
    /// Remembers a session; answers it, if it is to be looked at.
    pub fn session_event(&self, event: Event<lean::Session>) -> Option<Key> {
        let mut inner = self.locked();
        match event {
            Event::Init => {
                inner.begin_list(Kind::Sessions);
                None
            }
            Event::InitApply(session) => {
                inner.listing[Kind::Sessions as usize].insert(key(&session.metadata));
                Some(inner.see_session(session, false))
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut inner.listing[Kind::Sessions as usize]);
                inner.sessions.retain(|key, _| listed.contains(key));
                inner.recount_all();
                inner.listed_since_own(Kind::Sessions);
                drop(inner);
                self.listed.send_modify(|kinds| *kinds |= 1 << Kind::Sessions as u8);
                None
            }
            Event::Apply(session) => Some(inner.see_session(session, true)),
            Event::Delete(session) => {
                let key = key(&session.metadata);
                inner.sessions.remove(&key);
                if inner.own.get(&key).map(|own| &own.uid) == session.metadata.uid.as_ref() {
                    inner.own.remove(&key);
                }
                inner.recount(&key);
                None
            }
        }
    }

    /// Remembers a Job; answers the sessions that it concerns.
    pub fn job_event(&self, event: Event<Lean<Job>>) -> Vec<Key> {
        self.child_event(Kind::Jobs, event, |children, job, there| {
            if !there {
                return children.jobs.remove(&job.name_any());
            }
            children.jobs.put(KeptJob {
                owner: controller(&job.metadata).map(str::to_owned),
                job: OurJob::from(job),
            })
        })
    }

    /// Remembers a pod; answers the sessions that it concerns.
    pub fn pod_event(&self, event: Event<Lean<Pod>>) -> Vec<Key> {
        self.child_event(Kind::Pods, event, |children, pod, there| {
            let session = pod.labels().get(label::SESSION).cloned().unwrap_or_default();
            let session_uid = pod.labels().get(label::SESSION_UID).cloned().unwrap_or_default();
            let name = pod.name_any();
            children.bare.retain(|bare| *bare != name);
            let bare = bare_pod_of(pod, &session).filter(|_| there);
            if bare.is_some_and(|pod| pod.held || !pod.is_over()) {
                children.bare.push(name);
            }
            match pod_of(pod, &session).filter(|_| there) {
                // One whose Job was taken away may be the session's still, which is decided on live reads: whatever it goes through counts.
                None => children.pods.remove(&pod.name_any()) || (there && controller(&pod.metadata).is_none()),
                Some((what, pod)) => children.pods.put(KeptPod { session_uid, what, pod }),
            }
        })
    }

    /// Most of what a Job or pod goes through is nothing that decisions rest on: it concerns nobody.
    fn child_event<K: Resource>(
        &self,
        kind: Kind,
        event: Event<Lean<K>>,
        keep: impl Fn(&mut Children, &K, bool) -> bool,
    ) -> Vec<Key> {
        let mut inner = self.locked();
        let (object, there) = match event {
            Event::Init => {
                inner.begin_list(kind);
                return Vec::new();
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut inner.listing[kind as usize]);
                let vanished = inner.forget_unlisted(kind, &listed);
                inner.listed_since_own(kind);
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
        let name = meta.name.clone().unwrap_or_default();
        let key = (namespace, session);
        let children = inner.children.entry(key.clone()).or_default();
        let new = keep(children, &object, there);
        if children.is_empty() {
            inner.children.remove(&key);
        }
        if new {
            inner.recount(&key);
        }
        let shown = matches!(kind, Kind::Jobs) && inner.job_shown(&key, &name, controller(meta));
        if new || shown {
            inner.present(key).into_iter().collect()
        } else {
            Vec::new()
        }
    }
}

impl Inner {
    fn begin_list(&mut self, kind: Kind) {
        self.listing[kind as usize].clear();
        self.listing_since[kind as usize] = Some(Instant::now());
    }

    /// A list that was asked for after a write of ours shows it, whatever became of it since.
    fn listed_since_own(&mut self, kind: Kind) {
        let Some(since) = self.listing_since[kind as usize].take() else {
            return;
        };
        let sessions = &self.sessions;
        self.own.retain(|key, own| {
            if own.since >= since {
                return true;
            }
            match kind {
                Kind::Sessions => own.shown = true,
                Kind::Jobs => own.jobs.clear(),
                Kind::Pods => {}
            }
            !own.is_shown() && (!own.shown || sessions.contains_key(key))
        });
    }

    /// The watch shows a session: what we wrote before, and nothing of what we wrote about one of its name that is gone.
    fn own_shown(&mut self, key: &Key, uid: &str, version: u64) {
        if let Some(own) = self.own.get_mut(key).filter(|own| own.version <= version) {
            own.shown = true;
            if own.is_shown() || own.uid != uid {
                self.own.remove(key);
            }
        }
    }

    /// The watch shows a Job: of a namesake's of that name nothing follows. Answers whether it was waited for.
    fn job_shown(&mut self, key: &Key, name: &str, owner: Option<&str>) -> bool {
        let Some(own) = self.own.get_mut(key).filter(|own| owner == Some(&own.uid)) else {
            return false;
        };
        let before = own.jobs.len();
        own.jobs.retain(|job| job != name);
        let waited_for = own.jobs.len() < before;
        if own.is_shown() {
            self.own.remove(key);
        }
        waited_for
    }

    fn see_session(&mut self, session: lean::Session, live: bool) -> Key {
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
            begun: before.as_ref().is_some_and(|before| before.begun),
            told: before
                .as_ref()
                .is_some_and(|before| before.told && before.version == version),
            checked: before.as_ref().map_or_else(first_check, |before| before.checked),
            asked: before.as_ref().map_or((0, None), |before| before.asked),
            content: session.content.map(compact),
        };
        self.sessions.insert(key.clone(), kept);
        let uid = session.metadata.uid.unwrap_or_default();
        self.own_shown(&key, &uid, version);
        self.recount(&key);
        key
    }

    /// What was deleted while nobody watched.
    fn forget_unlisted(&mut self, kind: Kind, listed: &HashSet<Key>) -> Vec<Key> {
        let mut concerned = Vec::new();
        self.children.retain(|(namespace, session), children| {
            let count = |children: &Children| children.jobs.len() + children.pods.len() + children.bare.len();
            let before = count(children);
            let there = |name: &str| listed.contains(&(namespace.clone(), name.to_owned()));
            match kind {
                Kind::Jobs => children.jobs.retain(there),
                Kind::Pods => {
                    children.pods.retain(there);
                    children.bare.retain(|name| there(name));
                }
                Kind::Sessions => {}
            }
            let after = count(children);
            if after < before {
                concerned.push((namespace.clone(), session.clone()));
            }
            after > 0
        });
        for key in &concerned {
            self.recount(key);
        }
        concerned.into_iter().filter_map(|key| self.present(key)).collect()
    }

    /// A session that is there: of one that is not, nothing is to be looked at.
    fn present(&self, key: Key) -> Option<Key> {
        self.sessions.contains_key(&key).then_some(key)
    }
}

/// Not all that a start has found are due at one time.
fn first_check() -> Instant {
    let now = Instant::now();
    now.checked_sub(SAFETY.saturating_sub(jittered(SAFETY).mul_f64(0.8)))
        .unwrap_or(now)
}

/// UID of what controls an object.
fn controller(meta: &kube::core::ObjectMeta) -> Option<&str> {
    let owners = meta.owner_references.iter().flatten();
    owners
        .filter(|owner| owner.controller == Some(true))
        .map(|owner| &*owner.uid)
        .next()
}

/// Namespace and name of an object.
pub fn key(meta: &kube::core::ObjectMeta) -> Key {
    (
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

/// What is kept of a session.
fn compact(mut session: Box<AgenticSession>) -> Box<[u8]> {
    if let Some(status) = &mut session.status {
        status.result = None;
    }
    for value in session.metadata.annotations.iter_mut().flat_map(BTreeMap::values_mut) {
        // As much of it as counts.
        *value = value.chars().take(LONGEST_START_REQUEST).collect();
    }
    // A struct of strings and numbers serialises; nothing is read back as unknown.
    serde_json::to_vec(&*session).unwrap_or_default().into_boxed_slice()
}

/// What a watch says about an object; tests tell it as they please.
#[cfg(test)]
#[derive(Clone, Copy)]
pub enum Told {
    Apply,
    Delete,
    Init,
    InitApply,
    InitDone,
}

#[cfg(test)]
impl Told {
    /// The event about an object; lists begin and end without one.
    pub fn about<K>(self, object: Option<K>) -> Event<K> {
        match (self, object) {
            (Self::Apply, Some(object)) => Event::Apply(object),
            (Self::Delete, Some(object)) => Event::Delete(object),
            (Self::InitApply, Some(object)) => Event::InitApply(object),
            (Self::InitDone, None) => Event::InitDone,
            _ => Event::Init,
        }
    }
}
