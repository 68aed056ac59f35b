//! Metrics.

use std::{sync::Arc, time::Duration};

use http::Method;
use jiff::SignedDuration;
use prometheus_client::{
    encoding::{
        EncodeLabelSet,
        text::{encode_eof, encode_registry},
    },
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use protocol::Usage;

use crate::{project::tasks::Status, store::Receipt};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    code: u16,
}

/// What the gateway counts.
pub struct Metrics {
    registry: Registry,
    records: Family<ResultLabel, Counter>,
    record_bytes: Counter,
    append_seconds: Histogram,
    runners: Gauge,
    closes: Family<CodeLabel, Counter>,
    streams: Gauge,
    log_bytes: Gauge,
    log_sessions: Gauge,
    log_full: Gauge,
    removed: Counter,
    removed_bytes: Counter,
    requests: Family<RequestLabels, Counter>,
    task_api: TaskMetrics,
}

/// What clients of the task API know, under names without a prefix.
struct TaskMetrics {
    registry: Registry,
    requests: Family<HttpLabels, Counter>,
    tasks: Family<StatusLabel, Counter>,
    seconds: Histogram,
    sessions: Gauge,
    tokens: Family<TypeLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabels {
    method: &'static str,
    endpoint: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    r#type: &'static str,
}

impl Default for TaskMetrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Registry::default(),
            requests: Family::default(),
            tasks: Family::default(),
            seconds: Histogram::new(exponential_buckets(1.0, 2.0, 15)),
            sessions: Gauge::default(),
            tokens: Family::default(),
        };
        let Self {
            mut registry,
            requests,
            tasks,
            seconds,
            sessions,
            tokens,
        } = metrics;
        registry.register(
            "http_requests",
            "HTTP requests, by method, route and status",
            requests.clone(),
        );
        registry.register("tasks", "Tasks that ended, by status", tasks.clone());
        registry.register(
            "tasks_duration_seconds",
            "Time from a task's beginning to its end",
            seconds.clone(),
        );
        registry.register("active_sessions", "Sessions of tasks that are active", sessions.clone());
        registry.register("tokens_used", "Tokens that tasks used, by type", tokens.clone());
        Self {
            registry,
            requests,
            tasks,
            seconds,
            sessions,
            tokens,
        }
    }
}

/// A method by its name. Of names that clients make up there would be no end.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// Counts something as long as it lives.
pub struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("agentic_gateway"),
            records: Family::default(),
            record_bytes: Counter::default(),
            append_seconds: Histogram::new(exponential_buckets(0.000_5, 2.0, 14)),
            runners: Gauge::default(),
            closes: Family::default(),
            streams: Gauge::default(),
            log_bytes: Gauge::default(),
            log_sessions: Gauge::default(),
            log_full: Gauge::default(),
            removed: Counter::default(),
            removed_bytes: Counter::default(),
            requests: Family::default(),
            task_api: TaskMetrics::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "records",
            "Records received, by what became of them",
            self.records.clone(),
        );
        registry.register("record_bytes", "Bytes of records received", self.record_bytes.clone());
        registry.register(
            "append_seconds",
            "Time from a batch's arrival until it is on disk",
            self.append_seconds.clone(),
        );
        registry.register("runner_connections", "Runners connected", self.runners.clone());
        registry.register(
            "runner_closes",
            "Connections of runners ended, by close code",
            self.closes.clone(),
        );
        registry.register("streams", "Clients that follow a session", self.streams.clone());
        registry.register("log_bytes", "Bytes that the event log takes", self.log_bytes.clone());
        registry.register("log_sessions", "Sessions in the event log", self.log_sessions.clone());
        registry.register(
            "log_full",
            "1 while the event log has no room for another record",
            self.log_full.clone(),
        );
        registry.register("removed_records", "Records removed to make room", self.removed.clone());
        registry.register(
            "removed_bytes",
            "Bytes of records removed to make room",
            self.removed_bytes.clone(),
        );
        registry.register(
            "requests",
            "Requests answered, by route and status",
            self.requests.clone(),
        );
    }

    /// A batch is on disk.
    pub fn stored(&self, receipt: &Receipt, bytes: usize, took: Duration) {
        let Receipt {
            progress: _,
            new,
            equal,
            conflicts,
            more: _,
        } = receipt;
        for (result, count) in [("new", *new), ("equal", *equal), ("conflict", conflicts.len())] {
            self.records.get_or_create(&ResultLabel { result }).inc_by(count as u64);
        }
        self.record_bytes.inc_by(bytes as u64);
        self.append_seconds.observe(took.as_secs_f64());
    }

    /// Whether the log has room.
    pub fn log_is_full(&self, full: bool) {
        self.log_full.set(i64::from(full));
    }

    /// What the log takes.
    pub fn kept(&self, bytes: u64, sessions: usize) {
        self.log_bytes.set(bytes as i64);
        self.log_sessions.set(sessions as i64);
    }

    /// Records were removed.
    pub fn removed(&self, records: u64, bytes: u64) {
        self.removed.inc_by(records);
        self.removed_bytes.inc_by(bytes);
    }

    /// A runner connected.
    pub fn connected(&self) -> Counted {
        self.runners.inc();
        Counted(self.runners.clone())
    }

    /// A runner's connection ended.
    pub fn closed(&self, code: u16) {
        self.closes.get_or_create(&CodeLabel { code }).inc();
    }

    /// A client follows a session.
    pub fn stream(&self) -> Counted {
        self.streams.inc();
        Counted(self.streams.clone())
    }

    /// A task ended.
    pub fn task(&self, status: Status, took: SignedDuration, usage: &Usage) {
        let Usage {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        } = *usage;
        let metrics = &self.task_api;
        let status = status.as_str();
        metrics.tasks.get_or_create(&StatusLabel { status }).inc();
        metrics.seconds.observe(took.as_secs_f64().max(0.0));
        for (r#type, tokens) in [
            ("input", input_tokens),
            ("output", output_tokens),
            ("cache_read", cache_read_input_tokens),
            ("cache_creation", cache_creation_input_tokens),
        ] {
            metrics.tokens.get_or_create(&TypeLabel { r#type }).inc_by(tokens);
        }
    }

    /// So many sessions of tasks are active.
    pub fn active_sessions(&self, count: usize) {
        self.task_api.sessions.set(count as i64);
    }

    /// A request was answered.
    pub fn answered(&self, method: &Method, route: &str, code: u16) {
        let route = route.to_owned();
        let labels = HttpLabels {
            method: known(method),
            endpoint: route.clone(),
            status: code,
        };
        self.task_api.requests.get_or_create(&labels).inc();
        self.requests.get_or_create(&RequestLabels { route, code }).inc();
    }

    /// All of it in `OpenMetrics` text.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &self.task_api.registry)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

/// `GET /metrics`.
pub fn router(metrics: Arc<Metrics>) -> axum::Router {
    let answer = move || async move {
        const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        match metrics.text() {
            Ok(text) => Ok(([(http::header::CONTENT_TYPE, OPEN_METRICS)], text)),
            Err(_) => Err(http::StatusCode::INTERNAL_SERVER_ERROR),
        }
    };
    axum::Router::new().route("/metrics", axum::routing::get(answer))
}
