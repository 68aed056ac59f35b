//! Runs: which a start request begins, and what of a run may be changed.

use std::time::Duration;

use crds::Phase;
use kube::{
    ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use protocol::Outcome;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    plane::jobs_created,
    world::{World, report, session, until},
};

fn click(value: &str) -> Value {
    json!({"metadata": {"annotations": {"ambient-code.io/start-requested-at": value}}})
}

/// Runs the attempt's pod to its success.
async fn succeed(world: &World, name: &str, attempt: u32) {
    let pod = world.pod(name, attempt).await;
    world.start(&pod).await;
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, attempt))).await;
    world
        .status_when(name, |s| s.phase == Phase::Completed && s.attempt == Some(attempt))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_a_session_is_created_with_begins_no_second_run() {
    let world = World::new("request-at-creation").await;
    let mut ode = session("ode", json!({"prompt": "write an ode"}));
    ode.annotations_mut()
        .insert("ambient-code.io/start-requested-at".into(), "at creation".into());
    world.sessions().create(&PostParams::default(), &ode).await.unwrap();
    succeed(&world, "ode", 1).await;
    let looks = world.looks().await;
    world
        .patch("ode", json!({"metadata": {"annotations": {"look": "again"}}}))
        .await;
    until("another look", async || (world.looks().await > looks).then_some(())).await;
    let done = world.status("ode").await;
    assert_eq!((done.phase, done.run), (Phase::Completed, Some(1)));
    assert_eq!(done.handled_start_request.as_deref(), Some("at creation"));
    assert_eq!(jobs_created(&world.namespace), ["ode-job"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clicks_on_an_ended_session_begin_one_run_and_clicks_while_no_operator_is_there_one_too() {
    let mut world = World::new("double-click").await;
    world.create("lied", json!({"prompt": "write a song"})).await;
    succeed(&world, "lied", 1).await;
    world.patch("lied", click("one")).await;
    world.patch("lied", click("two")).await;
    succeed(&world, "lied", 2).await;
    let done = world.status("lied").await;
    assert_eq!(
        (done.run, done.handled_start_request.as_deref()),
        (Some(2), Some("two"))
    );

    world.stop_operator().await;
    for value in ["three", "four", "five"] {
        world.patch("lied", click(value)).await;
    }
    world.start_operator().await;
    succeed(&world, "lied", 3).await;
    let done = world.status("lied").await;
    assert_eq!(
        (done.run, done.handled_start_request.as_deref()),
        (Some(3), Some("five"))
    );
    assert_eq!(jobs_created(&world.namespace), ["lied-job", "lied-job-2", "lied-job-3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_while_suspended_is_answered_and_one_while_stopping_waits_for_the_stop() {
    let world = World::new("request-while-stopping").await;
    world.create("rondo", json!({"prompt": "write a rondo"})).await;
    let first = world.pod("rondo", 1).await;
    world.start(&first).await;
    world.phase("rondo", Phase::Running).await;
    world.patch("rondo", json!({"spec": {"suspend": true}})).await;
    world.phase("rondo", Phase::Stopping).await;
    // Kept while the agent is being stopped; answered then, since the session is suspended.
    world.patch("rondo", click("while stopping")).await;
    world.obey_deletion(&first, Some(&report(Outcome::Stopped, 1))).await;
    let stopped = world
        .status_when("rondo", |s| {
            s.handled_start_request.as_deref() == Some("while stopping")
        })
        .await;
    assert_eq!((stopped.phase, stopped.run), (Phase::Stopped, Some(1)));
    let events: kube::Api<k8s_openapi::api::events::v1::Event> =
        kube::Api::namespaced(world.client.clone(), &world.namespace);
    until("an Event that says why nothing happened", async || {
        let all = events.list(&kube::api::ListParams::default()).await.unwrap();
        let said = all
            .items
            .into_iter()
            .find(|e| e.reason.as_deref() == Some("StartRequestIgnored"));
        said.map(|e| e.note)
    })
    .await;
    world.patch("rondo", json!({"spec": {"suspend": false}})).await;
    succeed(&world, "rondo", 2).await;
    assert_eq!(world.status("rondo").await.run, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_that_is_changed_reaches_the_running_pod_its_job_and_the_next_attempt() {
    let mut world = World::without_operator("live-limits").await;
    world.timing.retry_first_wait = 1;
    world.start_operator().await;
    world
        .create("fugue", json!({"prompt": "write a fugue", "timeout": 600}))
        .await;
    let first = world.pod("fugue", 1).await;
    world.start(&first).await;
    world.phase("fugue", Phase::Running).await;
    let deadline = async || {
        world
            .jobs()
            .get("fugue-job")
            .await
            .unwrap()
            .spec
            .unwrap()
            .active_deadline_seconds
    };
    assert_eq!(deadline().await, Some(3_600 + 600 + 600));

    world.patch("fugue", json!({"spec": {"timeout": 900}})).await;
    let told = until("the annotation", async || {
        let pod = world.pod_now(&first).await?;
        let limits: Value = serde_json::from_str(&pod.annotations()["vteam.ambient-code/limits"]).unwrap();
        (limits["timeout"] == 900).then_some(limits)
    })
    .await;
    assert_eq!(told["timeout"], 900);
    assert_eq!(deadline().await, Some(3_600 + 900 + 600));

    // Somebody else's word in the annotation does not stay.
    let other = json!({"metadata": {"annotations": {"vteam.ambient-code/limits": r#"{"timeout":1}"#}}});
    world
        .pods()
        .patch(&first.name_any(), &PatchParams::default(), &Patch::Merge(other))
        .await
        .unwrap();
    until("the annotation to be put right", async || {
        let pod = world.pod_now(&first).await?;
        pod.annotations()["vteam.ambient-code/limits"]
            .contains("900")
            .then_some(())
    })
    .await;
    world.end(&first, 7, Some(&report(Outcome::ModelUnavailable, 1))).await;
    let second = world.pod("fugue", 2).await;
    assert!(second.annotations()["vteam.ambient-code/limits"].contains("900"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ended_attempts_job_goes_when_it_was_kept_for_long_enough_and_the_session_stays_as_it_is() {
    let mut world = World::without_operator("job-retention").await;
    world.timing.job_retention = 1;
    world.start_operator().await;
    let _kubelet = world.kubelet();
    world.create("canon", json!({"prompt": "write a canon"})).await;
    let pod = world.pod("canon", 1).await;
    world.start(&pod).await;
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, 1))).await;
    let done = world.phase("canon", Phase::Completed).await;
    until("Job and pod to go", async || {
        let job = world.jobs().get_opt("canon-job").await.unwrap();
        (job.is_none() && world.pod_now(&pod).await.is_none()).then_some(())
    })
    .await;
    let now = world.status("canon").await;
    assert_eq!(now, done);
    world.patch("canon", click("again")).await;
    succeed(&world, "canon", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_limit_that_may_change_reaches_the_running_pod() {
    let world = World::new("all-live-limits").await;
    let spec = json!({"prompt": "chat", "interactive": true, "inactivityTimeout": 60, "limits": {"maxTurns": 5}});
    world.create("rap", spec).await;
    let pod = world.pod("rap", 1).await;
    world.start(&pod).await;
    world.phase("rap", Phase::Running).await;
    let raised = json!({"inactivityTimeout": 90, "limits": {"maxTurns": 7, "maxCostUSD": "1.50", "maxTokens": 9000}});
    world.patch("rap", json!({"spec": raised})).await;
    let told = until("the annotation", async || {
        let pod = world.pod_now(&pod).await?;
        let limits: Value = serde_json::from_str(&pod.annotations()["vteam.ambient-code/limits"]).unwrap();
        (limits["maxTurns"] == 7).then_some(limits)
    })
    .await;
    assert_eq!(
        (&told["inactivityTimeout"], &told["maxTokens"]),
        (&json!(90), &json!(9000))
    );
    assert!(told["maxCostUSD"].to_string().contains("1.5"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_as_many_attempts_as_it_asks_for() {
    let mut world = World::without_operator("max-attempts").await;
    world.timing.retry_first_wait = 1;
    world.start_operator().await;
    for (name, attempts) in [("once", 1), ("twice", 2)] {
        world
            .create(name, json!({"prompt": "write", "retry": {"maxAttempts": attempts}}))
            .await;
        for attempt in 1..=attempts {
            let pod = world.pod(name, attempt).await;
            world.start(&pod).await;
            world.end(&pod, 1, None).await;
        }
        let failed = world.phase(name, Phase::Failed).await;
        assert_eq!(
            (failed.reason.as_deref(), failed.attempt),
            (Some("RunnerCrashed"), Some(attempts))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_when_its_time_after_the_end_is_over_with_all_that_it_had() {
    let mut world = World::without_operator("time-to-live").await;
    world.timing.drain_first_wait = 3_600;
    world.start_operator().await;
    let _kubelet = world.kubelet();
    for name in ["delivered", "undelivered", "suspended"] {
        let spec = json!({"prompt": "write", "ttlSecondsAfterFinished": 1});
        world.create(name, spec).await;
        let pod = world.pod(name, 1).await;
        world.start(&pod).await;
        world.phase(name, Phase::Running).await;
        match name {
            "delivered" => world.end(&pod, 2, Some(&report(Outcome::Succeeded, 1))).await,
            "undelivered" => {
                let left = protocol::Report {
                    events: protocol::report::Delivery::Failed,
                    acked_seq: 3,
                    ..report(Outcome::Succeeded, 1)
                };
                world.end(&pod, 2, Some(&left)).await;
            }
            _ => world.patch(name, json!({"spec": {"suspend": true}})).await,
        }
    }
    until("the delivered session and what it had to go", async || {
        let session = world.sessions().get_opt("delivered").await.unwrap();
        let job = world.jobs().get_opt("delivered-job").await.unwrap();
        (session.is_none() && job.is_none()).then_some(())
    })
    .await;
    // The others ended no later, and are looked at once more.
    world.phase("suspended", Phase::Stopped).await;
    let looks = world.looks().await;
    for name in ["undelivered", "suspended"] {
        world
            .patch(name, json!({"metadata": {"annotations": {"look": "again"}}}))
            .await;
    }
    until("more looks", async || (world.looks().await > looks + 1).then_some(())).await;
    assert_eq!(world.status("undelivered").await.phase, Phase::Completed);
    assert_eq!(world.status("suspended").await.phase, Phase::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ended_session_stays_ended_whatever_phase_is_written_over_it() {
    let world = World::new("written-over").await;
    world
        .create("poem", json!({"prompt": "p", "retry": {"maxAttempts": 1}}))
        .await;
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    world.phase("poem", Phase::Running).await;
    world.end(&pod, 2, Some(&report(Outcome::ModelUnavailable, 1))).await;
    let failed = world.phase("poem", Phase::Failed).await;
    for phase in ["Pending", "Running"] {
        let patch = Patch::Merge(json!({"status": {"phase": phase, "reason": null}}));
        let sessions = world.sessions();
        sessions
            .patch_status("poem", &PatchParams::default(), &patch)
            .await
            .unwrap();
        let again = world.phase("poem", Phase::Failed).await;
        assert_eq!(again, failed, "after {phase}");
    }
    assert_eq!(jobs_created(&world.namespace), ["poem-job"]);
    world.patch("poem", click("again")).await;
    succeed(&world, "poem", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_to_live_that_a_namespace_gets_counts_for_sessions_that_have_ended() {
    let mut world = World::without_operator("late-default").await;
    world.timing.job_retention = 1;
    world.start_operator().await;
    let _kubelet = world.kubelet();
    let long = json!({"prompt": "p", "ttlSecondsAfterFinished": 9_000});
    for (name, spec) in [("poem", json!({"prompt": "p"})), ("kept", long)] {
        world.create(name, spec).await;
        succeed(&world, name, 1).await;
    }
    until("Jobs and pods to go", async || {
        let jobs = world.jobs().list(&ListParams::default()).await.unwrap().items;
        let pods = world.pods().list(&ListParams::default()).await.unwrap().items;
        (jobs.is_empty() && pods.is_empty()).then_some(())
    })
    .await;
    let mut looks = (0, Instant::now());
    until("nothing to be heard of them any more", async || {
        let now = world.looks().await;
        if now != looks.0 {
            looks = (now, Instant::now());
        }
        (looks.1.elapsed() > Duration::from_secs(3)).then_some(())
    })
    .await;
    world
        .settings_of_the_namespace(json!({"ttlSecondsAfterFinished": 0}))
        .await;
    until("the session to go", async || {
        world.sessions().get_opt("poem").await.unwrap().is_none().then_some(())
    })
    .await;
    let kept = world.sessions().get_opt("kept").await.unwrap();
    assert!(kept.is_some(), "its own counts more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_to_live_that_is_given_to_a_session_that_has_ended_counts() {
    let world = World::new("late-time-to-live").await;
    world.create("poem", json!({"prompt": "p"})).await;
    succeed(&world, "poem", 1).await;
    world
        .patch("poem", json!({"spec": {"ttlSecondsAfterFinished": 0}}))
        .await;
    until("the session to go", async || {
        world.sessions().get_opt("poem").await.unwrap().is_none().then_some(())
    })
    .await;
}
