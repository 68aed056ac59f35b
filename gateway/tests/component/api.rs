use rstest::rstest;
use serde_json::{Value, json};

use crate::support::{Served, sse::http};

const SESSIONS: &str = "/api/projects/team-a/agentic-sessions";

/// A caller `token` who may do everything in `team-a`.
async fn served() -> Served {
    let served = Served::new().await;
    served.cluster.caller("token", "ann");
    served
        .cluster
        .allow("ann", &["get", "list", "create", "update", "delete"], "team-a");
    served
}

async fn request(served: &Served, method: &str, path: &str, token: Option<&str>, body: &Value) -> (u16, Value) {
    let mut request = http().request(method.parse().unwrap(), served.url(path));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    if !body.is_null() {
        request = request.json(body);
    }
    let response = request.send().await.unwrap();
    let code = response.status().as_u16();
    (
        code,
        serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default(),
    )
}

#[tokio::test]
async fn a_session_is_created_read_listed_and_deleted() {
    let served = served().await;
    let body =
        json!({"prompt": "Say 7f3a", "llmSettings": {"temperature": 0.7, "maxTokens": 4000}, "interactive": false});
    let (code, created) = request(&served, "POST", SESSIONS, Some("token"), &body).await;
    assert_eq!(code, 201);
    let name = created["name"].as_str().unwrap();
    assert!(name.starts_with("agentic-session-") && name.len() <= 52, "{name}");
    assert_eq!(created["uid"], format!("uid-of-{name}"));
    assert!(created["message"].is_string());

    let path = format!("{SESSIONS}/{name}");
    let (code, session) = request(&served, "GET", &path, Some("token"), &Value::Null).await;
    assert_eq!(code, 200);
    assert_eq!(session["apiVersion"], "vteam.ambient-code/v1alpha1");
    assert_eq!(session["kind"], "AgenticSession");
    assert_eq!(session["metadata"]["name"], name);
    assert_eq!(
        session["spec"],
        json!({"prompt": "Say 7f3a", "interactive": false, "userContext": {"userId": "ann", "groups": ["system:authenticated"]}})
    );
    assert_eq!(session["status"]["phase"], "Pending");

    let (code, list) = request(&served, "GET", SESSIONS, Some("token"), &Value::Null).await;
    assert_eq!((code, &list["items"]), (200, &json!([session])), "{list}");

    assert_eq!(
        request(&served, "DELETE", &path, Some("token"), &Value::Null).await.0,
        204
    );
    assert_eq!(
        request(&served, "DELETE", &path, Some("token"), &Value::Null).await.0,
        404
    );
    assert_eq!(request(&served, "GET", &path, Some("token"), &Value::Null).await.0, 404);
    let events = format!("{path}/events");
    assert_eq!(
        request(&served, "GET", &events, Some("token"), &Value::Null).await.0,
        404
    );
}

#[tokio::test]
async fn a_session_is_passed_through_with_fields_of_tomorrow_and_without_bookkeeping() {
    let served = served().await;
    served.cluster.running("s", "u", "p1");
    let (_, session) = request(&served, "GET", &format!("{SESSIONS}/s"), Some("token"), &Value::Null).await;
    assert_eq!(session["spec"]["aFieldOfTomorrow"], 1);
    assert_eq!(session["metadata"].get("managedFields"), None);
}

