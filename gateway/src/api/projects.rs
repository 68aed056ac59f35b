//! `/api/projects/{project}/agentic-sessions`: sessions as seed clients of the platform know them. A project is a namespace.

use std::sync::Arc;

use axum::{Json, extract::State, response::IntoResponse as _, response::Response};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use kube::{ResourceExt as _, api::DynamicObject};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    ApiError, Create, Delete, Get, OfProject, OfSession, create,
    events::{self, Client, Form},
    openapi::{self, Api},
};
use crate::{
    Gateway,
    body::Held,
    follow::{Follower, Sources},
    sessions::{self, Target, View},
};

/// Names tried for a session before giving up.
const NAME_TRIES: usize = 3;

/// The routes below `/api/projects`.
pub fn routes(api: Api) -> Api {
    let create = openapi::post("createSession", "Create a session", create_session)
        .says("The gateway chooses the name. A field that the session cannot honour is refused by name, never dropped.")
        .body::<create::NewSession>(
            true,
            json!({"prompt": "Write a haiku about etcd into haiku.txt.", "llmSettings": {"model": "claude-sonnet-5-5"}, "timeout": 300}),
        )
        .answers::<Created>(
            201,
            "The session exists",
            json!({"message": CREATED, "name": "agentic-session-1700000000-0a1b2c3d4e5f", "uid": "6c5f4f2e-0d51-4f0a-8f6b-3f1f5a0f7c11"}),
        )
        .refuses(&[409, 422]);
    let read =
        openapi::get("getSession", "A session", read).answers::<crds::AgenticSession>(200, "The session", example());
    let delete = openapi::delete(
        "deleteSession",
        "Delete a session, its workspace and its events",
        delete,
    )
    .answers_with(204, "The session is being deleted", &[])
    .refuses(&[409]);
    let follow = openapi::get("followSession", "The events of a session, as they happen", follow)
        .says(
            "Server-sent events, from the session's first record or the one after `Last-Event-ID` on, to the session's end. \
             `id` is `<session uid>/<seq>`, `event` the record's kind, `data` the record. `delta`, `phase`, `gap` and the last \
             event `close` carry no id.",
        )
        .header("Last-Event-ID", "The id of the last event that was received.", "6c5f4f2e-0d51-4f0a-8f6b-3f1f5a0f7c11/41")
        .answers_with(200, "The events", &["text/event-stream"])
        .looks(
            "text/event-stream",
            json!(
                "event: phase\ndata: {\"attempt\":1,\"message\":null,\"phase\":\"Completed\",\"reason\":\"Completed\"}\n\n\
                 event: close\ndata: {\"lastSeq\":7,\"reason\":\"ended\"}\n\n"
            ),
        )
        .refuses(&[400]);
    api.route(
        "/api/projects/{project}/agentic-sessions",
        [super::list::list(), create],
    )
    .route("/api/projects/{project}/agentic-sessions/{session}", {
        let [put, patch] = super::lifecycle::change();
        [read, put, patch, delete]
    })
    .route("/api/projects/{project}/agentic-sessions/{session}/events", [follow])
}

const CREATED: &str = "Agentic session created successfully";

/// A session, for the document.
pub(super) fn example() -> Value {
    json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession",
        "metadata": {
            "name": "agentic-session-1700000000-0a1b2c3d4e5f", "namespace": "team-a",
            "uid": "6c5f4f2e-0d51-4f0a-8f6b-3f1f5a0f7c11",
        },
        "spec": {"prompt": "Write a haiku about etcd into haiku.txt.", "timeout": 300},
        "status": {"phase": "Completed", "reason": "Completed", "turns": 2, "costUSD": "0.013", "result": "Done."},
    })
}

/// That a session was created.
#[derive(Serialize, JsonSchema)]
struct Created {
    /// For people.
    message: &'static str,
    /// Name of the session.
    name: String,
    /// UID of the session.
    uid: Option<String>,
}

async fn create_session(
    State(gateway): State<Arc<Gateway>>,
    OfProject { project, caller, .. }: OfProject<Create>,
    body: Held,
) -> Result<Response, ApiError> {
    let session = create::session(&body, &caller.identity)?;
    drop(body);
    let session: DynamicObject = serde_json::to_value(session)
        .and_then(serde_json::from_value)
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    let created = create_named(&gateway, Named::Anew(project), session).await?;
    let answer = Created {
        message: CREATED,
        name: created.name_any(),
        uid: created.uid(),
    };
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// How a session is to be called.
pub(super) enum Named {
    /// This.
    As(Target),
    /// As nothing in this namespace is called yet.
    Anew(String),
}

/// Creates a session under a name.
pub(super) async fn create_named(
    gateway: &Gateway,
    named: Named,
    mut session: DynamicObject,
) -> Result<DynamicObject, ApiError> {
    let mut tries = 0;
    let created = loop {
        let (target, last) = match &named {
            Named::As(target) => (target.clone(), true),
            Named::Anew(namespace) => (new_name(namespace)?, tries + 1 >= NAME_TRIES),
        };
        session.metadata.name = Some(target.name().to_owned());
        tries += 1;
        match gateway.sessions.create(&target, &session).await {
            Err(error) if !last && is_taken(&error) => {}
            created => break created?,
        }
    };
    gateway.watched.list(&created);
    Ok(created)
}

async fn read(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Get>,
) -> Result<Json<DynamicObject>, ApiError> {
    let mut session = existing(&gateway, &target).await?;
    shorten(&mut session);
    Ok(Json(session))
}

async fn delete(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Delete>,
) -> Result<StatusCode, ApiError> {
    if gateway.sessions.delete(&target).await? {
        gateway.watched.unlist(&target, None);
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(none(&target))
    }
}

async fn follow(
    State(gateway): State<Arc<Gateway>>,
    OfSession {
        target,
        credential,
        caller,
        ..
    }: OfSession<Get>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let view = View::from(&existing(&gateway, &target).await?);
    let cursor = events::cursor(&headers, &view.uid)?;
    let follower = follower(&gateway, &target, view, cursor, &caller.identity.user);
    let client = Client::new(Form::Sse, gateway, follower, target, credential, &caller);
    Ok(events::response(client))
}

pub(super) fn follower(gateway: &Gateway, target: &Target, view: View, cursor: u64, reader: &str) -> Follower {
    let sources = Sources {
        log: gateway.log.clone(),
        channel: gateway.live.channel(&view.uid),
        seen: gateway.watched.follow(target, view.clone()),
        shutdown: gateway.shutdown.clone(),
        room: gateway.streams.of(reader),
    };
    Follower::new(sources, view, cursor)
}

pub(super) async fn existing(gateway: &Gateway, target: &Target) -> Result<DynamicObject, ApiError> {
    gateway.sessions.get(target).await?.ok_or_else(|| none(target))
}

fn none(target: &Target) -> ApiError {
    ApiError::not_found(format!("{target} does not exist"))
}

/// The platform's form of a name, with 48 random bits: two creates within a second have two names.
fn new_name(namespace: &str) -> Result<Target, ApiError> {
    let random = &uuid::Uuid::new_v4().simple().to_string()[20..];
    let name = format!("agentic-session-{}-{random}", Timestamp::now().as_second());
    Target::new(namespace, &name)
        .ok_or_else(|| ApiError::not_found(format!("no namespace can have the name {namespace:?}")))
}

fn is_taken(error: &sessions::Error) -> bool {
    matches!(error, sessions::Error::Api { source: kube::Error::Api(status), .. } if status.code == 409 && status.reason == "AlreadyExists")
}

/// Without what only the API server's bookkeeping needs.
pub(super) fn shorten(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
}
