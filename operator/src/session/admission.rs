//! Who may run now, where a namespace bounds how many sessions do: oldest first.
//!
//! Only sessions that could begin at once wait here: one that cannot (its backoff, its configuration, a name that is taken)
//! holds nobody up. What is kept is in memory; it is read anew once, when a namespace's bound is first asked for, and exact
//! from then on, because the holder of the lease alone begins attempts.

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NS: &str = "poets";

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn change(name: &str, second: i64, place: Place) -> Change {
        Change {
            name: name.to_owned(),
            created: at(second),
            place,
        }
    }

    fn ledger(found: Vec<Change>) -> Ledger {
        let mut ledger = Ledger::default();
        assert!(ledger.begin(NS));
        ledger.load(NS, found);
        ledger
    }

    #[test]
    fn the_oldest_comes_first_whoever_asks_first() {
        let mut ledger = ledger(vec![change("old", 1, Place::Waits), change("runs", 0, Place::Holds)]);
        assert_eq!(ledger.ask(NS, "young", at(9), 2), Answer::Wait(1));
        assert_eq!(ledger.ask(NS, "old", at(1), 2), Answer::Admitted);
        assert_eq!(ledger.ask(NS, "young", at(9), 2), Answer::Wait(0));
        assert!(ledger.change(NS, change("runs", 0, Place::None)));
        assert_eq!(ledger.next(NS, 2), ["young"]);
        assert_eq!(ledger.ask(NS, "young", at(9), 2), Answer::Admitted);
    }

    #[test]
    fn one_that_cannot_begin_holds_nobody_up() {
        let mut ledger = ledger(vec![change("old", 1, Place::Waits), change("young", 2, Place::Waits)]);
        assert_eq!(ledger.ask(NS, "young", at(2), 1), Answer::Wait(1));
        assert!(
            ledger.change(NS, change("old", 1, Place::Refused)),
            "those behind it are asked"
        );
        assert_eq!(ledger.ask(NS, "young", at(2), 1), Answer::Admitted);
        assert_eq!(ledger.refused(NS), ["old"], "a change of the settings may concern it");
    }

    #[test]
    fn what_changes_while_a_namespace_is_read_counts() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.ask(NS, "a", at(1), 1), Answer::Unknown);
        assert!(ledger.begin(NS) && !ledger.begin(NS));
        ledger.change(NS, change("b", 2, Place::Holds));
        assert_eq!(ledger.ask(NS, "a", at(1), 1), Answer::Unknown);
        ledger.load(NS, vec![change("b", 2, Place::Waits)]);
        assert_eq!(ledger.ask(NS, "a", at(1), 1), Answer::Wait(0));
    }

    #[test]
    fn a_namespace_whose_reader_is_gone_is_read_by_the_next_who_asks() {
        let mut ledger = Ledger::default();
        assert!(ledger.begin(NS));
        ledger.give_up(NS);
        assert_eq!(ledger.ask(NS, "a", at(1), 1), Answer::Unknown);
        assert!(ledger.begin(NS));
        ledger.load(NS, vec![change("b", 2, Place::Holds)]);
        ledger.give_up(NS);
        assert_eq!(ledger.ask(NS, "a", at(1), 1), Answer::Wait(0), "what is known stays so");
    }

    #[test]
    fn one_that_went_unseen_gives_its_place_back() {
        let mut ledger = ledger(vec![change("gone", 1, Place::Holds)]);
        assert_eq!(ledger.ask(NS, "a", at(2), 1), Answer::Wait(0));
        assert!(!ledger.keep(NS, |_| true), "both are there");
        assert!(ledger.keep(NS, |name| name != "gone"));
        assert_eq!(ledger.ask(NS, "a", at(2), 1), Answer::Admitted);
    }

    #[test]
    fn a_namespace_without_sessions_is_forgotten_and_one_that_is_read_is_not() {
        let mut ledger = ledger(vec![change("runs", 1, Place::Holds)]);
        assert!(ledger.begin("musicians"));
        ledger.keep_namespaces(&HashSet::from([NS.to_owned()]));
        assert_eq!(ledger.ask(NS, "next", at(2), 1), Answer::Wait(0));
        ledger.keep_namespaces(&HashSet::new());
        assert_eq!(ledger.ask(NS, "next", at(2), 1), Answer::Unknown);
        assert!(!ledger.begin("musicians"), "somebody reads it");
    }

    #[test]
    fn an_agent_that_outlives_its_session_has_its_place_until_it_is_over() {
        let mut ledger = ledger(vec![change("deleted", 1, Place::Holds)]);
        assert!(!ledger.remains(NS, 1), "that frees no place");
        assert!(!ledger.remains(NS, 1), "nor does the same again");
        ledger.change(NS, change("deleted", 1, Place::None));
        assert_eq!(ledger.ask(NS, "next", at(2), 1), Answer::Wait(0));
        assert_eq!(
            (ledger.next(NS, 1), ledger.later(NS, 1)),
            (vec![], vec!["next".to_owned()])
        );
        assert_eq!(ledger.next(NS, 2), ["next"], "where there are more places");
        assert!(ledger.remains(NS, 0));
        assert_eq!(ledger.ask(NS, "next", at(2), 1), Answer::Admitted);
    }

    #[test]
    fn when_there_are_more_places_those_come_first_whose_turn_it_is() {
        let waits = |n: i64| change(&format!("s-{n}"), n, Place::Waits);
        let ledger = ledger(vec![waits(3), waits(1), change("runs", 0, Place::Holds), waits(2)]);
        assert_eq!(ledger.next(NS, 3), ["s-1", "s-2"]);
        assert_eq!(ledger.later(NS, 3), ["s-3"]);
        assert_eq!(ledger.later(NS, usize::MAX), [""; 0]);
    }

    #[test]
    fn far_behind_the_place_is_round() {
        assert!(message(0, 3).contains("3 places") && message(0, 3).contains("number 1 in the queue"));
        assert!(message(9, 3).contains("number 10 in the queue"));
        assert!(message(10, 3).contains("about 10 sessions"));
        assert!(message(14_999, 3).contains("about 10000 sessions"));
        assert_eq!(
            message(14_999, 3),
            message(10_000, 700),
            "not written anew when the places change"
        );
    }

    proptest! {
        #[test]
        fn the_place_of_one_is_how_many_are_older(
            loaded in prop::collection::hash_map(0_i64..9, 0_i64..5, 0..9),
            steps in prop::collection::vec((0_i64..9, 0_i64..5, 0_u8..4), 0..60),
        ) {
            let name = |n: i64| format!("s-{n}");
            let mut ledger = ledger(loaded.iter().map(|(n, at)| change(&name(*n), *at, Place::Waits)).collect());
            let mut waiting: std::collections::BTreeMap<String, i64> = loaded.iter().map(|(n, at)| (name(*n), *at)).collect();
            for (session, second, what) in steps {
                let name = name(session);
                match what {
                    0 => { waiting.remove(&name); ledger.change(NS, change(&name, second, Place::None)); }
                    1 => { waiting.remove(&name); ledger.stumble(NS, &name); }
                    // It may be another of that name, created at another time.
                    2 => { waiting.insert(name.clone(), second); ledger.change(NS, change(&name, second, Place::Waits)); }
                    _ => {
                        waiting.insert(name.clone(), second);
                        let before = waiting.iter().filter(|(other, at)| (**at, &***other) < (second, &*name)).count();
                        prop_assert_eq!(ledger.ask(NS, &name, at(second), 0), Answer::Wait(before));
                    }
                }
                let mut expected: Vec<_> = waiting.iter().map(|(name, at)| (*at, name.clone())).collect();
                expected.sort();
                let expected: Vec<_> = expected.into_iter().map(|(_, name)| name).collect();
                prop_assert_eq!(ledger.later(NS, 0), expected);
            }
        }

        #[test]
        fn never_more_hold_a_place_than_there_are(limit in 0_usize..4, steps in prop::collection::vec((0_i64..8, 0_u8..4), 0..60)) {
            let mut ledger = ledger(vec![]);
            let mut holders = HashSet::new();
            for (session, what) in steps {
                let name = format!("s-{session}");
                match what {
                    0 | 1 => if ledger.ask(NS, &name, at(session), limit) == Answer::Admitted {
                        holders.insert(name);
                    },
                    2 => { ledger.change(NS, change(&name, session, Place::None)); holders.remove(&name); }
                    _ => { ledger.change(NS, change(&name, session, Place::Refused)); holders.remove(&name); }
                }
                prop_assert!(holders.len() <= limit);
            }
            // Whoever still waits is let in when it is asked in the order that is given.
            while let Some(next) = ledger.next(NS, limit).first().cloned().filter(|_| holders.len() < limit) {
                let second: i64 = next[2..].parse().unwrap();
                prop_assert_eq!(ledger.ask(NS, &next, at(second), limit), Answer::Admitted);
                holders.insert(next);
            }
        }
    }
}
