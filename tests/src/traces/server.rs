//! The HTTP side of the collector: OTLP in, Langfuse's public API out, and `/__collector/…` for tests.

use std::convert::Infallible;
use std::io::{self, Read as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::read::GzDecoder;
use http::{HeaderMap, StatusCode, header};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::observation::{Observation, observation};
use super::store::{Export, Store};

/// An export larger than this is refused, packed or not.
const MAX_BODY: usize = 64 << 20;

/// Public and secret key that the collector accepts.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Public key.
    pub public: String,
    /// Secret key.
    pub secret: String,
}

/// What the next exports meet instead of an answer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Status to answer; none: never answer.
    pub status: Option<u16>,
    /// For how many exports.
    pub times: u32,
    /// Value of `Retry-After`, seconds.
    #[serde(default)]
    pub retry_after: Option<u32>,
}

/// Everything the handlers share.
#[derive(Debug)]
pub struct Shared {
    authorization: String,
    store: Mutex<Store>,
    fault: Mutex<Option<Fault>>,
}

impl Shared {
    /// State of a collector that accepts these keys.
    pub fn new(keys: &Keys) -> Self {
        let authorization = format!("Basic {}", STANDARD.encode(format!("{}:{}", keys.public, keys.secret)));
        Self {
            authorization,
            store: Mutex::default(),
            fault: Mutex::default(),
        }
    }

    /// What was sent so far.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the next exports fail.
    pub fn fail(&self, fault: Fault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
    }

    fn next_fault(&self) -> Option<Fault> {
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        let current = fault.as_mut()?;
        if current.times == 0 {
            *fault = None;
            return None;
        }
        current.times -= 1;
        Some(*current)
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if given == Some(&self.authorization) {
            Ok(())
        } else {
            Err(Refusal(StatusCode::UNAUTHORIZED, "Invalid credentials".to_owned()))
        }
    }
}

struct Refusal(StatusCode, String);

impl Refusal {
    fn bad(message: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, message.into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "message": self.1 }))).into_response()
    }
}

/// The routes of the collector.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/public/otel/v1/traces", post(export))
        .route("/api/public/traces", get(traces))
        .route("/api/public/traces/{id}", get(trace))
        .route("/api/public/observations", get(observations))
        .route("/api/public/v2/observations", get(observations_v2))
        .route("/api/public/health", get(|| async { Json(json!({ "status": "OK" })) }))
        .route("/__collector/exports", get(exports))
        .route("/__collector/fail", post(fail))
        .route("/__collector/reset", post(reset))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(shared)
}

async fn export(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let mut export = Export {
        at: jiff::Timestamp::now().to_string(),
        status: 200,
        version: text("x-langfuse-ingestion-version"),
        encoding: text("content-encoding"),
        bytes: body.len(),
        spans: 0,
        error: None,
    };
    if let Some(fault) = shared.next_fault() {
        export.status = fault.status.unwrap_or_default();
        shared.store().exports.push(export);
        return answer(fault).await;
    }
    let decoded = shared.check(&headers).and_then(|()| decode(&headers, &body));
    let response = match decoded {
        Ok(found) => {
            export.spans = found.len();
            shared.store().add(found);
            Json(json!({})).into_response()
        }
        Err(refusal) => {
            export.status = refusal.0.as_u16();
            export.error = Some(refusal.1.clone());
            refusal.into_response()
        }
    };
    shared.store().exports.push(export);
    response
}

