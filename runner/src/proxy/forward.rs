//! Forwards one request.

use std::{io::Read as _, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header, request::Parts};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as _, Incoming};
use jiff::Timestamp;
use protocol::price::Prices;
use secrecy::{ExposeSecret as _, SecretString};
use subtle::ConstantTimeEq as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Credential, Metered,
    answer::{self, Answers, Body},
    asked::Asked,
    credential::{Authorization, CredentialError},
    headers,
    mcp::{Server, Servers},
    meter::Meter,
    route::{Route, Vertex, mcp, route},
    stream,
    witness::{Refusal, Seen, retry_after},
};
use crate::limits::{Gate, Permit};

/// Most bytes of a request.
const MAX_REQUEST: usize = 64 << 20;
/// Most bytes of a response that is not streamed.
const MAX_RESPONSE: usize = 64 << 20;
/// Most bytes of an error of the API that are passed on.
const MAX_ERROR: usize = 1 << 20;
/// Room for the bodies of all requests that are read or wait, in KiB.
pub const ROOM: usize = 256 << 10;

/// What all requests share.
pub struct Shared {
    pub client: reqwest::Client,
    pub base_url: String,
    pub credential: Credential,
    pub vertex: Option<Vertex>,
    pub mcp: Servers,
    pub token: SecretString,
    pub events: mpsc::Sender<Metered>,
    pub seen: Seen,
    pub gate: Arc<Gate>,
    pub prices: Arc<Prices>,
    pub room: Arc<Semaphore>,
    pub answers: Answers,
    /// Nothing is forwarded any more.
    pub cut: CancellationToken,
    /// Model calls in flight.
    pub calls: TaskTracker,
}

/// Answers one request of the agent.
pub async fn handle(shared: Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    if !shared.knows(request.headers()) {
        return answer::error(
            StatusCode::UNAUTHORIZED,
            "this proxy takes the token of its own session only",
        );
    }
    if let Some(name) = mcp(request.uri().path()) {
        return tools(&shared, shared.mcp.get(name), request).await;
    }
    let Some((route, model)) = shared.route(request.method(), request.uri().path()) else {
        return answer::error(
            StatusCode::NOT_FOUND,
            "only model calls, token counts and model names are forwarded to the model API",
        );
    };
    if let Some(response) = shared.closed() {
        return response;
    }
    let (parts, body) = request.into_parts();
    let (body, room) = match shared.read(body).await {
        Ok(read) => read,
        Err(response) => return response,
    };
    let mut asked = match (route == Route::Messages).then(|| Asked::read(&body)).transpose() {
        Ok(asked) => asked,
        Err(refused) => return answer::error(StatusCode::BAD_REQUEST, &refused.to_string()),
    };
    if let (Some(asked), Some(model)) = (&mut asked, model) {
        asked.model = model;
    }
    let Ok(outgoing) = shared.outgoing(&parts, body) else {
        return answer::error(StatusCode::BAD_REQUEST, "the request's path and query are no URL");
    };
    match asked {
        Some(asked) => call(shared, outgoing, asked, room).await,
        None => plain(&shared, outgoing).await,
    }
}

impl Shared {
    /// Whether the request shows this run's token.
    fn knows(&self, headers: &HeaderMap) -> bool {
        let key = headers.get("x-api-key").map(HeaderValue::as_bytes);
        let bearer = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let token = self.token.expose_secret().as_bytes();
        [key, bearer]
            .into_iter()
            .flatten()
            .any(|shown| bool::from(shown.ct_eq(token)))
    }

    /// The answer to everything after the end, or after the API refused the credential.
    fn closed(&self) -> Option<Response<Body>> {
        if let Some(Refusal { status, body }) = self.seen.refusal() {
            return Some(answer::whole(status, "application/json", body));
        }
        self.cut
            .is_cancelled()
            .then(|| answer::error(StatusCode::SERVICE_UNAVAILABLE, "the session is ending"))
    }

