//! To change, start, stop and clone a session: each is one write on the resource, which the operator acts upon.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use crds::condition;
use http::StatusCode;
use jiff::Timestamp;
use kube::{Resource as _, ResourceExt as _, api::DynamicObject, core::ObjectMeta};
use protocol::{
    Reason,
    names::{RESERVED, annotation},
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    ApiError, Get, OfSession, Update, create,
    openapi::{self, Api, Operation},
    projects::{Named, create_named, example, existing, shorten},
    speak::parse_or_default,
};
use crate::{
    Gateway,
    auth::kubernetes::Verb,
    body::Held,
    sessions::{Target, View, is_namespace},
};

/// The routes that change one session.
pub(super) fn change() -> [Operation; 2] {
    let describe = |operation: Operation| {
        operation
            .says(
                "Takes the fields to change, bare or under `spec`; `null` takes one away. What may change is said in the \
                 resource's reference (`displayName`, `suspend`, `timeout`, `limits`, …); other fields may be sent as they are.",
            )
            .body::<create::NewSession>(true, json!({"displayName": "Nightly review", "timeout": 7200}))
            .answers::<crds::AgenticSession>(200, "The session as it now is", example())
            .refuses(&[409, 422])
    };
    [
        describe(openapi::put("updateSession", "Change a session", update)),
        describe(openapi::patch("patchSession", "Change a session", update)),
    ]
}

/// The routes.
pub fn routes(api: Api) -> Api {
    let accepted = |operation: Operation| {
        operation
            .answers::<crds::AgenticSession>(202, "The session; its phase follows", example())
            .refuses(&[409, 422])
    };
    let start = openapi::post("startSession", "Start a session's next run", start)
        .says("On the same workspace and conversation. A session that runs goes on; one that is suspended is resumed.");
    let stop = openapi::post("stopSession", "Stop a session", stop)
        .says("The agent is stopped gracefully; workspace and conversation are kept for the next start.");
    let clone = openapi::post("cloneSession", "Create a session like this one", clone)
        .says("With a workspace and a conversation of its own, and the caller as its user.")
        .body::<NewClone>(false, json!({"newSessionName": "second-try"}))
        .answers::<crds::AgenticSession>(201, "The new session", example())
        .refuses(&[409, 422]);
    let session = "/api/projects/{project}/agentic-sessions/{session}";
    api.route(&format!("{session}/start"), [accepted(start)])
        .route(&format!("{session}/stop"), [accepted(stop)])
        .route(&format!("{session}/clone"), [clone])
}

async fn update(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
    body: Held,
) -> Result<Json<DynamicObject>, ApiError> {
    let change = changes(create::object(&body)?)?;
    drop(body);
    Ok(Json(patched(&gateway, &target, change).await?))
}

/// The merge patch that a body asks for.
fn changes(mut body: Map<String, Value>) -> Result<Value, ApiError> {
    let mut metadata = Map::new();
    let mut fields = match body.remove("spec") {
        Some(Value::Object(spec)) => {
            // A whole session, as it was read: of its other parts only labels and annotations could be changed.
            if let Some(Value::Object(mut given)) = body.remove("metadata") {
                metadata.extend(
                    ["labels", "annotations"]
                        .into_iter()
                        .filter_map(|name| given.remove_entry(name)),
                );
            }
            spec
        }
        Some(_) => return Err(ApiError::bad_request("spec must be a JSON object")),
        None => body,
    };
    for name in ["labels", "annotations"] {
        metadata.extend(fields.remove_entry(name));
    }
    if let Some((name, _)) = metadata.iter().find(|(_, texts)| !is_texts(texts)) {
        return Err(ApiError::bad_request(format!("{name} must map names to strings")));
    }
    // Ours come along with a session as it was read; they stay what they are.
    for texts in metadata.values_mut().filter_map(Value::as_object_mut) {
        texts.retain(|key, _| !key.starts_with(RESERVED));
    }
    fields.remove("userContext");
    let removed = fields.iter().filter(|(_, value)| value.is_null() || *value == "");
    let removed: Map<_, _> = removed.map(|(name, _)| (name.clone(), Value::Null)).collect();
    fields.retain(|name, _| !removed.contains_key(name));
    let mut spec = match serde_json::to_value(create::spec(fields)?) {
        Ok(Value::Object(spec)) => spec,
        _ => Map::new(),
    };
    spec.extend(removed);
    Ok(json!({"metadata": metadata, "spec": spec}))
}

fn is_texts(texts: &Value) -> bool {
    let Value::Object(texts) = texts else {
        return texts.is_null();
    };
    texts.values().all(|value| value.is_string() || value.is_null())
}

async fn start(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
) -> Result<Response, ApiError> {
    // Another value than that of any earlier request.
    let request = format!("{}/{}", Timestamp::now(), uuid::Uuid::new_v4());
    let mut change = json!({"metadata": {"annotations": {annotation::START_REQUESTED_AT: request}}});
    let session = existing(&gateway, &target).await?;
    let spec = &session.data["spec"];
    if spec["workspace"]["ephemeral"] == true && View::from(&session).phase.is_terminal() && !was_suspended(&session) {
        return Err(ApiError::conflict(
            "the session has ended, and its workspace went with its pod (spec.workspace.ephemeral): clone it",
        ));
    }
    if spec["suspend"] == true {
        change["spec"] = json!({"suspend": false});
    }
    let session = patched(&gateway, &target, change).await?;
    Ok((StatusCode::ACCEPTED, Json(session)).into_response())
}

