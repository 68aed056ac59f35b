//! The gateway: runners deliver their records to it, clients create sessions and read their events from it.

pub mod answer;
pub mod api;
pub mod auth;
pub mod body;
pub mod catalog;
pub mod commands;
pub mod compat;
pub mod connection;
pub mod files;
pub mod follow;
pub mod ingest;
pub mod live;
pub mod log_format;
pub mod metrics;
pub mod news;
pub mod origin;
pub mod project;
pub mod quantity;
pub mod retention;
pub mod room;
pub mod server;
pub mod sessions;
pub mod store;
pub mod tls;
pub mod waiting;
pub mod watch;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    middleware::{self, Next},
    response::Response,
    routing::get,
};
use http::Uri;
use kube::Client;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    auth::{api_key::Keys, kubernetes::Reviews, rate::Rates},
    compat::{Compat, Settings},
    live::Live,
    metrics::Metrics,
    origin::Origins,
    room::Room,
    sessions::Sessions,
    store::EventLog,
    watch::Watched,
};

/// Memory for frames of the usual length under way.
const FRAMES: usize = 32 << 20;
/// The same for one namespace's.
const FRAMES_SHARE: usize = 8 << 20;
/// Memory for longer frames under way: one of the greatest length and some others.
const LONG_FRAMES: usize = protocol::frame::MAX_MESSAGE + (24 << 20);
/// The same for one namespace's.
const LONG_FRAMES_SHARE: usize = protocol::frame::MAX_MESSAGE;
/// Memory for bodies under way.
const BODIES: usize = 32 << 20;
/// The same for one caller's.
const BODIES_SHARE: usize = 8 << 20;
/// Memory for what was read of the log or of a workspace and not taken by its reader yet; who finds none gets small pieces.
const STREAMS: usize = 32 << 20;
/// The same for one caller's.
const STREAMS_SHARE: usize = 8 << 20;
/// Memory for long answers that were not taken yet.
const ANSWERS: usize = 48 << 20;
/// The same for one caller's.
const ANSWERS_SHARE: usize = 16 << 20;
/// How long a request may take until its answer begins.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// What all requests share.
pub struct Gateway {
    /// The API server.
    pub client: Client,
    /// Whether it answers.
    pub cluster: api::health::Cluster,
    /// Its sessions, read live.
    pub sessions: Sessions,
    /// Its sessions as the watch has them.
    pub watched: Watched,
    /// Who may do what.
    pub reviews: Reviews,
    /// Callers without a Kubernetes identity.
    pub keys: Keys,
    /// How often callers with one may ask.
    pub rates: Rates,
    /// The APIs of other systems.
    pub compat: Compat,
    /// The event log.
    pub log: Arc<dyn EventLog>,
    /// What happens now.
    pub live: Live,
    /// Memory for frames of runners, by namespace.
    pub frames: Room,
    /// The same for those longer than a usual batch.
    pub long_frames: Room,
    /// Memory for bodies of requests, by caller.
    pub bodies: Room,
    /// Memory for what readers have not taken yet, by caller.
    pub streams: Room,
    /// The same for answers that are not read in pieces.
    pub answers: Room,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Cancelled when the gateway is to end.
    pub shutdown: CancellationToken,
    /// What must have ended before it does.
    pub tasks: TaskTracker,
}

impl Gateway {
    /// On this cluster and this log.
    pub fn new(client: Client, log: Arc<dyn EventLog>, shutdown: CancellationToken) -> Arc<Self> {
        Self::serving(client, log, shutdown, Settings::default())
    }

    /// [`Gateway::new`] with the APIs of other systems.
    pub fn serving(
        client: Client,
        log: Arc<dyn EventLog>,
        shutdown: CancellationToken,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            compat: Compat::new(settings),
            sessions: Sessions::new(client.clone()),
            reviews: Reviews::new(client.clone()),
            keys: Keys::default(),
            rates: Rates::default(),
            client,
            cluster: api::health::Cluster::default(),
            watched: Watched::default(),
            log,
            live: Live::default(),
            frames: Room::new(FRAMES, FRAMES_SHARE),
            long_frames: Room::new(LONG_FRAMES, LONG_FRAMES_SHARE),
            bodies: Room::new(BODIES, BODIES_SHARE),
            streams: Room::new(STREAMS, STREAMS_SHARE),
            answers: Room::new(ANSWERS, ANSWERS_SHARE),
            metrics: Arc::default(),
            shutdown,
            tasks: TaskTracker::new(),
        })
    }
}

/// All routes, for web pages of the gateway itself only.
pub fn router(gateway: Arc<Gateway>) -> Router {
    router_for(gateway, &Origins::default())
}

/// All routes, for web pages of these origins too.
pub fn router_for(gateway: Arc<Gateway>, origins: &Origins) -> Router {
    Router::new()
        .route("/api/projects/{project}/sessions/{session}/ws", get(ingest::connect))
        .route("/peer/{question}", get(api::peer))
        .merge(api::router(&gateway.compat.settings))
        .method_not_allowed_fallback(async |uri: Uri| {
            api::compat::refusal(uri.path(), api::ApiError::method_not_allowed())
        })
        .fallback(async |uri: Uri| {
            api::compat::refusal(uri.path(), api::ApiError::not_found("there is nothing at this path"))
        })
        .layer(DefaultBodyLimit::max(body::MAX_BODY))
        .layer(middleware::from_fn_with_state(gateway.clone(), answer::hold))
        .layer(middleware::from_fn(in_time))
        .route_layer(middleware::from_fn_with_state(gateway.clone(), count))
        .layer(middleware::from_fn(api::compat::with_one_host))
        .layer(middleware::from_fn(api::compat::with_request_id))
        .layer(middleware::from_fn_with_state(origins.clone(), origin::check))
        .layer(origins.cors())
        .with_state(gateway)
}

async fn in_time(request: Request, next: Next) -> Response {
    if api::is_upload(&request) || api::is_query(&request) {
        return next.run(request).await;
    }
    let uri = request.uri().clone();
    let answer = tokio::time::timeout(ANSWER_WITHIN, next.run(request)).await;
    answer.unwrap_or_else(|_| {
        let error = api::ApiError::unavailable("the answer took too long: try again");
        api::compat::refusal(uri.path(), error)
    })
}

async fn count(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned())
        .unwrap_or_default();
    let method = request.method().clone();
    let response = next.run(request).await;
    gateway.metrics.answered(&method, &route, response.status().as_u16());
    response
}
