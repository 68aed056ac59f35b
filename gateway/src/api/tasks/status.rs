//! What became of a task, and its interruption.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use crds::Phase;
use jiff::Timestamp;
use protocol::{
    Reason,
    frame::{GatewayFrame, Interrupt},
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    super::{
        ApiError, Get, Update,
        compat::{Ours, TaskError, Who},
        projects::existing,
    },
    Named,
    find::{Found, find},
    seconds,
    submit::session_id,
    unknown_task,
};
use crate::{
    Gateway, commands,
    compat::folds,
    project::tasks::{self, Event, EventType, Status},
    sessions::View,
    store::commands::Answer,
};

/// How long an interrupt waits for the task to begin.
const BEGINS_WITHIN: Duration = Duration::from_secs(5);
/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A task.
#[derive(Serialize, JsonSchema)]
#[expect(clippy::struct_field_names, reason = "the API's own names")]
pub(super) struct Task {
    /// Its id.
    task_id: String,
    /// Its session's id.
    session_id: String,
    /// Where it is.
    pub status: Status,
    /// The workspace that it named.
    workspace: String,
    /// When it was submitted.
    #[schemars(with = "String")]
    created_at: Value,
    /// When the agent was given it.
    #[schemars(with = "Option<String>")]
    started_at: Value,
    /// When it was over.
    #[schemars(with = "Option<String>")]
    completed_at: Value,
    /// Milliseconds from the one to the other.
    duration_ms: Option<u64>,
    /// What the agent answered.
    result: Option<String>,
    /// Why it was not done, one word.
    error: Option<String>,
    /// Why it was not done, or what it waits for, for people.
    message: Option<String>,
    /// What it used up.
    progress: Progress,
    /// Name and phase of its session in the cluster.
    session: Session,
}

/// What a task used up.
#[derive(Default, Serialize, JsonSchema)]
struct Progress {
    /// Responses of the model.
    turns: u64,
    /// Tokens by sort.
    #[schemars(with = "std::collections::BTreeMap<String, u64>")]
    tokens: Value,
    /// All tokens together.
    tokens_used: u64,
    /// What they cost, in US dollars; absent for a model without a price.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<String>,
    /// Files that the agent wrote.
    files: Vec<String>,
}

/// A session in the cluster.
#[derive(Serialize, JsonSchema)]
struct Session {
    /// Its name, for `kubectl get agenticsession`.
    name: String,
    /// Its phase.
    phase: Phase,
}

/// A task, for the document.
pub(super) fn example() -> Value {
    json!({
        "task_id": "task-123", "session_id": "session-task-123", "status": "completed", "workspace": "/workspace/project",
        "created_at": "2026-01-19T10:00:00Z", "started_at": "2026-01-19T10:00:04Z", "completed_at": "2026-01-19T10:00:49Z",
        "duration_ms": 45000, "result": "Done.", "error": null, "message": null,
        "progress": {
            "turns": 7, "tokens": {"input": 9000, "output": 3500, "cache_read": 0, "cache_creation": 0}, "tokens_used": 12500,
            "files": ["/workspace/auth.py"],
        },
        "session": {"name": "task-0a1b2c3d4e5f0a1b2c3d4e5f", "phase": "Completed"},
    })
}

pub(super) async fn status(
    State(gateway): State<Arc<Gateway>>,
    Ours { who, .. }: Ours<Get, TaskError>,
    Named(id): Named,
) -> Result<Json<Task>, TaskError> {
    let found = existing_task(&gateway, &who, &id).await?;
    Ok(Json(of(&gateway, &found).await?))
}

pub(super) async fn existing_task(gateway: &Gateway, who: &Who, id: &str) -> Result<Found, ApiError> {
    find(gateway, who, id).await?.ok_or_else(|| unknown_task(id))
}

/// What is known of a task.
pub(super) async fn of(gateway: &Gateway, found: &Found) -> Result<Task, ApiError> {
    let task = state(gateway, found).await?;
    let progress = Progress {
        turns: task.rounds,
        tokens: tasks::tokens(&task.usage),
        tokens_used: task.usage.total(),
        cost_usd: task.cost.map(|cost| cost.to_string()),
        files: task.files.iter().cloned().collect(),
    };
    let begun = (task.turn > 0).then_some(task.begun);
    let duration = begun.zip(task.ended).map(|(begun, ended)| ended.duration_since(begun));
    Ok(Task {
        task_id: found.id.clone(),
        session_id: session_id(&found.object),
        status: task.status,
        workspace: found
            .asked()
            .map(|asked| asked.workspace().to_owned())
            .unwrap_or_default(),
        created_at: seconds(found.created()),
        started_at: begun.map_or(Value::Null, seconds),
        completed_at: task.ended.map_or(Value::Null, seconds),
        duration_ms: duration.map(|duration| duration.as_millis().max(0) as u64),
        error: task.reason.clone(),
        message: match task.status {
            Status::Running if begun.is_none() => found.view.message.clone(),
            _ => task.message.clone(),
        },
        result: task.result.filter(|_| task.status == Status::Completed),
        progress,
        session: Session {
            name: found.target.name().to_owned(),
            phase: found.view.phase,
        },
    })
}

