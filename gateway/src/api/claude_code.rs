//! The claude-code API: `POST /claude-code` runs a prompt in a session of its own and answers with what came of it.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    body::Body as Answer,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
};
use crds::{
    AgenticSession, AgenticSessionSpec,
    session::{Limits, LlmSettings, Workspace},
};
use http::{
    HeaderMap, Method,
    header::{CACHE_CONTROL, CONTENT_TYPE},
};
use kube::{ResourceExt as _, api::DynamicObject, core::ObjectMeta};
use protocol::names::{annotation, api, label};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};

use super::{
    ApiError, Create, Get,
    compat::{Body, Failure, Ours, QueryError, Who, request_id},
    create::user,
    openapi::{self, Api as Routes, Operation},
    projects::follower,
    speak::parse,
};
use crate::{
    Gateway,
    compat::{Settings, places::Place},
    project::claude_code::Query,
    sessions::{Target, View},
};

mod arguments;
mod running;

use running::{Leaving, Running};

/// Rounds of a request that names no number.
const DEFAULT_MAX_TURNS: u32 = 3;
/// When to try again while all places for requests are taken, seconds.
const TRY_AGAIN: u64 = 10;
/// Longest prompt, bytes.
const MAX_PROMPT: usize = 100_000;

/// A request.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewQuery {
    /// What the agent is told, at most 100,000 bytes.
    #[schemars(length(min = 1, max = 100_000))]
    prompt: String,
    /// Name of the model, passed on as it is.
    model: Option<String>,
    /// `true` or absent: a line for each thing that happens; `false`: one JSON object at the end.
    stream: Option<bool>,
    /// `true`: with all messages of the CLI in the result.
    verbose: Option<bool>,
    /// Responses of the model at most; 3 when absent.
    #[schemars(range(min = 1, max = 1_000_000))]
    max_turns: Option<u32>,
    /// Further arguments of the Claude Code CLI.
    additional_args: Option<Vec<String>>,
}

/// What came of a request.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct QueryResult {
    /// Always `result`.
    r#type: &'static str,
    /// What the agent answered.
    result: String,
    /// Name of the session in the cluster, the request's own.
    session_id: String,
    /// With `verbose`: the messages of the CLI.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Value>>")]
    messages: Option<Vec<Box<RawValue>>>,
    /// How many messages are left out, because all together have no room.
    #[serde(skip_serializing_if = "Option::is_none")]
    messages_omitted: Option<usize>,
}

/// That the API is served.
#[derive(Serialize, JsonSchema)]
struct Alive {
    /// Always `healthy`.
    status: &'static str,
    /// What answers.
    service: &'static str,
    /// Its version.
    version: &'static str,
}

/// What requests get that do not say otherwise.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Debug {
    /// Always `healthy`.
    status: &'static str,
    /// Version of the gateway.
    version: &'static str,
    /// Namespace of the caller's sessions.
    namespace: String,
    /// Who the caller is.
    caller: String,
    /// Model of requests that name none; absent: that of the namespace's settings, or the CLI's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    default_model: Option<String>,
    /// Responses of the model at most.
    default_max_turns: u32,
    /// Seconds that a request may work.
    timeout_seconds: u32,
    /// Seconds that a request's session stays after its end.
    keep_seconds: u32,
    /// Requests that are being worked on.
    active_requests: usize,
    /// Seconds since the gateway started.
    uptime_seconds: u64,
}

/// Whether an answer may take as long as the agent works.
pub fn is_query(request: &Request) -> bool {
    request.method() == Method::POST && matches!(request.uri().path(), "/claude-code" | "/")
}

/// The routes.
pub fn routes(api: Routes) -> Routes {
    let query = |id| {
        openapi::post(id, "Run a prompt in a session of its own", query)
            .says(
                "Streams a line of JSON for each thing that happens: `{\"type\":\"assistant\",\"content\":…}`, \
                 `{\"type\":\"tool_call\",\"tool\":…,\"input\":…}`, `{\"type\":\"tool_result\",\"tool\":…,\"result\":…}`, and at \
                 the end `{\"type\":\"result\",\"result\":…}` or an error. With `stream: false` the answer is one JSON object. A \
                 client that goes away stops the agent.",
            )
            .body::<NewQuery>(
                true,
                json!({"prompt": "What is 7 * 6?", "model": "openrouter/qwen/qwen3-coder", "stream": false, "maxTurns": 3}),
            )
            .answers::<QueryResult>(
                200,
                "What the agent answered",
                json!({"type": "result", "result": "42", "sessionId": "claude-code-0a1b2c3d4e5f"}),
            )
            .streams("text/plain")
            .refuses(&[422, 500, 502, 503, 504])
    };
    let alive = openapi::get("getClaudeCode", "Whether the API is served", alive)
        .open()
        .answers::<Alive>(
            200,
            "It is",
            json!({"status": "healthy", "service": "claude-code", "version": "0.1.0"}),
        );
    let debug = openapi::get(
        "getClaudeCodeSettings",
        "What requests get that do not say otherwise",
        debug,
    )
    .answers::<Debug>(
        200,
        "The settings",
        json!({
            "status": "healthy", "version": "0.1.0", "namespace": "team-a", "caller": "anonymous", "defaultMaxTurns": 3,
            "timeoutSeconds": 600, "keepSeconds": 60, "activeRequests": 0, "uptimeSeconds": 3600,
        }),
    );
    api.route("/claude-code", [ours(query("claudeCode"))])
        .route("/", [ours(alive), ours(query("claudeCodeAtRoot"))])
        .route("/debug", [ours(debug)])
}

