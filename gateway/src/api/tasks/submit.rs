//! To submit a task.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Extension, State},
};
use crds::session::Tools;
use http::{HeaderMap, StatusCode, header::HOST};
use jiff::Timestamp;
use kube::{ResourceExt as _, api::DynamicObject};
use protocol::{
    frame::{GatewayFrame, UserMessage},
    names::annotation,
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    super::{
        ApiError, Create,
        compat::{Body, Ours, TaskError, Who},
        list::synced,
        projects::{Named, create_named, existing},
        speak::parse,
    },
    find::{self, Found, find},
    new::{self, Asked, NewTask},
    seconds,
};
use crate::{
    Gateway,
    auth::kubernetes::Verb,
    commands,
    compat::{active, keeper},
    project::tasks::Status,
    server::Secure,
    sessions::{Target, View},
};

/// When to try again while all places for sessions are taken, seconds.
const TRY_AGAIN: u64 = 30;

/// The same while a workspace's session is being stopped.
const STOPPED_SOON: u64 = 5;

/// A task that was submitted.
#[derive(Serialize, JsonSchema)]
pub(super) struct Submitted {
    /// Its id.
    task_id: String,
    /// Its session's id.
    session_id: String,
    /// Where it is: `running`, unless it was submitted before.
    status: Status,
    /// Where its events are.
    websocket_url: String,
    /// When it was submitted.
    #[schemars(with = "String")]
    created_at: Value,
}

/// A body, for the document.
pub(super) fn example() -> Value {
    json!({
        "task_id": "task-123", "prompt": "Implement user authentication", "workspace": "/workspace/project",
        "options": {
            "allowed_tools": ["Read", "Write", "Edit", "Bash"], "permission_mode": "acceptEdits", "max_turns": 50,
            "timeout": 3600,
        },
        "session": {"reuse_existing": false},
    })
}

/// Its answer, for the document.
pub(super) fn answer_example() -> Value {
    json!({
        "task_id": "task-123", "session_id": "session-task-123", "status": "running",
        "websocket_url": "ws://localhost:8000/ws/tasks/task-123", "created_at": "2026-01-19T10:00:00Z",
    })
}

pub(super) async fn submit(
    State(gateway): State<Arc<Gateway>>,
    Ours { who, .. }: Ours<Create, TaskError>,
    secure: Option<Extension<Secure>>,
    headers: HeaderMap,
    body: Body<TaskError>,
) -> Result<Json<Submitted>, TaskError> {
    let task: NewTask = parse(&body.bytes).map_err(|error| ApiError::unprocessable(error.message()))?;
    let asked = task.checked(&gateway.compat.settings)?;
    drop(body);
    if asked.reuse {
        // What was done in the session so far may be long: read before others wait.
        known(&gateway, &who, &asked).await?;
    }
    // One at a time: a task's id, its workspace's session and the number of sessions stay as they are while they are looked at.
    let turn = gateway.compat.submit.of(&who.namespace).await;
    // A client that goes away does not take its turn with it: what is being created then is counted.
    let taking = gateway.tasks.spawn({
        let gateway = gateway.clone();
        async move {
            let _turn = turn;
            let _among_gateways = gateway.log.alone(&who.namespace).await?;
            found_or_taken(&gateway, &who, &asked).await
        }
    });
    let found = taking
        .await
        .map_err(|_| ApiError::busy("the task could not be taken: try again", 1))??;
    let status = super::status::of(&gateway, &found).await?.status;
    Ok(Json(Submitted {
        session_id: session_id(&found.object),
        status,
        websocket_url: socket_url(secure.is_some(), &headers, &found.id),
        created_at: seconds(found.created()),
        task_id: found.id,
    }))
}

/// The id of a session: that of the task that created it, behind `session-`.
pub(super) fn session_id(object: &DynamicObject) -> String {
    let id = object.annotations().get(annotation::TASK_ID);
    format!("session-{}", id.map_or("", String::as_str))
}

/// Where a task's events are, by the address at which its client found us.
fn socket_url(secure: bool, headers: &HeaderMap, id: &str) -> String {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(HOST.as_str()).unwrap_or("localhost:8000");
    let secure = secure || text("x-forwarded-proto").is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"));
    format!("{}://{host}/ws/tasks/{id}", if secure { "wss" } else { "ws" })
}

