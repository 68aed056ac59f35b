//! Whose turn it is to be looked at: one namespace's sessions take most of the places, never all, however many or slow they are.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Of so many places one is left to other namespaces.
const LEFT: usize = 4;

/// Looks under way and sessions that wait for one, by namespace.
#[derive(Debug)]
pub struct Turns {
    /// Places that one namespace may take.
    share: usize,
    namespaces: Mutex<HashMap<String, Lane>>,
}

#[derive(Debug, Default)]
struct Lane {
    busy: usize,
    waiting: VecDeque<String>,
    /// The same, to be found.
    waits: HashSet<String>,
}

impl Lane {
    fn next(&mut self) -> Option<String> {
        let next = self.waiting.pop_front()?;
        self.waits.remove(&next);
        Some(next)
    }
}

impl Turns {
    /// Of `places` in all.
    pub fn new(places: usize) -> Self {
        Self {
            share: places.saturating_sub(places.div_ceil(LEFT)).max(1),
            namespaces: Mutex::default(),
        }
    }

    /// Begins a look, or has the session wait; then it is named by an end.
    pub fn begin(&self, namespace: &str, name: &str) -> bool {
        let mut namespaces = self.held();
        let lane = namespaces.entry(namespace.to_owned()).or_default();
        if lane.busy < self.share {
            lane.busy += 1;
            return true;
        }
        if lane.waits.insert(name.to_owned()) {
            lane.waiting.push_back(name.to_owned());
        }
        false
    }

    /// Ends a look; answers whose turn it is then.
    pub fn end(&self, namespace: &str) -> Option<String> {
        let mut namespaces = self.held();
        let lane = namespaces.get_mut(namespace)?;
        lane.busy = lane.busy.saturating_sub(1);
        let next = lane.next();
        Self::tidy(&mut namespaces, namespace);
        next
    }

    /// One that was named is gone; answers whose turn it is in its place.
    pub fn pass(&self, namespace: &str) -> Option<String> {
        let mut namespaces = self.held();
        let next = namespaces.get_mut(namespace)?.next();
        Self::tidy(&mut namespaces, namespace);
        next
    }

    fn tidy(namespaces: &mut HashMap<String, Lane>, namespace: &str) {
        let done = |lane: &Lane| lane.busy == 0 && lane.waiting.is_empty();
        if namespaces.get(namespace).is_some_and(done) {
            namespaces.remove(namespace);
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, Lane>> {
        // What is kept is whole after every line.
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_namespace_never_has_all_places() {
        for (places, share) in [(1, 1), (2, 1), (4, 3), (16, 12)] {
            let turns = Turns::new(places);
            let begun = (0..50).filter(|n| turns.begin("busy", &format!("s{n}"))).count();
            assert_eq!(begun, share, "of {places}");
            assert!(turns.begin("other", "s"));
        }
    }

    #[test]
    fn those_who_wait_are_named_once_and_in_their_order() {
        let turns = Turns::new(2);
        assert!(turns.begin("poets", "a"));
        for name in ["b", "c", "b", "d"] {
            assert!(!turns.begin("poets", name));
        }
        assert_eq!(turns.end("poets").as_deref(), Some("b"));
        assert!(turns.begin("poets", "b"));
        // It went meanwhile.
        assert_eq!(turns.end("poets").as_deref(), Some("c"));
        assert_eq!(turns.pass("poets").as_deref(), Some("d"));
        assert!(turns.begin("poets", "d"));
        assert_eq!(turns.end("poets"), None);
        assert!(turns.held().is_empty(), "nothing is kept of who is done");
    }

    #[test]
    fn a_lane_whose_last_was_named_and_is_gone_is_not_kept() {
        let turns = Turns::new(2);
        assert!(turns.begin("poets", "a") && !turns.begin("poets", "b"));
        assert_eq!(turns.end("poets").as_deref(), Some("b"));
        assert_eq!(turns.pass("poets"), None);
        assert!(turns.held().is_empty());
    }
}
