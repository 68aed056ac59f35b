//! What is left of sessions that are gone: an agent that is told to stop has its grace, and its place until it is over.

use std::collections::{HashMap, HashSet};

use super::{Children, Inner, Key, Memory};
use crate::session::observed::JobFor;

/// Attempts that outlive their session.
#[derive(Debug, Default)]
pub(super) struct Remains {
    /// How many, where there are some.
    of: HashMap<Key, usize>,
    /// Namespaces in which that is another number now.
    changed: HashSet<String>,
}

impl Memory {
    /// Namespaces in which more or fewer attempts are left of sessions that are gone since this was asked the last time, and how many.
    pub fn remains(&self) -> Vec<(String, usize)> {
        // Until all is listed, the session of any may be there.
        if !self.is_listed() {
            return Vec::new();
        }
        let mut inner = self.locked();
        let Remains { of, changed } = &mut inner.remains;
        let left = |namespace: &str| {
            let here = of.iter().filter(|((of, _), _)| of == namespace);
            here.map(|(_, count)| count).sum()
        };
        changed
            .drain()
            .map(|namespace| {
                let count = left(&namespace);
                (namespace, count)
            })
            .collect()
    }
}

impl Inner {
    /// Counts what is left of the sessions of a name that are gone.
    pub(super) fn recount(&mut self, key: &Key) {
        let session = self.sessions.get(key).filter(|kept| !kept.deleting);
        let uid = session.map(|kept| &*kept.uid);
        let left = self.children.get(key).map_or(0, |children| children.left(&key.1, uid));
        let known = self.remains.of.get(key).copied().unwrap_or(0);
        if left == known {
            return;
        }
        self.remains.changed.insert(key.0.clone());
        if left == 0 {
            self.remains.of.remove(key);
        } else {
            self.remains.of.insert(key.clone(), left);
        }
    }

    /// The same of all.
    pub(super) fn recount_all(&mut self) {
        let keys: Vec<_> = self.children.keys().chain(self.remains.of.keys()).cloned().collect();
        for key in keys {
            self.recount(&key);
        }
    }
}

impl Children {
    /// Attempts that may work, of others than the session that is there.
    fn left(&self, session: &str, uid: Option<&str>) -> usize {
        let is_attempt = |job: &str| matches!(JobFor::of(job, session), Some(JobFor::Attempt(_)));
        // One that a session which is there has lost may be its own.
        let jobs = self
            .jobs
            .iter()
            .filter(|kept| uid.is_none() || kept.owner.as_deref().is_some_and(|owner| Some(owner) != uid))
            .filter(|kept| !kept.job.finished && !kept.job.suspended && is_attempt(&kept.job.name));
        let pods = self
            .pods
            .iter()
            .filter(|kept| Some(&*kept.session_uid) != uid && !kept.pod.is_over())
            .filter(|kept| matches!(kept.what, JobFor::Attempt(_)));
        let jobs = jobs.map(|kept| &*kept.job.uid);
        let places: HashSet<&str> = jobs.chain(pods.map(|kept| &*kept.pod.job_uid)).collect();
        places.len()
    }
}
