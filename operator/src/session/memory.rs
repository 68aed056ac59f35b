//! What the watches have told of sessions and their children, reduced to what decisions rest on.
//!
//! Memory says whether there is something to do; it may lag. So nothing is decided on it before it has our own writes, and what
//! takes away or ends is decided again on live reads.

mod few;
mod orphans;
mod remains;
mod told;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crds::{AgenticSession, Phase};
use tokio::{sync::watch, time::Instant};

use super::observed::{JobFor, OurJob, PodSeen};
use few::{Few, Named};

pub use orphans::Orphan;
pub use told::key;

/// A watch that is so far behind our own write is not waited for.
const BEHIND: Duration = Duration::from_secs(5);
/// How often a session that is not over is read live though no watch told of a change: watches may miss.
const SAFETY: Duration = Duration::from_mins(10);
/// Why something is silent is asked for after these, doubling.
const ASK: (Duration, Duration) = (Duration::from_secs(4), Duration::from_mins(5));
/// Namespace and name of a session.
pub type Key = (String, String);

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
    listing: [HashSet<Key>; 3],
    /// When the list of a kind was asked for.
    listing_since: [Option<Instant>; 3],
    /// What we wrote; of sessions that no watch has told of, too.
    own: HashMap<Key, Own>,
    remains: remains::Remains,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude each other")]
struct Kept {
    uid: String,
    version: u64,
    deleting: bool,
    phase: Phase,
    /// The result is not remembered: a status built on this would lose it.
    cut: bool,
    /// Seen to be made, and not looked at by anybody yet.
    born: Option<Instant>,
    /// We have made a Job for it.
    begun: bool,
    /// It was told that this version cannot be read.
    told: bool,
    /// Read live the last time.
    checked: Instant,
    /// How often it was asked why something of it is silent, and when the last time.
    asked: (u32, Option<Instant>),
    /// JSON: a tenth of what the parsed object takes.
    content: Result<Box<[u8]>, String>,
}

/// What we have written and no watch has shown yet.
#[derive(Debug)]
struct Own {
    /// UID of the session.
    uid: String,
    /// Version that it then had.
    version: u64,
    /// That was shown.
    shown: bool,
    /// Jobs that we made, and that were not shown.
    jobs: Vec<String>,
    since: Instant,
}

impl Own {
    fn is_shown(&self) -> bool {
        self.shown && self.jobs.is_empty()
    }
}

#[derive(Debug, Default)]
struct Children {
    jobs: Few<KeptJob>,
    pods: Few<KeptPod>,
    /// Names of pods that nothing controls and that are not done with.
    bare: Vec<String>,
}

impl Children {
    fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.pods.is_empty() && self.bare.is_empty()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct KeptJob {
    owner: Option<String>,
    job: OurJob,
}

#[derive(Debug, PartialEq, Eq)]
struct KeptPod {
    session_uid: String,
    what: JobFor,
    pod: PodSeen,
}

impl Named for KeptJob {
    fn name(&self) -> &str {
        &self.job.name
    }
}

impl Named for KeptPod {
    fn name(&self) -> &str {
        &self.pod.name
    }
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
    /// We have made a Job for it, whatever became of that.
    pub begun: bool,
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

    /// Whether the first lists are complete.
    pub fn is_listed(&self) -> bool {
        *self.listed.borrow() == 0b111
    }

    /// Namespaces with sessions, or with what is left of them.
    pub fn occupied(&self) -> HashSet<String> {
        let inner = self.locked();
        let mut occupied = HashSet::new();
        for (namespace, _) in inner.sessions.keys().chain(inner.children.keys()) {
            if !occupied.contains(namespace) {
                occupied.insert(namespace.clone());
            }
        }
        occupied
    }

