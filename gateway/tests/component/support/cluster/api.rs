//! What it answers.

use std::collections::BTreeMap;

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{API_SERVER, Known, Shared, Token, put, remove};

pub(super) fn router(shared: &Shared) -> Router {
    let sessions = "/apis/vteam.ambient-code/v1alpha1/namespaces/{namespace}/agenticsessions";
    Router::new()
        .route("/version", get(version))
        .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
        .route("/apis/authorization.k8s.io/v1/subjectaccessreviews", post(access))
        .route("/apis/vteam.ambient-code/v1alpha1/agenticsessions", get(list_or_watch))
        .route(sessions, get(list).post(create))
        .route(&format!("{sessions}/{{name}}"), get(read).delete(delete).patch(patch))
        .with_state(shared.clone())
}

fn failure(code: u16, reason: &str, message: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message});
    (StatusCode::from_u16(code).unwrap(), Json(status)).into_response()
}

async fn version(State(shared): State<Shared>) -> Response {
    if shared.state.lock().unwrap().down {
        return failure(500, "InternalError", "down");
    }
    let parts = [
        "major",
        "minor",
        "gitVersion",
        "gitCommit",
        "gitTreeState",
        "buildDate",
        "goVersion",
        "compiler",
        "platform",
    ];
    Json(
        parts
            .iter()
            .map(|part| ((*part).to_owned(), json!("1")))
            .collect::<serde_json::Map<_, _>>(),
    )
    .into_response()
}

async fn review(State(shared): State<Shared>, Json(mut review): Json<Value>) -> Response {
    let held = {
        let mut known = shared.state.lock().unwrap();
        if known.down {
            return failure(500, "InternalError", "down");
        }
        known.reviews += 1;
        let audience = review["spec"]["audiences"][0].as_str().unwrap_or(API_SERVER);
        let token = known.tokens.get(review["spec"]["token"].as_str().unwrap());
        let token = token.filter(|token| token.audience == audience);
        review["status"] = match token {
            Some(Token { user, audience, pod }) => {
                let mut user = json!({"username": user, "groups": ["system:authenticated"]});
                if let Some(pod) = pod {
                    user["extra"] = json!({"authentication.kubernetes.io/pod-uid": [pod]});
                }
                json!({"authenticated": true, "user": user, "audiences": [audience]})
            }
            None => json!({"authenticated": false, "error": "unknown"}),
        };
        token.is_none() && known.hold_unknown
    };
    if held {
        std::future::pending::<()>().await;
    }
    (StatusCode::CREATED, Json(review)).into_response()
}

async fn access(State(shared): State<Shared>, Json(mut review): Json<Value>) -> (StatusCode, Json<Value>) {
    let known = shared.state.lock().unwrap();
    let (spec, text) = (&review["spec"], |value: &Value| {
        value.as_str().unwrap_or_default().to_owned()
    });
    let attributes = &spec["resourceAttributes"];
    let right = (
        text(&spec["user"]),
        text(&attributes["verb"]),
        text(&attributes["namespace"]),
    );
    let ours = attributes["group"] == "vteam.ambient-code" && attributes["resource"] == "agenticsessions";
    review["status"] = json!({"allowed": ours && known.rights.contains(&right)});
    (StatusCode::CREATED, Json(review))
}

fn items(known: &Known, namespace: Option<&str>) -> Value {
    let chosen = known
        .sessions
        .iter()
        .filter(|((of, _), _)| namespace.is_none_or(|namespace| namespace == of));
    json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSessionList",
        "metadata": {"resourceVersion": known.version.to_string()},
        "items": chosen.map(|(_, session)| session).collect::<Vec<_>>(),
    })
}

async fn list(State(shared): State<Shared>, Path(namespace): Path<String>) -> Json<Value> {
    Json(items(&shared.state.lock().unwrap(), Some(&namespace)))
}

