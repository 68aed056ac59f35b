//! The ledger of places.

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
fn whether_one_may_have_a_place_is_known_where_a_namespace_was_read() {
    let mut ledger = ledger(vec![change("runs", 0, Place::Holds), change("old", 1, Place::Waits)]);
    assert!(ledger.may_hold(NS, "runs") && !ledger.may_hold(NS, "old") && !ledger.may_hold(NS, "other"));
    assert!(!ledger.may_hold("painters", "runs"), "nobody asked for a bound there");
    assert!(ledger.begin("painters"));
    assert!(ledger.may_hold("painters", "runs"));
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
