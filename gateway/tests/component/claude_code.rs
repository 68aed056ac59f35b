//! The claude-code API: one request, one session, one answer.

use std::{collections::BTreeSet, time::Duration};

use futures::StreamExt as _;
use gateway::compat::Settings;
use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    support::{Served, soon, sse::http},
    tasks::{answered, ask, begin, complete, only_session, open, record, said, tool_result, turn_ended, user},
};

async fn session(served: &Served) -> (String, Value) {
    soon("the session", async {
        loop {
            if let Some(session) = served.cluster.sessions("team-a").into_iter().next() {
                return session;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

/// A session's agent uses a tool and answers.
async fn work(served: &Served, answer: &str) {
    let (name, _) = session(served).await;
    let mut runner = begin(served, &name).await;
    let tool = json!({"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "echo 42"}});
    let records = [
        record(
            1,
            0,
            "session",
            &json!({"event": "attemptStarted", "run": 1, "podUid": "p1", "runnerVersion": "1"}),
        ),
        user(2, 1, "prompt"),
        said(3, 1, "m1", &json!({"type": "text", "text": "I ask bc."})),
        said(4, 1, "m1", &tool),
        tool_result(5, 1, "t1", "42"),
    ];
    runner.send(&records).await;
    runner.send(&answered(6, 1, answer)).await;
    complete(served, &name, &mut runner, 8).await;
}

#[tokio::test]
async fn a_session_that_is_created_after_its_client_went_away_is_deleted() {
    let served = Served::serving(open()).await;
    served.cluster.hold_creates("team-a");
    let request = http().post(served.url("/claude-code")).json(&json!({"prompt": "p"}));
    tokio::select! {
        _ = request.send() => panic!("nothing is created yet"),
        () = soon("the create", served.cluster.creates_are_held(1)) => {}
    }
    // Longer than anybody would look for what may never come.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(served.cluster.sessions("team-a").is_empty());
    served.cluster.release_creates();
    Box::pin(soon("its beginning and its end", async {
        while served.cluster.changes() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }))
    .await;
    assert!(served.cluster.sessions("team-a").is_empty());
}

#[tokio::test]
async fn the_documented_request_is_answered_as_one_object_by_a_session_of_its_own() {
    let served = Served::serving(open()).await;
    let body =
        json!({"prompt": "What is 7 * 6?", "model": "openrouter/qwen/qwen3-coder", "stream": false, "maxTurns": 3});
    let (answer, ()) = tokio::join!(
        ask(served.address, "POST", "/claude-code", Some(&body)),
        work(&served, "42")
    );
    let (code, answer) = answer;
    let (name, session) = only_session(&served.cluster);
    assert_eq!(
        (code, &answer),
        (200, &json!({"type": "result", "result": "42", "sessionId": name}))
    );
    assert_eq!(
        session["spec"],
        json!({
            "prompt": "What is 7 * 6?", "interactive": false, "timeout": 600, "ttlSecondsAfterFinished": 60,
            "llmSettings": {"model": "openrouter/qwen/qwen3-coder"}, "limits": {"maxTurns": 3}, "workspace": {"ephemeral": true},
            "userContext": {"userId": "anonymous"},
        })
    );
}

#[rstest]
#[case("/claude-code")]
#[case("/")]
#[tokio::test]
async fn a_stream_has_a_line_for_each_thing_that_happens_and_the_result_at_its_end(#[case] path: &str) {
    let served = Served::serving(open()).await;
    let request = http()
        .post(served.url(path))
        .header("x-request-id", "mine-1")
        .json(&json!({"prompt": "What is 2+2?", "additionalArgs": ["--effort", "low"]}));
    let response = async {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(
            response.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/plain")
        );
        assert_eq!(response.headers()["x-request-id"], "mine-1");
        response.text().await.unwrap()
    };
    let (text, ()) = tokio::join!(response, work(&served, "4"));
    let (name, session) = only_session(&served.cluster);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        lines,
        [
            json!({"type": "assistant", "content": "I ask bc."}),
            json!({"type": "tool_call", "tool": "Bash", "input": "{\"command\":\"echo 42\"}"}),
            json!({"type": "tool_result", "tool": "Bash", "result": "42"}),
            json!({"type": "result", "result": "4", "sessionId": name}),
        ]
    );
    assert_eq!(session["spec"]["limits"]["maxTurns"], 3, "the default");
    assert_eq!(session["spec"]["additionalArgs"], json!(["--effort", "low"]));
    assert_eq!(
        session["metadata"]["annotations"]["vteam.ambient-code/request-id"],
        "mine-1"
    );
}

#[tokio::test]
async fn a_verbose_request_is_answered_with_the_messages_of_the_cli() {
    let served = Served::serving(open()).await;
    let body = json!({"prompt": "p", "stream": false, "verbose": true});
    let (answer, ()) = tokio::join!(
        ask(served.address, "POST", "/claude-code", Some(&body)),
        work(&served, "4")
    );
    let messages = answer.1["messages"].as_array().unwrap();
    let types: Vec<_> = messages
        .iter()
        .map(|message| message["type"].as_str().unwrap())
        .collect();
    assert_eq!(types, ["assistant", "assistant", "user", "result"], "{messages:?}");
}

#[rstest]
#[case("maxTurns", 500, "MaxTurns")]
#[case("timeout", 504, "Timeout")]
#[case("agentError", 500, "AgentError")]
#[tokio::test]
async fn a_request_that_fails_says_why_in_its_own_shape(#[case] outcome: &str, #[case] code: u16, #[case] error: &str) {
    for stream in [false, true] {
        let served = Served::serving(open()).await;
        let fail = async {
            let (name, _) = session(&served).await;
            let mut runner = begin(&served, &name).await;
            runner.send(&[user(1, 1, "prompt"), turn_ended(2, 1, outcome)]).await;
            // It stays connected until the request is answered.
            runner
        };
        let body = json!({"prompt": "p", "stream": stream});
        let (answer, _runner) = tokio::join!(ask(served.address, "POST", "/claude-code", Some(&body)), fail);
        assert_eq!(answer.0, if stream { 200 } else { code }, "{answer:?}");
        assert_eq!(
            (&answer.1["type"], &answer.1["error"]),
            (&json!("error"), &json!(error)),
            "{answer:?}"
        );
        assert!(
            answer.1["message"].is_string() && answer.1["details"].is_string(),
            "{answer:?}"
        );
    }
}

#[tokio::test]
async fn a_session_that_cannot_start_is_an_error_with_its_reason() {
    let served = Served::serving(open()).await;
    let fail = async {
        let (name, _) = session(&served).await;
        let failed = json!({
            "phase": "Failed", "reason": "NoCredentials", "message": "no key: see the two Secrets", "attempt": 1,
            "completionTime": "2026-01-02T03:04:05Z",
        });
        served.cluster.set_status("team-a", &name, &failed);
    };
    let body = json!({"prompt": "p", "stream": false});
    let ((code, answer), ()) = tokio::join!(ask(served.address, "POST", "/claude-code", Some(&body)), fail);
    assert_eq!((code, &answer["error"]), (500, &json!("NoCredentials")), "{answer}");
    assert_eq!(answer["message"], "no key: see the two Secrets");
}

#[rstest]
#[case(json!({"model": "m"}), "prompt")]
#[case(json!({"prompt": ""}), "prompt")]
#[case(json!({"prompt": "p", "promt": 1}), "promt")]
#[case(json!({"prompt": "p", "maxTurns": 0}), "maxTurns")]
#[case(json!({"prompt": "p", "additionalArgs": ["--model"]}), "--model")]
#[tokio::test]
async fn what_cannot_be_honoured_is_refused_by_name(#[case] body: Value, #[case] says: &str) {
    let served = Served::serving(open()).await;
    let (code, error) = ask(served.address, "POST", "/claude-code", Some(&body)).await;
    assert_eq!((code, &error["type"]), (400, &json!("error")), "{error}");
    assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    assert!(served.cluster.sessions("team-a").is_empty());
}

#[tokio::test]
async fn what_the_clusters_rules_refuse_comes_through_with_its_message() {
    let served = Served::serving(open()).await;
    served.cluster.refuse_create(json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 422, "reason": "Invalid",
        "message": "spec.additionalArgs must not contain flags that the product sets itself",
    }));
    let body = json!({"prompt": "p", "additionalArgs": ["--resume", "x"]});
    let (code, error) = ask(served.address, "POST", "/claude-code", Some(&body)).await;
    assert_eq!((code, &error["error"]), (422, &json!("Invalid")), "{error}");
    assert!(error["message"].as_str().unwrap().contains("additionalArgs"), "{error}");
}

#[rstest]
#[tokio::test]
async fn a_client_that_goes_away_takes_its_session_with_it(#[values(false, true)] stream: bool) {
    let served = Served::serving(open()).await;
    let request = http()
        .post(served.url("/claude-code"))
        .json(&json!({"prompt": "p", "stream": stream}))
        .send();
    let client = tokio::spawn(async move {
        let mut body = request.await.unwrap().bytes_stream();
        while body.next().await.is_some() {}
    });
    let (name, _) = session(&served).await;
    let mut runner = begin(&served, &name).await;
    runner.deliver(&[user(1, 1, "prompt")]).await;
    client.abort();
    Box::pin(soon("the session being deleted", async {
        while !served.cluster.sessions("team-a").is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }))
    .await;
}

#[tokio::test]
async fn ten_requests_at_once_have_ten_sessions_and_ten_answers() {
    let served = Served::serving(open()).await;
    let requests = (0..10).map(|n| {
        let body = json!({"prompt": format!("number {n}"), "stream": false});
        async move { (n, body) }
    });
    let asked = async {
        let answers = futures::future::join_all(requests.map(|request| async {
            let (n, body) = request.await;
            (n, ask(served.address, "POST", "/claude-code", Some(&body)).await)
        }));
        answers.await
    };
    let work = async {
        let mut done = BTreeSet::new();
        while done.len() < 10 {
            for (name, session) in served.cluster.sessions("team-a") {
                if done.insert(name.clone()) {
                    let prompt = session["spec"]["prompt"].as_str().unwrap().to_owned();
                    let mut runner = begin(&served, &name).await;
                    runner.send(&[user(1, 1, "prompt")]).await;
                    runner.send(&answered(2, 1, &format!("answer to {prompt}"))).await;
                    complete(&served, &name, &mut runner, 4).await;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (answers, ()) = Box::pin(soon("all answers", async { tokio::join!(asked, work) })).await;
    let mut sessions = BTreeSet::new();
    for (n, (code, answer)) in answers {
        assert_eq!(
            (code, &answer["result"]),
            (200, &json!(format!("answer to number {n}")))
        );
        sessions.insert(answer["sessionId"].as_str().unwrap().to_owned());
    }
    assert_eq!(sessions.len(), 10);
}

#[tokio::test]
async fn health_and_settings_are_shown_without_what_is_secret_and_settings_only_to_who_may_call() {
    let served = Served::serving(Settings {
        open: false,
        model: Some("claude-sonnet-5-5".to_owned()),
        ..open()
    })
    .await;
    served.gateway.use_key(Some("fake-key-of-the-environment"));
    let (code, alive) = ask(served.address, "GET", "/", None).await;
    assert_eq!((code, &alive["status"]), (200, &json!("healthy")), "{alive}");
    let (code, error) = ask(served.address, "GET", "/debug", None).await;
    assert_eq!((code, &error["type"]), (401, &json!("error")), "{error}");
    let debug = http()
        .get(served.url("/debug"))
        .bearer_auth("fake-key-of-the-environment");
    let debug = debug.send().await.unwrap().text().await.unwrap();
    let settings: Value = serde_json::from_str(&debug).unwrap();
    assert_eq!(settings["namespace"], "team-a");
    assert_eq!(settings["defaultModel"], "claude-sonnet-5-5");
    assert!(!debug.contains("fake-key"), "{debug}");
}

#[tokio::test]
async fn no_more_requests_are_under_way_than_have_a_place_however_many_come_at_once() {
    let settings = Settings {
        request_max: 2,
        ..open()
    };
    let served = Served::serving(settings).await;
    let body = json!({"prompt": "p", "stream": false});
    let requests = (0..6).map(|_| ask(served.address, "POST", "/claude-code", Some(&body)));
    let mut requests: futures::stream::FuturesUnordered<_> = requests.collect();
    for _ in 0..4 {
        let (code, answer) = soon("a refusal", requests.next()).await.unwrap();
        assert_eq!((code, &answer["type"]), (503, &json!("error")), "{answer}");
        assert!(
            answer["message"]
                .as_str()
                .unwrap()
                .contains("CLAUDE_CODE_MAX_CONCURRENT"),
            "{answer}"
        );
    }
    // Whoever goes away makes room when its session is gone.
    drop(requests);
    soon("the sessions being deleted", async {
        while !served.cluster.sessions("team-a").is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let room = async {
        while http()
            .post(served.url("/claude-code"))
            .json(&json!({"prompt": "p"}))
            .send()
            .await
            .unwrap()
            .status()
            == 503
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("room", room).await;
}

#[rstest]
#[case("GET", "/claude-code", 405, "error")]
#[case("DELETE", "/debug", 405, "error")]
#[case("GET", "/claude-code/x", 404, "error")]
#[tokio::test]
async fn what_there_is_not_is_said_in_the_form_of_the_api(
    #[case] method: &str,
    #[case] path: &str,
    #[case] code: u16,
    #[case] form: &str,
) {
    let served = Served::serving(open()).await;
    let (answered, body) = ask(served.address, method, path, None).await;
    assert_eq!((answered, &body["type"]), (code, &json!(form)), "{body}");
}