    /// What is remembered of a session.
    pub fn look(&self, namespace: &str, name: &str) -> Look {
        if !self.is_listed() {
            return Look::Unknown;
        }
        let key = (namespace.to_owned(), name.to_owned());
        let mut inner = self.locked();
        let Inner {
            sessions,
            children,
            own,
            ..
        } = &mut *inner;
        let Some(kept) = sessions.get_mut(&key) else {
            return Look::Unknown;
        };
        if kept.deleting {
            return Look::Gone;
        }
        if let Some(own) = own.get(&key) {
            // Watches that stay behind are not waited for, and not believed either.
            return if own.since.elapsed() < BEHIND {
                Look::Behind
            } else {
                Look::Unknown
            };
        }
        let children = children.get(&key);
        if children.is_some_and(|children| !children.bare.is_empty()) {
            return Look::Unknown;
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
        let jobs = children.into_iter().flat_map(|c| c.jobs.iter());
        let pods = children.into_iter().flat_map(|c| c.pods.iter());
        Look::Known(Box::new(Known {
            cut: kept.cut,
            newborn: kept.born.is_some(),
            begun: kept.begun,
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

    /// Nothing of the session is silent any more: what comes next is asked about without delay.
    pub fn answered(&self, namespace: &str, name: &str) {
        if let Some(kept) = self.locked().sessions.get_mut(&(namespace.to_owned(), name.to_owned())) {
            kept.asked = (0, None);
        }
    }

    /// We wrote about the session of this UID, which has this version now, and made these Jobs: nothing is decided until the
    /// watches show both.
    pub fn wrote(&self, namespace: &str, name: &str, uid: &str, version: Option<&str>, mut jobs: Vec<String>) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut inner = self.locked();
        let Inner {
            sessions,
            children,
            own,
            ..
        } = &mut *inner;
        if let Some(kept) = sessions.get_mut(&key).filter(|kept| kept.uid == uid) {
            kept.begun |= !jobs.is_empty();
        }
        // Watches may be faster than the answer to a write.
        let told = |job: &String| children.get(&key)?.jobs.get(job)?.owner.as_deref();
        jobs.retain(|job| told(job) != Some(uid));
        let version = version.map_or(0, number);
        let shown = sessions.get(&key).is_some_and(|kept| kept.version >= version);
        let wrote = Own {
            uid: uid.to_owned(),
            version,
            shown,
            jobs,
            since: Instant::now(),
        };
        if wrote.is_shown() {
            own.remove(&key);
        } else {
            own.insert(key, wrote);
        }
    }

    /// We let go of a pod. Should older news of it be told yet, it is let go once more, which does nothing.
    pub fn released(&self, namespace: &str, name: &str, pod_uid: &str) {
        let mut inner = self.locked();
        let children = inner.children.get_mut(&(namespace.to_owned(), name.to_owned()));
        for pod in children.into_iter().flat_map(|children| children.pods.iter_mut()) {
            if pod.pod.uid == pod_uid {
                pod.pod.held = false;
            }
        }
    }

    /// How long ago a session was seen to be made, if nobody had done anything about it so far.
    pub fn age(&self, namespace: &str, name: &str) -> Option<Duration> {
        let inner = self.locked();
        let kept = inner.sessions.get(&(namespace.to_owned(), name.to_owned()))?;
        kept.born.map(|born| born.elapsed())
    }

    /// Whether a session was seen to be made, and has nothing yet.
    pub fn is_new(&self, key: &Key) -> bool {
        let inner = self.locked();
        let born = inner.sessions.get(key).is_some_and(|kept| kept.born.is_some());
        born && !inner.own.contains_key(key) && !inner.children.contains_key(key)
    }

    /// How many sessions are in each phase.
    pub fn phases(&self) -> BTreeMap<&'static str, i64> {
        let mut phases = BTreeMap::new();
        for kept in self.locked().sessions.values() {
            *phases.entry(kept.phase.as_str()).or_default() += 1;
        }
        phases
    }

    /// All sessions.
    pub fn keys(&self) -> Vec<Key> {
        self.locked().sessions.keys().cloned().collect()
    }

    /// Whether it was not told so far that this version of a session cannot be read; then it counts as told.
    pub fn is_untold(&self, namespace: &str, name: &str) -> bool {
        let mut inner = self.locked();
        let kept = inner.sessions.get_mut(&(namespace.to_owned(), name.to_owned()));
        kept.is_none_or(|kept| !std::mem::replace(&mut kept.told, true))
    }

    /// Whether the watch has told of a session that cannot be read.
    pub fn is_unreadable(&self, namespace: &str, name: &str) -> bool {
        let inner = self.locked();
        let kept = inner.sessions.get(&(namespace.to_owned(), name.to_owned()));
        kept.is_some_and(|kept| kept.content.is_err())
    }

    /// Names of the sessions of a namespace whose run is over.
    pub fn ended(&self, namespace: &str) -> Vec<String> {
        let inner = self.locked();
        let ended = inner.sessions.iter();
        let ended = ended.filter(|((of, _), kept)| of == namespace && kept.phase.is_terminal());
        ended.map(|((_, name), _)| name.clone()).collect()
    }

    /// Whether a session is known by its name.
    pub fn has(&self, namespace: &str, name: &str) -> bool {
        let key = (namespace.to_owned(), name.to_owned());
        self.locked().sessions.contains_key(&key)
    }

    /// UID of a session.
    pub fn uid(&self, namespace: &str, name: &str) -> Option<String> {
        let key = (namespace.to_owned(), name.to_owned());
        self.locked().sessions.get(&key).map(|kept| kept.uid.clone())
    }

    /// UID of a session that is not being deleted.
    pub fn uid_of_one_that_stays(&self, namespace: &str, name: &str) -> Option<String> {
        let key = (namespace.to_owned(), name.to_owned());
        let inner = self.locked();
        let kept = inner.sessions.get(&key).filter(|kept| !kept.deleting)?;
        Some(kept.uid.clone())
    }

    /// How much is kept, of whatever kind.
    #[cfg(test)]
    fn size(&self) -> usize {
        let Inner {
            sessions,
            children,
            listing,
            listing_since: _,
            own,
            remains: _,
        } = &*self.locked();
        sessions.len() + children.len() + own.len() + listing.iter().map(HashSet::len).sum::<usize>()
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        // Every change is whole: one that panicked elsewhere did no harm here.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Versions of one kind are numbers that grow; one that is not is older than all.
fn number(version: &str) -> u64 {
    version.parse().unwrap_or(0)
}
