//! Tasks that share the session of their workspace, keys, and what a gateway knows that has just started.

use std::io::Write as _;

use sha2::{Digest as _, Sha256};

use super::*;

fn task(id: &str) -> Value {
    json!({"task_id": id, "prompt": format!("do {id}"), "workspace": "/w", "session": {"reuse_existing": true}})
}

#[tokio::test]
async fn a_workspaces_session_takes_one_task_after_the_other_and_none_while_it_is_busy() {
    let served = Served::serving(open()).await;
    let first = submit(&served, task("one")).await;
    let (name, session) = only_session(&served.cluster);
    assert_eq!(session["spec"]["interactive"], true);
    assert_eq!(session["spec"]["inactivityTimeout"], 1800);
    let mut runner = begin(&served, &name).await;
    let (code, error) = ask(served.address, "POST", "/api/v1/tasks", Some(&task("two"))).await;
    assert_eq!(code, 409, "{error}");
    assert!(error["detail"].as_str().unwrap().contains("busy"), "{error}");
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, "First.")).await;
    assert_eq!(over(&served, "one").await["result"], "First.");

    let second = submit(&served, task("two")).await;
    assert_eq!(
        second["session_id"], first["session_id"],
        "its session is that of the first"
    );
    let message = order(&mut runner).await;
    assert_eq!(message["user_message"], json!({"id": "two", "text": "do two"}));
    assert_eq!(submit(&served, task("two")).await, second, "the same task");
    runner
        .send(&[
            user(4, 2, "two"),
            said(5, 2, "m9", &json!({"type": "text", "text": "2"})),
        ])
        .await;
    runner.send(&answered(6, 2, "Second.")).await;
    let (events, code) = events(&served, "/ws/tasks/two").await.unwrap();
    assert_eq!((types(&events), code), (vec!["message", "complete"], 1000));
    assert_eq!(events[1]["data"]["result"], "Second.");
    assert_eq!(
        over(&served, "one").await["result"],
        "First.",
        "and the first is as it was"
    );
    only_session(&served.cluster);
}

#[tokio::test]
async fn a_session_that_was_stopped_for_idleness_is_started_again_and_one_that_failed_is_replaced() {
    let served = Served::serving(open()).await;
    submit(&served, task("one")).await;
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(&served, &name).await;
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, "First.")).await;
    over(&served, "one").await;
    // A task that came now would be given to nobody.
    runner.send(&[end(4)]).await;
    while !matches!(runner.frame().await, GatewayFrame::Ack(ack) if ack.seq == 4) {}
    let (code, refused) = ask(served.address, "POST", "/api/v1/tasks", Some(&task("two"))).await;
    assert_eq!(code, 503, "{refused}");
    assert!(
        refused["detail"].as_str().unwrap().contains("is being stopped"),
        "{refused}"
    );
    let idle =
        json!({"phase": "Stopped", "reason": "Inactivity", "attempt": 1, "completionTime": jiff::Timestamp::now()});
    served.cluster.set_status("team-a", &name, &idle);
    submit(&served, task("two")).await;
    let (_, session) = only_session(&served.cluster);
    assert!(
        session["metadata"]["annotations"]["ambient-code.io/start-requested-at"].is_string(),
        "{session}"
    );
    let failed = json!({"phase": "Failed", "reason": "AgentError", "attempt": 1, "completionTime": jiff::Timestamp::now(),
        "handledStartRequest": session["metadata"]["annotations"]["ambient-code.io/start-requested-at"]});
    served.cluster.set_status("team-a", &name, &failed);
    submit(&served, task("three")).await;
    assert_eq!(served.cluster.sessions("team-a").len(), 2);
}

