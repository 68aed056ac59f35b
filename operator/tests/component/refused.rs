//! What the API server, its webhooks or the admin's later word refuse.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use crds::{AgenticSessionStatus, Phase, condition};
use http::{Method, Request, Response, StatusCode};
use k8s_openapi::api::{admissionregistration::v1::ValidatingWebhookConfiguration, core::v1::ResourceQuota};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, PostParams},
    client::Body,
};
use protocol::{Outcome, Report, report::Delivery, report::RepoReport};
use serde_json::json;

use crate::{
    faults::whole,
    plane::operator_config,
    wire::{self, Answer, Fate, Wire},
    world::{World, report, until},
};

/// Refuses each Job, each time in other words.
#[derive(Clone, Default)]
struct Refuses(Arc<AtomicUsize>);

impl Wire for Refuses {
    fn fate(&self, request: &Request<Body>) -> Fate {
        if request.method() != Method::POST || !request.uri().path().ends_with("/jobs") {
            return Fate::Pass;
        }
        let time = self.0.fetch_add(1, Ordering::SeqCst) + 1;
        Fate::Instead(denied(time))
    }
}

/// A refusal, each time in other words.
fn denied(time: usize) -> Answer {
    let message = format!("admission webhook denied the request: no, for the {time}. time");
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": "Forbidden", "code": 403});
    let mut answer = Response::new(whole(status.to_string()));
    *answer.status_mut() = StatusCode::FORBIDDEN;
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_in_other_words_each_time_is_not_tried_again_at_once() {
    let mut world = World::without_operator("refused-words").await;
    let refuses = Refuses::default();
    world.start_operator_with(wire::client(operator_config("refused-words").await, refuses.clone()));
    world.create("poem", json!({"prompt": "p"})).await;
    let status = world
        .status_when("poem", |s| s.reason.as_deref() == Some("ConfigError"))
        .await;
    assert!(
        status.message.as_deref().unwrap().contains("for the 1. time"),
        "{status:#?}"
    );
    assert!(status.next_attempt_time.is_some(), "it is said when it is tried again");
    // Whatever makes the operator look: its own write has done so already.
    for number in 0..5 {
        let before = world.looks().await;
        world
            .patch("poem", json!({"metadata": {"labels": {"number": number.to_string()}}}))
            .await;
        until("a look", async || (world.looks().await > before).then_some(())).await;
    }
    assert_eq!(refuses.0.load(Ordering::SeqCst), 1);
    // Another spec may be taken.
    world.patch("poem", json!({"spec": {"displayName": "another"}})).await;
    world
        .status_when("poem", |s| {
            s.message.as_deref().unwrap_or_default().contains("for the 2. time")
        })
        .await;
    assert_eq!(refuses.0.load(Ordering::SeqCst), 2);
    // It can still be stopped.
    world.patch("poem", json!({"spec": {"suspend": true}})).await;
    world
        .status_when("poem", |s| s.reason.as_deref() == Some("Suspended"))
        .await;
}

/// Refuses every change and deletion of what has an address with this in it, each time in other words.
#[derive(Clone, Default)]
struct Guards(Arc<Mutex<(&'static str, usize)>>);

impl Guards {
    fn guard(&self, what: &'static str) {
        *self.0.lock().unwrap() = (what, 0);
    }

    /// Has the operator look, and waits until it was tried once more.
    async fn tried(&self, world: &World) {
        let before = self.0.lock().unwrap().1;
        world
            .patch("poem", json!({"metadata": {"labels": {"tried": before.to_string()}}}))
            .await;
        until("another refusal", async || {
            (self.0.lock().unwrap().1 > before).then_some(())
        })
        .await;
    }
}

impl Wire for Guards {
    fn fate(&self, request: &Request<Body>) -> Fate {
        let path = request.uri().path();
        let changes = matches!(*request.method(), Method::PATCH | Method::DELETE) && !path.ends_with("/status");
        let mut guarded = self.0.lock().unwrap();
        if !changes || guarded.0.is_empty() || !path.contains(guarded.0) {
            return Fate::Pass;
        }
        guarded.1 += 1;
        Fate::Instead(denied(guarded.1))
    }
}

fn said(status: &AgenticSessionStatus, type_: &str) -> Option<String> {
    let found = status.conditions.iter().find(|c| c.type_ == type_);
    found.map(|c| c.message.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_which_an_attempt_may_not_be_told_are_said_and_hold_up_nothing_else() {
    let mut world = World::without_operator("refused-limits").await;
    let refuses = Guards::default();
    world.start_operator_with(wire::client(operator_config("refused-limits").await, refuses.clone()));
    world.create("poem", json!({"prompt": "p", "timeout": 600})).await;
    let pod = world.pod("poem", 1).await;
    world.status_when("poem", |s| s.pod_uid == pod.uid()).await;
    refuses.guard("/jobs/");
    world.patch("poem", json!({"spec": {"timeout": 700}})).await;
    let said = |status: &AgenticSessionStatus| said(status, condition::SPEC_ACCEPTED);
    let told = world.status_when("poem", |s| said(s).is_some()).await;
    let expected = "The API server refuses to change the limits of Job poem-job: ";
    assert!(said(&told).unwrap().starts_with(expected), "{told:#?}");
    // Whatever makes the operator look: its own write has done so already.
    for number in 0..3 {
        let before = world.looks().await;
        world
            .patch("poem", json!({"metadata": {"labels": {"number": number.to_string()}}}))
            .await;
        until("a look", async || (world.looks().await > before).then_some(())).await;
    }
    world.start(&pod).await;
    let running = world.phase("poem", Phase::Running).await;
    assert_eq!(said(&running), said(&told), "it is still so, and the words stay");
    refuses.guard("");
    world.patch("poem", json!({"spec": {"displayName": "another"}})).await;
    world.status_when("poem", |s| said(s).is_none()).await;
    until("the pod to be told", async || {
        let annotations = world.pod_now(&pod).await?.metadata.annotations?;
        annotations["vteam.ambient-code/limits"].contains("700").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_should_go_and_may_not_is_said_once_and_holds_up_nothing_else() {
    let mut world = World::without_operator("refused-kept").await;
    (world.timing.job_retention, world.timing.retry_first_wait) = (1, 1);
    let guards = Guards::default();
    world.start_operator_with(wire::client(operator_config("refused-kept").await, guards.clone()));
    world
        .create("poem", json!({"prompt": "p", "ttlSecondsAfterFinished": 1}))
        .await;
    let told = async |what: String| {
        let begin = format!("The API server refuses to {what}: admission webhook denied the request: no");
        let is_told = |s: &AgenticSessionStatus| said(s, condition::CLEANED_UP).filter(|said| said.starts_with(&begin));
        guards.tried(&world).await;
        let first = world.status_when("poem", |s| is_told(s).is_some()).await;
        for _ in 0..2 {
            guards.tried(&world).await;
        }
        assert_eq!(is_told(&world.status("poem").await), is_told(&first), "the words stay");
        first
    };
    let first = world.pod("poem", 1).await;
    world.start(&first).await;
    world.phase("poem", Phase::Running).await;
    guards.guard("/pods/");
    world.patch("poem", json!({"spec": {"suspend": true}})).await;
    let stopping = told(format!("delete pod {}", first.name_any())).await;
    assert_eq!(stopping.phase, Phase::Stopping);

    guards.guard("/jobs/");
    world.obey_deletion(&first, Some(&report(Outcome::Stopped, 1))).await;
    world.phase("poem", Phase::Stopped).await;
    told("delete Job poem-job".to_owned()).await;
    world.patch("poem", json!({"spec": {"suspend": false}})).await;
    let second = world.pod("poem", 2).await;
    world.start(&second).await;
    world.phase("poem", Phase::Running).await;

    guards.guard("/pods/");
    world.end(&second, 2, Some(&report(Outcome::Succeeded, 2))).await;
    let ended = told(format!("release the report of pod {}", second.name_any())).await;
    assert_eq!(ended.phase, Phase::Completed);
    assert!(
        world.jobs().get_opt("poem-job").await.unwrap().is_none(),
        "that was allowed"
    );
    guards.guard("/agenticsessions/");
    told("delete session poem".to_owned()).await;
    guards.guard("");
    world.patch("poem", json!({"metadata": {"labels": null}})).await;
    until("the session to go", async || {
        world.sessions().get_opt("poem").await.unwrap().is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn that_something_may_not_go_is_said_no_more_when_it_has_gone() {
    let mut world = World::without_operator("refused-gone").await;
    world.timing.job_retention = 1;
    let guards = Guards::default();
    world.start_operator_with(wire::client(operator_config("refused-gone").await, guards.clone()));
    world.create("poem", json!({"prompt": "p"})).await;
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    world.phase("poem", Phase::Running).await;
    guards.guard("/jobs/");
    world.end(&pod, 2, Some(&report(Outcome::Succeeded, 1))).await;
    let said = |status: &AgenticSessionStatus| said(status, condition::CLEANED_UP);
    world.status_when("poem", |s| said(s).is_some()).await;
    // By somebody else.
    let background = DeleteParams::background();
    world.jobs().delete("poem-job", &background).await.unwrap();
    let status = world.status_when("poem", |s| said(s).is_none()).await;
    assert_eq!(status.phase, Phase::Completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_cannot_be_asked_is_said_and_the_session_begins_when_it_can() {
    let world = World::new("refused-webhook").await;
    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(world.client.clone());
    let away = json!({"metadata": {"name": "away"}, "webhooks": [{
        "name": "jobs.away.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None", "timeoutSeconds": 1,
        "clientConfig": {"url": "https://127.0.0.1:9/"}, "failurePolicy": "Fail",
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "refused-webhook"}},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
    }]});
    let away = serde_json::from_value(away).unwrap();
    webhooks.create(&PostParams::default(), &away).await.unwrap();
    // The API server takes up webhooks a moment later.
    let probe = json!({"metadata": {"generateName": "probe-"}, "spec": {"suspend": true, "template": {"spec": {"restartPolicy": "Never",
        "containers": [{"name": "c", "image": "i"}]}}}});
    let probe = serde_json::from_value(probe).unwrap();
    until("the webhook to be asked", async || {
        world
            .jobs()
            .create(&PostParams::default(), &probe)
            .await
            .is_err()
            .then_some(())
    })
    .await;
    world.create("poem", json!({"prompt": "p"})).await;
    let status = world.status_when("poem", |s| s.reason.is_some()).await;
    assert_eq!(
        (status.phase, status.reason.as_deref()),
        (Phase::Pending, Some("ConfigError"))
    );
    let message = status.message.unwrap();
    assert!(
        message.contains("poem-job") && message.contains("jobs.away.example.com"),
        "{message}"
    );
    webhooks.delete("away", &DeleteParams::default()).await.unwrap();
    world.phase("poem", Phase::Creating).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_a_quota_refuses_does_not_keep_the_job_that_fills_the_quota() {
    let mut world = World::without_operator("refused-drain").await;
    world.timing.job_retention = 2;
    world.timing.drain_first_wait = 1;
    let quotas: Api<ResourceQuota> = Api::namespaced(world.client.clone(), &world.namespace);
    let quota = json!({"metadata": {"name": "one-job"}, "spec": {"hard": {"count/jobs.batch": "1"}}});
    let quota = serde_json::from_value(quota).unwrap();
    quotas.create(&PostParams::default(), &quota).await.unwrap();
    until("the quota to count", async || {
        quotas.get("one-job").await.unwrap().status?.used
    })
    .await;
    world.start_operator().await;
    world.create("poem", json!({"prompt": "p"})).await;
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    world.phase("poem", Phase::Running).await;
    let left = Report {
        events: Delivery::Failed,
        acked_seq: 4,
        ..report(Outcome::Succeeded, 1)
    };
    world.end(&pod, 4, Some(&left)).await;
    let delivered = |status: &crds::AgenticSessionStatus| {
        let found = status
            .conditions
            .iter()
            .find(|c| c.type_ == condition::EVENTS_DELIVERED);
        found.map(|c| c.message.clone()).unwrap_or_default()
    };
    let held_up = world
        .status_when("poem", |s| delivered(s).contains("exceeded quota"))
        .await;
    assert!(
        delivered(&held_up).contains("Acknowledged to 4 of 17"),
        "{}",
        delivered(&held_up)
    );
    until("the first Job to go", async || {
        world.jobs().get_opt("poem-job").await.unwrap().is_none().then_some(())
    })
    .await;
    until("the drain", async || {
        world.jobs().get_opt("poem-drain-1").await.unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_allowed_is_not_judged_by_what_is_allowed_at_its_end() {
    let world = World::new("refused-later").await;
    let all = json!({"ceilings": {"timeout": 7200}});
    world.settings_of_the_namespace(all).await;
    let spec = |ttl: Option<u32>| {
        json!({"prompt": "p", "timeout": 5000, "ttlSecondsAfterFinished": ttl,
            "repos": [{"url": "https://git.example/team/tool.git", "autoPush": true}]})
    };
    world.create("kept", spec(None)).await;
    world.create("goes", spec(Some(1))).await;
    let mut pods = Vec::new();
    for name in ["kept", "goes"] {
        let pod = world.pod(name, 1).await;
        world.start(&pod).await;
        world.phase(name, Phase::Running).await;
        pods.push(pod);
    }
    world
        .settings_of_the_namespace(json!({"ceilings": {"timeout": 60}}))
        .await;
    // Seen when the sessions are looked at, which an edit brings about.
    let mut edits = 0;
    until("the settings to be seen", async || {
        edits += 1;
        world
            .patch("kept", json!({"spec": {"displayName": edits.to_string()}}))
            .await;
        let status = world.status("kept").await;
        status
            .conditions
            .iter()
            .any(|c| c.type_ == condition::SPEC_ACCEPTED)
            .then_some(())
    })
    .await;
    let pushed = Report {
        repos: vec![RepoReport {
            index: 0,
            branch: "sessions/kept".into(),
            commit: "0123abcd".into(),
            pushed: true,
        }],
        ..report(Outcome::Succeeded, 1)
    };
    for pod in &pods {
        world.end(pod, 4, Some(&pushed)).await;
    }
    let status = world.phase("kept", Phase::Completed).await;
    assert_eq!(
        status
            .repos
            .iter()
            .map(|repo| (repo.commit.as_deref(), repo.pushed))
            .collect::<Vec<_>>(),
        [(Some("0123abcd"), true)]
    );
    until("the session to go", async || {
        world.sessions().get_opt("goes").await.unwrap().is_none().then_some(())
    })
    .await;
    // The next run is judged by today's settings.
    let click = json!({"metadata": {"annotations": {"ambient-code.io/start-requested-at": "now"}}});
    world.patch("kept", click).await;
    let refused = world
        .status_when("kept", |s| s.reason.as_deref() == Some("ConfigError"))
        .await;
    assert_eq!(refused.phase, Phase::Pending, "{}", pods[0].name_any());
}
