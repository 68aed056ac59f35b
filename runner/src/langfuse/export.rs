//! Sends spans in the background.

use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use jiff::Timestamp;
use protocol::{Record, report::Delivery};
use rand::Rng as _;
use reqwest::{Client, Url};
use secrecy::ExposeSecret as _;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout_at},
};

use super::{LangfuseConfig, otlp::Trace, span::Span, spans::Tracer};
use crate::proxy::http_client;

/// Where OTLP is below the base URL.
const PATH: &str = "api/public/otel/v1/traces";
/// Most spans of one request.
const BATCH: usize = 64;
/// Most requests that wait, while Langfuse does not answer; what comes then is lost, and counted.
const QUEUE: usize = 64;
/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// First wait before a request is tried again; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Longest wait.
const LAST_WAIT: Duration = Duration::from_secs(30);
/// Longest wait at the end of the session.
const ENDING_WAIT: Duration = Duration::from_secs(1);

/// Follows the records of a session and sends their spans. Never waits, never fails the session.
pub struct Exporter {
    tracer: Tracer,
    trace: Trace,
    trace_id: String,
    sender: Option<Sender>,
    /// Spans that found no place in the queue.
    dropped: usize,
}

struct Sender {
    queue: mpsc::Sender<Batch>,
    /// Set at the end: when sending must be over.
    deadline: watch::Sender<Option<Instant>>,
    task: JoinHandle<usize>,
}

struct Batch {
    spans: usize,
    body: Bytes,
}

impl Exporter {
    /// An exporter with a task of its own that sends.
    pub fn start(config: &LangfuseConfig) -> Self {
        let sender = target(config).map(|(client, url, headers)| {
            let (queue, batches) = mpsc::channel(QUEUE);
            let (deadline, told) = watch::channel(None);
            let worker = Worker {
                client,
                url,
                headers,
                deadline: told,
            };
            let task = tokio::spawn(worker.run(batches));
            Sender { queue, deadline, task }
        });
        if sender.is_none() {
            tracing::warn!(
                host = config.host,
                "failed to use LANGFUSE_HOST: it must be an http or https URL"
            );
        }
        Self {
            tracer: Tracer::new(&config.session_uid, config.run, config.mask),
            trace: Trace::new(config),
            trace_id: protocol::identity::trace_id(&config.session_uid),
            sender,
            dropped: 0,
        }
    }

    /// Takes a record that an earlier process spooled, in seq order, before the first [`Exporter::observe`]: what it has
    /// sent is not sent again, what it left open goes on.
    pub fn replay(&mut self, record: &Record) {
        self.tracer.record(record);
        drop(self.tracer.take_ready());
        if self.tracer.kept() >= BATCH * QUEUE {
            // More than is ever sent at once: they were sent while the turn went on.
            drop(self.tracer.take_ended());
        }
    }

    /// Takes the next record, in seq order. Records are redacted already. Does not block.
    pub fn observe(&mut self, record: &Record) {
        self.tracer.record(record);
        if self.tracer.kept() >= BATCH {
            // A turn of thousands of calls must not be kept whole.
            let spans = self.tracer.take_ended();
            self.send(&spans);
        }
    }

    /// Id of the trace, hex.
    pub fn trace_id(&self) -> String {
        self.trace_id.clone()
    }

    /// Sends what is complete so far; does not wait for it.
    pub fn turn_end(&mut self) {
        let spans = self.tracer.take_ready();
        self.send(&spans);
    }

    /// Sends the rest and says whether all of it arrived, at the latest at `deadline`.
    pub async fn finish(mut self, deadline: Instant) -> Delivery {
        self.tracer.finish(Timestamp::now(), None);
        self.turn_end();
        let Some(Sender {
            queue,
            deadline: until,
            task,
        }) = self.sender
        else {
            return Delivery::Failed;
        };
        until.send_replace(Some(deadline));
        drop(queue);
        let abort = task.abort_handle();
        let Ok(Ok(refused)) = timeout_at(deadline, task).await else {
            abort.abort();
            tracing::warn!("failed to send the trace to Langfuse in time; the session is not affected");
            return Delivery::Failed;
        };
        let lost = refused + self.dropped;
        if lost > 0 {
            tracing::warn!(
                lost,
                "failed to send a part of the trace to Langfuse; the session is not affected"
            );
            return Delivery::Failed;
        }
        Delivery::Delivered
    }

