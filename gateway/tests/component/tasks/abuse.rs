//! Clients that go away, that interrupt what has not begun, that choose odd ids, and neighbours that are slow.

use std::io::Write as _;

use sha2::{Digest as _, Sha256};

use super::*;

fn shared(id: &str) -> Value {
    json!({"task_id": id, "prompt": "p", "workspace": "/w", "session": {"reuse_existing": true}})
}

/// A client that waits no longer for the answer.
async fn gives_up(served: &Served, body: &Value) {
    let request = http().post(served.url("/api/v1/tasks")).json(body);
    let answer = request.timeout(Duration::from_millis(200)).send().await;
    assert!(answer.unwrap_err().is_timeout());
}

#[tokio::test]
async fn what_is_created_for_clients_that_went_away_is_counted_and_sent_again_is_the_same() {
    let settings = Settings {
        max_concurrent: 2,
        ..open()
    };
    let served = Served::serving(settings).await;
    served.cluster.hold_creates("team-a");
    let first = json!({"task_id": "t0", "prompt": "p"});
    tokio::select! {
        _ = ask(served.address, "POST", "/api/v1/tasks", Some(&first)) => panic!("nothing is created yet"),
        () = soon("a create", served.cluster.creates_are_held(1)) => {}
    }
    for n in 1..6 {
        gives_up(&served, &json!({"task_id": format!("t{n}"), "prompt": "p"})).await;
    }
    served.cluster.release_creates();
    let answer = submit(&served, json!({"task_id": "t0", "prompt": "p"})).await;
    assert_eq!(answer["status"], "running");
    submit(&served, json!({"task_id": "last", "prompt": "p"})).await;
    assert_eq!(served.cluster.sessions("team-a").len(), 2);
}