#[tokio::test]
async fn a_session_is_changed_stopped_started_and_cloned() {
    let served = served().await;
    served.cluster.interactive("s", "u", &json!({"phase": "Running"}));
    let path = format!("{SESSIONS}/s");
    let read = async || request(&served, "GET", &path, Some("token"), &Value::Null).await.1;
    let change = json!({"displayName": "Nightly", "timeout": 7200, "userContext": {"userId": "root"}});
    let (code, session) = request(&served, "PUT", &path, Some("token"), &change).await;
    assert_eq!((code, &session["spec"]["timeout"]), (200, &json!(7200)), "{session}");
    let (code, _) = request(
        &served,
        "PATCH",
        &path,
        Some("token"),
        &json!({"spec": {"timeout": null}}),
    )
    .await;
    assert_eq!(code, 200);
    assert_eq!(
        read().await["spec"],
        json!({"prompt": "p", "interactive": true, "displayName": "Nightly"})
    );

    let post =
        async |verb: &str, body: &Value| request(&served, "POST", &format!("{path}/{verb}"), Some("token"), body).await;
    let (code, session) = post("stop", &Value::Null).await;
    assert_eq!((code, &session["spec"]["suspend"]), (202, &json!(true)));
    let (code, session) = post("start", &Value::Null).await;
    assert_eq!((code, &session["spec"]["suspend"]), (202, &json!(false)));
    let asked = |session: &Value| session["metadata"]["annotations"]["ambient-code.io/start-requested-at"].clone();
    let first = asked(&session);
    assert!(first.is_string());
    assert_ne!(
        asked(&post("start", &Value::Null).await.1),
        first,
        "each request is another"
    );

    let labels = json!({"team": "a", "vteam.ambient-code/api": "tasks"});
    served.cluster.set_labels("team-a", "s", &labels);
    let (code, clone) = post("clone", &Value::Null).await;
    assert_eq!(code, 201, "{clone}");
    assert_eq!(clone["metadata"]["labels"], json!({"team": "a"}), "a clone is no task");
    assert_ne!(clone["metadata"]["name"], "s");
    assert_eq!(clone["spec"]["userContext"]["userId"], "ann");
    assert_eq!(
        (&clone["spec"]["prompt"], clone["spec"].get("suspend")),
        (&json!("p"), None)
    );
    let named = json!({"newSessionName": "second", "prompt": "q"});
    let (code, clone) = post("clone", &named).await;
    assert_eq!(
        (code, &clone["metadata"]["name"], &clone["spec"]["prompt"]),
        (201, &json!("second"), &json!("q"))
    );
    assert_eq!(post("clone", &named).await.0, 409, "the name is taken");
    assert_eq!(post("clone", &json!({"targetProject": "team-b"})).await.0, 403);
}

#[tokio::test]
async fn a_list_has_pages_and_shows_at_once_what_its_caller_did() {
    let served = served().await;
    for n in 0..7 {
        let body = json!({"prompt": if n == 3 { "Write a HAIKU" } else { "p" }, "displayName": format!("number {n}")});
        request(&served, "POST", SESSIONS, Some("token"), &body).await;
    }
    let list = async |query: &str| {
        let (code, list) = request(
            &served,
            "GET",
            &format!("{SESSIONS}?{query}"),
            Some("token"),
            &Value::Null,
        )
        .await;
        assert_eq!(code, 200, "{list}");
        list
    };
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap().iter();
        items
            .map(|item| item["metadata"]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let all = list("").await;
    assert_eq!((all["totalCount"].as_u64(), &all["hasMore"]), (Some(7), &json!(false)));
    let by_offset = [list("limit=4").await, list("limit=4&offset=4").await];
    assert_eq!(
        (&by_offset[0]["nextOffset"], &by_offset[1]["hasMore"]),
        (&json!(4), &json!(false))
    );
    assert_eq!([names(&by_offset[0]), names(&by_offset[1])].concat(), names(&all));
    let cursor = by_offset[0]["nextCursor"].as_str().unwrap();
    assert_eq!(
        names(&list(&format!("limit=4&cursor={cursor}")).await),
        names(&by_offset[1])
    );
    assert_eq!(list("search=haiku").await["totalCount"], 1);
    assert_eq!(list("search=NUMBER%205").await["totalCount"], 1);
    assert_eq!(list("phase=Pending,Running").await["totalCount"], 7);
    assert_eq!(list("phase=Failed").await["totalCount"], 0);
    let gone = &names(&all)[0];
    request(
        &served,
        "DELETE",
        &format!("{SESSIONS}/{gone}"),
        Some("token"),
        &Value::Null,
    )
    .await;
    assert_eq!(list("").await["totalCount"], 6);
}

#[rstest]
#[case("limit=0", "limit must be")]
#[case("limit=x", "limit")]
#[case("phase=Done", "Pending, Creating")]
#[case("cursor=x", "nextCursor")]
#[tokio::test]
async fn a_list_that_cannot_be_given_is_refused(#[case] query: &str, #[case] says: &str) {
    let served = served().await;
    let (code, error) = request(
        &served,
        "GET",
        &format!("{SESSIONS}?{query}"),
        Some("token"),
        &Value::Null,
    )
    .await;
    assert_eq!(code, 400);
    assert!(error["message"].as_str().unwrap().contains(says), "{error}");
}

#[tokio::test]
async fn creates_in_one_second_have_different_names() {
    let served = served().await;
    let create = async || {
        let (code, created) = request(&served, "POST", SESSIONS, Some("token"), &json!({"prompt": "p"})).await;
        assert_eq!(code, 201);
        created["name"].as_str().unwrap().to_owned()
    };
    let names = futures::future::join_all((0..50).map(|_| create())).await;
    assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), 50);
}