    fn send(&mut self, spans: &[Span]) {
        for spans in spans.chunks(BATCH) {
            let sent = self.sender.as_ref().is_some_and(|sender| {
                let batch = Batch {
                    spans: spans.len(),
                    body: self.trace.encoded(spans).into(),
                };
                sender.queue.try_send(batch).is_ok()
            });
            if !sent {
                self.dropped += spans.len();
            }
        }
    }
}

/// Where to send, and with what.
fn target(config: &LangfuseConfig) -> Option<(Client, Url, HeaderMap)> {
    let base = Url::parse(config.host.trim()).ok().filter(Url::has_host)?;
    let url = Url::parse(&format!("{}/{PATH}", base.as_str().trim_end_matches('/'))).ok()?;
    let client = http_client(&url).ok()?;
    let keys = format!("{}:{}", config.public_key, config.secret_key.expose_secret());
    let basic = base64::engine::general_purpose::STANDARD.encode(keys);
    let mut authorization = HeaderValue::from_str(&format!("Basic {basic}")).ok()?;
    authorization.set_sensitive(true);
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, authorization);
    let plain = [
        ("content-type", "application/x-protobuf"),
        ("content-encoding", "gzip"),
        // Without it a server in its migration mode shows the trace minutes later.
        ("x-langfuse-ingestion-version", "4"),
        ("x-langfuse-sdk-name", "agentic-runner"),
        ("x-langfuse-sdk-version", env!("CARGO_PKG_VERSION")),
    ];
    for (name, value) in plain {
        headers.insert(name, HeaderValue::from_static(value));
    }
    Some((client, url, headers))
}

/// What became of a request.
enum Answer {
    Taken,
    /// No later try can help.
    Refused(StatusCode),
    /// Try again, after this time if it is told.
    Busy(Option<Duration>),
}

struct Worker {
    client: Client,
    url: Url,
    headers: HeaderMap,
    deadline: watch::Receiver<Option<Instant>>,
}

impl Worker {
    /// Sends until the queue is closed and empty; the number of spans that were refused.
    async fn run(mut self, mut batches: mpsc::Receiver<Batch>) -> usize {
        let mut lost = 0;
        while let Some(batch) = batches.recv().await {
            let mut wait = FIRST_WAIT;
            loop {
                match self.post(batch.body.clone()).await {
                    Answer::Taken => break,
                    Answer::Refused(status) => {
                        tracing::warn!(status = status.as_u16(), hint = hint(status), "Langfuse refused spans");
                        lost += batch.spans;
                        break;
                    }
                    Answer::Busy(told) => {
                        self.pause(told.unwrap_or(wait).min(LAST_WAIT)).await;
                        wait = (wait * 2).min(LAST_WAIT);
                    }
                }
            }
        }
        lost
    }

    async fn post(&self, body: Bytes) -> Answer {
        let request = self
            .client
            .post(self.url.clone())
            .headers(self.headers.clone())
            .timeout(TIMEOUT)
            .body(body);
        let Ok(response) = request.send().await else {
            return Answer::Busy(None);
        };
        crate::kill_point::pass("traced");
        let status = response.status();
        if status.is_success() {
            return Answer::Taken;
        }
        if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
            let seconds = response.headers().get(header::RETRY_AFTER);
            let seconds = seconds.and_then(|value| value.to_str().ok()?.parse().ok());
            return Answer::Busy(seconds.map(Duration::from_secs));
        }
        Answer::Refused(status)
    }

    /// Waits before the next try; at the end of the session not as long as before.
    async fn pause(&mut self, wait: Duration) {
        let ending = self.deadline.borrow().is_some();
        let wait = if ending { wait.min(ENDING_WAIT) } else { wait };
        let until = Instant::now() + wait.mul_f64(rand::rng().random_range(0.8..1.2));
        tokio::select! {
            () = sleep_until(until) => {}
            // The wait began before the end was known.
            _ = self.deadline.changed(), if !ending => {}
        }
    }
}

fn hint(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 | 403 => "are the keys in langfuse-keys of this host's project?",
        404 => "is LANGFUSE_HOST the base URL of Langfuse 3.22 or newer?",
        _ => "see the logs of Langfuse",
    }
}