    async fn read(&self, body: Incoming) -> Result<(Bytes, OwnedSemaphorePermit), Response<Body>> {
        // Where there is no body, nothing is what is told.
        let told = body.size_hint().exact().and_then(|length| usize::try_from(length).ok());
        let too_large = || {
            answer::error(
                StatusCode::PAYLOAD_TOO_LARGE,
                "the request is larger than 64 MiB, more than the model API takes",
            )
        };
        if told.is_some_and(|length| length > MAX_REQUEST) {
            return Err(too_large());
        }
        // A chunked body has no length; few are read at a time then.
        let kib = told.unwrap_or(MAX_REQUEST) / 1024 + 1;
        let room = Arc::clone(&self.room)
            .acquire_many_owned(kib as u32)
            .await
            .map_err(|_| answer::error(StatusCode::SERVICE_UNAVAILABLE, "the session is ending"))?;
        match Limited::new(body, MAX_REQUEST).collect().await {
            Ok(body) => Ok((body.to_bytes(), room)),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
            Err(_) => Err(answer::error(StatusCode::BAD_REQUEST, "the request's body ended early")),
        }
    }

    fn outgoing(&self, parts: &Parts, body: Bytes) -> reqwest::Result<reqwest::Request> {
        let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let path = parts.uri.path();
        // Vertex' base URLs have their version, as those that the CLI knows.
        let path = self
            .vertex
            .as_ref()
            .and_then(|_| path.strip_prefix("/v1"))
            .unwrap_or(path);
        let url = format!("{}{path}{query}", self.base_url);
        let headers = headers::to_upstream(&parts.headers);
        self.client
            .request(parts.method.clone(), url)
            .headers(headers)
            .body(body)
            .build()
    }

    /// Whether an answer says that the credential is no good, and not only for what was asked.
    ///
    /// A key that may not use one model is told 403 for it, as is one that may not use any. The agent's tools choose models
    /// as they like, so 403 counts only where no call went well, and none is on its way that may. Who was told 403 for the
    /// session's own model ends with that, and the witness knows why.
    fn refuses(&self, status: StatusCode, route: Route) -> bool {
        match status {
            StatusCode::UNAUTHORIZED => true,
            // A gateway may forbid one of the other paths; that says nothing of model calls.
            StatusCode::FORBIDDEN => route == Route::Messages && !self.seen.accepted() && self.calls.len() <= 1,
            _ => false,
        }
    }

    fn route(&self, method: &http::Method, path: &str) -> Option<(Route, Option<String>)> {
        match &self.vertex {
            None => route(method, path).map(|route| (route, None)),
            Some(vertex) => vertex
                .route(method, path)
                .map(|(route, model)| (route, Some(model.to_owned()))),
        }
    }

    /// Sends a request with the credential as it is now; once more with another one, if the API refuses it and there is
    /// another one by now.
    async fn execute(&self, request: reqwest::Request) -> Result<(reqwest::Response, Authorization), Failed> {
        let used = self
            .credential
            .current(&self.client)
            .await
            .map_err(Failed::Credential)?;
        // A body that is in memory can always be sent again.
        let again = request.try_clone();
        let response = self.client.execute(with(request, &used)).await.map_err(Failed::Send)?;
        let refused = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        let (true, Some(again)) = (refused, again) else {
            return Ok((response, used));
        };
        match self.credential.renewed(&self.client, &used).await {
            None => Ok((response, used)),
            Some(renewed) => {
                let response = self.client.execute(with(again, &renewed)).await.map_err(Failed::Send)?;
                Ok((response, renewed))
            }
        }
    }

    /// Answers for a request that got no answer.
    fn unanswered(&self, failed: &Failed) -> Response<Body> {
        match failed {
            Failed::Send(error) => {
                self.seen.unreachable();
                answer::unreachable(error)
            }
            Failed::Credential(error) if error.is_transient() => {
                self.seen.unreachable();
                answer::error(StatusCode::BAD_GATEWAY, &error.to_string())
            }
            Failed::Credential(error) => {
                tracing::error!(%error, "there is no credential for the model API");
                let (status, body) = (
                    StatusCode::UNAUTHORIZED,
                    answer::text(StatusCode::UNAUTHORIZED, &error.to_string()),
                );
                self.seen.refused(Refusal {
                    status,
                    body: body.clone(),
                });
                answer::whole(status, "application/json", body)
            }
        }
    }
}

