//! The HTTP side of the mock: the API's routes, and `/__mock/…` for tests.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::{StreamExt as _, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::answer::Answer;
use super::log::{End, Log, Logged};
use super::refuse::{self, Refusal};
use super::script::{self, Place, Step};
use super::sending::{Sending, Trouble, cut};

/// The API takes bodies up to this size.
const MAX_BODY: usize = 32 << 20;

/// Everything the handlers share.
#[derive(Debug)]
pub struct Shared {
    keys: Vec<String>,
    /// The requests so far.
    pub log: Log,
    released: watch::Sender<HashSet<String>>,
    /// How often a step with `times` was asked for.
    asked: Mutex<HashMap<String, u32>>,
}

impl Shared {
    /// State of a mock that accepts these keys.
    pub fn new(keys: Vec<String>) -> Self {
        Self {
            keys,
            log: Log::default(),
            released: watch::Sender::default(),
            asked: Mutex::default(),
        }
    }

    /// Lets every answer on that holds for `name`, now and later.
    pub fn release(&self, name: &str) {
        self.released.send_modify(|names| {
            names.insert(name.to_owned());
        });
    }

    /// Forgets requests, releases and counts.
    pub fn reset(&self) {
        self.log.clear();
        self.released.send_replace(HashSet::new());
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    async fn released(&self, name: &str) {
        // The sender lives as long as `self`.
        let _ = self.released.subscribe().wait_for(|names| names.contains(name)).await;
    }

    /// Whether a trouble that lasts `times` requests still lasts; counts this one.
    fn lasts(&self, key: &str, times: Option<u32>) -> bool {
        let Some(times) = times else { return true };
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let count = asked.entry(key.to_owned()).or_default();
        *count += 1;
        *count <= times
    }
}

/// The routes of the mock.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/v1/models", get(models))
        .route(
            "/v1/projects/{project}/locations/{region}/publishers/anthropic/models/{call}",
            post(vertex),
        )
        .route("/__mock/requests", get(requests))
        .route("/__mock/reset", post(reset))
        .route("/__mock/release/{name}", post(release))
        .route("/__mock/health", get(|| async { "ok" }))
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(shared)
}

async fn requests(State(shared): State<Arc<Shared>>) -> Json<Vec<Logged>> {
    Json(shared.log.all())
}

async fn reset(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.reset();
    StatusCode::NO_CONTENT
}