#[tokio::test]
async fn what_nobody_can_be_asked_is_denied_and_limits_are_held_in_a_session_that_goes_on() {
    let served = Served::serving(open()).await;
    let mut body = task("one");
    body["options"] = json!({"allowed_tools": ["Read"], "max_turns": 1, "timeout": 1000});
    submit(&served, body).await;
    let (name, session) = only_session(&served.cluster);
    assert_eq!(
        session["spec"]["tools"],
        json!({"allowed": ["Read"], "permissionMode": "default"})
    );
    assert!(session["spec"].get("limits").is_none(), "{session}");
    let mut runner = begin(&served, &name).await;
    let question = json!({"type": "control_request", "request_id": "q1", "request": {"subtype": "can_use_tool", "tool_name": "Bash"}});
    runner
        .send(&[
            user(1, 1, "prompt"),
            said(2, 1, "m1", &json!({"type": "text", "text": "a"})),
            record(3, 1, "cli", &question),
        ])
        .await;
    let denied = order(&mut runner).await;
    assert_eq!(denied["permission_response"]["requestId"], "q1");
    assert_eq!(denied["permission_response"]["response"]["behavior"], "deny");
    runner
        .send(&[
            record(
                4,
                1,
                "session",
                &json!({"event": "permissionAnswered", "requestId": "q1", "allowed": false}),
            ),
            tool_result(5, 1, "t1", "denied"),
        ])
        .await;
    let stop = order(&mut runner).await;
    assert_eq!(stop["interrupt"], json!({"id": "gateway/max-turns/1", "turn": 1}));
    runner
        .send(&[
            record(
                6,
                1,
                "session",
                &json!({"event": "commandDone", "id": "gateway/max-turns/1"}),
            ),
            turn_ended(7, 1, "stoppedByUser"),
        ])
        .await;
    let ended = over(&served, "one").await;
    assert_eq!(
        (&ended["status"], &ended["error"]),
        (&json!("failed"), &json!("MaxTurns"))
    );

    let mut second = task("two");
    second["options"] = json!({"timeout": 1});
    submit(&served, second).await;
    assert_eq!(order(&mut runner).await["user_message"]["id"], "two");
    runner.send(&[user(8, 2, "two")]).await;
    let stop = order(&mut runner).await;
    assert_eq!(stop["interrupt"], json!({"id": "gateway/timeout/2", "turn": 2}));
    runner
        .send(&[
            record(
                9,
                2,
                "session",
                &json!({"event": "commandDone", "id": "gateway/timeout/2"}),
            ),
            turn_ended(10, 2, "stoppedByUser"),
        ])
        .await;
    assert_eq!(over(&served, "two").await["error"], "Timeout");
    let mut third = task("three");
    third["options"] = json!({"permission_mode": "bypassPermissions"});
    let (code, error) = ask(served.address, "POST", "/api/v1/tasks", Some(&third)).await;
    assert_eq!(code, 409, "{error}");
    assert!(error["detail"].as_str().unwrap().contains("permission_mode"), "{error}");
}

#[tokio::test]
async fn a_gateway_that_has_just_started_knows_every_task() {
    let cluster = Cluster::start().await;
    let log = std::sync::Arc::new(gateway::store::memory::MemoryLog::default());
    let served = Served::with(cluster.client(), cluster.clone(), log.clone(), open()).await;
    submit(&served, task("one")).await;
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(&served, &name).await;
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, "First.")).await;
    over(&served, "one").await;
    submit(&served, task("two")).await;
    order(&mut runner).await;
    runner.send(&[user(4, 2, "two")]).await;
    let before = served;
    before.gateway.shutdown.cancel();
    let served = Served::with(cluster.client(), cluster, log, open()).await;
    assert_eq!(status(&served, "one").await["result"], "First.");
    assert_eq!(status(&served, "two").await["status"], "running");
    submit(&served, task("two")).await;
    let (code, error) = ask(served.address, "POST", "/api/v1/tasks", Some(&task("three"))).await;
    assert_eq!(code, 409, "{error}");
    only_session(&served.cluster);
}

