//! Who is looked at, and when.

use futures::FutureExt as _;
use proptest::prelude::*;

use super::*;

fn key(namespace: &str, name: &str) -> Key {
    (namespace.to_owned(), name.to_owned())
}

fn begun(queue: &Arc<Queue>) -> Option<Turn> {
    queue.next().now_or_never()
}

fn is_empty(queue: &Queue) -> bool {
    let inner = queue.held();
    let Inner {
        known,
        later,
        lanes,
        turns,
        busy,
        ready,
    } = &*inner;
    known.is_empty() && later.is_empty() && lanes.is_empty() && turns.is_empty() && *busy == 0 && *ready == 0
}

#[tokio::test(start_paused = true)]
async fn one_namespace_never_has_all_places() {
    for (places, share) in [(1, 1), (2, 1), (4, 3), (16, 12)] {
        let queue = Arc::new(Queue::new(places));
        (0..50).for_each(|n| queue.push(key("busy", &n.to_string())));
        let turns: Vec<_> = std::iter::from_fn(|| begun(&queue)).collect();
        assert_eq!(turns.len(), share, "of {places}");
        queue.push(key("other", "s"));
        assert_eq!(begun(&queue).is_some(), places > 1, "of {places}");
    }
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_are_taken_once_in_their_order_and_namespaces_in_turn() {
    let queue = Arc::new(Queue::new(1));
    for name in ["a", "b", "a", "c"] {
        queue.push(key("poets", name));
    }
    queue.push(key("critics", "z"));
    assert_eq!(queue.depth(), 4);
    let mut order = Vec::new();
    while let Some(turn) = begun(&queue) {
        assert!(begun(&queue).is_none(), "there is one place");
        order.push(turn.key.1.clone());
    }
    assert_eq!(order, ["a", "z", "b", "c"]);
    assert!(is_empty(&queue), "nothing is kept of who is done");
}

#[tokio::test(start_paused = true)]
async fn new_ones_come_first_and_the_others_still_come() {
    let queue = Arc::new(Queue::new(1));
    for name in ["a", "b", "c"] {
        queue.push(key("poets", name));
    }
    (0..10).for_each(|n| queue.push_new(key("poets", &n.to_string())));
    queue.push(key("poets", "9"));
    let mut order = String::new();
    while let Some(turn) = begun(&queue) {
        order.push_str(&turn.key.1);
    }
    assert_eq!(order, "0123a4567b89c");
    assert!(is_empty(&queue));
}

#[tokio::test(start_paused = true)]
async fn what_is_heard_during_a_look_is_looked_at_after_it_and_not_beside_it() {
    let queue = Arc::new(Queue::new(4));
    queue.push(key("poets", "a"));
    let turn = begun(&queue).unwrap();
    queue.push(key("poets", "a"));
    assert!(begun(&queue).is_none());
    tokio::time::advance(Duration::from_secs(3)).await;
    drop(turn);
    assert_eq!(begun(&queue).unwrap().waited, Duration::from_secs(3));
    assert!(is_empty(&queue));
}

#[tokio::test(start_paused = true)]
async fn one_that_is_due_later_comes_then_or_when_something_is_heard_of_it() {
    let queue = Arc::new(Queue::new(4));
    for heard in [false, true] {
        queue.push(key("poets", "a"));
        begun(&queue).unwrap().again = Some(Duration::from_mins(1));
        let since = Instant::now();
        if heard {
            queue.push(key("poets", "a"));
        }
        drop(queue.next().await);
        assert_eq!(since.elapsed() >= Duration::from_mins(1), !heard);
        assert!(is_empty(&queue));
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_gone_is_not_looked_at_and_one_of_its_name_not_beside_its_last_look() {
    let queue = Arc::new(Queue::new(4));
    queue.push(key("poets", "a"));
    queue.forget("poets", "a");
    assert!(begun(&queue).is_none());
    queue.push(key("poets", "a"));
    let mut turn = begun(&queue).unwrap();
    turn.again = Some(Duration::from_secs(1));
    queue.push(key("poets", "a"));
    queue.forget("poets", "a");
    assert!(begun(&queue).is_none());
    drop(turn);
    assert!(is_empty(&queue));
    queue.push(key("poets", "a"));
    let turn = begun(&queue).unwrap();
    queue.forget("poets", "a");
    queue.push(key("poets", "a"));
    assert!(begun(&queue).is_none());
    drop(turn);
    assert!(begun(&queue).is_some());
}

#[derive(Clone, Copy, Debug)]
enum Happening {
    Heard(u8),
    New(u8),
    Gone(u8),
    Begun,
    Ended(usize, Option<u8>),
    Passed(u8),
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn whoever_was_heard_of_is_looked_at_by_one_look_at_a_time(
        happenings in prop::collection::vec(prop_oneof![
            4 => (0..6_u8).prop_map(Happening::Heard),
            2 => (0..6_u8).prop_map(Happening::New),
            1 => (0..6_u8).prop_map(Happening::Gone),
            4 => Just(Happening::Begun),
            3 => (any::<usize>(), prop::option::of(0..9_u8)).prop_map(|(n, after)| Happening::Ended(n, after)),
            1 => (0..9_u8).prop_map(Happening::Passed),
        ], 0..80),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let queue = Arc::new(Queue::new(3));
            let of = |n: u8| key(if n < 4 { "busy" } else { "other" }, &n.to_string());
            let (mut turns, mut heard) = (Vec::<Turn>::new(), std::collections::HashSet::new());
            for happening in happenings {
                match happening {
                    Happening::Heard(n) => {
                        queue.push(of(n));
                        heard.insert(of(n));
                    }
                    Happening::New(n) => {
                        queue.push_new(of(n));
                        heard.insert(of(n));
                    }
                    Happening::Gone(n) => {
                        queue.forget(&of(n).0, &of(n).1);
                        heard.remove(&of(n));
                    }
                    Happening::Begun => {
                        if let Some(turn) = begun(&queue) {
                            prop_assert!(turns.iter().all(|other| other.key != turn.key), "two looks at one");
                            heard.remove(&*turn.key);
                            turns.push(turn);
                        }
                    }
                    Happening::Ended(n, after) if !turns.is_empty() => {
                        let mut turn = turns.swap_remove(n % turns.len());
                        turn.again = after.map(|after| Duration::from_secs(after.into()));
                    }
                    Happening::Ended(..) => {}
                    Happening::Passed(seconds) => tokio::time::advance(Duration::from_secs(seconds.into())).await,
                }
                prop_assert!(turns.len() <= 3 && turns.iter().filter(|turn| turn.key.0 == "busy").count() <= 2);
            }
            turns.clear();
            while let Some(turn) = begun(&queue) {
                heard.remove(&*turn.key);
            }
            prop_assert!(heard.is_empty(), "never looked at: {:?}", heard);
            tokio::time::advance(Duration::from_secs(10)).await;
            while begun(&queue).is_some() {}
            prop_assert!(is_empty(&queue));
            Ok(())
        })?;
    }
}
