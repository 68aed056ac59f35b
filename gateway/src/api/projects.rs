//! `/api/projects/{project}/agentic-sessions`: sessions as seed clients of the platform know them. A project is a namespace.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{FromRequest as _, Path, Request, State},
    response::IntoResponse as _,
    response::Response,
    routing::get,
};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use kube::{ResourceExt as _, api::DynamicObject};
use serde_json::{Value, json};

use super::{ApiError, create, events};
use crate::{
    Gateway,
    auth::{
        self,
        kubernetes::{Caller, Verb},
    },
    body::Held,
    follow::{Follower, Sources},
    sessions::{self, Target, View, is_namespace},
};

/// Names tried for a session before giving up.
const NAME_TRIES: usize = 3;

/// The routes below `/api/projects`.
pub fn router() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/{project}/agentic-sessions", get(list).post(create_session))
        .route("/{project}/agentic-sessions/{session}", get(read).delete(delete))
        .route("/{project}/agentic-sessions/{session}/events", get(follow))
}

async fn list(
    State(gateway): State<Arc<Gateway>>,
    Path(project): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    allowed(&gateway, &headers, Verb::List, &project, None).await?;
    let mut items = gateway.sessions.list(&project).await?;
    items.iter_mut().for_each(shorten);
    Ok(Json(json!({"items": items})))
}

async fn create_session(
    State(gateway): State<Arc<Gateway>>,
    Path(project): Path<String>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, ApiError> {
    // Before anything of the body is read.
    let caller = allowed(&gateway, &headers, Verb::Create, &project, None).await?;
    let body = Held::from_request(request, &gateway).await?;
    let mut session = create::session(&body, &caller.identity)?;
    drop(body);
    let mut tries = 0;
    let created = loop {
        let target = new_name(&project)?;
        session.metadata.name = Some(target.name().to_owned());
        tries += 1;
        match gateway.sessions.create(&target, &session).await {
            Err(error) if tries < NAME_TRIES && is_taken(&error) => {}
            created => break created?,
        }
    };
    let answer = json!({
        "message": "Agentic session created successfully",
        "name": created.name_any(),
        "uid": created.uid(),
    });
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

async fn read(
    State(gateway): State<Arc<Gateway>>,
    Path((project, session)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Json<DynamicObject>, ApiError> {
    let target = target(&project, &session)?;
    allowed(&gateway, &headers, Verb::Get, &project, Some(&session)).await?;
    let mut session = existing(&gateway, &target).await?;
    shorten(&mut session);
    Ok(Json(session))
}

async fn delete(
    State(gateway): State<Arc<Gateway>>,
    Path((project, session)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    let target = target(&project, &session)?;
    allowed(&gateway, &headers, Verb::Delete, &project, Some(&session)).await?;
    if gateway.sessions.delete(&target).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(none(&target))
    }
}

async fn follow(
    State(gateway): State<Arc<Gateway>>,
    Path((project, session)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let target = target(&project, &session)?;
    allowed(&gateway, &headers, Verb::Get, &project, Some(&session)).await?;
    let view = View::from(&existing(&gateway, &target).await?);
    let sources = Sources {
        log: gateway.log.clone(),
        channel: gateway.live.channel(&view.uid),
        seen: gateway.watched.follow(&target, view.clone()),
        shutdown: gateway.shutdown.clone(),
    };
    let cursor = events::cursor(&headers, &view.uid);
    let follower = Follower::new(sources, view, cursor);
    let token = auth::bearer(&headers).unwrap_or_default().to_owned();
    Ok(events::response(gateway, follower, target, token))
}

/// The caller, if it may do this.
async fn allowed(
    gateway: &Gateway,
    headers: &HeaderMap,
    verb: Verb,
    namespace: &str,
    name: Option<&str>,
) -> Result<Caller, ApiError> {
    let token = auth::bearer(headers).ok_or_else(|| {
        ApiError::unauthorized("no token: send a Kubernetes token in the header `Authorization: Bearer <token>`")
    })?;
    if !is_namespace(namespace) {
        return Err(ApiError::not_found(format!(
            "no namespace can have the name {namespace:?}"
        )));
    }
    let caller = gateway.reviews.authenticate(token).await?;
    gateway.reviews.authorize(&caller, verb, namespace, name).await?;
    Ok(caller)
}

fn target(namespace: &str, name: &str) -> Result<Target, ApiError> {
    Target::new(namespace, name).ok_or_else(|| {
        ApiError::not_found(format!(
            "no session can have the name {name:?} in namespace {namespace:?}"
        ))
    })
}

async fn existing(gateway: &Gateway, target: &Target) -> Result<DynamicObject, ApiError> {
    gateway.sessions.get(target).await?.ok_or_else(|| none(target))
}

fn none(target: &Target) -> ApiError {
    ApiError::not_found(format!("{target} does not exist"))
}

/// The platform's form of a name, with 48 random bits: two creates within a second have two names.
fn new_name(namespace: &str) -> Result<Target, ApiError> {
    let random = &uuid::Uuid::new_v4().simple().to_string()[20..];
    target(
        namespace,
        &format!("agentic-session-{}-{random}", Timestamp::now().as_second()),
    )
}

fn is_taken(error: &sessions::Error) -> bool {
    matches!(error, sessions::Error::Api { source: kube::Error::Api(status), .. } if status.code == 409 && status.reason == "AlreadyExists")
}

/// Without what only the API server's bookkeeping needs.
fn shorten(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
}