/// The task with this id, if it is the same, or a new one.
async fn found_or_taken(gateway: &Arc<Gateway>, who: &Who, asked: &Asked) -> Result<Found, ApiError> {
    match find(gateway, who, &asked.id).await? {
        Some(found) => same(found, asked),
        None => taken(gateway, who, asked).await,
    }
}

fn same(found: Found, asked: &Asked) -> Result<Found, ApiError> {
    if found.asked() == Some(asked.kept()) {
        return Ok(found);
    }
    Err(ApiError::conflict(format!(
        "there is another task with the id {:?}: an id stands for one task, choose another",
        asked.id
    )))
}

/// Reads what the records of a workspace's session say of its tasks.
async fn known(gateway: &Gateway, who: &Who, asked: &Asked) -> Result<(), ApiError> {
    let key = new::workspace_key(&who.owner, &asked.workspace);
    if let Some(entry) = find::shared(gateway, who, Some(&key)).await?.first() {
        let fold = gateway.compat.folds.of(&entry.uid);
        fold.lock().await.catch_up(&*gateway.log, &entry.uid).await?;
    }
    Ok(())
}

/// Takes a task that is new.
async fn taken(gateway: &Arc<Gateway>, who: &Who, asked: &Asked) -> Result<Found, ApiError> {
    synced(gateway).await?;
    if gateway.log.peer().is_some() {
        active::see_all(gateway, &who.namespace).await?;
    }
    if asked.reuse
        && let Some((target, object)) = usable(gateway, who, asked).await?
    {
        // The session may be another caller's who shares this name: to create is not to tell it what to do.
        gateway
            .authorize(&who.caller, Verb::Update, &who.namespace, None)
            .await?;
        return sent(gateway, &target, object, asked).await;
    }
    let active = active::active(gateway, Some(&who.namespace)).len();
    let most = gateway.compat.settings.max_concurrent;
    if active >= most {
        return Err(ApiError::busy(
            format!(
                "Maximum concurrent sessions reached ({most}): wait for tasks to end and idle sessions to be stopped, delete \
                 sessions, or raise SESSION_MAX_CONCURRENT"
            ),
            TRY_AGAIN,
        ));
    }
    if !active::make_room(gateway, &who.namespace).await? {
        return Err(ApiError::busy(
            format!(
                "there are {} sessions of tasks, and none of them has ended: delete some",
                active::MOST_KEPT
            ),
            TRY_AGAIN,
        ));
    }
    created(gateway, who, asked).await
}

/// Creates the session of a task.
async fn created(gateway: &Arc<Gateway>, who: &Who, asked: &Asked) -> Result<Found, ApiError> {
    let name = new::session_name(&who.owner, &asked.id);
    let target = Target::new(&who.namespace, &name)
        .ok_or_else(|| ApiError::not_found(format!("no namespace can have the name {:?}", who.namespace)))?;
    let session: DynamicObject = serde_json::to_value(asked.session(who))
        .and_then(serde_json::from_value)
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    let object = match create_named(gateway, Named::As(target.clone()), session).await {
        // One that was given up came after all.
        Err(error) if error.code() == StatusCode::CONFLICT => {
            let found = find(gateway, who, &asked.id).await?.ok_or(error)?;
            return same(found, asked);
        }
        created => created?,
    };
    let view = View::from(&object);
    keeper::keep(gateway, &target, &object);
    Ok(Found {
        id: asked.id.clone(),
        target,
        object,
        view,
        command: protocol::identity::PROMPT_COMMAND.to_owned(),
        sent: None,
    })
}