/// Why a request got no answer.
enum Failed {
    Credential(CredentialError),
    Send(reqwest::Error),
}

fn with(mut request: reqwest::Request, authorization: &Authorization) -> reqwest::Request {
    request
        .headers_mut()
        .insert(authorization.name.clone(), authorization.value.clone());
    request
}

/// What the agent asks of an MCP server.
async fn tools(shared: &Shared, server: Option<Arc<Server>>, request: Request<Incoming>) -> Response<Body> {
    let Some(server) = server else {
        return answer::error(StatusCode::NOT_FOUND, "the session names no MCP server like that");
    };
    let (parts, body) = request.into_parts();
    match shared.read(body).await {
        Ok((body, _room)) => {
            server
                .call(&parts.method, &parts.headers, body, shared.cut.clone())
                .await
        }
        Err(response) => response,
    }
}

/// A request that costs nothing.
async fn plain(shared: &Shared, outgoing: reqwest::Request) -> Response<Body> {
    let answered = async {
        match shared.execute(outgoing).await {
            Err(Failed::Send(error)) => answer::unreachable(&error),
            Err(failed) => shared.unanswered(&failed),
            Ok((response, used)) if response.status().is_success() => {
                let (status, headers) = (response.status(), headers::to_agent(response.headers(), used.secret()));
                match shared.answers.held(response, MAX_RESPONSE).await {
                    Ok(body) => answer::with_headers(status, headers, answer::full(body)),
                    Err(error) => answer::unreachable(&error),
                }
            }
            Ok(answered) => failed(shared, Route::CountTokens, answered).await,
        }
    };
    shared
        .cut
        .run_until_cancelled(answered)
        .await
        .unwrap_or_else(|| answer::error(StatusCode::SERVICE_UNAVAILABLE, "the session is ending"))
}

/// A model call: admitted by the gate, then driven by a task of its own, which outlives the agent's connection so that
/// every response gets its closing record.
async fn call(
    shared: Arc<Shared>,
    outgoing: reqwest::Request,
    asked: Asked,
    room: OwnedSemaphorePermit,
) -> Response<Body> {
    let admitted = shared.gate.admit(asked.reservation(&shared.prices));
    let permit = shared.cut.run_until_cancelled(admitted).await;
    // It may have waited long: what held before need not hold now.
    let (Some(permit), None) = (permit, shared.closed()) else {
        return shared
            .closed()
            .unwrap_or_else(|| answer::error(StatusCode::SERVICE_UNAVAILABLE, "the session is ending"));
    };
    if let Err(refused) = asked.allowed(&shared.gate.limits(), &shared.prices) {
        return answer::error(StatusCode::BAD_REQUEST, &refused.to_string());
    }
    let (head, answered) = oneshot::channel();
    shared
        .calls
        .spawn(drive(Arc::clone(&shared), outgoing, asked, permit, head, room));
    answered
        .await
        .unwrap_or_else(|_| answer::error(StatusCode::SERVICE_UNAVAILABLE, "the session is ending"))
}