#[tokio::test]
async fn nobody_waits_for_another_namespaces_api_server() {
    let settings = Settings { open: false, ..open() };
    let served = Served::serving(settings).await;
    let entry = |name: &str, namespace: &str| {
        let sha256 = hex::encode(Sha256::digest(format!("fake-{name}-key")));
        json!({"name": name, "sha256": sha256, "namespace": namespace, "verbs": ["create", "get", "list"], "ratePerMinute": 100})
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let keys = json!({"keys": [entry("ann", "team-a"), entry("bob", "team-b")]});
    file.write_all(keys.to_string().as_bytes()).unwrap();
    served.gateway.keys.load(file.path()).unwrap();
    let submit = async |key: &str| {
        let request = http().post(served.url("/api/v1/tasks")).header("x-api-key", key);
        request.json(&json!({"prompt": "p"})).send().await.unwrap().status()
    };
    served.cluster.hold_creates("team-b");
    let slow = submit("fake-bob-key");
    let quick = async {
        served.cluster.creates_are_held(1).await;
        assert_eq!(submit("fake-ann-key").await, 200);
        served.cluster.release_creates();
    };
    let (slow, ()) = Box::pin(soon("both", async { tokio::join!(slow, quick) })).await;
    assert_eq!(slow, 200);
}

#[tokio::test]
async fn a_workspace_whose_first_task_was_interrupted_before_it_began_takes_the_next() {
    let served = Served::serving(open()).await;
    submit(&served, shared("one")).await;
    let (code, task) = ask(served.address, "POST", "/api/v1/tasks/one/interrupt", None).await;
    assert_eq!((code, &task["status"]), (200, &json!("interrupted")), "{task}");
    let second = submit(&served, shared("two")).await;
    assert_eq!(second["session_id"], "session-two");
    assert_eq!(served.cluster.sessions("team-a").len(), 2);
}

#[tokio::test]
async fn sessions_that_never_began_are_removed_in_time() {
    let settings = Settings {
        cleanup_every: Duration::from_millis(1),
        keep_ended: Duration::ZERO,
        ..open()
    };
    let served = Served::serving(settings).await;
    submit(&served, json!({"task_id": "never", "prompt": "p"})).await;
    submit(&served, json!({"task_id": "waits", "prompt": "p"})).await;
    ask(served.address, "POST", "/api/v1/tasks/never/interrupt", None).await;
    Box::pin(soon("its removal", async {
        while served.cluster.sessions("team-a").len() > 1 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }))
    .await;
    assert_eq!(status(&served, "waits").await["status"], "running");
}

#[tokio::test]
async fn a_namespace_keeps_so_many_sessions_of_tasks_and_the_oldest_go_first() {
    let served = Served::serving(open()).await;
    let cluster = &served.cluster;
    let labels = json!({"vteam.ambient-code/api": "tasks"});
    let begun = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(1);
    for n in 0..1000_i64 {
        let at = begun + jiff::SignedDuration::from_secs((n * 7) % 1000);
        let ended = json!({"phase": "Completed", "attempt": 1, "completionTime": at});
        cluster.set("team-a", &format!("old-{n}"), &format!("uid-of-old-{n}"), &ended);
        cluster.set_labels("team-a", &format!("old-{n}"), &labels);
    }
    soon("all of them", async {
        while served.gateway.watched.of_api(Some("team-a"), "tasks").len() < 1000 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    submit(&served, json!({"task_id": "new", "prompt": "p"})).await;
    let sessions = cluster.sessions("team-a");
    assert_eq!(sessions.len(), 1000);
    assert!(!sessions.contains_key("old-0"), "the one that ended first");
}

#[tokio::test]
async fn the_id_of_a_task_does_not_take_its_limits_away() {
    let served = Served::serving(open()).await;
    submit(&served, shared("one")).await;
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(&served, &name).await;
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, "First.")).await;
    over(&served, "one").await;
    let mut second = shared("max-turns:2");
    second["options"] = json!({"max_turns": 1});
    submit(&served, second).await;
    assert_eq!(order(&mut runner).await["user_message"]["id"], "max-turns:2");
    let text = json!({"type": "text", "text": "a"});
    runner
        .send(&[
            user(4, 2, "max-turns:2"),
            said(5, 2, "m1", &text),
            tool_result(6, 2, "t1", "b"),
            said(7, 2, "m2", &text),
        ])
        .await;
    let stop = order(&mut runner).await;
    assert_eq!(stop["interrupt"], json!({"id": "gateway/max-turns/2", "turn": 2}));
    // A client's command of such a name is no limit.
    let done = json!({"event": "commandDone", "id": "max-turns:99"});
    runner
        .send(&[record(8, 2, "session", &done), turn_ended(9, 2, "stoppedByUser")])
        .await;
    assert_eq!(over(&served, "max-turns:2").await["status"], "interrupted");
}

#[tokio::test]
async fn what_the_cli_goes_on_with_by_itself_is_held_to_the_limits_of_the_task_before() {
    let served = Served::serving(open()).await;
    let mut first = shared("one");
    first["options"] = json!({"max_turns": 2});
    submit(&served, first).await;
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(&served, &name).await;
    let text = json!({"type": "text", "text": "a"});
    runner.send(&[user(1, 1, "prompt"), said(2, 1, "m1", &text)]).await;
    runner.send(&answered(3, 1, "Runs in the background.")).await;
    over(&served, "one").await;
    let started = |seq: u64, turn: u32| record(seq, turn, "session", &json!({"event": "turnStarted", "turn": turn}));
    // Within the limit.
    runner
        .send(&[started(5, 2), said(6, 2, "m2", &text), turn_ended(7, 2, "succeeded")])
        .await;
    runner.send(&[started(8, 3), said(9, 3, "m3", &text)]).await;
    let stop = order(&mut runner).await;
    assert_eq!(stop["interrupt"], json!({"id": "gateway/max-turns/3", "turn": 3}));
    let task = status(&served, "one").await;
    assert_eq!(
        (&task["status"], &task["result"]),
        (&json!("completed"), &json!("Runs in the background."))
    );
}

#[tokio::test]
async fn answers_of_many_tasks_are_kept_by_the_log_alone_and_told_all_the_same() {
    /// Of a task, so that some of them are more than is kept in memory.
    const LONG: usize = 100 << 10;
    let served = Served::serving(open()).await;
    submit(&served, shared("t0")).await;
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(&served, &name).await;
    let text = |n: u64| format!("{n}{}", "x".repeat(LONG));
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, &text(0))).await;
    over(&served, "t0").await;
    for n in 1..6 {
        let id = format!("t{n}");
        submit(&served, shared(&id)).await;
        assert_eq!(order(&mut runner).await["user_message"]["id"], id);
        let (seq, turn) = (3 * n + 1, n as u32 + 1);
        runner.send(&[user(seq, turn, &id)]).await;
        runner.send(&answered(seq + 1, turn, &text(n))).await;
        over(&served, &id).await;
    }
    let fold = served.gateway.compat.folds.of(&format!("uid-of-{name}"));
    let kept: usize = {
        let fold = fold.lock().await;
        fold.tasks
            .all()
            .iter()
            .filter_map(|task| task.result.as_ref())
            .map(String::len)
            .sum()
    };
    assert!(
        (LONG..5 * LONG).contains(&kept),
        "{kept} bytes of answers are in memory"
    );
    for n in 0..6 {
        let task = status(&served, &format!("t{n}")).await;
        assert!(task["result"] == json!(text(n)), "{n}: {}", task["status"]);
    }
}
