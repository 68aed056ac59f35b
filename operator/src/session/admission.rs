//! Who may run now, where a namespace bounds how many sessions do: oldest first.
//!
//! Only sessions that could begin at once wait here: one that cannot (its backoff, its configuration, a name that is taken)
//! holds nobody up. What is kept is in memory; it is read anew once, when a namespace's bound is first asked for, and exact
//! from then on, because the holder of the lease alone begins attempts.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use jiff::Timestamp;

/// Waiting sessions up to here are told their exact place, and again when it changes.
pub const EXACT: usize = 10;

/// What a session is to the places of its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It has one.
    Holds,
    /// It could begin at once, had it one.
    Waits,
    /// It waits for its admin.
    Refused,
    /// It needs none.
    None,
}

/// What a session is told that asks for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has one from now on.
    Admitted,
    /// So many are before it.
    Wait(usize),
    /// The namespace must be read first.
    Unknown,
}

/// A change of a session's place.
#[derive(Clone, Debug)]
pub struct Change {
    /// Its name.
    pub name: String,
    /// When it was created.
    pub created: Timestamp,
    /// What it is now.
    pub place: Place,
}

/// The places of all namespaces.
#[derive(Debug, Default)]
pub struct Ledger {
    namespaces: HashMap<String, Namespace>,
    /// Those that wait for their admin, also where no bound is asked for.
    refused: BTreeSet<(String, String)>,
    /// Attempts of sessions that are gone, which have their places until they are over.
    remains: HashMap<String, usize>,
}

#[derive(Debug)]
enum Namespace {
    /// It is being read; what changes meanwhile counts after what was read.
    Loading(Vec<Change>),
    Known(Queue),
}

#[derive(Debug, Default)]
struct Queue {
    holders: HashSet<String>,
    /// Oldest first. The place of one is found by halving; they come at the end and go at the front, where that costs nothing.
    waiting: VecDeque<(Timestamp, String)>,
    /// When those who wait were created.
    created: HashMap<String, Timestamp>,
}

impl Ledger {
    /// Asks for a place among `limit`.
    pub fn ask(&mut self, namespace: &str, name: &str, created: Timestamp, limit: usize) -> Answer {
        let limit = self.left_of(namespace, limit);
        let Some(Namespace::Known(queue)) = self.namespaces.get_mut(namespace) else {
            return Answer::Unknown;
        };
        if queue.holders.contains(name) {
            return Answer::Admitted;
        }
        let before = queue.enter(name, created);
        if queue.holders.len().saturating_add(before) < limit {
            queue.leave(name);
            queue.holders.insert(name.to_owned());
            Answer::Admitted
        } else {
            Answer::Wait(before)
        }
    }

    /// Begins to read a namespace; `false` when somebody else does, or it is known.
    pub fn begin(&mut self, namespace: &str) -> bool {
        if self.namespaces.contains_key(namespace) {
            return false;
        }
        let loading = Namespace::Loading(Vec::new());
        self.namespaces.insert(namespace.to_owned(), loading);
        true
    }

    /// Nobody reads it any more: the next who asks does, unless it is known.
    pub fn give_up(&mut self, namespace: &str) {
        if matches!(self.namespaces.get(namespace), Some(Namespace::Loading(_))) {
            self.namespaces.remove(namespace);
        }
    }

    /// What was read of a namespace.
    pub fn load(&mut self, namespace: &str, found: impl IntoIterator<Item = Change>) {
        let mut queue = Queue::default();
        // All at once: one by one each would make room for itself among the others.
        let (waiting, others): (Vec<_>, Vec<_>) = found.into_iter().partition(|change| change.place == Place::Waits);
        for change in others {
            queue.change(change);
        }
        let mut waiting: Vec<_> = waiting
            .into_iter()
            .map(|change| (change.created, change.name))
            .collect();
        waiting.sort_unstable();
        queue.created = waiting.iter().map(|(created, name)| (name.clone(), *created)).collect();
        queue.waiting = waiting.into();
        if let Some(Namespace::Loading(later)) = self.namespaces.remove(namespace) {
            for change in later {
                queue.change(change);
            }
        }
        self.namespaces.insert(namespace.to_owned(), Namespace::Known(queue));
    }

    /// A session's place is another now; `true` when that may concern those who wait.
    pub fn change(&mut self, namespace: &str, change: Change) -> bool {
        let key = (namespace.to_owned(), change.name.clone());
        if change.place == Place::Refused {
            self.refused.insert(key);
        } else {
            self.refused.remove(&key);
        }
        match self.namespaces.get_mut(namespace) {
            // Nobody asked for a bound there.
            None => false,
            Some(Namespace::Loading(later)) => {
                later.push(change);
                false
            }
            Some(Namespace::Known(queue)) => queue.change(change),
        }
    }

    /// One that failed to be looked at holds nobody up; a place that it has it keeps, since it may have begun.
    pub fn stumble(&mut self, namespace: &str, name: &str) -> bool {
        let Some(Namespace::Known(queue)) = self.namespaces.get_mut(namespace) else {
            return false;
        };
        queue.leave(name)
    }

    /// Whether one may have a place that others could have.
    pub fn may_hold(&self, namespace: &str, name: &str) -> bool {
        match self.namespaces.get(namespace) {
            None => false,
            Some(Namespace::Loading(_)) => true,
            Some(Namespace::Known(queue)) => queue.holders.contains(name),
        }
    }

