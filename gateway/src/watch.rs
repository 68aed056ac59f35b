//! One watch on all sessions, and what it says of each, for streams and runners.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use futures::StreamExt as _;
use kube::{
    ResourceExt as _,
    api::DynamicObject,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::sync::watch;

use crate::{
    catalog::{Catalog, Entry, Wanted},
    sessions::{Sessions, Target, View},
};

/// What is known of a session now; `None`: it is deleted.
pub type Seen = Option<View>;

/// Deleted sessions remembered, for readers whose live read is older than what the watch says.
const REMEMBERED: usize = 256;
/// Seconds after which the watch is begun anew where it was: less than the API server may be silent for. Bookmarks make it cheap.
const WATCH: u32 = 60;

/// What is known of all sessions.
#[derive(Debug, Default)]
pub struct Watched {
    known: Mutex<Known>,
    synced: watch::Sender<bool>,
    catalog: Mutex<Catalog>,
}

#[derive(Debug, Default)]
struct Known {
    sessions: HashMap<Target, watch::Sender<Seen>>,
    deleted: VecDeque<String>,
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happens to a session from `view` (read live) on.
    pub fn follow(&self, target: &Target, view: View) -> watch::Receiver<Seen> {
        let mut known = self.lock();
        if known.deleted.contains(&view.uid) {
            return watch::channel(None).1;
        }
        let sender = known
            .sessions
            .entry(target.clone())
            .or_insert_with(|| watch::channel(None).0);
        update(sender, view);
        sender.subscribe()
    }

    /// What is known of a session now.
    pub fn view(&self, target: &Target) -> Seen {
        self.lock()
            .sessions
            .get(target)
            .and_then(|sender| sender.borrow().clone())
    }

    fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a session in lists as it is in this (live) answer.
    pub fn list(&self, object: &DynamicObject) {
        let target = Target::new(&object.namespace().unwrap_or_default(), &object.name_any());
        if let Some(target) = target {
            self.catalog().put(&target, object);
        }
    }

    /// No longer shows a session in lists.
    pub fn unlist(&self, target: &Target, uid: Option<&str>) {
        self.catalog().remove(target, uid);
    }

    /// The sessions of a project that are wanted, newest first.
    pub fn listed(&self, project: &str, wanted: &Wanted) -> Vec<Entry> {
        self.catalog().list(project, wanted)
    }

    /// The sessions that an API of another system created, newest first; of all projects when none is named.
    pub fn of_api(&self, project: Option<&str>, api: &str) -> Vec<Entry> {
        self.catalog().of_api(project, api)
    }

    /// Returns when all sessions have been seen since the start.
    pub async fn synced(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Whether all sessions have been seen since the start.
    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    fn apply(&self, object: &DynamicObject) -> Option<Target> {
        let target = Target::new(&object.namespace()?, &object.name_any())?;
        if !self.is_deleted(object) {
            self.catalog().put(&target, object);
        }
        self.follow(&target, View::from(object));
        Some(target)
    }

    fn is_deleted(&self, object: &DynamicObject) -> bool {
        self.lock().deleted.contains(&object.uid().unwrap_or_default())
    }

    fn delete(&self, target: &Target, uid: Option<&str>) {
        self.unlist(target, uid);
        let mut known = self.lock();
        if let Some(uid) = uid {
            known.deleted.truncate(REMEMBERED - 1);
            known.deleted.push_front(uid.to_owned());
        }
        // A late word of an earlier session of that name says nothing of this one.
        let same = |sender: &watch::Sender<Seen>| {
            let seen = sender.borrow();
            uid.is_none() || seen.as_ref().map(|view| view.uid.as_str()) == uid
        };
        if known.sessions.get(target).is_some_and(same)
            && let Some(sender) = known.sessions.remove(target)
        {
            sender.send_replace(None);
        }
    }

    fn known(&self) -> HashSet<Target> {
        self.lock().sessions.keys().cloned().collect()
    }

    /// Watches until dropped.
    pub async fn run(&self, sessions: &Sessions) {
        // Of what the list does not name, only that is gone which was known before the list was asked for.
        let mut unlisted = HashSet::new();
        let watching = watcher::Config::default().page_size(100).timeout(WATCH);
        let mut events = watcher(sessions.everywhere(), watching).default_backoff().boxed();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => unlisted = self.known(),
                Ok(watcher::Event::InitApply(object)) => {
                    if let Some(target) = self.apply(&object) {
                        unlisted.remove(&target);
                    }
                }
                Ok(watcher::Event::InitDone) => {
                    for target in unlisted.drain() {
                        self.delete(&target, None);
                    }
                    self.synced.send_replace(true);
                }
                Ok(watcher::Event::Apply(object)) => {
                    self.apply(&object);
                }
                Ok(watcher::Event::Delete(object)) => {
                    if let Some(target) = Target::new(&object.namespace().unwrap_or_default(), &object.name_any()) {
                        self.delete(&target, object.uid().as_deref());
                    }
                }
                Err(error) => tracing::warn!(%error, "watch of sessions interrupted"),
            }
        }
    }
}

fn update(sender: &watch::Sender<Seen>, view: View) {
    sender.send_if_modified(|seen| {
        // The watch may lag behind a live read.
        let newer = seen.as_ref().is_none_or(|seen| view.version > seen.version);
        if newer {
            *seen = Some(view);
        }
        newer
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(uid: &str, version: u64) -> View {
        View {
            uid: uid.to_owned(),
            version,
            ..View::default()
        }
    }

    #[test]
    fn an_older_view_does_not_replace_a_newer_one() {
        let (watched, target) = (Watched::default(), Target::new("team-a", "s").unwrap());
        let seen = watched.follow(&target, view("u1", 7));
        watched.follow(&target, view("u1", 6));
        assert_eq!(seen.borrow().as_ref().unwrap().version, 7);
    }

    #[test]
    fn a_live_read_that_is_older_than_the_deletion_does_not_bring_a_session_back() {
        let (watched, target) = (Watched::default(), Target::new("team-a", "s").unwrap());
        watched.delete(&target, Some("u1"));
        assert!(watched.follow(&target, view("u1", 7)).borrow().is_none());
        assert!(watched.follow(&target, view("u2", 9)).borrow().is_some());
    }

    #[test]
    fn the_end_of_an_earlier_session_of_that_name_is_not_the_end_of_this_one() {
        let (watched, target) = (Watched::default(), Target::new("team-a", "s").unwrap());
        let seen = watched.follow(&target, view("u2", 9));
        watched.delete(&target, Some("u1"));
        assert!(seen.borrow().is_some());
        watched.delete(&target, Some("u2"));
        assert!(seen.borrow().is_none());
    }
}
