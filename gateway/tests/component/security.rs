//! Who may do what, and what those who may not can do.

use std::io::Write as _;

use http::{Method, StatusCode};
use rstest::rstest;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use gateway::compat::Settings;

use crate::support::{
    Served, records,
    runner::{Runner, hello},
    soon,
    sse::http,
};

/// Verbs by namespace.
type Rights = &'static [(&'static str, &'static [&'static str])];

/// Of the callers below and what they may, the one truth that the matrix is held against.
const RIGHTS: &[(&str, Rights)] = &[
    ("nobody", &[]),
    ("unknown token", &[]),
    ("runner", &[]),
    ("reader", &[("team-a", &["get", "list"])]),
    ("writer", &[("team-a", &VERBS)]),
    ("neighbour", &[("team-ab", &VERBS)]),
    (
        "everywhere",
        &[("team-a", &["get", "list"]), ("team-ab", &["get", "list"])],
    ),
    ("key: reader", &[("team-a", &["get", "list"])]),
    ("key: creator", &[("team-ab", &["create"])]),
    ("unknown key", &[]),
];

const VERBS: [&str; 5] = ["get", "list", "create", "update", "delete"];

/// Every operation of the API, by its id, and the rights that it asks for.
const OPERATIONS: &[(&str, &[&str])] = &[
    ("getHealth", &[]),
    ("getLiveness", &[]),
    ("getOpenapi", &[]),
    ("listSessions", &["list"]),
    ("createSession", &["create"]),
    ("getSession", &["get"]),
    ("updateSession", &["update"]),
    ("patchSession", &["update"]),
    ("deleteSession", &["delete"]),
    ("startSession", &["update"]),
    ("stopSession", &["update"]),
    ("cloneSession", &["get", "create"]),
    ("listMessages", &["get"]),
    ("sendMessage", &["update"]),
    ("interrupt", &["update"]),
    ("answerPermission", &["update"]),
    ("endSession", &["update"]),
    ("getCommand", &["get"]),
    ("getTranscript", &["get"]),
    ("followSession", &["get"]),
    ("followSessionSocket", &["get"]),
    ("listWorkspace", &["get"]),
    ("readWorkspace", &["get"]),
    ("writeWorkspace", &["update"]),
];

/// Method, path and rights of every operation that the document has. One that the table above lacks is a failure.
fn operations() -> Vec<(Method, String, &'static [&'static str])> {
    let document = gateway::api::openapi(&gateway::compat::Settings::default());
    let mut found = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap();
            let known = OPERATIONS.iter().find(|(known, _)| *known == id);
            let (_, verbs) = known.unwrap_or_else(|| panic!("{id} asks for rights that no test knows of"));
            found.push((method.to_uppercase().parse().unwrap(), path.clone(), *verbs));
        }
    }
    assert_eq!(found.len(), OPERATIONS.len(), "an operation is gone");
    found
}

fn key(name: &str) -> String {
    format!("fake-{name}-key")
}