    /// Forgets all but these namespaces. One that is asked about again is read anew.
    pub fn keep_namespaces(&mut self, occupied: &HashSet<String>) {
        self.namespaces
            .retain(|namespace, known| occupied.contains(namespace) || matches!(known, Namespace::Loading(_)));
    }

    /// So many attempts are left of sessions that are gone; `true` when they were more.
    pub fn remains(&mut self, namespace: &str, count: usize) -> bool {
        let before = if count == 0 {
            self.remains.remove(namespace)
        } else {
            self.remains.insert(namespace.to_owned(), count)
        };
        before.is_some_and(|before| before > count)
    }

    /// Of so many places, those that sessions can have.
    fn left_of(&self, namespace: &str, limit: usize) -> usize {
        limit.saturating_sub(self.remains.get(namespace).copied().unwrap_or(0))
    }

    /// Those whose turn it is.
    pub fn next(&self, namespace: &str, limit: usize) -> Vec<String> {
        let Some(Namespace::Known(queue)) = self.namespaces.get(namespace) else {
            return Vec::new();
        };
        let free = self.left_of(namespace, limit).saturating_sub(queue.holders.len());
        queue.waiting.iter().take(free).map(|(_, name)| name.clone()).collect()
    }

    /// The first of those whose turn it is.
    pub fn first(&self, namespace: &str, limit: usize) -> Option<String> {
        let Some(Namespace::Known(queue)) = self.namespaces.get(namespace) else {
            return None;
        };
        let is_free = queue.holders.len() < self.left_of(namespace, limit);
        queue.waiting.front().filter(|_| is_free).map(|(_, name)| name.clone())
    }

    /// Those who wait for their admin.
    pub fn refused(&self, namespace: &str) -> Vec<String> {
        let refused = self.refused.iter().filter(|(of, _)| of == namespace);
        refused.map(|(_, name)| name.clone()).collect()
    }

    /// Namespaces in which some wait for their admin.
    pub fn refusing(&self) -> impl Iterator<Item = String> {
        self.refused.iter().map(|(namespace, _)| namespace.clone())
    }

    /// Those who wait and whose turn it is not.
    pub fn later(&self, namespace: &str, limit: usize) -> Vec<String> {
        let Some(Namespace::Known(queue)) = self.namespaces.get(namespace) else {
            return Vec::new();
        };
        let free = self.left_of(namespace, limit).saturating_sub(queue.holders.len());
        queue.waiting.iter().skip(free).map(|(_, name)| name.clone()).collect()
    }

    /// Forgets those who are gone though nobody said so; `true` when there were any.
    pub fn keep(&mut self, namespace: &str, exists: impl Fn(&str) -> bool) -> bool {
        let Some(Namespace::Known(queue)) = self.namespaces.get_mut(namespace) else {
            return false;
        };
        let before = queue.holders.len() + queue.waiting.len();
        queue.holders.retain(|name| exists(name));
        queue.waiting.retain(|(_, name)| exists(name));
        queue.created.retain(|name, _| exists(name));
        before != queue.holders.len() + queue.waiting.len()
    }
}

impl Queue {
    /// Lets one wait; answers how many are before it.
    fn enter(&mut self, name: &str, created: Timestamp) -> usize {
        // One of this name that was created earlier may have gone unnoticed.
        if self.created.get(name).is_some_and(|before| *before != created) {
            self.leave(name);
        }
        self.place(name, created).unwrap_or_else(|place| {
            self.waiting.insert(place, (created, name.to_owned()));
            self.created.insert(name.to_owned(), created);
            place
        })
    }

    /// Answers whether it waited.
    fn leave(&mut self, name: &str) -> bool {
        let created = self.created.remove(name);
        let place = created.and_then(|created| self.place(name, created).ok());
        place.is_some_and(|place| self.waiting.remove(place).is_some())
    }

    fn place(&self, name: &str, created: Timestamp) -> Result<usize, usize> {
        self.waiting
            .binary_search_by(|(at, other)| at.cmp(&created).then_with(|| (**other).cmp(name)))
    }

    fn change(&mut self, Change { name, created, place }: Change) -> bool {
        let held = self.holders.remove(&name);
        if place == Place::Waits {
            self.enter(&name, created);
            return held;
        }
        let waited = self.leave(&name);
        if place == Place::Holds {
            self.holders.insert(name);
            return waited;
        }
        held || waited
    }
}

/// What a waiting session is told. How many places there are is told to those alone who are soon told anew.
pub fn message(before: usize, limit: usize) -> String {
    let (places, place) = if before < EXACT {
        (
            format!("{limit} places"),
            format!("it is number {} in the queue", before + 1),
        )
    } else {
        (
            "places".to_owned(),
            format!("about {} sessions are before it", rounded(before)),
        )
    };
    format!(
        "Waits for one of the {places} that the ProjectSettings give this namespace (maxConcurrentSessions): {place}."
    )
}

/// To one digit: the message of a session far behind need not be written at every step.
fn rounded(count: usize) -> usize {
    let digit = std::iter::successors(Some(1_usize), |d| d.checked_mul(10)).take_while(|d| *d <= count);
    let digit = digit.last().unwrap_or(1);
    count / digit * digit
}
