//! Tasks whose session's node has another time than the gateway.

use jiff::SignedDuration;

use super::*;

/// A task in a workspace's session is given to its agent, by a clock that is so far ahead, after the keeper of its session has
/// seen another one end.
async fn begun(served: &Served, ahead: SignedDuration, timeout: u32) -> Runner {
    let task = |id: &str| json!({"task_id": id, "prompt": "p", "workspace": "/w", "session": {"reuse_existing": true}, "options": {"timeout": timeout}});
    submit(served, task("one")).await;
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(served, &name).await;
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, "First.")).await;
    soon("the first task being counted", async {
        while !served
            .gateway
            .metrics
            .text()
            .unwrap()
            .contains("tasks_duration_seconds_count 1")
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    submit(served, task("two")).await;
    assert!(order(&mut runner).await["user_message"].is_object());
    let record = json!({
        "seq": 4, "attempt": 1, "turn": 2, "ts": jiff::Timestamp::now() + ahead, "kind": "user",
        "body": {"command": "two", "uuid": "00000000-0000-5000-8000-000000000001", "text": "p"},
    });
    runner.send(&[record.to_string()]).await;
    runner
}

#[tokio::test]
async fn a_task_has_its_time_though_the_clock_of_its_node_is_behind() {
    let served = Served::serving(open()).await;
    let mut runner = begun(&served, SignedDuration::from_hours(-2), 3600).await;
    // The keeper of the session sees this record too, and then has looked at the one before.
    runner
        .send(&[said(5, 2, "m2", &json!({"type": "text", "text": "2"}))])
        .await;
    let interrupted = async {
        while ask(served.address, "POST", "/api/v1/tasks/two/interrupt", None).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("the interrupt", interrupted).await;
    let id = order(&mut runner).await["interrupt"]["id"].to_string();
    assert!(!id.contains("timeout"), "{id}");
}

#[tokio::test]
async fn a_task_has_no_more_than_its_time_though_the_clock_of_its_node_is_ahead() {
    let served = Served::serving(open()).await;
    let mut runner = begun(&served, SignedDuration::from_hours(2), 1).await;
    let id = order(&mut runner).await["interrupt"]["id"].to_string();
    assert!(id.contains("timeout"), "{id}");
}