fn keys(served: &Served) {
    let entry = |name: &str, namespace: &str, verbs: &[&str]| {
        let sha256 = hex::encode(Sha256::digest(key(name)));
        json!({"name": name, "sha256": sha256, "namespace": namespace, "verbs": verbs})
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let keys = json!({"keys": [entry("reader", "team-a", &["get", "list"]), entry("creator", "team-ab", &["create"])]});
    file.write_all(keys.to_string().as_bytes()).unwrap();
    served.gateway.keys.load(file.path()).unwrap();
}

#[tokio::test]
async fn every_caller_may_do_exactly_what_it_was_given_in_each_namespace() {
    let served = Served::new().await;
    let client = http();
    for (name, uid, namespace) in [("s", "u", "team-a"), ("s", "u-ab", "team-ab")] {
        served.cluster.set(namespace, name, uid, &json!({"phase": "Running"}));
    }
    for (caller, rights) in RIGHTS {
        for (namespace, verbs) in *rights {
            served.cluster.allow(caller, verbs, namespace);
        }
        if !["nobody", "unknown token", "runner"].contains(caller) && !caller.contains("key") {
            served.cluster.caller(&format!("token of {caller}"), caller);
        }
    }
    served.cluster.runner("token of runner", Some("p1"));
    keys(&served);
    let (mut asked, mut allowed) = (0, 0);
    for (caller, rights) in RIGHTS {
        for namespace in ["team-a", "team-ab", "team"] {
            for (method, path, verbs) in operations() {
                let path = path
                    .replace("{project}", namespace)
                    .replace("{session}", if verbs == ["delete"] { "none" } else { "s" })
                    .replace("{id}", "c")
                    .replace("{path}", "a");
                let mut request = client.request(method.clone(), served.url(&path));
                request = match *caller {
                    "nobody" => request,
                    "key: reader" => request.header("x-api-key", key("reader")),
                    "key: creator" => request.header("x-api-key", key("creator")),
                    "unknown key" => request.header("x-api-key", "fake-other-key"),
                    caller => request.bearer_auth(format!("token of {caller}")),
                };
                if method != Method::GET && !path.ends_with("/a") {
                    request = request.json(&json!({"prompt": "p"}));
                }
                let answer = soon("an answer", request.send()).await.unwrap().status();
                let has = |verb| rights.iter().any(|(of, has)| *of == namespace && has.contains(verb));
                let may = verbs.iter().all(has);
                let known = !["nobody", "unknown token", "runner", "unknown key"].contains(caller);
                let refused = if known {
                    StatusCode::FORBIDDEN
                } else {
                    StatusCode::UNAUTHORIZED
                };
                let case = format!("{caller}: {method} {path}: {answer}");
                assert_eq!(answer == refused, !may, "{case}");
                assert!(may || answer == refused, "{case}");
                asked += 1;
                allowed += u32::from(may);
            }
        }
    }
    eprintln!("{asked} cases, {allowed} of them allowed");
}

/// The operations of the APIs of other systems, and the right that each asks for in the caller's namespace.
const OTHERS: &[(&str, Option<&str>)] = &[
    ("submitTask", Some("create")),
    ("getTask", Some("get")),
    ("interruptTask", Some("update")),
    ("listTaskSessions", Some("list")),
    ("deleteTaskSession", Some("delete")),
    ("followTask", Some("get")),
    ("claudeCode", Some("create")),
    ("claudeCodeAtRoot", Some("create")),
    ("getClaudeCode", None),
    ("getClaudeCodeSettings", Some("get")),
];

#[tokio::test]
async fn callers_of_the_other_apis_may_do_what_they_were_given_in_their_one_namespace() {
    let settings = Settings {
        tasks: true,
        claude_code: true,
        namespace: "team-a".to_owned(),
        request_max: 100,
        ..Settings::default()
    };
    let document = gateway::api::openapi(&settings);
    let served = Served::serving(settings).await;
    let client = http();
    for (caller, rights) in RIGHTS {
        for (namespace, verbs) in *rights {
            served.cluster.allow(caller, verbs, namespace);
        }
        if !["nobody", "unknown token", "runner"].contains(caller) && !caller.contains("key") {
            served.cluster.caller(&format!("token of {caller}"), caller);
        }
    }
    served.cluster.runner("token of runner", Some("p1"));
    keys(&served);
    let (mut asked, mut allowed, mut found) = (0, 0, 0);
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap();
            if OPERATIONS.iter().any(|(known, _)| *known == id) {
                continue;
            }
            let known = OTHERS.iter().find(|(known, _)| *known == id);
            let (_, verb) = known.unwrap_or_else(|| panic!("{id} asks for rights that no test knows of"));
            found += 1;
            for (caller, rights) in RIGHTS {
                let method: Method = method.to_uppercase().parse().unwrap();
                let url = served.url(&path.replace("{task}", "none").replace("{task_session}", "none"));
                let mut request = client.request(method.clone(), url);
                // That of a key is its own; a token's is that of the APIs.
                let (namespace, shown) = match *caller {
                    "key: reader" => ("team-a", Some(key("reader"))),
                    "key: creator" => ("team-ab", Some(key("creator"))),
                    "unknown key" => ("team-a", Some("fake-other-key".to_owned())),
                    _ => ("team-a", None),
                };
                request = match shown {
                    Some(key) => request.header("x-api-key", key),
                    None if *caller == "nobody" => request,
                    None => request.bearer_auth(format!("token of {caller}")),
                };
                if method == Method::POST {
                    // Understood by none of them: what is allowed does nothing.
                    request = request.json(&json!({"none": 1}));
                }
                let answer = soon("an answer", request.send()).await.unwrap().status();
                let has = |verb: &str| rights.iter().any(|(of, has)| *of == namespace && has.contains(&verb));
                let may = verb.is_none_or(has);
                let known = !["nobody", "unknown token", "runner", "unknown key"].contains(caller);
                let refused = if known {
                    StatusCode::FORBIDDEN
                } else {
                    StatusCode::UNAUTHORIZED
                };
                assert_eq!(answer == refused, !may, "{caller}: {method} {path}: {answer}");
                asked += 1;
                allowed += u32::from(may);
            }
        }
    }
    assert_eq!(found, OTHERS.len(), "an operation is gone");
    eprintln!("{asked} cases, {allowed} of them allowed");
}

