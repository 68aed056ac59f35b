//! Tasks with a session of their own.

use super::*;

/// The body of the API's own description.
fn documented() -> Value {
    json!({
        "task_id": "task-123",
        "prompt": "Implement user authentication",
        "workspace": "/workspace/project",
        "options": {
            "allowed_tools": ["Read", "Write", "Edit", "Bash"],
            "permission_mode": "acceptEdits",
            "max_turns": 50,
            "timeout": 3600
        },
        "session": {"reuse_existing": false}
    })
}

#[tokio::test]
async fn a_task_becomes_a_session_with_all_its_options_and_is_answered_as_documented() {
    let served = Served::serving(open()).await;
    let answer = submit(&served, documented()).await;
    assert_eq!(answer["task_id"], "task-123");
    assert_eq!(answer["session_id"], "session-task-123");
    assert_eq!(answer["status"], "running");
    assert_eq!(
        answer["websocket_url"],
        format!("ws://{}/ws/tasks/task-123", served.address)
    );
    assert!(answer["created_at"].as_str().unwrap().ends_with('Z'));
    let (_, session) = only_session(&served.cluster);
    assert_eq!(
        session["spec"],
        json!({
            "prompt": "Implement user authentication", "displayName": "Task task-123", "interactive": false, "timeout": 3600,
            "limits": {"maxTurns": 50},
            "tools": {"allowed": ["Read", "Write", "Edit", "Bash"], "permissionMode": "acceptEdits"},
            "userContext": {"userId": "anonymous"},
        })
    );
}

#[tokio::test]
async fn a_task_sent_again_is_the_same_task_and_another_with_its_id_is_refused() {
    let served = Served::serving(open()).await;
    let first = submit(&served, documented()).await;
    assert_eq!(submit(&served, documented()).await, first);
    only_session(&served.cluster);
    let mut other = documented();
    other["prompt"] = "Something else".into();
    let (code, error) = ask(served.address, "POST", "/api/v1/tasks", Some(&other)).await;
    assert_eq!(code, 409, "{error}");
    assert!(error["detail"].as_str().unwrap().contains("task-123"), "{error}");
    only_session(&served.cluster);
}

