//! What is asked of an API server that keeps nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use http::{Request as Asked, Response};
use kube::client::Body;
use protocol::spec::LiveLimits;
use rstest::rstest;
use serde_json::Value;

use super::*;
use crate::{
    session::{
        observed::Resolved,
        plan::Attempt,
        validate::tests::{checked, session},
    },
    settings::{PullPolicy, RunAs},
};

#[derive(Default)]
struct Server {
    /// What it answers to requests that begin so; to others that it was done.
    answers: HashMap<&'static str, (u16, Value)>,
    asked: Vec<(String, Value)>,
}

type Shared = Arc<Mutex<Server>>;

fn client(server: &Shared) -> Client {
    let server = Arc::clone(server);
    let service = tower::service_fn(move |request: Asked<Body>| {
        let server = Arc::clone(&server);
        async move {
            let (parts, body) = request.into_parts();
            let body = serde_json::from_slice(&body.collect_bytes().await?).unwrap_or_default();
            let path = parts.uri.path().rsplit('/').take(2).collect::<Vec<_>>();
            let asked = format!("{} {}/{}", parts.method, path[1], path[0]);
            let mut server = server.lock().unwrap();
            let found = server.answers.iter().find(|(begin, _)| asked.starts_with(**begin));
            let done = match parts.method {
                http::Method::DELETE => json!({"kind": "Status", "status": "Success", "metadata": {}}),
                _ => json!({"metadata": {}}),
            };
            let (status, answer) = found.map_or((200, done), |(_, answer)| answer.clone());
            server.asked.push((asked, body));
            let answer = Body::from(serde_json::to_vec(&answer).unwrap());
            Ok::<_, kube::Error>(Response::builder().status(status).body(answer).unwrap())
        }
    });
    Client::new(service, "poets")
}