/// The session of a workspace, if it can take a task now, or when it is started again.
async fn usable(gateway: &Gateway, who: &Who, asked: &Asked) -> Result<Option<(Target, DynamicObject)>, ApiError> {
    let key = new::workspace_key(&who.owner, &asked.workspace);
    let shared = find::shared(gateway, who, Some(&key)).await?;
    let Some(entry) = shared.first() else { return Ok(None) };
    let Some(target) = Target::new(&who.namespace, &entry.key.1) else {
        return Ok(None);
    };
    let Some(object) = gateway.sessions.get(&target).await? else {
        return Ok(None);
    };
    let view = View::from(&object);
    // One that was stopped before it began has nothing to go on with, and one that is being deleted goes.
    if active::is_held(&object) || object.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let fold = gateway.compat.folds.of(&view.uid);
    let mut fold = fold.lock().await;
    fold.catch_up(&*gateway.log, &view.uid).await?;
    let open = fold.tasks.all().is_empty() || fold.tasks.open().is_some();
    // The runner has said its last word before the status tells of the end.
    let has_ended = !open && gateway.log.state(&view.uid).await?.progress.ended >= view.attempt.max(1);
    if view.phase == crds::Phase::Stopping || (has_ended && !view.phase.is_terminal()) {
        let why = format!(
            "the session of workspace {:?} is being stopped: try again",
            asked.workspace
        );
        return Err(ApiError::busy(why, STOPPED_SOON));
    }
    if view.phase.is_terminal() && !view.starting {
        // One that ended in the midst of a task would go on with that task.
        let stopped = view.phase == crds::Phase::Stopped && !open;
        return Ok(stopped.then_some((target, object)));
    }
    let waiting = gateway.log.pending(&view.uid, 0).await?;
    let waiting = waiting
        .iter()
        .any(|command| matches!(command.frame(), Ok(GatewayFrame::UserMessage(_))));
    if open || waiting {
        return Err(ApiError::conflict(format!(
            "workspace {:?} is busy with another task: wait until it is over, interrupt it, or leave out session.reuse_existing",
            asked.workspace
        )));
    }
    Ok(Some((target, object)))
}

/// Sends a task to the session of its workspace.
async fn sent(
    gateway: &Arc<Gateway>,
    target: &Target,
    object: DynamicObject,
    asked: &Asked,
) -> Result<Found, ApiError> {
    same_tools(&object, asked)?;
    let mut view = View::from(&object);
    if view.phase.is_terminal() && !view.starting {
        let request = format!("{}/{}", Timestamp::now(), uuid::Uuid::new_v4());
        let mut change = json!({"metadata": {"annotations": {annotation::START_REQUESTED_AT: request}}});
        if object.data["spec"]["suspend"] == true {
            change["spec"] = json!({"suspend": false});
        }
        let started = gateway.sessions.patch(target, change).await?;
        gateway.watched.list(&started);
        view = View::from(&started);
    }
    gateway.watched.follow(target, view.clone());
    let frame = GatewayFrame::UserMessage(UserMessage {
        id: asked.id.clone(),
        text: asked.prompt.clone(),
    });
    let command = commands::send(gateway, target, &view, frame, json!(asked.kept()).to_string()).await?;
    let object = existing(gateway, target).await?;
    keeper::keep(gateway, target, &object);
    Ok(Found {
        id: asked.id.clone(),
        target: target.clone(),
        view: View::from(&object),
        object,
        command: command.id.clone(),
        sent: Some(command),
    })
}

/// What an agent may use is settled when its session begins.
fn same_tools(object: &DynamicObject, asked: &Asked) -> Result<(), ApiError> {
    let Some(tools) = asked.tools() else { return Ok(()) };
    let has: Option<Tools> = serde_json::from_value(object.data["spec"]["tools"].clone()).unwrap_or_default();
    if has.as_ref() == Some(&tools) {
        return Ok(());
    }
    let has = has.unwrap_or_default();
    let allowed: Vec<_> = has.allowed.iter().map(|rule| rule.0.as_str()).collect();
    Err(ApiError::conflict(format!(
        "options.allowed_tools and options.permission_mode are settled by the first task of a workspace's session, which has {} \
         and {}: leave them out, or delete {}",
        json!(allowed),
        json!(has.permission_mode.unwrap_or_default()),
        session_id(object),
    )))
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(false, &[("host", "localhost:8000")], "ws://localhost:8000/ws/tasks/a")]
    #[case(true, &[("host", "tasks.example.com")], "wss://tasks.example.com/ws/tasks/a")]
    #[case(false, &[("host", "tasks.example.com"), ("x-forwarded-proto", "https")], "wss://tasks.example.com/ws/tasks/a")]
    fn events_are_where_the_client_found_us(
        #[case] tls: bool,
        #[case] headers: &[(&'static str, &'static str)],
        #[case] url: &str,
    ) {
        let headers = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        assert_eq!(socket_url(tls, &headers.collect(), "a"), url);
    }
}
