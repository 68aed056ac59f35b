use serde_json::json;

use crate::support::{
    Served, end, record, records,
    runner::{Runner, hello},
    soon,
    sse::{Event, Events},
};

async fn served() -> Served {
    let served = Served::new().await;
    served.cluster.caller("token", "ann");
    served.cluster.allow("ann", &["get"], "team-a");
    served.cluster.running("s", "u", "p1");
    served.cluster.runner("t1", Some("p1"));
    served
}

async fn runner(served: &Served) -> Runner {
    Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await.0
}

fn data(events: &[Event]) -> Vec<String> {
    events
        .iter()
        .filter(|event| event.id.is_some())
        .map(|event| event.data.clone())
        .collect()
}

#[tokio::test]
async fn a_client_from_the_start_and_one_after_the_end_see_the_same_records() {
    let served = served().await;
    let live = Events::of(&served, "s", "token", None).await;
    let mut runner = runner(&served).await;
    let mut sent = records(1, 100);
    sent.push(end(101));
    for batch in sent.chunks(7) {
        runner.deliver(batch).await;
    }
    served.cluster.set(
        "team-a",
        "s",
        "u",
        &json!({"phase": "Completed", "podUID": "p1", "attempt": 1}),
    );
    let live = live.rest().await;
    let late = Events::of(&served, "s", "token", None).await.rest().await;
    assert_eq!(data(&live), sent);
    assert_eq!(data(&late), sent);
    let seqs: Vec<_> = late.iter().filter_map(Event::seq).collect();
    assert_eq!(seqs, (1..=101).collect::<Vec<_>>());
    for events in [&live, &late] {
        let close = events.last().unwrap();
        assert_eq!((close.name.as_str(), &close.id), ("close", &None));
        assert_eq!(close.json(), json!({"reason": "ended", "lastSeq": 101}));
    }
    assert_eq!(
        late.iter().find(|event| event.name == "end").unwrap().id.as_deref(),
        Some("u/101")
    );
}

#[tokio::test]
async fn a_client_goes_on_after_its_last_event_and_from_the_start_of_another_session() {
    let served = served().await;
    runner(&served).await.deliver(&records(1, 5)).await;
    let mut events = Events::of(&served, "s", "token", Some("u/3")).await;
    assert_eq!(events.wait("cli").await.seq(), Some(4));
    let mut events = Events::of(&served, "s", "token", Some("u0/3")).await;
    assert_eq!(events.wait("cli").await.seq(), Some(1));
}

#[tokio::test]
async fn a_last_event_id_that_is_none_is_refused_with_its_form() {
    let served = served().await;
    let url = served.url("/api/projects/team-a/agentic-sessions/s/events");
    let answer = crate::support::sse::http()
        .get(url)
        .bearer_auth("token")
        .header("last-event-id", "yesterday")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 400);
    assert!(answer.text().await.unwrap().contains("<session uid>/<seq>"));
}