#[tokio::test]
async fn a_key_is_told_when_to_come_again_and_its_sessions_bear_its_name() {
    let served = Served::new().await;
    let sha256 = hex::encode(Sha256::digest(key("ci")));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let keys = json!({"keys": [{"name": "ci", "sha256": sha256, "namespace": "team-a", "verbs": ["create", "get"], "ratePerMinute": 2}]});
    file.write_all(keys.to_string().as_bytes()).unwrap();
    served.gateway.keys.load(file.path()).unwrap();
    let sessions = served.url("/api/projects/team-a/agentic-sessions");
    let create = || {
        http()
            .post(&sessions)
            .header("x-api-key", key("ci"))
            .json(&json!({"prompt": "p"}))
            .send()
    };
    let created: serde_json::Value = create().await.unwrap().json().await.unwrap();
    let read = http()
        .get(format!("{sessions}/{}", created["name"].as_str().unwrap()))
        .header("x-api-key", key("ci"));
    let session: serde_json::Value = read.send().await.unwrap().json().await.unwrap();
    assert_eq!(session["spec"]["userContext"]["userId"], "api-key:ci");
    let refused = create().await.unwrap();
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
}

/// A request as it is, with a path that no client would send.
async fn raw(served: &Served, path: &str) -> String {
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer token\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("an answer", stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[rstest]
#[case("/api/projects/team-a/agentic-sessions/../../team-b/agentic-sessions/s")]
#[case("/api/projects/team-a/agentic-sessions/..%2f..%2fteam-b%2fagentic-sessions%2fs")]
#[case("/api/projects/team-a/agentic-sessions/%2e%2e")]
#[case("/api/projects/team-a/agentic-sessions/s%00")]
#[case("/api/projects/team-a/agentic-sessions/s%2fstatus")]
#[case("/api/projects/team-a/agentic-sessions/%252e%252e")]
#[case("/api/projects/team-a/agentic-sessions/s%3flimit=1")]
#[case("/api/projects/team-a%2f..%2fteam-b/agentic-sessions/s")]
#[case("/api/projects/%00/agentic-sessions/s")]
#[case("/api/projects/TEAM-A/agentic-sessions/s")]
#[case("//api/projects/team-a/agentic-sessions/s")]
#[case("/api/projects/team-a/agentic-sessions/%ff")]
#[tokio::test]
async fn no_path_leads_out_of_what_the_caller_may_see(#[case] path: &str) {
    let served = Served::new().await;
    served.cluster.caller("token", "ann");
    for namespace in ["team-a", "team-b"] {
        served.cluster.set(namespace, "s", "u", &json!({"phase": "Running"}));
    }
    served.cluster.allow("ann", &["get", "list"], "team-a");
    let answer = raw(&served, path).await;
    assert!(
        answer.starts_with("HTTP/1.1 404") || answer.starts_with("HTTP/1.1 400"),
        "{path}: {answer}"
    );
}

#[tokio::test]
async fn a_caller_who_asks_too_often_is_told_when_to_ask_again_and_others_are_not() {
    let served = Served::new().await;
    for (token, user) in [("token", "ann"), ("again", "ann"), ("other", "bob")] {
        served.cluster.caller(token, user);
        served.cluster.allow(user, &["list"], "team-a");
    }
    served.gateway.rates.limit(3);
    let ask = async |token: &str| {
        let list = http().get(served.url("/api/projects/team-a/agentic-sessions"));
        list.bearer_auth(token).send().await.unwrap()
    };
    for token in ["token", "again", "token"] {
        assert_eq!(ask(token).await.status(), 200);
    }
    let refused = ask("again").await;
    assert_eq!(refused.status(), 429, "two tokens of one account");
    let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    assert_eq!(ask("other").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_does_not_wait_for_the_reviews_of_strangers() {
    const STRANGERS: usize = 100;
    let served = Served::new().await;
    let claims = URL_SAFE_NO_PAD.encode(r#"{"kubernetes.io":{"pod":{"uid":"p1"}}}"#);
    let token = format!("e30.{claims}.c2ln");
    served.cluster.running("s", "u", "p1");
    served.cluster.runner(&token, Some("p1"));
    served.gateway.watched.synced().await;
    served.cluster.hold_unknown();
    let url = served.url("/api/projects/team-a/agentic-sessions");
    let strangers: Vec<_> = (0..STRANGERS)
        .map(|n| {
            let url = url.clone();
            tokio::spawn(async move { http().get(url).bearer_auth(format!("junk{n}")).send().await.map(drop) })
        })
        .collect();
    let asked = async {
        while served.cluster.reviews() < 64 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    soon("the strangers' reviews", asked).await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), &token).await;
    assert_eq!(runner.deliver(&records(1, 3)).await, 3);
    assert!(
        strangers.iter().all(|stranger| !stranger.is_finished()),
        "they still wait"
    );
    for stranger in strangers {
        stranger.abort();
    }
}

#[rstest]
#[case("evil.example", 403)]
#[case("evil.example:8080", 403)]
#[case("10.0.0.7.evil.example", 403)]
#[case("agentic-gateway.svc.evil.example", 403)]
#[case("127.0.0.1:8080", 200)]
#[case("[::1]:8080", 200)]
#[case("LOCALHOST:8080", 200)]
#[case("agentic-gateway", 200)]
#[case("agentic-gateway.agentic.svc:8080", 200)]
#[case("agentic-gateway.agentic.svc.cluster.local.", 200)]
#[case("tasks.example.com", 200)]
#[tokio::test]
async fn who_need_not_say_who_they_are_must_say_a_name_that_only_the_gateway_can_have(
    #[case] host: &str,
    #[case] expected: u16,
) {
    let served = Served::serving(Settings {
        tasks: true,
        namespace: "team-a".to_owned(),
        open: true,
        hosts: vec!["tasks.example.com".to_owned()],
        ..Settings::default()
    })
    .await;
    let list = http().get(served.url("/api/v1/sessions")).header("host", host);
    let answer = list.send().await.unwrap();
    let (code, said) = (answer.status().as_u16(), answer.text().await.unwrap());
    assert_eq!(code, expected, "{said}");
    assert!(code == 200 || said.contains("--allow-host"), "{said}");
}

#[tokio::test]
async fn a_request_that_names_two_hosts_is_refused() {
    let served = Served::new().await;
    let mut stream = tokio::net::TcpStream::connect(served.address).await.unwrap();
    let request = "GET /live HTTP/1.1\r\nhost: localhost\r\nhost: other.example\r\nconnection: close\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    soon(
        "the answer",
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer),
    )
    .await
    .unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}
