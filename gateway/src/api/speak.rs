//! To speak with a session's agent: messages, interrupts, answers to permission questions, its end; and what became of each.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse as _, Response},
};
use http::StatusCode;
use jiff::Timestamp;
use protocol::frame::{EndSession, GatewayFrame, Interrupt, PermissionResponse, UserMessage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{json, value::RawValue};

use super::{
    ApiError, Get, OfSession, Update,
    openapi::{self, Api, Operation},
    projects::existing,
};
use crate::{
    Gateway,
    body::Held,
    commands,
    sessions::{Target, View},
    store::commands::{Command, Waiting},
};

/// Longest message, bytes: that of a prompt.
const MAX_MESSAGE: usize = 100_000;

/// The routes.
pub fn routes(api: Api) -> Api {
    let message = openapi::post("sendMessage", "Send a message to the agent", send_message)
        .says(
            "The session must be interactive. The message is on disk before it is answered, and given to the agent once, however \
             often it is sent with the same id.",
        )
        .body::<NewMessage>(true, json!({"id": "review-1", "text": "Now add a test."}));
    let interrupt = openapi::post("interrupt", "Interrupt the agent's turn", interrupt)
        .says("Nothing happens if that turn is over when the interrupt arrives.")
        .body::<NewInterrupt>(false, json!({}));
    let permission = openapi::post(
        "answerPermission",
        "Answer a permission question of the agent",
        permission,
    )
    .says("The question is the record with `type: control_request`; its `request_id` names it.")
    .body::<NewPermission>(true, json!({"requestId": "9b1d0f", "behavior": "allow"}));
    let end = openapi::post("endSession", "End an interactive session", end)
        .says("The agent finishes its turn, and the session is `Completed`.")
        .body::<NewEnd>(false, json!({}));
    let command = openapi::get("getCommand", "What became of a command", command).answers::<Sent>(
        200,
        "The command",
        json!({"id": "review-1", "kind": "user_message", "state": "done", "seq": 42, "createdAt": "2026-01-02T03:04:05Z"}),
    );
    let session = "/api/projects/{project}/agentic-sessions/{session}";
    api.route(&format!("{session}/messages"), [super::messages::list(), kept(message)])
        .route(&format!("{session}/interrupt"), [kept(interrupt)])
        .route(&format!("{session}/permissions"), [kept(permission)])
        .route(&format!("{session}/end"), [kept(end)])
        .route(&format!("{session}/commands/{{id}}"), [command])
}

fn kept(operation: Operation) -> Operation {
    operation
        .answers::<Sent>(
            202,
            "The command is on disk; ask for it to learn what became of it",
            json!({"id": "review-1", "kind": "user_message", "state": "pending", "createdAt": "2026-01-02T03:04:05Z"}),
        )
        .refuses(&[409])
}

/// A message for the agent.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NewMessage {
    /// Id of the command, 1 to 128 letters, digits and `-_.:`; chosen when absent. Sent again, it is the same message.
    id: Option<String>,
    /// The message, at most 100,000 bytes.
    #[serde(alias = "content")]
    #[schemars(length(min = 1, max = 100_000))]
    text: String,
    /// `user_message`, as the platform's clients say.
    #[serde(rename = "type")]
    kind: Option<MessageType>,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum MessageType {
    UserMessage,
}

/// An interrupt.
#[derive(Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NewInterrupt {
    /// Id of the command; chosen when absent.
    id: Option<String>,
    /// The turn to interrupt; the newest when absent.
    turn: Option<u32>,
}

/// An answer to a permission question.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewPermission {
    /// Id of the command; chosen when absent.
    id: Option<String>,
    /// `request_id` of the question.
    #[schemars(length(min = 1, max = 256))]
    request_id: String,
    /// Whether the tool may run.
    behavior: Behavior,
    /// With `allow`: the tool's input, when it is to be another.
    #[schemars(with = "Option<std::collections::BTreeMap<String, serde_json::Value>>")]
    updated_input: Option<serde_json::Map<String, serde_json::Value>>,
    /// With `deny`: why, for the agent.
    message: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Behavior {
    Allow,
    Deny,
}

/// The end of a session.
#[derive(Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NewEnd {
    /// Id of the command; chosen when absent.
    id: Option<String>,
}

/// A command that was kept.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Sent {
    /// Its id.
    id: String,
    /// `user_message`, `interrupt`, `permission_response` or `end_session`.
    kind: String,
    /// `pending`: the session's runner has not answered yet; `done`: carried out; `refused`: not carried out, the runner says;
    /// `expired`: the session was over first.
    state: &'static str,
    /// Why it was not carried out.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Number of the record that holds its effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    /// When it was kept.
    created_at: Timestamp,
}

impl From<Command> for Sent {
    fn from(command: Command) -> Self {
        let kind = command.frame.split('"').nth(1).unwrap_or_default().to_owned();
        Self {
            kind,
            state: command.answer.state(),
            error: command.answer.error().map(str::to_owned),
            seq: command.answer.seq(),
            created_at: command.created,
            id: command.id,
        }
    }
}