#[tokio::test]
async fn phases_and_pieces_of_messages_are_live_and_carry_no_id() {
    let served = served().await;
    let mut events = Events::of(&served, "s", "token", None).await;
    assert_eq!(events.wait("phase").await.json()["phase"], "Running");
    let mut runner = runner(&served).await;
    runner.deliver(&records(1, 1)).await;
    assert_eq!(events.wait("cli").await.seq(), Some(1));
    runner.text(r#"{"delta":{"text":"He" }}"#.to_owned()).await;
    let delta = events.wait("delta").await;
    assert_eq!((delta.id, delta.data.as_str()), (None, r#"{"text":"He" }"#));
    served.cluster.set(
        "team-a",
        "s",
        "u",
        &json!({"phase": "Stopping", "reason": "StoppedByUser", "podUID": "p1", "attempt": 1}),
    );
    let phase = events.wait("phase").await;
    assert_eq!((&phase.json()["phase"], &phase.id), (&json!("Stopping"), &None));
    assert_eq!(phase.json()["reason"], "StoppedByUser");
}

#[tokio::test]
async fn a_stream_waits_at_a_hole_and_passes_over_one_that_is_declared() {
    let served = served().await;
    let mut live = Events::of(&served, "s", "token", None).await;
    let mut runner = runner(&served).await;
    runner.deliver(&records(1, 2)).await;
    runner.deliver(&records(4, 5)).await;
    runner.text(r#"{"delta":{"behind":"the hole"}}"#.to_owned()).await;
    let mut seen = Vec::new();
    while let Some(event) = live.next().await.filter(|event| event.name != "delta") {
        seen.extend(event.seq());
    }
    assert_eq!(seen, [1, 2], "what is behind a hole may not be shown yet");
    runner.deliver(&records(3, 3)).await;
    let body = r#"{"from":6,"to":8}"#;
    let gap = format!(r#"{{"seq":9,"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05Z","kind":"gap","body":{body}}}"#);
    runner.deliver(&[gap, record(10, protocol::Kind::Cli, "x")]).await;
    while seen.last() != Some(&10) {
        seen.extend(live.next().await.unwrap().seq());
    }
    assert_eq!(seen, [1, 2, 3, 4, 5, 9, 10]);
}

#[tokio::test]
async fn a_record_that_conflicts_with_a_stored_one_is_shown_to_nobody() {
    let served = served().await;
    let mut events = Events::of(&served, "s", "token", None).await;
    let mut runner = runner(&served).await;
    runner.deliver(&[records(1, 1), records(3, 3)].concat()).await;
    assert_eq!(events.wait("cli").await.seq(), Some(1));
    runner
        .send(&[records(2, 2), vec![record(3, protocol::Kind::Cli, "other")]].concat())
        .await;
    assert_eq!(events.wait("cli").await.data, records(2, 2)[0]);
    assert_eq!(events.wait("cli").await.data, records(3, 3)[0]);
}

#[tokio::test]
async fn records_that_the_operator_knows_to_be_delivered_end_a_stream_without_an_end_record() {
    let served = served().await;
    runner(&served).await.deliver(&records(1, 3)).await;
    let delivered = json!([{"type": "EventsDelivered", "status": "True", "reason": "Delivered", "message": "", "lastTransitionTime": "2026-01-02T03:04:05Z"}]);
    served.cluster.set(
        "team-a",
        "s",
        "u",
        &json!({"phase": "Failed", "attempt": 2, "conditions": delivered}),
    );
    let events = Events::of(&served, "s", "token", None).await.rest().await;
    assert_eq!(data(&events), records(1, 3));
    assert_eq!(events.last().unwrap().json(), json!({"reason": "ended", "lastSeq": 3}));
}

#[tokio::test]
async fn an_old_session_whose_records_never_came_ends_with_a_gap_and_a_cursor() {
    let served = served().await;
    runner(&served).await.deliver(&records(1, 3)).await;
    let missing = json!([{"type": "EventsDelivered", "status": "False", "reason": "Pending", "message": "", "lastTransitionTime": "2026-01-02T03:04:05Z"}]);
    served.cluster.set(
        "team-a",
        "s",
        "u",
        &json!({"phase": "Failed", "attempt": 1, "completionTime": "2026-01-02T03:04:05Z", "conditions": missing}),
    );
    let events = Events::of(&served, "s", "token", None).await.rest().await;
    let [.., gap, close] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(gap.json(), json!({"known": 3, "final": "unknown", "cursor": "u/3"}));
    assert_eq!((gap.name.as_str(), &gap.id), ("gap", &None));
    assert_eq!(close.name, "close");
}

#[tokio::test]
async fn streams_end_when_their_session_is_deleted_even_if_another_takes_its_name() {
    let served = served().await;
    runner(&served).await.deliver(&records(1, 2)).await;
    let mut events = Events::of(&served, "s", "token", None).await;
    assert_eq!(events.wait("cli").await.seq(), Some(1));
    served.cluster.delete("team-a", "s");
    served.cluster.running("s", "u2", "p2");
    let rest = events.rest().await;
    assert_eq!(rest.last().unwrap().json(), json!({"reason": "deleted", "lastSeq": 2}));
    let mut events = Events::of(&served, "s", "token", Some("u/2")).await;
    assert_eq!(events.wait("phase").await.json()["phase"], "Running");
}

#[tokio::test]
async fn a_gateway_that_stops_ends_its_streams_with_a_last_event() {
    let served = served().await;
    runner(&served).await.deliver(&records(1, 2)).await;
    let mut events = Events::of(&served, "s", "token", None).await;
    events.wait("cli").await;
    let stop = tokio::spawn(served.stop());
    let rest = events.rest().await;
    assert_eq!(rest.last().unwrap().json(), json!({"reason": "shutdown", "lastSeq": 2}));
    soon("the stop", stop).await.unwrap();
}

#[tokio::test]
async fn a_reader_that_does_not_read_slows_nobody_and_misses_nothing() {
    let served = served().await;
    let mut idle = Events::of(&served, "s", "token", None).await;
    idle.wait("phase").await;
    let mut runner = runner(&served).await;
    let text = "x".repeat(32 << 10);
    // Far more than the sockets' buffers and the backlog hold.
    for seq in 1..=1000 {
        runner.deliver(&[record(seq, protocol::Kind::Cli, &text)]).await;
    }
    for seq in 1..=1000 {
        assert_eq!(idle.wait("cli").await.seq(), Some(seq));
    }
}