fn ours(operation: Operation) -> Operation {
    operation.errors::<Failure>()
}

async fn alive() -> Json<Alive> {
    Json(Alive {
        status: "healthy",
        service: "claude-code",
        version: env!("CARGO_PKG_VERSION"),
    })
}

async fn debug(State(gateway): State<Arc<Gateway>>, Ours { who, .. }: Ours<Get, QueryError>) -> Json<Debug> {
    let settings = &gateway.compat.settings;
    let active = gateway.watched.of_api(Some(&who.namespace), api::CLAUDE_CODE);
    Json(Debug {
        status: "healthy",
        version: env!("CARGO_PKG_VERSION"),
        caller: who.caller.identity.user.clone(),
        namespace: who.namespace,
        default_model: settings.model.clone(),
        default_max_turns: DEFAULT_MAX_TURNS,
        timeout_seconds: settings.request_seconds,
        keep_seconds: settings.request_keep_seconds,
        active_requests: active.iter().filter(|entry| !entry.phase.is_terminal()).count(),
        uptime_seconds: gateway.compat.uptime_seconds(),
    })
}

impl NewQuery {
    /// The session of this request, without a name.
    fn session(self, settings: &Settings, who: &Who, request: String) -> Result<AgenticSession, ApiError> {
        let Self {
            prompt,
            model,
            stream: _,
            verbose: _,
            max_turns,
            additional_args,
        } = self;
        if prompt.is_empty() || prompt.len() > MAX_PROMPT || prompt.contains('\0') {
            return Err(ApiError::bad_request(format!(
                "prompt must have 1 to {MAX_PROMPT} bytes and no NUL character"
            )));
        }
        let max_turns = max_turns.unwrap_or(DEFAULT_MAX_TURNS);
        if !(1..=1_000_000).contains(&max_turns) {
            return Err(ApiError::bad_request("maxTurns must be 1 to 1000000"));
        }
        let model = model
            .filter(|model| !model.is_empty())
            .or_else(|| settings.model.clone());
        let mut spec = AgenticSessionSpec {
            prompt: Some(prompt),
            interactive: Some(false),
            timeout: Some(settings.request_seconds),
            ttl_seconds_after_finished: Some(settings.request_keep_seconds),
            llm_settings: model.map(|model| LlmSettings {
                model: Some(model),
                ..LlmSettings::default()
            }),
            limits: Some(Limits {
                max_turns: Some(max_turns),
                ..Limits::default()
            }),
            workspace: settings.request_ephemeral.then(|| Workspace {
                ephemeral: Some(true),
                ..Workspace::default()
            }),
            user_context: Some(user(&who.caller.identity)),
            ..AgenticSessionSpec::default()
        };
        arguments::apply(&mut spec, additional_args.unwrap_or_default())?;
        let labels = BTreeMap::from([(label::API.to_owned(), api::CLAUDE_CODE.to_owned())]);
        let annotations = BTreeMap::from([(annotation::REQUEST_ID.to_owned(), request)]);
        Ok(AgenticSession {
            metadata: ObjectMeta {
                labels: Some(labels),
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            spec,
            status: None,
        })
    }
}

/// A place for one more request.
fn place(gateway: &Gateway, who: &Who) -> Result<Place, ApiError> {
    let most = gateway.compat.settings.request_max;
    // Other gateways' requests are seen by their sessions.
    let listed = gateway.watched.of_api(Some(&who.namespace), api::CLAUDE_CODE);
    let active = listed.iter().filter(|entry| !entry.phase.is_terminal()).count();
    let place = gateway.compat.places.take(&who.namespace, most);
    place.filter(|_| active < most).ok_or_else(|| {
        ApiError::busy(
            format!("{most} requests are under way: wait for one to end, or raise CLAUDE_CODE_MAX_CONCURRENT"),
            TRY_AGAIN,
        )
    })
}

async fn query(
    State(gateway): State<Arc<Gateway>>,
    Ours { who, .. }: Ours<Create, QueryError>,
    headers: HeaderMap,
    body: Body<QueryError>,
) -> Result<Response, QueryError> {
    let asked: NewQuery = parse(&body.bytes)?;
    drop(body);
    let (stream, verbose) = (asked.stream.unwrap_or(true), asked.verbose.unwrap_or_default());
    let request = request_id(&headers);
    let session = asked.session(&gateway.compat.settings, &who, request.clone())?;
    let session: DynamicObject = serde_json::to_value(session)
        .and_then(serde_json::from_value)
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    let name = format!("claude-code-{}", uuid::Uuid::new_v4().simple());
    let target = Target::new(&who.namespace, &name)
        .ok_or_else(|| ApiError::not_found(format!("no namespace can have the name {:?}", who.namespace)))?;
    let place = place(&gateway, &who)?;
    // From here on the session goes with its request.
    let mut leaving = Leaving::create(&gateway, &target, request.clone(), session, place);
    let created = leaving.created().await?;
    tracing::info!(
        request_id = request,
        session = created.name_any(),
        namespace = who.namespace,
        "claude-code request"
    );
    let view = View::from(&created);
    let follower = follower(&gateway, &target, view.clone(), 0, &who.caller.identity.user);
    let running = Running::new(gateway, follower, Query::new(verbose), view, leaving);
    if stream {
        let headers = [
            (CONTENT_TYPE.as_str(), "text/plain; charset=utf-8"),
            (CACHE_CONTROL.as_str(), "no-cache, no-transform"),
            // nginx would hold lines back.
            ("x-accel-buffering", "no"),
        ];
        return Ok((headers, Answer::from_stream(running.lines())).into_response());
    }
    running.answer().await
}
