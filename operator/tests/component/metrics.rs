//! What `/metrics` counts, on a life that is known.

use crds::Phase;
use protocol::Outcome;
use serde_json::json;

use crate::{
    plane::{operator_writes, writes},
    world::{World, report, until},
};

/// Value of a line of the page: a name with its labels, as they are written.
fn value(page: &str, name: &str) -> Option<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(name))?;
    line.strip_prefix(' ')?.split(' ').next()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_counts_what_happened() {
    let world = World::new("metrics").await;
    // A session whose beginning nobody can have missed: the operator has looked at another before.
    world.create("waits", json!({"prompt": "p", "suspend": true})).await;
    world
        .status_when("waits", |s| s.reason.as_deref() == Some("Suspended"))
        .await;
    world.create("ends", json!({"prompt": "p"})).await;
    let pod = world.pod("ends", 1).await;
    world.start(&pod).await;
    world.phase("ends", Phase::Running).await;
    world.end(&pod, 7, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("ends", Phase::Completed).await;

    let expected = [
        (r#"sessions{phase="Pending"}"#, 1.0),
        (r#"sessions{phase="Completed"}"#, 1.0),
        (r#"sessions{phase="Running"}"#, 0.0),
        ("attempts_total", 1.0),
        (r#"runs_ended_total{phase="Completed",reason="Completed"}"#, 1.0),
        ("time_to_job_seconds_count", 1.0),
        ("session_duration_seconds_count", 1.0),
        ("session_duration_seconds_sum", 7.0),
        ("cost_usd_total", 0.012_345),
        (r#"tokens_total{kind="input"}"#, 11.0),
        (r#"tokens_total{kind="output"}"#, 22.0),
        (r#"tokens_total{kind="cache_read"}"#, 33.0),
        (r#"tokens_total{kind="cache_creation"}"#, 44.0),
        (r#"api_writes_total{verb="create",kind="Job"}"#, 1.0),
        (r#"api_writes_total{verb="create",kind="PersistentVolumeClaim"}"#, 1.0),
        ("queue_depth", 0.0),
        ("leader", 1.0),
    ];
    let mut wrong = Vec::new();
    let found = until("the metrics", async || {
        let (_, page) = world.page("/metrics").await?;
        let of = |name: &str| value(&page, &format!("agentic_operator_{name}"));
        wrong = expected
            .iter()
            .filter(|(name, value)| of(name) != Some(*value))
            .map(|(name, value)| format!("{name} is {:?} and not {value}", of(name)))
            .collect();
        // The page is of one moment, the log of another: they agree when nothing is being written.
        let status = |page: &str| {
            value(
                page,
                r#"agentic_operator_api_writes_total{verb="patch",kind="AgenticSession"}"#,
            )
        };
        let logged = logged("agenticsessions");
        let agree = of("status_writes_total") == Some(logged) && status(&page) == Some(logged);
        let events = value(
            &page,
            r#"agentic_operator_api_writes_total{verb="create",kind="Event"}"#,
        );
        let looked = of("reconcile_duration_seconds_count").zip(of("queue_wait_seconds_count"));
        let busy = looked.is_some_and(|(looks, waits)| looks >= waits && waits >= 4.0);
        let settled = wrong.is_empty() && agree && busy && events == Some(events_logged());
        if !settled {
            println!("not yet: {wrong:?} agree={agree} busy={busy} {events:?}");
        }
        settled.then_some(())
    });
    found.await;
}

fn logged(resource: &str) -> f64 {
    let ours = operator_writes("metrics");
    ours.iter()
        .filter(|entry| entry["objectRef"]["resource"] == resource)
        .count() as f64
}

/// Those of the operator alone: others tell of things too.
fn events_logged() -> f64 {
    let operator = "system:serviceaccount:metrics:agentic-operator";
    let all = writes("metrics");
    let events = all.iter().filter(|entry| {
        entry["objectRef"]["resource"] == "events" && entry["impersonatedUser"]["username"] == *operator
    });
    events.count() as f64
}