async fn send_message(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
    body: Held,
) -> Result<Response, ApiError> {
    let message: NewMessage = parse(&body)?;
    if message.text.is_empty() || message.text.len() > MAX_MESSAGE || message.text.contains('\0') {
        return Err(ApiError::bad_request(format!(
            "text must have 1 to {MAX_MESSAGE} bytes and no NUL character: put long material into the workspace"
        )));
    }
    let frame = |id| {
        GatewayFrame::UserMessage(UserMessage {
            id,
            text: message.text.clone(),
        })
    };
    keep(&gateway, &target, message.id.clone(), asked(&message)?, frame).await
}

async fn interrupt(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
    body: Held,
) -> Result<Response, ApiError> {
    let interrupt: NewInterrupt = parse_or_default(&body)?;
    let asked = asked(&interrupt)?;
    let view = View::from(&existing(&gateway, &target).await?);
    let turn = match interrupt.turn {
        Some(turn) => turn,
        None => gateway.log.turn(&view.uid).await?,
    };
    if turn == 0 {
        return Err(commands::Error::NoTurn(target).into());
    }
    let frame = |id| GatewayFrame::Interrupt(Interrupt { id, turn });
    keep(&gateway, &target, interrupt.id, asked, frame).await
}

async fn permission(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
    body: Held,
) -> Result<Response, ApiError> {
    let answer: NewPermission = parse(&body)?;
    let asked = asked(&answer)?;
    if answer.request_id.is_empty() || answer.request_id.len() > 256 {
        return Err(ApiError::bad_request("requestId must have 1 to 256 bytes"));
    }
    let response = match answer.behavior {
        Behavior::Allow if answer.message.is_some() => Err("message goes with `deny` only"),
        Behavior::Deny if answer.updated_input.is_some() => Err("updatedInput goes with `allow` only"),
        Behavior::Allow => Ok(match answer.updated_input {
            Some(input) => json!({"behavior": "allow", "updatedInput": input}),
            None => json!({"behavior": "allow"}),
        }),
        Behavior::Deny => {
            let message = answer.message.as_deref().unwrap_or("The user denied this.");
            Ok(json!({"behavior": "deny", "message": message}))
        }
    };
    let response = response.map_err(ApiError::bad_request)?.to_string();
    let response = RawValue::from_string(response).map_err(|error| ApiError::bad_request(error.to_string()))?;
    let request_id = answer.request_id;
    let frame = |id| {
        GatewayFrame::PermissionResponse(PermissionResponse {
            id,
            request_id,
            response,
        })
    };
    keep(&gateway, &target, answer.id, asked, frame).await
}

async fn end(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
    body: Held,
) -> Result<Response, ApiError> {
    let end: NewEnd = parse_or_default(&body)?;
    let frame = |id| GatewayFrame::EndSession(EndSession { id });
    keep(&gateway, &target, end.id.clone(), asked(&end)?, frame).await
}

async fn command(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Get>,
    Path((.., id)): Path<(String, String, String)>,
) -> Result<Json<Sent>, ApiError> {
    let view = View::from(&existing(&gateway, &target).await?);
    let waiting = Waiting {
        session: view.uid,
        namespace: target.namespace().to_owned(),
        name: target.name().to_owned(),
    };
    commands::expire(&gateway, &waiting).await?;
    match gateway.log.command(&waiting.session, &id).await? {
        Some(command) => Ok(Json(command.into())),
        None => Err(ApiError::not_found(format!(
            "{target} has no command {id:?}, or it was answered more than a week ago"
        ))),
    }
}

async fn keep(
    gateway: &Gateway,
    target: &Target,
    id: Option<String>,
    asked: String,
    frame: impl FnOnce(String) -> GatewayFrame,
) -> Result<Response, ApiError> {
    // Read live, and told to the watch, so that a start that was just asked for is known.
    let view = View::from(&existing(gateway, target).await?);
    gateway.watched.follow(target, view.clone());
    let id = id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let command = commands::send(gateway, target, &view, frame(id), asked).await?;
    Ok((StatusCode::ACCEPTED, Json(Sent::from(command))).into_response())
}

fn asked<T: Serialize>(body: &T) -> Result<String, ApiError> {
    let mut asked = serde_json::to_value(body).map_err(|error| ApiError::bad_request(error.to_string()))?;
    asked["as"] = std::any::type_name::<T>().rsplit(':').next().unwrap_or_default().into();
    Ok(asked.to_string())
}

/// A body's fields, or an error that names the one that is wrong.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." {
            String::new()
        } else {
            format!("{path}: ")
        };
        ApiError::bad_request(format!("the body is not understood: {place}{}", error.into_inner()))
    })?;
    json.end()
        .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
    Ok(parsed)
}

pub(super) fn parse_or_default<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, ApiError> {
    if body.trim_ascii().is_empty() {
        Ok(T::default())
    } else {
        parse(body)
    }
}

impl From<commands::Error> for ApiError {
    fn from(error: commands::Error) -> Self {
        match error {
            commands::Error::Id(_) => Self::bad_request(error.to_string()),
            commands::Error::Store(error) => error.into(),
            commands::Error::Full(_) => Self::too_many(error.to_string(), 5),
            commands::Error::Over { .. }
            | commands::Error::OneShot(_)
            | commands::Error::NoTurn(_)
            | commands::Error::Taken { .. } => Self::conflict(error.to_string()),
        }
    }
}