fn keyed(served: &Served) {
    let entry = |name: &str, rate: u32| {
        let sha256 = hex::encode(Sha256::digest(format!("fake-{name}-key")));
        json!({"name": name, "sha256": sha256, "namespace": "team-a", "verbs": ["create", "get", "list"], "ratePerMinute": rate})
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let keys = json!({"keys": [entry("ann", 100), entry("bob", 3)]});
    file.write_all(keys.to_string().as_bytes()).unwrap();
    served.gateway.keys.load(file.path()).unwrap();
}

#[tokio::test]
async fn who_has_a_key_sees_their_own_tasks_and_who_has_none_is_refused() {
    let settings = Settings {
        open: false,
        rate: Some(2),
        ..open()
    };
    let served = Served::serving(settings).await;
    served.gateway.use_key(Some("fake-key-of-the-environment"));
    keyed(&served);
    let get = async |path: &str, header: &str, value: &str| {
        let response = http().get(served.url(path)).header(header, value).send().await.unwrap();
        let after = response.headers().get("retry-after").cloned();
        (
            response.status().as_u16(),
            after,
            response.json::<Value>().await.unwrap(),
        )
    };
    let (code, error) = ask(served.address, "GET", "/api/v1/sessions", None).await;
    assert_eq!(code, 401, "{error}");
    assert!(error["detail"].as_str().unwrap().contains("X-API-Key"), "{error}");
    let (code, ..) = get("/api/v1/sessions", "x-api-key", "fake-unknown-key").await;
    assert_eq!(code, 401);
    let body = json!({"task_id": "mine", "prompt": "p"});
    let mine = http()
        .post(served.url("/api/v1/tasks"))
        .header("x-api-key", "fake-ann-key")
        .json(&body);
    assert_eq!(mine.send().await.unwrap().status(), 200);
    let (code, _, list) = get("/api/v1/sessions", "authorization", "Bearer fake-ann-key").await;
    assert_eq!((code, &list["total"]), (200, &json!(1)));
    let (code, ..) = get("/api/v1/tasks/mine", "x-api-key", "fake-bob-key").await;
    assert_eq!(code, 404, "another key's task");
    let (_, _, list) = get("/api/v1/sessions", "x-api-key", "fake-bob-key").await;
    assert_eq!(list["total"], 0);
    let delete = http()
        .delete(served.url("/api/v1/sessions/session-mine"))
        .header("x-api-key", "fake-ann-key");
    let refused = delete.send().await.unwrap();
    assert_eq!(refused.status(), 403, "its verbs do not have it");

    for (path, key, calls) in [
        ("/api/v1/sessions", "fake-key-of-the-environment", 2),
        ("/api/v1/sessions", "fake-bob-key", 1),
    ] {
        for _ in 0..calls {
            assert_eq!(get(path, "x-api-key", key).await.0, 200);
        }
        let (code, after, error) = get(path, "x-api-key", key).await;
        assert_eq!(code, 429, "{error}");
        assert!(after.is_some() && error["detail"].is_string(), "{error}");
    }
}

#[tokio::test]
async fn the_effective_mapping_is_shown_to_administrators_without_what_is_secret() {
    let served = Served::serving(open()).await;
    keyed(&served);
    served.cluster.caller("token", "root");
    served.cluster.caller("other", "ann");
    served.cluster.allow("root", &["list"], "");
    let health = async |token: &str| {
        let request = http().get(served.url("/health?verbose=true")).bearer_auth(token);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let (code, text) = health("token").await;
    assert_eq!(code, 200, "{text}");
    let mapping = serde_json::from_str::<Value>(&text).unwrap()["mapping"].take();
    assert_eq!(mapping["namespace"], "team-a");
    assert_eq!(mapping["authentication"], false);
    assert_eq!(
        mapping["keys"][1],
        json!({"name": "bob", "namespace": "team-a", "verbs": ["create", "get", "list"], "ratePerMinute": 3})
    );
    assert!(!text.contains("sha256") && !text.contains(&hex::encode(Sha256::digest("fake-bob-key"))));
    assert_eq!(health("other").await.0, 403);
    assert_eq!(ask(served.address, "GET", "/health?verbose=true", None).await.0, 401);
}

#[tokio::test]
async fn a_web_page_cannot_make_its_visitor_submit_a_task_where_no_key_is_needed() {
    let served = Served::serving(open()).await;
    let body = json!({"prompt": "p"}).to_string();
    for path in ["/api/v1/tasks", "/claude-code", "/api/v1/tasks/t/interrupt"] {
        let request = http()
            .post(served.url(path))
            .header("origin", "https://evil.example.com")
            .header("content-type", "text/plain")
            .body(body.clone());
        assert_eq!(request.send().await.unwrap().status(), 403, "{path}");
    }
    assert!(served.cluster.sessions("team-a").is_empty());
}

#[tokio::test]
async fn sessions_that_ended_long_ago_are_removed_and_no_others() {
    let settings = Settings {
        cleanup_every: Duration::from_millis(1),
        keep_ended: Duration::from_hours(1),
        ..open()
    };
    let served = Served::serving(settings).await;
    for id in ["old", "new", "runs"] {
        submit(&served, json!({"task_id": id, "prompt": "p"})).await;
    }
    let names: std::collections::BTreeMap<String, String> = served
        .cluster
        .sessions("team-a")
        .into_iter()
        .map(|(name, session)| {
            let id = &session["metadata"]["annotations"]["vteam.ambient-code/task-id"];
            (id.as_str().unwrap().to_owned(), name)
        })
        .collect();
    let ended =
        |at: jiff::Timestamp| json!({"phase": "Completed", "reason": "Completed", "attempt": 1, "completionTime": at});
    let now = jiff::Timestamp::now();
    served.cluster.set_status("team-a", &names["new"], &ended(now));
    let long_ago = now - jiff::SignedDuration::from_hours(2);
    served.cluster.set_status("team-a", &names["old"], &ended(long_ago));
    Box::pin(soon("the old one being removed", async {
        while served.cluster.sessions("team-a").contains_key(&names["old"]) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }))
    .await;
    assert_eq!(served.cluster.sessions("team-a").len(), 2);
}

#[tokio::test]
async fn who_may_only_create_sends_no_task_into_a_session_that_is_there() {
    let served = Served::serving(Settings { open: false, ..open() }).await;
    for (token, user, verbs) in [
        ("token-a", "ann", &["create", "get", "update"][..]),
        ("token-b", "bob", &["create", "get"]),
    ] {
        served.cluster.caller(token, user);
        served.cluster.allow(user, verbs, "team-a");
    }
    let post = async |token: &str, id: &str| {
        let request = http()
            .post(served.url("/api/v1/tasks"))
            .bearer_auth(token)
            .json(&task(id));
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    assert_eq!(post("token-b", "one").await.0, 200, "a session of its own");
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(&served, &name).await;
    runner.send(&[user(1, 1, "prompt")]).await;
    runner.send(&answered(2, 1, "First.")).await;
    let sent = async {
        loop {
            // Until the first task is over there is no place for another one.
            match post("token-b", "two").await {
                (409, _) => tokio::time::sleep(Duration::from_millis(10)).await,
                answer => return answer,
            }
        }
    };
    let (code, error) = soon("an answer", sent).await;
    assert_eq!(code, 403, "{error}");
    assert!(error["detail"].as_str().unwrap().contains("update"), "{error}");
    assert_eq!(post("token-a", "three").await.0, 200);
    assert_eq!(order(&mut runner).await["user_message"]["id"], "three");
}