async fn release(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> StatusCode {
    shared.release(&name);
    StatusCode::NO_CONTENT
}

async fn unknown(State(shared): State<Arc<Shared>>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let exchange = Exchange::begin(&shared, &method, &uri, &headers, &[]);
    exchange.refuse(Refusal::new(
        StatusCode::NOT_FOUND,
        format!("Not found: {method} {}", uri.path()),
    ))
}

async fn models(State(shared): State<Arc<Shared>>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let exchange = Exchange::begin(&shared, &method, &uri, &headers, &[]);
    if let Err(refusal) = refuse::check_key(&headers, &shared.keys) {
        return exchange.refuse(refusal);
    }
    let data: Vec<Value> = [
        "claude-opus-5-5",
        "claude-sonnet-5-5",
        "claude-haiku-5-5",
        "claude-fable-5-2",
    ]
    .map(|id| json!({ "type": "model", "id": id, "display_name": id, "created_at": "2026-01-01T00:00:00Z" }))
    .into();
    exchange.answer(Json(
        json!({ "data": data, "has_more": false, "first_id": null, "last_id": null }),
    ))
}

async fn count_tokens(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let exchange = Exchange::begin(&shared, &method, &uri, &headers, &body);
    match refuse::check_key(&headers, &shared.keys) {
        Err(refusal) => exchange.refuse(refusal),
        Ok(()) => exchange.answer(Json(json!({ "input_tokens": body.len() / 4 + 1 }))),
    }
}

async fn messages(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let exchange = Exchange::begin(&shared, &method, &uri, &headers, &body);
    let checked = refuse::check_key(&headers, &shared.keys).and_then(|()| parse(&headers, &body));
    let body = match checked {
        Ok(body) => body,
        Err(refusal) => return exchange.refuse(refusal),
    };
    let model = body["model"].as_str().map(str::to_owned);
    let streamed = body["stream"] == true;
    match refuse::check_body(&body, model.as_deref()).and_then(|()| exchange.step(&body)) {
        Ok((step, key)) => exchange.play(step, &key, model.unwrap_or_default(), streamed).await,
        Err(refusal) => exchange.refuse(refusal),
    }
}

/// A call as Vertex AI takes it: the path names the model, the body the version.
async fn vertex(
    State(shared): State<Arc<Shared>>,
    Path((_, _, call)): Path<(String, String, String)>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let exchange = Exchange::begin(&shared, &method, &uri, &headers, &body);
    if headers.contains_key("x-api-key") {
        return exchange.refuse(Refusal::bad_request("Vertex AI takes bearer tokens"));
    }
    if let Err(refusal) = refuse::check_key(&headers, &shared.keys) {
        return exchange.refuse(refusal);
    }
    let (Some((model, verb)), Ok(mut body)) = (call.rsplit_once(':'), serde_json::from_slice::<Value>(&body)) else {
        return exchange.refuse(Refusal::bad_request("Vertex AI cannot read this"));
    };
    if model == "count-tokens" {
        return exchange.answer(Json(json!({ "input_tokens": 1 })));
    }
    let version = body.as_object_mut().and_then(|body| body.remove("anthropic_version"));
    if version != Some("vertex-2023-10-16".into()) || body.get("model").is_some() {
        return exchange.refuse(Refusal::bad_request(
            "anthropic_version: Field required; model: not permitted",
        ));
    }
    let model = model.split('@').next().unwrap_or_default().to_owned();
    match refuse::check_body(&body, Some(&model)).and_then(|()| exchange.step(&body)) {
        Ok((step, key)) => exchange.play(step, &key, model, verb == "streamRawPredict").await,
        Err(refusal) => exchange.refuse(refusal),
    }
}

fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Value, Refusal> {
    if !headers.contains_key("anthropic-version") {
        return Err(Refusal::bad_request("anthropic-version: header is required"));
    }
    serde_json::from_slice(body).map_err(|error| Refusal::bad_request(format!("The request body is not JSON: {error}")))
}

/// A request under way. When it is dropped before its end is known, the client went away.
pub(super) struct Exchange {
    shared: Arc<Shared>,
    id: u64,
    ended: bool,
}

impl Exchange {
    fn begin(shared: &Arc<Shared>, method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> Self {
        let id = shared.log.begin(method, uri, headers, body);
        Self {
            shared: Arc::clone(shared),
            id,
            ended: false,
        }
    }

    pub(super) fn end(&mut self, end: End) {
        self.ended = true;
        self.shared.log.change(self.id, |entry| entry.end = Some(end));
    }

    fn began(&self, status: StatusCode) {
        self.shared
            .log
            .change(self.id, |entry| entry.status = Some(status.as_u16()));
    }

    fn answer(mut self, answer: impl IntoResponse) -> Response {
        let mut response = answer.into_response();
        if let Ok(id) = HeaderValue::try_from(format!("req_mock_{:06}", self.id)) {
            response.headers_mut().insert("request-id", id);
        }
        self.began(response.status());
        self.end(End::Complete);
        response
    }

    fn refuse(self, refusal: Refusal) -> Response {
        self.answer(refusal)
    }

    /// The step that is asked for, and a key under which its troubles are counted.
    fn step(&self, body: &Value) -> Result<(Step, String), Refusal> {
        let messages = body["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = script::position(messages)
            .map_err(|error| Refusal::bad_request(format!("The mock's script is wrong: {error}")))?;
        let Some(position) = found else {
            return Ok((Step::without_script(), String::new()));
        };
        let mut key = format!("{:?}/{}", position.script, position.step);
        self.shared.log.change(self.id, |entry| {
            entry.step = Some(position.step);
            key = format!("{:?}/{key}", entry.session);
        });
        Ok((position.answer(), key))
    }

    async fn play(self, step: Step, key: &str, model: String, streamed: bool) -> Response {
        if step.at == Place::Start || !streamed {
            self.wait(&step).await;
        }
        let extra = match extra_headers(&step) {
            Ok(extra) => extra,
            Err(refusal) => return self.refuse(refusal),
        };
        if let Some(error) = &step.error
            && self.shared.lasts(key, error.times)
        {
            let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let message = error
                .message
                .clone()
                .unwrap_or_else(|| format!("The mock's error {status}"));
            let refusal = Refusal::new(status, message);
            return self.answer((extra, refusal));
        }
        let cut = step.cut.as_ref().is_some_and(|cut| self.shared.lasts(key, cut.times));
        let broken = step
            .sse_error
            .clone()
            .filter(|error| self.shared.lasts(key, error.times));
        let answer = Answer {
            id: format!("msg_mock_{}", Uuid::new_v4().simple()),
            model,
            step,
        };
        if streamed {
            let trouble = if cut {
                Some(Trouble::Cut)
            } else {
                broken.map(|error| Trouble::Error(error.r#type))
            };
            self.stream(answer, trouble, extra)
        } else if cut {
            self.cut_message(&answer, extra)
        } else {
            self.answer((extra, Json(answer.message())))
        }
    }

    /// Holds and hangs as the step says.
    pub(super) async fn wait(&self, step: &Step) {
        if let Some(name) = &step.hold {
            self.shared.released(name).await;
        }
        if step.hang {
            std::future::pending::<()>().await;
        }
    }

    /// Half of a message, and the connection closed.
    fn cut_message(mut self, answer: &Answer, extra: HeaderMap) -> Response {
        let whole = answer.message().to_string();
        let half = Bytes::copy_from_slice(&whole.as_bytes()[..whole.len() / 2]);
        self.began(StatusCode::OK);
        self.end(End::Cut);
        let parts = stream::once(async { Ok(half) }).chain(stream::once(cut()));
        let body = Body::from_stream(parts);
        (extra, [(header::CONTENT_TYPE, "application/json")], body).into_response()
    }

    fn stream(self, answer: Answer, trouble: Option<Trouble>, extra: HeaderMap) -> Response {
        self.began(StatusCode::OK);
        let id = self.id;
        let (sender, receiver) = mpsc::channel(1);
        // The task ends when the answer does or when the receiver, held by the connection, is dropped.
        tokio::spawn(
            Sending {
                exchange: self,
                sender,
                answer,
                trouble,
            }
            .run(),
        );
        let body = stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|chunk| (chunk, receiver))
        });
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8".to_owned()),
            (header::CACHE_CONTROL, "no-cache".to_owned()),
            (HeaderName::from_static("request-id"), format!("req_mock_{id:06}")),
        ];
        (extra, headers, Body::from_stream(body)).into_response()
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.ended {
            self.end(End::ClientGone);
        }
    }
}

fn extra_headers(step: &Step) -> Result<HeaderMap, Refusal> {
    let mut headers = HeaderMap::new();
    for (name, value) in &step.headers {
        let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) else {
            return Err(Refusal::bad_request(format!(
                "The mock's script has a header that cannot be sent: {name}"
            )));
        };
        headers.insert(name, value);
    }
    Ok(headers)
}

/// Connections on which an event does not wait for the acknowledgement of the one before, as with the real API.
pub fn prompt(listener: tokio::net::TcpListener) -> impl axum::serve::Listener<Addr = std::net::SocketAddr> {
    axum::serve::ListenerExt::tap_io(listener, |stream| {
        let _ = stream.set_nodelay(true);
    })
}

/// Serves until the process ends.
pub async fn serve(listener: tokio::net::TcpListener, shared: Arc<Shared>) -> Result<Infallible, io::Error> {
    axum::serve(prompt(listener), router(shared)).await?;
    Err(io::Error::other("the listener closed"))
}