async fn drive(
    shared: Arc<Shared>,
    outgoing: reqwest::Request,
    asked: Asked,
    mut permit: Permit,
    mut head: oneshot::Sender<Response<Body>>,
    room: OwnedSemaphorePermit,
) {
    let started_at = Timestamp::now();
    crate::kill_point::pass("forward");
    let streams = asked.streams();
    let gone = async {
        if streams {
            head.closed().await;
        } else {
            // It is made, and charged, whether somebody waits for it or not: only it tells what it has cost.
            std::future::pending::<()>().await;
        }
    };
    let answered = tokio::select! {
        biased;
        () = shared.cut.cancelled() => None,
        () = gone => None,
        answered = shared.execute(outgoing) => Some(answered),
    };
    drop(room);
    match answered {
        // The session ends: an answer that streams has hardly begun.
        None if streams && shared.cut.is_cancelled() => permit.charge = asked.prompt(&shared.prices),
        None => {
            let mut meter = Meter::new(asked, Arc::clone(&shared.prices), started_at);
            meter.given_up();
            stream::close(&shared, &meter, &mut permit).await;
        }
        Some(Err(failed)) => {
            if matches!(&failed, Failed::Send(error) if answer::is_silent(error)) {
                let mut meter = Meter::new(asked, Arc::clone(&shared.prices), started_at);
                meter.given_up();
                stream::close(&shared, &meter, &mut permit).await;
            }
            let _ = head.send(shared.unanswered(&failed));
        }
        Some(Ok(answered)) if !answered.0.status().is_success() => {
            let answer = failed(&shared, Route::Messages, answered).await;
            let _ = head.send(answer);
        }
        Some(Ok((response, used))) => {
            shared.seen.answered(response.status().as_u16(), None);
            // What it costs at least, until the response tells.
            permit.charge = asked.prompt(&shared.prices);
            let meter = Meter::new(asked, Arc::clone(&shared.prices), started_at);
            let streamed = response
                .headers()
                .get(header::CONTENT_TYPE)
                .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
            if streamed {
                stream::pass(&shared, (response, used), meter, permit, head).await;
            } else {
                whole(&shared, (response, used), meter, permit, head).await;
            }
        }
    }
}

/// A model response that is not streamed: it is metered before any of it reaches the agent.
async fn whole(
    shared: &Shared,
    (response, used): (reqwest::Response, Authorization),
    mut meter: Meter,
    mut permit: Permit,
    head: oneshot::Sender<Response<Body>>,
) {
    let (status, headers) = (response.status(), headers::to_agent(response.headers(), used.secret()));
    let encoded = stream::encoding(response.headers());
    let body = shared
        .cut
        .run_until_cancelled(shared.answers.held(response, MAX_RESPONSE))
        .await;
    if let Some(Ok(body)) = &body {
        if let Ok(encoding) = encoded {
            meter.whole(body, encoding, Timestamp::now());
        } else {
            meter.seen(body.len());
        }
    } else {
        shared.seen.unreachable();
        meter.given_up();
    }
    let durable = stream::open(shared, &meter).await;
    stream::close(shared, &meter, &mut permit).await;
    let answer = match body {
        Some(Ok(body)) if durable => answer::with_headers(status, headers, answer::full(body)),
        Some(Err(error)) => answer::unreachable(&error),
        Some(Ok(_)) | None => answer::error(StatusCode::SERVICE_UNAVAILABLE, "the session is ending"),
    };
    let _ = head.send(answer);
}

/// The API's refusal of a request, passed on with its own words but for the credential.
async fn failed(shared: &Shared, route: Route, (response, used): (reqwest::Response, Authorization)) -> Response<Body> {
    let status = response.status();
    if status.is_redirection() {
        shared.seen.unreachable();
        return answer::error(
            StatusCode::BAD_GATEWAY,
            "the model API answered with a redirect; set ANTHROPIC_BASE_URL to where it leads",
        );
    }
    let mut headers = headers::to_agent(response.headers(), used.secret());
    // In what is packed nobody would find the credential.
    headers.remove(header::CONTENT_ENCODING);
    let encoding = stream::encoding(response.headers());
    let wait = retry_after(response.headers(), Timestamp::now());
    let body = shared
        .cut
        .run_until_cancelled(shared.answers.held(response, MAX_ERROR))
        .await;
    let body = body.and_then(Result::ok).unwrap_or_default();
    let mut text = Vec::new();
    if let Ok(encoding) = encoding {
        // As far as it can be read.
        let _ = encoding.text(&body).take(MAX_ERROR as u64).read_to_end(&mut text);
    }
    let body = used.taken_out_of(text.into());
    if shared.refuses(status, route) {
        shared.seen.refused(Refusal {
            status,
            body: body.clone(),
        });
    } else if route == Route::Messages {
        shared.seen.answered(status.as_u16(), wait);
    }
    answer::with_headers(status, headers, answer::full(body))
}