/// Whether it ended by `spec.suspend` in a way that it can go on.
fn was_suspended(session: &DynamicObject) -> bool {
    let conditions = session.data["status"]["conditions"].as_array();
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|c| c["type"] == condition::FINISHED && c["reason"] == Reason::Suspended.as_str())
}

async fn stop(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
) -> Result<Response, ApiError> {
    let session = patched(&gateway, &target, json!({"spec": {"suspend": true}})).await?;
    Ok((StatusCode::ACCEPTED, Json(session)).into_response())
}

async fn patched(gateway: &Gateway, target: &Target, change: Value) -> Result<DynamicObject, ApiError> {
    let mut session = gateway.sessions.patch(target, change).await?;
    // Who asks next sees what this did, whatever the watch knows.
    gateway.watched.follow(target, View::from(&session));
    gateway.watched.list(&session);
    shorten(&mut session);
    Ok(session)
}

/// How a clone differs.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewClone {
    /// Its name; chosen when absent.
    new_session_name: Option<String>,
    /// Its project; that of the session when absent.
    target_project: Option<String>,
    /// Its prompt; that of the session when absent.
    prompt: Option<String>,
}

async fn clone(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, caller, .. }: OfSession<Get>,
    body: Held,
) -> Result<Response, ApiError> {
    let NewClone {
        new_session_name: name,
        target_project: project,
        prompt,
    } = parse_or_default(&body)?;
    drop(body);
    let project = project.unwrap_or_else(|| target.namespace().to_owned());
    if !is_namespace(&project) {
        return Err(ApiError::bad_request(format!(
            "no namespace can have the name {project:?}"
        )));
    }
    gateway.authorize(&caller, Verb::Create, &project, None).await?;
    let name = match name {
        Some(name) => Named::As(Target::new(&project, &name).ok_or_else(|| {
            ApiError::bad_request(format!(
                "no session can have the name {name:?}: use lower-case letters, digits and `-`"
            ))
        })?),
        None => Named::Anew(project),
    };
    let original = existing(&gateway, &target).await?;
    let mut spec = original.data["spec"].clone();
    if let Value::Object(spec) = &mut spec {
        spec.remove("suspend");
        if let Some(prompt) = prompt {
            spec.remove("initialPrompt");
            spec.insert("prompt".to_owned(), prompt.into());
        }
        spec.insert("userContext".to_owned(), json!(create::user(&caller.identity)));
    }
    // A clone is no task, whatever its original was.
    let mut labels = original.labels().clone();
    labels.retain(|key, _| !key.starts_with(RESERVED));
    let session = DynamicObject {
        types: original.types.clone(),
        metadata: ObjectMeta {
            labels: Some(labels).filter(|labels| !labels.is_empty()),
            ..ObjectMeta::default()
        },
        data: json!({"spec": spec}),
    };
    let mut created = create_named(&gateway, name, session).await?;
    created.meta_mut().managed_fields = None;
    Ok((StatusCode::CREATED, Json(created)).into_response())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::bare(json!({"timeout": 5}), json!({"metadata": {}, "spec": {"timeout": 5}}))]
    #[case::whole(
        json!({"apiVersion": "v", "metadata": {"name": "n", "labels": {"a": "b"}}, "spec": {"timeout": 5}, "status": {"phase": "Running"}}),
        json!({"metadata": {"labels": {"a": "b"}}, "spec": {"timeout": 5}})
    )]
    #[case::ours_stay(
        json!({"metadata": {"labels": {"a": "b", "vteam.ambient-code/api": "tasks"}}, "spec": {}}),
        json!({"metadata": {"labels": {"a": "b"}}, "spec": {}})
    )]
    #[case::taken_away(json!({"timeout": null, "displayName": ""}), json!({"metadata": {}, "spec": {"timeout": null, "displayName": null}}))]
    #[case::whose_it_is_is_not_said_here(json!({"userContext": {"userId": "root"}}), json!({"metadata": {}, "spec": {}}))]
    fn what_is_asked_for_becomes_a_merge_patch(#[case] body: Value, #[case] patch: Value) {
        let Value::Object(body) = body else { panic!("an object") };
        assert_eq!(changes(body).unwrap(), patch);
    }

    #[rstest]
    #[case(json!({"timeoutt": 5}), "unknown field \\\"timeoutt\\\"")]
    #[case(json!({"spec": {"timeout": "x"}}), "timeout has the wrong type")]
    #[case(json!({"spec": 1}), "spec must be")]
    #[case(json!({"labels": {"a": 1}}), "labels must map")]
    fn what_cannot_be_changed_to_is_refused_by_name(#[case] body: Value, #[case] says: &str) {
        let Value::Object(body) = body else { panic!("an object") };
        let error = format!("{:?}", changes(body).unwrap_err());
        assert!(error.contains(says), "{error}");
    }
}
