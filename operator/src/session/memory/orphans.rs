//! Jobs whose session is gone.

use super::Memory;
use crate::session::observed::JobFor;

/// A Job that a session's name is on, and no session that is there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Orphan {
    /// Where.
    pub namespace: String,
    /// Name of the session.
    pub session: String,
    /// Name of the Job.
    pub job: String,
    /// Its UID.
    pub uid: String,
}

impl Memory {
    /// Jobs that no session of theirs is there for, or one that is being deleted. Whose they are, their labels say.
    pub fn orphans(&self) -> Vec<Orphan> {
        if !self.is_listed() {
            return Vec::new();
        }
        let inner = self.locked();
        let mut orphans = Vec::new();
        for (key, children) in &inner.children {
            let session = inner.sessions.get(key).filter(|kept| !kept.deleting);
            let uid = session.map(|kept| &*kept.uid);
            let (namespace, session) = key;
            let left = children
                .jobs
                .iter()
                .filter(|kept| !kept.job.deleting && (uid.is_none() || kept.owner.as_deref() != uid));
            let left = left.filter(|kept| JobFor::of(&kept.job.name, session).is_some());
            orphans.extend(left.map(|kept| Orphan {
                namespace: namespace.clone(),
                session: session.clone(),
                job: kept.job.name.clone(),
                uid: kept.job.uid.clone(),
            }));
        }
        orphans
    }
}
