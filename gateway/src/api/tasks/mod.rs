//! The task API: `/api/v1/tasks`, `/api/v1/sessions` and `/ws/tasks/{id}`. A task is a turn of a session.

mod find;
mod new;
mod sessions;
mod socket;
mod status;
mod submit;

use std::sync::Arc;

use axum::extract::{FromRequestParts, Path};
use http::request::Parts;
use serde_json::{Value, json};

use super::{
    ApiError,
    compat::{Detail, TaskError},
    openapi::{self, Api, Operation},
};
use crate::Gateway;

pub use new::{Kept, Limits};

/// The routes.
pub fn routes(api: Api) -> Api {
    let submit = openapi::post("submitTask", "Submit a task", submit::submit)
        .says(
            "A task that was submitted is submitted once, however often it is sent with the same `task_id`. With \
             `session.reuse_existing` it goes to the session of its workspace, whose files and conversation it finds.",
        )
        .body::<new::NewTask>(true, submit::example())
        .answers::<submit::Submitted>(200, "The task runs, or will", submit::answer_example())
        .refuses(&[409, 422]);
    let status =
        openapi::get("getTask", "A task", status::status).answers::<status::Task>(200, "The task", status::example());
    let interrupt = openapi::post("interruptTask", "Interrupt a task", status::interrupt)
        .says("The agent stops; the task's session keeps its files. A task that is over stays as it is.")
        .answers::<status::Task>(200, "The task", status::example())
        .refuses(&[409]);
    let list = openapi::get(
        "listTaskSessions",
        "The sessions of tasks, newest first",
        sessions::list,
    )
    .answers::<sessions::Sessions>(
        200,
        "The sessions",
        json!({"sessions": [sessions::example()], "total": 1}),
    );
    let delete = openapi::delete(
        "deleteTaskSession",
        "Delete a session, its files and its tasks",
        sessions::delete,
    )
    .answers::<sessions::Deleted>(
        200,
        "It is being deleted",
        json!({"session_id": "session-task-123", "status": "deleted"}),
    )
    .refuses(&[409]);
    let follow = openapi::get("followTask", "The events of a task on a WebSocket", socket::connect)
        .says(
            "Messages are `{\"type\": …, \"data\": …}` with the types `message`, `tool_use`, `tool_result`, `progress`, \
             `complete` and `error`, from the task's beginning on, however late the client comes. The last one is `complete` \
             or `error`. What a client sends is not looked at.",
        )
        .answers_with(101, "The socket", &[])
        .refuses(&[400]);
    api.route("/api/v1/tasks", [ours(submit)])
        .route("/api/v1/tasks/{task}", [ours(status)])
        .route("/api/v1/tasks/{task}/interrupt", [ours(interrupt)])
        .route("/api/v1/sessions", [ours(list)])
        .route("/api/v1/sessions/{task_session}", [ours(delete)])
        .route("/ws/tasks/{task}", [ours(follow)])
}

fn ours(operation: Operation) -> Operation {
    operation.errors::<Detail>()
}

/// The one parameter of a path.
struct Named(String);

impl FromRequestParts<Arc<Gateway>> for Named {
    type Rejection = TaskError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, TaskError> {
        let path: Result<Path<String>, _> = Path::from_request_parts(parts, gateway).await;
        let Path(name) = path.map_err(|error| ApiError::not_found(format!("the path is not understood: {error}")))?;
        Ok(Self(name))
    }
}

fn unknown_task(id: &str) -> ApiError {
    ApiError::not_found(format!("Task {id} not found"))
}

/// A time as this API writes it.
fn seconds(time: jiff::Timestamp) -> Value {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into()
}