fn refusal(code: u16, message: &str) -> (u16, Value) {
    let reason = match (code, message) {
        (404, _) => "NotFound",
        (409, "exists") => "AlreadyExists",
        (409, _) => "Conflict",
        _ => "Other",
    };
    let status = json!({"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code});
    (code, status)
}

/// All that a plan can hold, which none does.
fn everything(session: &AgenticSession) -> Plan {
    let attempt = Attempt {
        number: 3,
        run: 2,
        used_seconds: 0,
        held: false,
    };
    let (name, uid) = (|what: &str| format!("a-{what}"), |what: &str| format!("uid-of-{what}"));
    Plan {
        create_claim: true,
        create_job: Some(attempt),
        create_drain: Some(Drain { number: 5, attempt }),
        tune: vec![
            Tuned::Job(name("job"), uid("job"), Resolved::default()),
            Tuned::Pod(name("pod"), uid("pod"), LiveLimits::default()),
        ],
        delete: vec![
            Target::Pod(name("lost-pod"), uid("lost-pod")),
            Target::Job(name("old-job"), uid("old-job")),
        ],
        delete_session: true,
        release: vec![(name("read-pod"), uid("read-pod"))],
        ..Plan::nothing(session.status.clone().unwrap_or_default())
    }
}

async fn applied(server: &Shared, plan: &Plan) -> Result<Refusals, Error> {
    let mut session = session(json!({"prompt": "p"}));
    session.metadata.resource_version = Some("77".to_owned());
    let request = checked(json!({"prompt": "p"})).unwrap();
    let settings = PodSettings {
        runner_image: "registry.test/runner:7".into(),
        gateway_url: Some("ws://agentic-gateway.agentic.svc:8080/".into()),
        run_as_user: RunAs::User(10001),
        image_pull_policy: PullPolicy::IfNotPresent,
    };
    apply(&client(server), &session, plan, Some(&request), &settings).await
}

/// Each in its turn, and to nothing but what was seen.
#[tokio::test]
async fn what_goes_goes_before_what_is_made_and_nothing_is_changed_that_is_not_what_was_seen() {
    let server = Shared::default();
    let session = session(json!({"prompt": "p"}));
    applied(&server, &everything(&session)).await.unwrap();
    let asked = std::mem::take(&mut server.lock().unwrap().asked);
    let preconditions: Vec<_> = asked
        .iter()
        .map(|(asked, body)| {
            let seen = match body.pointer("/preconditions") {
                Some(preconditions) => json!([preconditions, body["propagationPolicy"]]),
                None if body.is_array() => body.clone(),
                None => body["metadata"].get("uid").cloned().unwrap_or_default(),
            };
            (&**asked, seen)
        })
        .collect();
    let only = |uid: &str| json!([{"uid": uid}, "Background"]);
    let session_uid = session.uid().unwrap();
    let release = json!([
        {"op": "test", "path": "/metadata/uid", "value": "uid-of-read-pod"},
        {"op": "test", "path": "/metadata/finalizers/0", "value": REPORT_FINALIZER},
        {"op": "remove", "path": "/metadata/finalizers/0"},
    ]);
    let expected = [
        ("PATCH jobs/a-job", json!("uid-of-job")),
        ("PATCH pods/a-pod", json!("uid-of-pod")),
        ("DELETE pods/a-lost-pod", only("uid-of-lost-pod")),
        ("DELETE jobs/a-old-job", only("uid-of-old-job")),
        ("PATCH pods/a-read-pod", release),
        ("POST poets/persistentvolumeclaims", Value::Null),
        ("POST poets/jobs", Value::Null),
        ("POST poets/jobs", Value::Null),
        (
            "DELETE agenticsessions/write-poem",
            json!([{"uid": session_uid, "resourceVersion": "77"}, "Background"]),
        ),
    ];
    assert_eq!(preconditions, expected);
    let names: Vec<_> = asked[5..8].iter().map(|(_, body)| &body["metadata"]["name"]).collect();
    assert_eq!(
        names,
        ["ambient-workspace-write-poem", "write-poem-job-3", "write-poem-drain-5"]
    );
}

#[tokio::test]
async fn what_was_not_done_keeps_what_comes_after_it_from_being_done() {
    let plan = everything(&session(json!({"prompt": "p"})));
    let whole = Shared::default();
    applied(&whole, &plan).await.unwrap();
    let whole: Vec<_> = whole
        .lock()
        .unwrap()
        .asked
        .iter()
        .map(|(asked, _)| asked.clone())
        .collect();
    for (at, asked) in whole.iter().enumerate().filter(|(at, _)| *at != 7) {
        let server = Shared::default();
        let begin: &'static str = asked.clone().leak();
        server.lock().unwrap().answers.insert(begin, refusal(503, "away"));
        assert!(
            matches!(applied(&server, &plan).await, Err(Error::Write { .. })),
            "{asked}"
        );
        assert_eq!(server.lock().unwrap().asked.len(), at + 1, "{asked}");
    }
}

#[rstest]
#[case::gone("DELETE", refusal(404, ""))]
#[case::gone_before_it_was_tuned("PATCH", refusal(404, ""))]
#[case::replaced("DELETE pods", refusal(409, "another UID"))]
#[case::a_job_replaced("DELETE jobs", refusal(409, "another UID"))]
#[tokio::test]
async fn what_is_gone_or_replaced_is_done_with(#[case] asked: &'static str, #[case] answer: (u16, Value)) {
    let server = Shared::default();
    server.lock().unwrap().answers.insert(asked, answer);
    let refusals = applied(&server, &everything(&session(json!({"prompt": "p"})))).await;
    assert_eq!(refusals.unwrap(), Refusals::default());
    assert_eq!(server.lock().unwrap().asked.len(), 9);
}

#[rstest]
#[case::limits_of_a_job("PATCH jobs/a-job", "change the limits of Job a-job", false)]
#[case::limits_of_a_pod("PATCH pods/a-pod", "change the limits of pod a-pod", false)]
#[case::the_end_of_a_pod("DELETE pods", "delete pod a-lost-pod", true)]
#[case::the_end_of_a_job("DELETE jobs", "delete Job a-old-job", true)]
#[case::the_release_of_a_pod("PATCH pods/a-read-pod", "release the report of pod a-read-pod", true)]
#[case::the_end_of_the_session("DELETE agenticsessions", "delete session write-poem", true)]
#[tokio::test]
async fn what_may_not_be_changed_or_taken_away_is_told_of_and_keeps_nothing_else_from_being_done(
    #[case] asked: &'static str,
    #[case] what: &str,
    #[case] should_go: bool,
) {
    // But the session goes last.
    let writes = if should_go && !asked.contains("sessions") { 8 } else { 9 };
    let server = Shared::default();
    server.lock().unwrap().answers.insert(asked, refusal(403, "not that"));
    let refusals = applied(&server, &everything(&session(json!({"prompt": "p"}))))
        .await
        .unwrap();
    let expected = Refusal {
        what: what.to_owned(),
        said: "not that".to_owned(),
    };
    let (kept, untold) = if should_go {
        (refusals.kept, refusals.untold)
    } else {
        (refusals.untold, refusals.kept)
    };
    assert_eq!((kept, untold), (Some(expected), None));
    assert_eq!(server.lock().unwrap().asked.len(), writes);
}

#[rstest]
#[case::a_session_that_changed("DELETE agenticsessions", refusal(409, "changed"), "race")]
#[case::a_pod_that_was_replaced("PATCH pods/a-pod", refusal(409, "another UID"), "race")]
#[case::a_name_that_is_taken("POST poets/jobs", refusal(409, "exists"), "race")]
#[case::a_quota("POST poets/jobs", refusal(403, "exceeded quota"), "refused")]
#[case::a_value("POST poets/persistentvolumeclaims", refusal(422, "invalid"), "refused")]
#[case::a_webhook("POST poets/jobs", refusal(500, "failed calling webhook \"w\""), "refused")]
#[case::an_error_of_the_server("POST poets/jobs", refusal(500, "etcd"), "again")]
#[case::too_many_requests("POST poets/jobs", refusal(429, "slow down"), "again")]
#[tokio::test]
async fn what_the_api_server_does_not_take_is_looked_at_anew_waited_for_or_tried_again(
    #[case] asked: &'static str,
    #[case] answer: (u16, Value),
    #[case] expected: &str,
) {
    let server = Shared::default();
    server.lock().unwrap().answers.insert(asked, answer);
    let plan = everything(&session(json!({"prompt": "p"})));
    let error = applied(&server, &plan).await.unwrap_err();
    let found = match &error {
        error if error.is_race() => "race",
        Error::Refused { .. } => "refused",
        _ => "again",
    };
    assert_eq!(found, expected, "{error}");
}

#[tokio::test]
async fn a_drain_whose_name_is_taken_waits() {
    let server = Shared::default();
    server
        .lock()
        .unwrap()
        .answers
        .insert("POST poets/jobs", refusal(409, "exists"));
    let plan = Plan {
        create_job: None,
        ..everything(&session(json!({"prompt": "p"})))
    };
    let error = applied(&server, &plan).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }) && !error.is_race(), "{error}");
}