/// A task by its session's records, its command and its session's phase.
pub(super) async fn state(gateway: &Gateway, found: &Found) -> Result<tasks::Task, ApiError> {
    let fold = gateway.compat.folds.of(&found.view.uid);
    let mut fold = fold.lock().await;
    fold.catch_up(&*gateway.log, &found.view.uid).await?;
    let mut task = fold.tasks.of(&found.command).cloned().unwrap_or_default();
    drop(fold);
    if task.answer_left {
        task.result = folds::answer(&*gateway.log, &found.view.uid, &found.command).await?;
    }
    end_by_session(&mut task, found);
    // Its last records may still be on their way.
    if task.status == Status::Completed && task.result.is_none() && found.sent.is_none() {
        task.result = found.object.data["status"]["result"].as_str().map(str::to_owned);
    }
    Ok(task)
}

/// Ends a task of which no record says that it is over, if its command or its session does.
pub(super) fn end_by_session(task: &mut tasks::Task, found: &Found) {
    let view = &found.view;
    let now = view.ended.unwrap_or_else(|| found.created());
    if let Some(Answer::Refused(error) | Answer::Expired(error)) = found.sent.as_ref().map(|sent| &sent.answer) {
        task.end(Status::Failed, "SessionEnded", error.clone(), now);
    } else if found.sent.is_none() || task.turn > 0 {
        let suspended = found.object.data["spec"]["suspend"] == true && view.phase == Phase::Pending;
        if suspended && task.turn == 0 {
            task.end_with_session(view.phase, Some(Reason::StoppedByUser.as_str()), None, now);
        }
        end_by_view(task, view);
    }
}

/// Ends a task with its session.
pub(super) fn end_by_view(task: &mut tasks::Task, view: &View) {
    // Stopped before it began.
    if view.phase == Phase::Pending && view.reason.as_deref() == Some(Reason::Suspended.as_str()) && task.turn == 0 {
        task.end_with_session(view.phase, Some(Reason::StoppedByUser.as_str()), None, Timestamp::now());
    }
    if let Some(ended) = view.ended.filter(|_| view.phase.is_terminal() && !view.starting) {
        task.end_with_session(view.phase, view.reason.as_deref(), view.message.as_deref(), ended);
    }
}

/// The last event of a task.
pub(super) fn last(task: &tasks::Task, id: &str) -> Event {
    let mut event = task.last();
    event.set_task(id);
    event
}

/// Whether nothing follows an event.
pub(super) fn is_last(event: &Event) -> bool {
    matches!(event.kind, EventType::Complete | EventType::Error)
}

pub(super) async fn interrupt(
    State(gateway): State<Arc<Gateway>>,
    Ours { who, .. }: Ours<Update, TaskError>,
    Named(id): Named,
) -> Result<Json<Task>, TaskError> {
    let found = existing_task(&gateway, &who, &id).await?;
    let mut task = state(&gateway, &found).await?;
    let until = tokio::time::Instant::now() + BEGINS_WITHIN;
    while !task.is_over() {
        let pod = matches!(found.view.phase, Phase::Running | Phase::Stopping);
        if task.turn > 0 {
            stop_turn(&gateway, &found, task.turn).await?;
            break;
        }
        if found.sent.is_none() && !pod {
            // Nothing of it has begun. A session that other tasks share is not one of them yet.
            let stop = json!({"spec": {"suspend": true}});
            let stopped = gateway.sessions.patch(&found.target, stop).await?;
            gateway.watched.list(&stopped);
            break;
        }
        if tokio::time::Instant::now() >= until {
            return Err(ApiError::conflict("the task is about to begin: try again").into());
        }
        tokio::time::sleep(LOOK_EVERY).await;
        task = state(&gateway, &found).await?;
    }
    let found = existing_task(&gateway, &who, &id).await?;
    Ok(Json(of(&gateway, &found).await?))
}

async fn stop_turn(gateway: &Gateway, found: &Found, turn: u32) -> Result<(), ApiError> {
    let view = View::from(&existing(gateway, &found.target).await?);
    let id = commands::own_id("interrupt", turn);
    let frame = GatewayFrame::Interrupt(Interrupt { id, turn });
    match commands::send_own(gateway, &found.target, &view, frame).await {
        // It was over first.
        Ok(_) | Err(commands::Error::Over { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