#[tokio::test]
async fn a_task_tells_what_happens_in_it_also_to_a_client_that_comes_late() {
    let served = Served::serving(open()).await;
    submit(&served, documented()).await;
    let (name, _) = only_session(&served.cluster);
    let early = events(&served, "/ws/tasks/task-123");
    let work = async {
        let mut runner = begin(&served, &name).await;
        let write =
            json!({"type": "tool_use", "id": "t1", "name": "Write", "input": {"file_path": "/workspace/auth.py"}});
        let records = [
            user(1, 1, "prompt"),
            said(2, 1, "m1", &json!({"type": "text", "text": "I write it."})),
            said(3, 1, "m1", &write),
            usage(4, 1, "m1"),
            tool_result(5, 1, "t1", "written"),
            said(6, 1, "m2", &json!({"type": "text", "text": "Done."})),
            usage(7, 1, "m2"),
        ];
        runner.send(&records).await;
        assert_eq!(status(&served, "task-123").await["status"], "running");
        runner.send(&answered(8, 1, "Done.")).await;
        complete(&served, &name, &mut runner, 10).await;
    };
    let (early, ()) = tokio::join!(early, work);
    let (early, code) = early.unwrap();
    assert_eq!(code, 1000);
    assert_eq!(
        types(&early),
        [
            "message",
            "tool_use",
            "progress",
            "tool_result",
            "message",
            "progress",
            "complete"
        ]
    );
    assert_eq!(early[1]["data"]["tool"], "Write");
    assert_eq!(early[3]["data"]["content"], "written");
    let progress = &early[5]["data"];
    assert_eq!((&progress["turns"], &progress["tokens_used"]), (&json!(2), &json!(240)));
    assert_eq!(progress["files"], json!(["/workspace/auth.py"]));
    assert_eq!(early[6]["data"]["result"], "Done.");
    let (late, code) = events(&served, "/ws/tasks/task-123").await.unwrap();
    assert_eq!((late, code), (early, 1000));

    let task = status(&served, "task-123").await;
    assert_eq!(
        (&task["status"], &task["result"]),
        (&json!("completed"), &json!("Done."))
    );
    assert_eq!(
        task["progress"]["tokens"],
        json!({"input": 200, "output": 40, "cache_read": 0, "cache_creation": 0})
    );
    let metrics = soon("the task being counted", async {
        loop {
            let text = served.gateway.metrics.text().unwrap();
            if text.contains("tasks_total{status=\"completed\"} 1") {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(metrics.contains("\ntokens_used_total{type=\"input\"} 200"), "{metrics}");
    assert!(metrics.contains("\ntasks_duration_seconds_count 1"), "{metrics}");
    assert!(
        metrics.contains("\nhttp_requests_total{method=\"POST\",endpoint=\"/api/v1/tasks\",status=\"200\"} 1"),
        "{metrics}"
    );
    assert!(metrics.contains("\nactive_sessions "), "{metrics}");
    assert_eq!(metrics.matches("# EOF").count(), 1, "{metrics}");
}

#[tokio::test]
async fn a_task_whose_session_fails_before_it_begins_fails_with_the_sessions_reason() {
    let served = Served::serving(open()).await;
    submit(&served, documented()).await;
    let (name, _) = only_session(&served.cluster);
    let failed = json!({
        "phase": "Failed", "reason": "NoCredentials", "message": "no key: see the two Secrets", "attempt": 1,
        "completionTime": "2026-01-02T03:04:05Z",
    });
    let follow = events(&served, "/ws/tasks/task-123");
    let fail = async {
        served.cluster.set_status("team-a", &name, &failed);
    };
    let (followed, ()) = tokio::join!(follow, fail);
    let (followed, code) = followed.unwrap();
    assert_eq!((types(&followed), code), (vec!["error"], 1000));
    assert_eq!(followed[0]["data"]["error"], "NoCredentials");
    let task = status(&served, "task-123").await;
    assert_eq!(
        (&task["status"], &task["error"]),
        (&json!("failed"), &json!("NoCredentials"))
    );
    assert_eq!(task["message"], "no key: see the two Secrets");
}

#[tokio::test]
async fn a_task_that_works_is_interrupted_by_its_turn_and_one_that_waits_by_its_session() {
    let served = Served::serving(open()).await;
    submit(&served, json!({"task_id": "works", "prompt": "p"})).await;
    let (name, _) = only_session(&served.cluster);
    let mut runner = begin(&served, &name).await;
    runner.deliver(&[user(1, 1, "prompt")]).await;
    let (code, answer) = ask(served.address, "POST", "/api/v1/tasks/works/interrupt", None).await;
    assert_eq!(code, 200, "{answer}");
    assert_eq!(order(&mut runner).await["interrupt"]["turn"], 1);
    runner.send(&[turn_ended(2, 1, "stoppedByUser")]).await;
    let task = over(&served, "works").await;
    assert_eq!(task["status"], "interrupted");

    submit(&served, json!({"task_id": "waits", "prompt": "p"})).await;
    let (code, answer) = ask(served.address, "POST", "/api/v1/tasks/waits/interrupt", None).await;
    assert_eq!((code, &answer["status"]), (200, &json!("interrupted")), "{answer}");
    let waiting = answer["session"]["name"].as_str().unwrap();
    let sessions = served.cluster.sessions("team-a");
    assert_eq!(sessions[waiting]["spec"]["suspend"], true);
    let (code, again) = ask(served.address, "POST", "/api/v1/tasks/works/interrupt", None).await;
    assert_eq!((code, &again["status"]), (200, &json!("interrupted")), "{again}");
}

#[tokio::test]
async fn no_more_sessions_are_active_than_allowed_and_they_are_listed_and_deleted_by_id() {
    let settings = Settings {
        max_concurrent: 2,
        ..open()
    };
    let served = Served::serving(settings).await;
    submit(&served, json!({"task_id": "a", "prompt": "p"})).await;
    submit(&served, json!({"task_id": "b", "prompt": "p", "workspace": "/w"})).await;
    let third = json!({"task_id": "c", "prompt": "p"});
    let (code, error) = ask(served.address, "POST", "/api/v1/tasks", Some(&third)).await;
    assert_eq!(code, 503, "{error}");
    assert!(
        error["detail"]
            .as_str()
            .unwrap()
            .starts_with("Maximum concurrent sessions reached"),
        "{error}"
    );
    let (_, health) = ask(served.address, "GET", "/health", None).await;
    assert_eq!(
        (&health["status"], &health["active_sessions"], &health["active_tasks"]),
        (&json!("healthy"), &json!(2), &json!(2))
    );
    assert!(
        health["uptime_seconds"].is_u64() && health["version"].is_string(),
        "{health}"
    );
    let (_, list) = ask(served.address, "GET", "/api/v1/sessions", None).await;
    let ids: std::collections::BTreeSet<_> = list["sessions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|session| session["session_id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["session-a", "session-b"].into(), "{list}");
    let (code, answer) = ask(served.address, "DELETE", "/api/v1/sessions/session-a", None).await;
    assert_eq!((code, &answer["status"]), (200, &json!("deleted")), "{answer}");
    let (code, answer) = ask(served.address, "DELETE", "/api/v1/sessions/session-a", None).await;
    assert_eq!(code, 404, "{answer}");
    assert!(answer["detail"].is_string());
    submit(&served, third).await;
}

#[tokio::test]
async fn what_cannot_be_honoured_is_refused_by_name() {
    let served = Served::serving(open()).await;
    for (body, says) in [
        (json!({"task_id": "a"}), "prompt"),
        (json!({"prompt": "p", "options": {"temperature": 1}}), "temperature"),
        (
            json!({"prompt": "p", "options": {"permission_mode": "yolo"}}),
            "options.permission_mode",
        ),
        (json!({"prompt": "p", "options": {"timeout": 0}}), "options.timeout"),
        (json!({"prompt": "p", "options": {"max_turns": 0}}), "options.max_turns"),
        (json!({"prompt": "p", "task_id": "a/b"}), "task_id"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": "p", "session": {"reuse_existing": true}}), "workspace"),
    ] {
        let (code, error) = ask(served.address, "POST", "/api/v1/tasks", Some(&body)).await;
        assert_eq!(code, 422, "{body}: {error}");
        assert!(error["detail"].as_str().unwrap().contains(says), "{body}: {error}");
    }
    for (method, path) in [
        ("GET", "/api/v1/tasks/none"),
        ("POST", "/api/v1/tasks/none/interrupt"),
        ("DELETE", "/api/v1/sessions/none"),
    ] {
        let (code, error) = ask(served.address, method, path, None).await;
        assert_eq!(code, 404, "{path}: {error}");
        assert!(
            error["detail"].as_str().unwrap().contains("not found"),
            "{path}: {error}"
        );
    }
    assert!(served.cluster.sessions("team-a").is_empty());
    let refused = events(&served, "/ws/tasks/none").await.unwrap_err();
    assert!(matches!(refused, Error::Http(answer) if answer.status() == 404));
}

#[tokio::test]
async fn the_apis_are_not_there_unless_they_are_switched_on() {
    let served = Served::new().await;
    for (method, path) in [
        ("POST", "/api/v1/tasks"),
        ("GET", "/api/v1/sessions"),
        ("POST", "/claude-code"),
        ("GET", "/"),
        ("GET", "/debug"),
    ] {
        let (code, _) = ask(served.address, method, path, Some(&json!({"prompt": "p"}))).await;
        assert_eq!(code, 404, "{method} {path}");
    }
    let (_, health) = ask(served.address, "GET", "/health", None).await;
    assert!(health.get("active_sessions").is_none(), "{health}");
}

#[tokio::test]
async fn what_there_is_not_is_said_in_the_form_of_the_api() {
    let served = Served::serving(open()).await;
    for (method, path, code) in [
        ("PUT", "/api/v1/tasks", 405),
        ("GET", "/api/v1/other", 404),
        ("GET", "/ws/other", 404),
    ] {
        let (answered, body) = ask(served.address, method, path, None).await;
        assert_eq!(answered, code, "{body}");
        assert!(body["detail"].is_string(), "{method} {path}: {body}");
    }
    // Elsewhere as Kubernetes says it.
    assert_eq!(ask(served.address, "GET", "/other", None).await.1["kind"], "Status");
}
