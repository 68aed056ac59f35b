//! The sessions of tasks.

use std::sync::Arc;

use axum::{Json, extract::State};
use kube::api::DynamicObject;
use protocol::names::{annotation, api, label};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    super::{
        ApiError, Delete, List,
        compat::{Ours, TaskError, Who},
        list::synced,
    },
    Named,
    find::session_of,
    submit::session_id,
};
use crate::Gateway;

/// The sessions of tasks.
#[derive(Serialize, JsonSchema)]
pub(super) struct Sessions {
    /// The sessions, newest first.
    sessions: Vec<Session>,
    /// How many they are.
    total: usize,
}

/// A session of tasks.
#[derive(Serialize, JsonSchema)]
#[expect(clippy::struct_field_names, reason = "the API's own names")]
struct Session {
    /// Its id.
    session_id: String,
    /// `active`: it runs, or will; `ended`.
    status: &'static str,
    /// The task that created it.
    task_id: String,
    /// The workspace that it is of.
    workspace: String,
    /// Whether tasks of its workspace share it.
    shared: bool,
    /// When it was created.
    created_at: String,
    /// Its name in the cluster.
    name: String,
    /// Its phase in the cluster.
    phase: crds::Phase,
}

/// That a session is being deleted.
#[derive(Serialize, JsonSchema)]
pub(super) struct Deleted {
    /// Its id.
    session_id: String,
    /// Always `deleted`.
    status: &'static str,
}

/// A session, for the document.
pub(super) fn example() -> Value {
    json!({
        "session_id": "session-task-123", "status": "active", "task_id": "task-123", "workspace": "/workspace/project",
        "shared": false, "created_at": "2026-01-19T10:00:00Z", "name": "task-0a1b2c3d4e5f0a1b2c3d4e5f", "phase": "Running",
    })
}

pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    Ours { who, .. }: Ours<List, TaskError>,
) -> Result<Json<Sessions>, TaskError> {
    synced(&gateway).await?;
    let entries = gateway.watched.of_api(Some(&who.namespace), api::TASKS);
    let items = entries
        .iter()
        .filter_map(|entry| serde_json::from_str(entry.item.get()).ok());
    let sessions: Vec<_> = items.filter_map(|item| session(&item, &who)).collect();
    Ok(Json(Sessions {
        total: sessions.len(),
        sessions,
    }))
}

fn session(object: &DynamicObject, who: &Who) -> Option<Session> {
    let annotations = object.metadata.annotations.as_ref()?;
    let text = |name: &str| annotations.get(name).cloned().unwrap_or_default();
    if text(annotation::TASK_OWNER) != who.owner {
        return None;
    }
    let phase: crds::Phase = serde_json::from_value(object.data["status"]["phase"].clone()).unwrap_or_default();
    let labels = object.metadata.labels.as_ref();
    let created = object.metadata.creation_timestamp.as_ref();
    Some(Session {
        session_id: session_id(object),
        status: if phase.is_terminal() { "ended" } else { "active" },
        task_id: text(annotation::TASK_ID),
        workspace: text(annotation::TASK_WORKSPACE),
        shared: labels.is_some_and(|labels| labels.contains_key(label::WORKSPACE)),
        created_at: created.map(|time| time.0.to_string()).unwrap_or_default(),
        name: object.metadata.name.clone().unwrap_or_default(),
        phase,
    })
}

pub(super) async fn delete(
    State(gateway): State<Arc<Gateway>>,
    Ours { who, .. }: Ours<Delete, TaskError>,
    Named(id): Named,
) -> Result<Json<Deleted>, TaskError> {
    let none = || ApiError::not_found(format!("Session {id} not found"));
    let task = id.strip_prefix("session-").ok_or_else(none)?;
    let target = session_of(&gateway, &who, task).await?.ok_or_else(none)?;
    if !gateway.sessions.delete(&target).await? {
        return Err(none().into());
    }
    gateway.watched.unlist(&target, None);
    Ok(Json(Deleted {
        session_id: id,
        status: "deleted",
    }))
}
