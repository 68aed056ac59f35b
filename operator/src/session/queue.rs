//! Which sessions are looked at, and when: new ones first, then in the order in which something was heard of them, each by one look at a
//! time, and no namespace's sessions take all places, however many or slow they are.
//!
//! Not the queue of kube's controllers: that one takes those who wait in no order, and lets each wait for a tick of its clock first.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::memory::Key;

/// Of so many places one is left to other namespaces.
const LEFT: usize = 4;
/// After so many new sessions of a namespace comes one that is not, if one waits.
const NEW_IN_A_ROW: u8 = 4;

/// Sessions that are looked at, wait for it, or are due later.
#[derive(Debug)]
pub struct Queue {
    places: usize,
    /// Places that one namespace may take.
    share: usize,
    inner: Mutex<Inner>,
    /// Somebody waits now, a place is free, or somebody is due earlier than all others.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    known: HashMap<Arc<Key>, State>,
    later: BTreeSet<(Instant, Arc<Key>)>,
    lanes: HashMap<String, Lane>,
    /// Namespaces in which one waits that may be looked at, in turn.
    turns: VecDeque<String>,
    busy: usize,
    ready: usize,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// It waits, since then.
    Ready(Instant),
    /// It is due then.
    Later(Instant),
    /// It is looked at.
    Busy {
        /// Something was heard of it meanwhile.
        again: Option<Instant>,
        /// It went meanwhile.
        gone: bool,
    },
}

/// Those of one namespace.
#[derive(Debug, Default)]
struct Lane {
    busy: usize,
    /// Nobody has looked at these so far, and somebody waits for them to begin. Some may have gone, or been taken, since.
    new: VecDeque<Arc<Key>>,
    /// How many of those were taken in a row.
    new_in_a_row: u8,
    /// The others; the same holds.
    ready: VecDeque<Arc<Key>>,
    /// It is among those whose turn comes.
    in_turn: bool,
}

impl Lane {
    fn pop(&mut self) -> Option<Arc<Key>> {
        if self.new.is_empty() || (self.new_in_a_row >= NEW_IN_A_ROW && !self.ready.is_empty()) {
            self.new_in_a_row = 0;
            return self.ready.pop_front();
        }
        self.new_in_a_row = self.new_in_a_row.saturating_add(1);
        self.new.pop_front()
    }
}

/// A look under way. Its end, however it comes, gives the place to another.
#[derive(Debug)]
pub struct Turn {
    queue: Arc<Queue>,
    /// Namespace and name of the session.
    pub key: Arc<Key>,
    /// For how long it waited.
    pub waited: Duration,
    /// When to look again though nothing is heard.
    pub again: Option<Duration>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.queue.end(&self.key, self.again);
    }
}

