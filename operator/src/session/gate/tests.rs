//! Whom a place is told to, and when.

use futures::FutureExt as _;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::session::validate::tests::checked;

#[test]
fn a_namespace_whose_reader_was_given_up_in_the_middle_is_read_by_the_next() {
    let ledger = Mutex::new(Ledger::default());
    assert!(held(&ledger).begin("poets"));
    let mut reading = Box::pin(async {
        let _reading = Reading {
            ledger: &ledger,
            namespace: "poets",
        };
        std::future::pending::<()>().await;
    });
    assert_eq!(reading.as_mut().now_or_never(), None);
    assert!(!held(&ledger).begin("poets"), "one reads");
    drop(reading);
    assert!(held(&ledger).begin("poets"));
    let reading = Reading {
        ledger: &ledger,
        namespace: "poets",
    };
    reading.done(Vec::new());
    assert!(!held(&ledger).begin("poets"), "it is known");
}

#[tokio::test(start_paused = true)]
async fn when_the_bound_is_raised_those_come_first_whose_turn_it_is() {
    let gate = Arc::new(Gate::default());
    held(&gate.limits).insert("poets".to_owned(), 0);
    held(&gate.ledger).begin("poets");
    let waits = |n: i64| Change {
        name: format!("s{n}"),
        created: Timestamp::from_second(n).unwrap(),
        place: Place::Waits,
    };
    held(&gate.ledger).load("poets", (0..5).map(waits));
    let mut nudges = Box::pin(gate.nudges());
    gate.settings_changed("poets", Some(2));
    let mut first = Vec::new();
    for _ in 0..2 {
        first.push(nudges.next().await.unwrap().1);
    }
    first.sort();
    assert_eq!(first, ["s0", "s1"]);
    // These two have not begun yet.
    assert!(nudges.next().now_or_never().is_none());
    for n in 0..2 {
        let created = Timestamp::from_second(n).unwrap();
        let answer = held(&gate.ledger).ask("poets", &format!("s{n}"), created, 2);
        assert_eq!(answer, Answer::Admitted);
    }
    for n in 2..5 {
        assert_eq!(
            nudges.next().await.unwrap().1,
            format!("s{n}"),
            "then they are told their places"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn settings_that_change_faster_than_all_can_be_told_have_each_told_once() {
    let gate = Arc::new(Gate::default());
    held(&gate.ledger).begin("poets");
    let waits = |n: i64| Change {
        name: format!("s{n}"),
        created: Timestamp::from_second(n).unwrap(),
        place: Place::Waits,
    };
    held(&gate.ledger).load("poets", (0..9).map(waits));
    let mut nudges = Box::pin(gate.nudges());
    let mut told = Vec::new();
    for _ in 0..2 {
        (0..100).for_each(|_| gate.settings_changed("poets", Some(0)));
        for _ in 0..9 {
            told.push(nudges.next().await.unwrap().1);
        }
        let more = tokio::time::timeout(GIVE_WAY, nudges.next()).await;
        assert!(more.is_err() && held(&gate.to_tell).is_empty(), "{more:?}");
    }
    let all: Vec<_> = (0..9).map(|n| format!("s{n}")).collect();
    assert_eq!(told, [all.clone(), all].concat(), "and again when they change again");
}

#[test]
fn a_place_that_becomes_free_is_told_to_the_next_however_it_does() {
    let gate = Arc::new(Gate::default());
    held(&gate.limits).insert("poets".to_owned(), 1);
    held(&gate.ledger).begin("poets");
    let change = |name: &str, n: i64, place| Change {
        name: name.to_owned(),
        created: Timestamp::from_second(n).unwrap(),
        place,
    };
    let found = [
        change("runs", 0, Place::Holds),
        change("a", 1, Place::Waits),
        change("b", 2, Place::Waits),
    ];
    held(&gate.ledger).load("poets", found);
    let mut nudges = Box::pin(gate.nudges());
    let mut told = || {
        let mut names = Vec::new();
        while let Some(Some(nudge)) = nudges.next().now_or_never() {
            names.push(nudge);
        }
        names
    };
    let poet = |name: &str| vec![("poets".to_owned(), name.to_owned())];
    gate.change("poets", "later", Timestamp::MAX, Place::Waits);
    assert_eq!(told(), [], "one that waits frees nothing");
    gate.gone("poets", "runs");
    assert_eq!(told(), poet("a"));
    gate.stumbled("poets", "nobody");
    assert_eq!(told(), []);
    gate.stumbled("poets", "a");
    assert_eq!(told(), poet("b"), "it holds nobody up");
    gate.change("poets", "b", Timestamp::from_second(2).unwrap(), Place::Refused);
    assert_eq!(told(), poet("later"));
    gate.change("musicians", "refused", Timestamp::MAX, Place::Refused);
    let mut namespaces = gate.namespaces();
    namespaces.sort();
    assert_eq!(
        namespaces,
        ["musicians", "poets"],
        "where some may wait for their admin"
    );
    gate.keep(&HashSet::new());
    gate.change("poets", "b", Timestamp::MAX, Place::None);
    gate.gone("musicians", "refused");
    assert_eq!((gate.namespaces(), told()), (vec![], vec![]));
}

/// An API server that has these sessions, and no Job.
fn client(sessions: &serde_json::Value) -> Client {
    let list = json!({"metadata": {}, "items": sessions});
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let is_jobs = request.uri().path().ends_with("/jobs");
        let answer = if is_jobs {
            json!({"metadata": {}, "items": []})
        } else {
            list.clone()
        };
        let body = kube::client::Body::from(serde_json::to_vec(&answer).unwrap());
        std::future::ready(Ok::<_, kube::Error>(http::Response::new(body)))
    });
    Client::new(service, "poets")
}

#[tokio::test]
async fn a_session_of_another_system_keeps_no_namespace_from_being_read() {
    let session = |name: &str, status: &serde_json::Value| json!({"metadata": {"name": name, "creationTimestamp": "2026-01-02T03:04:05Z"}, "spec": {"prompt": "p"}, "status": status});
    let sessions = json!([
        // As the Ambient platform wrote it.
        session("of-old", &json!({"phase": "Error"})),
        session("runs", &json!({"phase": "Running", "reason": "Running"})),
        session("new", &json!({})),
        session("queued", &json!({"phase": "Pending", "reason": "Queued"})),
    ]);
    let found = read(&client(&sessions), "poets", |_| false).await.unwrap();
    let found: Vec<_> = found.iter().map(|change| (&*change.name, change.place)).collect();
    let expected = [
        ("of-old", Place::None),
        ("runs", Place::Holds),
        ("new", Place::Waits),
        ("queued", Place::Waits),
    ];
    assert_eq!(found, expected);
}

#[test]
fn one_that_waits_has_those_looked_at_that_are_before_it_and_do_not_come() {
    let gate = Arc::new(Gate::default());
    held(&gate.limits).insert("poets".to_owned(), 1);
    held(&gate.ledger).begin("poets");
    let waits = |n: i64| Change {
        name: format!("s{n}"),
        created: Timestamp::from_second(n).unwrap(),
        place: Place::Waits,
    };
    // Of the first nobody knows that it cannot be read: it is in the list as it is.
    held(&gate.ledger).load("poets", (0..2).map(waits));
    let mut nudges = Box::pin(gate.nudges());
    let mut told = || nudges.next().now_or_never().flatten().map(|(_, name)| name);
    let second = |gate: &Gate| gate.ask("poets", "s1", Timestamp::from_second(1).unwrap(), 1);
    assert_eq!((second(&gate), told()), (Answer::Wait(1), Some("s0".into())));
    gate.stumbled("poets", "s0");
    assert_eq!(
        (told(), second(&gate), told()),
        (Some("s1".into()), Answer::Admitted, None)
    );
}

#[rstest]
#[case::that_works(Phase::Running, "Running", false, Place::Holds)]
#[case::that_begins(Phase::Creating, "Creating", false, Place::Holds)]
#[case::that_is_being_stopped(Phase::Stopping, "StoppedByUser", false, Place::Holds)]
#[case::whose_job_others_hold_back(Phase::Creating, "Queued", true, Place::None)]
#[case::that_waits(Phase::Pending, "Queued", true, Place::Waits)]
#[case::that_is_suspended_while_it_waits(Phase::Pending, "Suspended", true, Place::None)]
#[case::that_waits_for_its_next_attempt(Phase::Pending, "Retrying", false, Place::None)]
#[case::that_says_so_without_being_held(Phase::Pending, "Queued", false, Place::None)]
#[case::that_lacks_something(Phase::Pending, "ConfigError", false, Place::Refused)]
#[case::that_meets_a_name_that_is_taken(Phase::Pending, "NameConflict", true, Place::Refused)]
#[case::that_meets_a_quota(Phase::Pending, "QuotaExceeded", false, Place::Refused)]
#[case::that_ended_for_lack_of_something(Phase::Failed, "ConfigError", false, Place::None)]
#[case::that_is_over(Phase::Completed, "Completed", false, Place::None)]
fn a_session_has_a_place_waits_for_one_or_for_its_admin(
    #[case] phase: Phase,
    #[case] reason: &str,
    #[case] is_held: bool,
    #[case] expected: Place,
) {
    let mut status = AgenticSessionStatus {
        phase,
        reason: Some(reason.to_owned()),
        ..AgenticSessionStatus::default()
    };
    if is_held {
        let (now, type_) = (Timestamp::UNIX_EPOCH, condition::ADMITTED);
        conditions::set(&mut status, type_, "False", Reason::Queued, "", now);
    }
    assert_eq!(place(&status, &checked(json!({"prompt": "p"}))), expected);
    // What the admin may allow waits for that, unless it is at work.
    let refused = if matches!(phase, Phase::Creating | Phase::Running | Phase::Stopping) {
        expected
    } else {
        Place::Refused
    };
    let not_here = Err(Invalid::NotAllowed {
        field: "runnerSecrets",
        asked: "theirs".into(),
        list: "allowedSecrets",
        allowed: "none".into(),
    });
    assert_eq!(place(&status, &not_here), refused);
}
