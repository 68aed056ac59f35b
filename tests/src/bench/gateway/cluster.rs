//! An API server that says yes: as far as the gateway asks, and at no cost to speak of.

use std::net::SocketAddr;

use anyhow::Result;
use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// Serves sessions `s<n>` with UID `u<n>`, whose pod is `p<n>` with the token `t<n>`.
pub(super) async fn start(sessions: usize) -> Result<SocketAddr> {
    let list = move |Query(query): Query<Value>| async move { list_or_watch(&query, sessions) };
    let router = Router::new()
        .route("/version", get(async || Json(json!({}))))
        .route("/apis/authentication.k8s.io/v1/tokenreviews", post(token))
        .route("/apis/authorization.k8s.io/v1/subjectaccessreviews", post(access))
        .route("/apis/vteam.ambient-code/v1alpha1/agenticsessions", get(list))
        .route(
            "/apis/vteam.ambient-code/v1alpha1/namespaces/bench/agenticsessions/{name}",
            get(async |Path(name): Path<String>| Json(session(&name[1..]))),
        );
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

pub(super) fn kubeconfig(address: SocketAddr) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bench",
        "clusters": [{"name": "bench", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "bench", "user": {}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
    })
    .to_string()
}

fn session(number: &str) -> Value {
    json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession",
        "metadata": {"namespace": "bench", "name": format!("s{number}"), "uid": format!("u{number}"), "resourceVersion": "1"},
        "spec": {"prompt": "p"},
        "status": {"phase": "Running", "podUID": format!("p{number}"), "attempt": 1},
    })
}

fn list_or_watch(query: &Value, sessions: usize) -> Response {
    if query.get("watch").is_some() {
        // Nothing ever happens.
        let silence = futures::stream::pending::<Result<String, std::io::Error>>().boxed();
        return Body::from_stream(silence).into_response();
    }
    let items: Vec<_> = (0..sessions).map(|number| session(&number.to_string())).collect();
    Json(json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSessionList",
        "metadata": {"resourceVersion": "1"}, "items": items,
    }))
    .into_response()
}

async fn token(Json(mut review): Json<Value>) -> Json<Value> {
    let token = review["spec"]["token"].as_str().unwrap_or_default().to_owned();
    let audiences = review["spec"]["audiences"].clone();
    let mut user = json!({"username": token});
    if let Some(number) = token.strip_prefix('t') {
        user["extra"] = json!({"authentication.kubernetes.io/pod-uid": [format!("p{number}")]});
    }
    review["status"] = json!({"authenticated": true, "user": user, "audiences": audiences});
    Json(review)
}

async fn access(Json(mut review): Json<Value>) -> Json<Value> {
    review["status"] = json!({"allowed": true});
    Json(review)
}