async fn list_or_watch(State(shared): State<Shared>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    if !query.contains_key("watch") {
        return Json(items(&shared.state.lock().unwrap(), None)).into_response();
    }
    let from: u64 = query["resourceVersion"].parse().unwrap();
    let events = shared.events.subscribe();
    let lines = futures::stream::unfold((shared, events, 0), move |(shared, mut events, mut sent)| async move {
        loop {
            let next = shared.state.lock().unwrap().history.get(sent).cloned();
            sent += usize::from(next.is_some());
            match next {
                Some((version, event)) if version > from => {
                    return Some((Ok::<_, std::io::Error>(format!("{event}\n")), (shared, events, sent)));
                }
                Some(_) => {}
                None => drop(events.wait_for(|count| *count > sent).await.ok()?),
            }
        }
    });
    Body::from_stream(lines).into_response()
}

async fn create(State(shared): State<Shared>, Path(namespace): Path<String>, Json(session): Json<Value>) -> Response {
    // Whoever asked may go away: an API server does what it has begun.
    let done = tokio::spawn(created(shared, namespace, session));
    done.await.unwrap()
}

async fn created(shared: Shared, namespace: String, mut session: Value) -> Response {
    let mut held = shared.creates.subscribe();
    if held.borrow().0.as_ref() == Some(&namespace) {
        shared.creates.send_modify(|(_, count)| *count += 1);
        held.wait_for(|(held, _)| held.as_ref() != Some(&namespace))
            .await
            .unwrap();
    }
    if let Some(status) = shared.state.lock().unwrap().refuse_create.clone() {
        let code = status["code"].as_u64().unwrap() as u16;
        return (StatusCode::from_u16(code).unwrap(), Json(status)).into_response();
    }
    let name = session["metadata"]["name"].as_str().unwrap().to_owned();
    if shared
        .state
        .lock()
        .unwrap()
        .sessions
        .contains_key(&(namespace.clone(), name.clone()))
    {
        return failure(409, "AlreadyExists", "there is one");
    }
    session["metadata"]["namespace"] = namespace.clone().into();
    session["metadata"]["uid"] = format!("uid-of-{name}").into();
    session["metadata"]["creationTimestamp"] = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
    session["status"] = json!({"phase": "Pending"});
    (StatusCode::CREATED, Json(put(&shared, &namespace, &name, session))).into_response()
}

async fn read(State(shared): State<Shared>, Path(key): Path<(String, String)>) -> Response {
    let (found, late) = {
        let mut known = shared.state.lock().unwrap();
        if known.down {
            return failure(500, "InternalError", "down");
        }
        known.reads += 1;
        let late = known.held_read == Some(known.reads - 1);
        (known.sessions.get(&key).cloned(), late)
    };
    if late {
        let mut held = shared.held.subscribe();
        shared.held.send_replace(true);
        held.wait_for(|held| !*held).await.unwrap();
    }
    match found {
        Some(session) => Json(session).into_response(),
        None => failure(404, "NotFound", "not found"),
    }
}

/// A JSON merge patch of spec and metadata.
async fn patch(
    State(shared): State<Shared>,
    Path((namespace, name)): Path<(String, String)>,
    Json(change): Json<Value>,
) -> Response {
    let found = shared
        .state
        .lock()
        .unwrap()
        .sessions
        .get(&(namespace.clone(), name.clone()))
        .cloned();
    let Some(mut session) = found else {
        return failure(404, "NotFound", "not found");
    };
    merge(&mut session, &change);
    Json(put(&shared, &namespace, &name, session)).into_response()
}

fn merge(object: &mut Value, change: &Value) {
    for (name, value) in change.as_object().unwrap() {
        if value.is_object() {
            merge(&mut object[name], value);
        } else if value.is_null() {
            object.as_object_mut().unwrap().remove(name);
        } else {
            if object.is_null() {
                *object = json!({});
            }
            object[name] = value.clone();
        }
    }
}

async fn delete(State(shared): State<Shared>, Path((namespace, name)): Path<(String, String)>) -> Response {
    let kept = {
        let known = shared.state.lock().unwrap();
        let session = known.sessions.get(&(namespace.clone(), name.clone())).cloned();
        session.filter(|_| known.finalized.contains(&name))
    };
    if let Some(session) = kept {
        return Json(session).into_response();
    }
    match remove(&shared, &namespace, &name) {
        Some(session) => Json(session).into_response(),
        None => failure(404, "NotFound", "not found"),
    }
}