impl Queue {
    /// With so many places.
    pub fn new(places: usize) -> Self {
        Self {
            places: places.max(1),
            share: places.saturating_sub(places.div_ceil(LEFT)).max(1),
            inner: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// A session is new: it is looked at before most of those of its namespace that are not.
    pub fn push_new(&self, key: Key) {
        self.add(key, true);
    }

    /// Something was heard of a session: it is looked at as soon as there is a place.
    pub fn push(&self, key: Key) {
        self.add(key, false);
    }

    fn add(&self, key: Key, new: bool) {
        let mut inner = self.held();
        let now = Instant::now();
        match inner.known.get_mut(&key) {
            Some(State::Ready(_)) => return,
            Some(State::Busy { again, .. }) => {
                again.get_or_insert(now);
                return;
            }
            Some(State::Later(at)) => {
                let at = *at;
                if let Some((key, _)) = inner.known.remove_entry(&key) {
                    inner.later.remove(&(at, key.clone()));
                    self.ready(&mut inner, key, now, new);
                }
            }
            None => self.ready(&mut inner, Arc::new(key), now, new),
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// A session is gone: it is not looked at again, unless something is heard of one of its name.
    pub fn forget(&self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut inner = self.held();
        match inner.known.get_mut(&key) {
            Some(State::Busy { again, gone }) => (*again, *gone) = (None, true),
            Some(State::Later(at)) => {
                let at = *at;
                if let Some((key, _)) = inner.known.remove_entry(&key) {
                    inner.later.remove(&(at, key));
                }
            }
            Some(State::Ready(_)) => {
                inner.known.remove(&key);
                inner.ready = inner.ready.saturating_sub(1);
            }
            None => {}
        }
    }

    /// The next to be looked at, once there is one and a place for it. For one caller at a time.
    pub async fn next(self: &Arc<Self>) -> Turn {
        loop {
            let changed = self.changed.notified();
            let (key, since) = match self.take(Instant::now()) {
                Ok(taken) => taken,
                Err(Some(due)) => {
                    // Either way it is asked again.
                    let _ = tokio::time::timeout_at(due, changed).await;
                    continue;
                }
                Err(None) => {
                    changed.await;
                    continue;
                }
            };
            return Turn {
                queue: self.clone(),
                key,
                waited: since.elapsed(),
                again: None,
            };
        }
    }

    /// How many wait.
    pub fn depth(&self) -> usize {
        self.held().ready
    }

    /// The next and since when it waits; else when the next is due.
    fn take(&self, now: Instant) -> Result<(Arc<Key>, Instant), Option<Instant>> {
        let mut inner = self.held();
        while inner.later.first().is_some_and(|(at, _)| *at <= now)
            && let Some((at, key)) = inner.later.pop_first()
        {
            self.ready(&mut inner, key, at, false);
        }
        let due = inner.later.first().map(|(at, _)| *at);
        if inner.busy >= self.places {
            return Err(due);
        }
        while let Some(namespace) = inner.turns.pop_front() {
            let Inner { lanes, known, .. } = &mut *inner;
            let Some(lane) = lanes.get_mut(&namespace) else {
                continue;
            };
            lane.in_turn = false;
            let taken = std::iter::from_fn(|| lane.pop()).find_map(|key| match known.get_mut(&key)? {
                State::Ready(since) => Some((key, *since)),
                State::Later(_) | State::Busy { .. } => None,
            });
            if let Some((key, _)) = &taken {
                lane.busy += 1;
                let busy = State::Busy {
                    again: None,
                    gone: false,
                };
                known.insert(key.clone(), busy);
            }
            self.settle(&mut inner, &namespace);
            if let Some(taken) = taken {
                inner.busy += 1;
                inner.ready = inner.ready.saturating_sub(1);
                return Ok(taken);
            }
        }
        Err(due)
    }

    fn end(&self, key: &Arc<Key>, after: Option<Duration>) {
        let mut inner = self.held();
        inner.busy = inner.busy.saturating_sub(1);
        if let Some(lane) = inner.lanes.get_mut(&key.0) {
            lane.busy = lane.busy.saturating_sub(1);
        }
        match inner.known.remove(key) {
            Some(State::Busy { again: Some(since), .. }) => self.ready(&mut inner, key.clone(), since, false),
            Some(State::Busy { gone: false, .. }) => {
                // What is due in a century is not due.
                if let Some(at) = after.and_then(|after| Instant::now().checked_add(after)) {
                    inner.later.insert((at, key.clone()));
                    inner.known.insert(key.clone(), State::Later(at));
                }
            }
            _ => {}
        }
        self.settle(&mut inner, &key.0);
        drop(inner);
        self.changed.notify_one();
    }

    fn ready(&self, inner: &mut Inner, key: Arc<Key>, since: Instant, new: bool) {
        let namespace = key.0.clone();
        inner.known.insert(key.clone(), State::Ready(since));
        let lane = inner.lanes.entry(namespace.clone()).or_default();
        if new { &mut lane.new } else { &mut lane.ready }.push_back(key);
        inner.ready += 1;
        self.settle(inner, &namespace);
    }

    /// Puts a namespace among those whose turn comes, or forgets it when nothing is left of it.
    fn settle(&self, inner: &mut Inner, namespace: &str) {
        let Some(lane) = inner.lanes.get_mut(namespace) else {
            return;
        };
        if lane.ready.is_empty() && lane.new.is_empty() {
            if lane.busy == 0 && !lane.in_turn {
                inner.lanes.remove(namespace);
            }
        } else if lane.busy < self.share && !lane.in_turn {
            lane.in_turn = true;
            inner.turns.push_back(namespace.to_owned());
        }
    }

    fn held(&self) -> MutexGuard<'_, Inner> {
        // What is kept is whole after every line.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