async fn answer(fault: Fault) -> Response {
    let Some(status) = fault.status else {
        return std::future::pending().await;
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = Refusal(status, "The collector was told to fail".to_owned()).into_response();
    if let Some(seconds) = fault.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

fn decode(headers: &HeaderMap, body: &[u8]) -> Result<Vec<Observation>, Refusal> {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    if !text("content-type").contains("application/x-protobuf") {
        return Err(Refusal::bad("Invalid content type"));
    }
    // Langfuse ignores an absent version and refuses those that it does not know yet.
    if !matches!(text("x-langfuse-ingestion-version"), "" | "1" | "2" | "3" | "4") {
        return Err(Refusal::bad("Unsupported ingestion version"));
    }
    let unpacked = match text("content-encoding") {
        "" | "identity" => body.to_vec(),
        "gzip" => {
            let mut unpacked = Vec::new();
            GzDecoder::new(body)
                .take(MAX_BODY as u64)
                .read_to_end(&mut unpacked)
                .map_err(|error| Refusal::bad(format!("Failed to decompress: {error}")))?;
            unpacked
        }
        other => return Err(Refusal::bad(format!("Unsupported content encoding: {other}"))),
    };
    let request = ExportTraceServiceRequest::decode(unpacked.as_slice())
        .map_err(|error| Refusal::bad(format!("Failed to parse OTel Protobuf: {error}")))?;
    let mut found = Vec::new();
    for spans in &request.resource_spans {
        let resource = spans
            .resource
            .as_ref()
            .map(|resource| resource.attributes.as_slice())
            .unwrap_or_default();
        for span in spans.scope_spans.iter().flat_map(|scope| &scope.spans) {
            found.push(observation(span, resource).map_err(Refusal::bad)?);
        }
    }
    Ok(found)
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Filter {
    name: Option<String>,
    session_id: Option<String>,
    user_id: Option<String>,
    trace_id: Option<String>,
    r#type: Option<String>,
    limit: Option<usize>,
    page: Option<usize>,
}

impl Filter {
    fn has(&self, observation: &Observation) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        is(&self.trace_id, &observation.trace)
            && is(&self.name, &observation.name)
            && is(&self.r#type, &observation.kind)
    }

    /// A page of `found`, in the envelope of the API's first version.
    fn page(&self, found: Vec<Value>) -> Value {
        let (limit, page) = (self.limit.unwrap_or(50).max(1), self.page.unwrap_or(1).max(1));
        let total = found.len();
        let data: Vec<_> = found.into_iter().skip((page - 1) * limit).take(limit).collect();
        let meta = json!({ "page": page, "limit": limit, "totalItems": total, "totalPages": total.div_ceil(limit) });
        json!({ "data": data, "meta": meta })
    }
}

async fn traces(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Query(filter): Query<Filter>,
) -> Result<Json<Value>, Refusal> {
    shared.check(&headers)?;
    let is = |wanted: &Option<String>, found: &Value| wanted.as_deref().is_none_or(|wanted| found == wanted);
    let mut found = shared.store().traces();
    found.retain(|trace| {
        is(&filter.name, &trace["name"])
            && is(&filter.session_id, &trace["sessionId"])
            && is(&filter.user_id, &trace["userId"])
    });
    Ok(Json(filter.page(found)))
}

async fn trace(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    shared.check(&headers)?;
    let store = shared.store();
    let found = store.traces().into_iter().find(|trace| trace["id"] == id.as_str());
    let mut found = found.ok_or_else(|| Refusal(StatusCode::NOT_FOUND, format!("Trace {id} not found")))?;
    found["observations"] = store
        .observations(|observation| observation.trace == id)
        .iter()
        .map(|observation| observation.v1())
        .collect();
    Ok(Json(found))
}

async fn observations(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Query(filter): Query<Filter>,
) -> Result<Json<Value>, Refusal> {
    shared.check(&headers)?;
    let found = shared
        .store()
        .observations(|observation| filter.has(observation))
        .iter()
        .map(|one| one.v1())
        .collect();
    Ok(Json(filter.page(found)))
}

async fn observations_v2(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Query(filter): Query<Filter>,
) -> Result<Json<Value>, Refusal> {
    shared.check(&headers)?;
    let limit = filter.limit.unwrap_or(1000);
    let store = shared.store();
    let found = store.observations(|observation| filter.has(observation));
    let data: Vec<_> = found.iter().take(limit).map(|one| one.v2()).collect();
    Ok(Json(json!({ "data": data, "meta": { "cursor": null } })))
}

async fn exports(State(shared): State<Arc<Shared>>) -> Json<Vec<Export>> {
    Json(shared.store().exports.clone())
}

async fn fail(State(shared): State<Arc<Shared>>, Json(fault): Json<Fault>) -> StatusCode {
    shared.fail(fault);
    StatusCode::NO_CONTENT
}

async fn reset(State(shared): State<Arc<Shared>>) -> StatusCode {
    *shared.store() = Store::default();
    shared.fail(Fault {
        status: None,
        times: 0,
        retry_after: None,
    });
    StatusCode::NO_CONTENT
}

/// Serves until the process ends.
pub async fn serve(listener: tokio::net::TcpListener, shared: Arc<Shared>) -> Result<Infallible, io::Error> {
    axum::serve(listener, router(shared)).await?;
    Err(io::Error::other("the listener closed"))
}