#[rstest]
#[case::behind_anothers(json!({"uid": "u", "finalizers": ["other/a", REPORT_FINALIZER, "other/b"]}), Some(json!(["other/a", "other/b"])))]
#[case::of_another_pod(json!({"uid": "v", "finalizers": ["other/a", REPORT_FINALIZER]}), None)]
#[case::that_is_gone(json!({"uid": "u", "finalizers": ["other/a"]}), None)]
#[tokio::test]
async fn a_finalizer_that_is_not_the_first_is_taken_off_the_version_that_was_read(
    #[case] mut metadata: Value,
    #[case] left: Option<Value>,
) {
    let server = Shared::default();
    metadata["name"] = json!("a-pod");
    metadata["resourceVersion"] = json!("12");
    let pod = json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": metadata});
    server
        .lock()
        .unwrap()
        .answers
        .insert("PATCH", refusal(422, "the test failed"));
    server.lock().unwrap().answers.insert("GET", (200, pod));
    let released = release(&client(&server), "poets", "a-pod", "u").await;
    let asked = std::mem::take(&mut server.lock().unwrap().asked);
    let second = asked.get(2).map(|(_, body)| body["metadata"].clone());
    assert_eq!(
        second,
        left.map(|left| json!({"resourceVersion": "12", "finalizers": left}))
    );
    assert_eq!(released.is_err(), second.is_some(), "refused as the first was");
}