#[tokio::test]
async fn a_refusal_of_the_api_server_comes_through_with_its_message() {
    let served = served().await;
    let message = "AgenticSession is invalid: spec: give the task in exactly one of spec.prompt and spec.initialPrompt";
    served.cluster.refuse_create(
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 422, "reason": "Invalid", "message": message}),
    );
    let (code, error) = request(&served, "POST", SESSIONS, Some("token"), &json!({})).await;
    assert_eq!((code, error["reason"].as_str()), (422, Some("Invalid")));
    assert_eq!(
        (error["message"].as_str(), error["error"].as_str()),
        (Some(message), Some(message))
    );
}

#[rstest]
#[case::no_token("GET", "", None, 401, "Authorization")]
#[case::unknown_token("GET", "", Some("wrong"), 401, "kubectl create token")]
#[case::token_of_a_runner("GET", "", Some("runner"), 401, "kubectl create token")]
#[case::list_elsewhere("GET", "@team-b", Some("token"), 403, "ann may not list")]
#[case::create_elsewhere("POST", "@team-b", Some("token"), 403, "ann may not create")]
#[case::read_elsewhere("GET", "@team-b/s", Some("token"), 403, "ann may not get")]
#[case::delete_elsewhere("DELETE", "@team-b/s", Some("token"), 403, "ann may not delete")]
#[case::events_elsewhere("GET", "@team-b/s/events", Some("token"), 403, "ann may not get")]
#[case::delete_with_the_right_to_read("DELETE", "/s", Some("reader"), 403, "bob may not delete")]
#[case::create_with_the_right_to_read("POST", "", Some("reader"), 403, "bob may not create")]
#[case::a_name_that_leads_astray("GET", "/s%2Fstatus", Some("token"), 404, "no session can have the name")]
#[case::no_session("GET", "/none", Some("token"), 404, "AgenticSession team-a/none does not exist")]
#[case::unknown_path("GET", "/s/nothing/here", Some("token"), 404, "nothing at this path")]
#[tokio::test]
async fn who_may_not_is_told_so_as_kubernetes_would(
    #[case] method: &str,
    #[case] path: &str,
    #[case] token: Option<&str>,
    #[case] code: u16,
    #[case] says: &str,
) {
    let served = served().await;
    served.cluster.runner("runner", Some("p1"));
    served.cluster.caller("reader", "bob");
    served.cluster.allow("bob", &["get", "list"], "team-a");
    let path = match path.strip_prefix('@') {
        Some(elsewhere) => {
            let (namespace, rest) = elsewhere.split_at(6);
            format!("/api/projects/{namespace}/agentic-sessions{rest}")
        }
        None => format!("{SESSIONS}{path}"),
    };
    let body = if method == "POST" {
        json!({"prompt": "p"})
    } else {
        Value::Null
    };
    let (answered, error) = request(&served, method, &path, token, &body).await;
    assert_eq!(
        (answered, &error["kind"], &error["code"]),
        (code, &json!("Status"), &json!(code)),
        "{error}"
    );
    assert!(error["message"].as_str().unwrap().contains(says), "{error}");
}

#[tokio::test]
async fn the_api_server_is_asked_once_for_a_token_and_its_outage_is_no_refusal() {
    let served = served().await;
    for _ in 0..5 {
        assert_eq!(
            request(&served, "GET", SESSIONS, Some("token"), &Value::Null).await.0,
            200
        );
    }
    assert_eq!(served.cluster.reviews(), 1);
    served.cluster.break_down();
    assert_eq!(
        request(&served, "GET", SESSIONS, Some("another"), &Value::Null).await.0,
        503
    );
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused() {
    let served = served().await;
    let body = json!({"prompt": "x".repeat(5 << 20)});
    assert_eq!(request(&served, "POST", SESSIONS, Some("token"), &body).await.0, 413);
}

#[tokio::test]
async fn health_needs_no_token() {
    let served = served().await;
    let (code, health) = request(&served, "GET", "/health", None, &Value::Null).await;
    assert_eq!((code, &health["status"]), (200, &json!("healthy")));
}
