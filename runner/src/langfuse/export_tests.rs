//! The exporter against a collector on loopback that answers as it is told.

use std::{
    collections::VecDeque,
    io::Read as _,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::Request,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt as _;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest, common::v1::any_value::Value as Any, trace::v1::Span as OtlpSpan,
};
use prost::Message as _;
use protocol::{
    Kind, Outcome, Record,
    record::{SessionBody, UserBody},
    report::Delivery,
    spec::User,
};
use rstest::rstest;
use serde::Serialize;
use serde_json::{json, value::RawValue};
use tokio::{net::TcpListener, sync::watch, time::Instant};
use uuid::Uuid;

use super::{Exporter, LangfuseConfig};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

/// What the collector answers to one request; afterwards it takes everything.
#[derive(Clone, Copy)]
enum Told {
    Status(u16),
    Hang,
}

#[derive(Clone)]
struct Collector {
    host: String,
    told: Arc<Mutex<VecDeque<Told>>>,
    taken: watch::Sender<Vec<(String, HeaderMap, ExportTraceServiceRequest)>>,
    asked: watch::Sender<usize>,
}

impl Collector {
    async fn new(told: &[Told]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let collector = Self {
            host: format!("http://{}/prefix/", listener.local_addr().unwrap()),
            told: Arc::new(Mutex::new(told.iter().copied().collect())),
            taken: watch::Sender::new(Vec::new()),
            asked: watch::Sender::new(0),
        };
        let here = collector.clone();
        let app = Router::new().fallback(move |request: Request| {
            let here = here.clone();
            async move { here.answer(request).await }
        });
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        collector
    }

    async fn answer(&self, request: Request) -> Response {
        self.asked.send_modify(|asked| *asked += 1);
        let told = self.told.lock().unwrap().pop_front();
        match told {
            Some(Told::Hang) => return std::future::pending().await,
            Some(Told::Status(status)) => {
                return (StatusCode::from_u16(status).unwrap(), [("retry-after", "0")]).into_response();
            }
            None => {}
        }
        let (parts, body) = request.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&bytes[..])
            .read_to_end(&mut plain)
            .unwrap();
        let request = ExportTraceServiceRequest::decode(&plain[..]).unwrap();
        self.taken
            .send_modify(|taken| taken.push((parts.uri.to_string(), parts.headers, request)));
        // What Langfuse answers: JSON, not protobuf.
        "{}".into_response()
    }

    fn spans(&self) -> Vec<OtlpSpan> {
        let taken = self.taken.borrow();
        let requests = taken.iter().map(|(_, _, request)| request);
        requests
            .flat_map(|request| request.resource_spans[0].scope_spans[0].spans.clone())
            .collect()
    }

    fn exporter(&self) -> Exporter {
        exporter(&self.host)
    }
}

fn exporter(host: &str) -> Exporter {
    Exporter::start(&LangfuseConfig {
        host: host.into(),
        public_key: "pk-lf-fake".into(),
        secret_key: "sk-lf-fake".into(),
        session_uid: "uid-1".into(),
        session_name: "name-2".into(),
        namespace: "namespace-3".into(),
        run: 1,
        user: Some(User {
            user_id: "user-4".into(),
            display_name: "Display".into(),
            groups: vec!["g-1".into(), "g-2".into()],
        }),
        mask: false,
        tags: vec!["tag-5".into()],
    })
}

fn record(seq: u64, turn: u32, kind: Kind, body: &impl Serialize) -> Record {
    Record {
        seq,
        attempt: 1,
        turn,
        ts: "2026-01-02T03:04:05Z".parse().unwrap(),
        kind,
        was: None,
        body: RawValue::from_string(serde_json::to_string(body).unwrap()).unwrap(),
    }
}

/// A turn of `tools` tool calls.
fn turn(number: u32, tools: usize) -> Vec<Record> {
    let user = UserBody {
        command: "prompt".into(),
        uuid: Uuid::nil(),
        text: format!("MARKER-{number}"),
    };
    let mut records = vec![record(1, number, Kind::User, &user)];
    for n in 0..tools {
        let id = format!("{number}-{n}");
        let call = json!({"type": "assistant", "message": {"id": format!("msg_{id}"), "model": "m", "content":
            [{"type": "tool_use", "id": id, "name": "Bash", "input": {"n": n}}]}});
        let result = json!({"type": "user", "message": {"content":
            [{"type": "tool_result", "tool_use_id": id, "content": "out"}]}});
        records.push(record(2, number, Kind::Cli, &call));
        records.push(record(3, number, Kind::Cli, &result));
    }
    let ended = SessionBody::TurnEnded {
        turn: number,
        outcome: Outcome::Succeeded,
    };
    records.push(record(9, number, Kind::Session, &ended));
    records
}

fn observe(exporter: &mut Exporter, records: &[Record]) {
    for record in records {
        exporter.observe(record);
    }
}

fn attribute(span: &OtlpSpan, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Any::StringValue(text) => Some(text.clone()),
        Any::ArrayValue(list) => Some(
            list.values
                .iter()
                .map(|value| match &value.value {
                    Some(Any::StringValue(text)) => text.as_str(),
                    _ => "?",
                })
                .collect::<Vec<_>>()
                .join(","),
        ),
        _ => None,
    }
}

#[tokio::test]
async fn a_trace_arrives_as_langfuse_wants_it() {
    let collector = Collector::new(&[]).await;
    let mut exporter = collector.exporter();
    assert_eq!(exporter.trace_id(), protocol::identity::trace_id("uid-1"));
    observe(&mut exporter, &turn(1, 1));
    assert_eq!(exporter.finish(Instant::now() + LONG).await, Delivery::Delivered);
    let (uri, headers, _) = collector.taken.borrow()[0].clone();
    assert_eq!(uri, "/prefix/api/public/otel/v1/traces");
    let expected = [
        ("authorization", "Basic cGstbGYtZmFrZTpzay1sZi1mYWtl"),
        ("content-type", "application/x-protobuf"),
        ("content-encoding", "gzip"),
        ("x-langfuse-ingestion-version", "4"),
    ];
    for (name, value) in expected {
        assert_eq!(headers[name], value, "{name}");
    }
    let spans = collector.spans();
    let mut names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["Bash", "agent-session", "agent-turn", "llm-call"]);
    let id = |name: &str| spans.iter().find(|span| span.name == name).unwrap().span_id.clone();
    for span in &spans {
        assert_eq!(span.trace_id, protocol::identity::trace_id_bytes("uid-1"));
        let wide = [
            ("langfuse.trace.name", "name-2"),
            ("langfuse.session.id", "name-2"),
            ("langfuse.user.id", "user-4"),
            ("langfuse.trace.metadata.user_groups", "g-1, g-2"),
            ("langfuse.trace.tags", "namespace:namespace-3,tag-5"),
        ];
        for (key, value) in wide {
            assert_eq!(attribute(span, key).as_deref(), Some(value), "{key} of {}", span.name);
        }
        let parent = match span.name.as_str() {
            "agent-session" => Vec::new(),
            "agent-turn" => id("agent-session"),
            _ => id("agent-turn"),
        };
        assert_eq!(span.parent_span_id, parent, "{}", span.name);
    }
    let call = spans.iter().find(|span| span.name == "llm-call").unwrap();
    assert_eq!(
        attribute(call, "langfuse.observation.type").as_deref(),
        Some("generation")
    );
    assert!(
        attribute(call, "langfuse.observation.input")
            .unwrap()
            .contains("MARKER-1")
    );
}

#[tokio::test]
async fn a_finished_turn_is_sent_before_the_session_ends() {
    let collector = Collector::new(&[]).await;
    let mut exporter = collector.exporter();
    observe(&mut exporter, &turn(1, 1));
    exporter.turn_end();
    let mut taken = collector.taken.subscribe();
    let sent = tokio::time::timeout(LONG, taken.wait_for(|taken| taken.len() == 1)).await;
    drop(sent.unwrap().unwrap());
    assert!(collector.spans().iter().any(|span| span.name == "agent-turn"));
    assert_eq!(exporter.finish(Instant::now() + LONG).await, Delivery::Delivered);
    let names: Vec<String> = collector.spans().iter().map(|span| span.name.clone()).collect();
    assert_eq!(names.iter().filter(|name| *name == "agent-turn").count(), 1);
    assert!(names.iter().any(|name| name == "agent-session"));
}

#[rstest]
#[case(503)]
#[case(429)]
#[case(500)]
#[case(408)]
#[tokio::test]
async fn a_busy_collector_is_asked_again(#[case] status: u16) {
    let collector = Collector::new(&[Told::Status(status), Told::Status(status)]).await;
    let mut exporter = collector.exporter();
    observe(&mut exporter, &turn(1, 1));
    assert_eq!(exporter.finish(Instant::now() + LONG).await, Delivery::Delivered);
    assert_eq!((*collector.asked.borrow(), collector.spans().len()), (3, 4));
}

#[rstest]
#[case(401)]
#[case(400)]
#[case(413)]
#[case(302)]
#[tokio::test]
async fn a_refusal_is_not_asked_again_and_what_follows_is_sent(#[case] status: u16) {
    let collector = Collector::new(&[Told::Status(status)]).await;
    let mut exporter = collector.exporter();
    observe(&mut exporter, &turn(1, 1));
    exporter.turn_end();
    observe(&mut exporter, &turn(2, 0));
    assert_eq!(exporter.finish(Instant::now() + LONG).await, Delivery::Failed);
    assert_eq!(*collector.asked.borrow(), 2);
    assert!(collector.spans().iter().all(|span| span.name != "Bash"));
}

#[tokio::test]
async fn a_collector_that_hangs_holds_nobody_up() {
    let collector = Collector::new(&[Told::Hang; 9]).await;
    let mut exporter = collector.exporter();
    observe(&mut exporter, &turn(1, 1));
    let begun = Instant::now();
    assert_eq!(exporter.finish(begun + SHORT).await, Delivery::Failed);
    assert!(begun.elapsed() < SHORT * 10);
}

#[tokio::test]
async fn a_collector_that_is_not_there_holds_nobody_up() {
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut exporter = exporter(&format!("http://{unused}"));
    observe(&mut exporter, &turn(1, 1));
    let begun = Instant::now();
    assert_eq!(exporter.finish(begun + SHORT).await, Delivery::Failed);
    assert!(begun.elapsed() < SHORT * 10);
}

#[tokio::test]
async fn an_address_that_is_none_loses_the_trace_and_nothing_else() {
    let mut exporter = exporter("langfuse");
    observe(&mut exporter, &turn(1, 1));
    assert_eq!(exporter.finish(Instant::now() + LONG).await, Delivery::Failed);
}

#[tokio::test]
async fn a_turn_of_many_calls_is_sent_in_pieces_before_it_ends() {
    let collector = Collector::new(&[]).await;
    let mut exporter = collector.exporter();
    let records = turn(1, 200);
    let (ended, before) = records.split_last().unwrap();
    observe(&mut exporter, before);
    let mut taken = collector.taken.subscribe();
    let sent = tokio::time::timeout(LONG, taken.wait_for(|taken| taken.len() >= 6)).await;
    drop(sent.unwrap().unwrap());
    exporter.observe(ended);
    assert_eq!(exporter.finish(Instant::now() + LONG).await, Delivery::Delivered);
    assert_eq!(collector.spans().len(), 402);
}

#[tokio::test]
async fn more_than_the_queue_holds_is_lost_and_said() {
    let collector = Collector::new(&[Told::Hang; 9]).await;
    let mut exporter = collector.exporter();
    for number in 1..=100 {
        observe(&mut exporter, &turn(number, 0));
        exporter.turn_end();
    }
    assert_eq!(exporter.finish(Instant::now() + SHORT).await, Delivery::Failed);
}

#[tokio::test]
async fn what_an_earlier_process_has_sent_is_not_sent_again() {
    let collector = Collector::new(&[]).await;
    let mut exporter = collector.exporter();
    for record in turn(1, 1) {
        exporter.replay(&record);
    }
    observe(&mut exporter, &turn(2, 0));
    assert_eq!(exporter.finish(Instant::now() + LONG).await, Delivery::Delivered);
    let turns: Vec<Option<String>> = collector
        .spans()
        .iter()
        .filter(|span| span.name == "agent-turn")
        .map(|span| attribute(span, "langfuse.observation.input"))
        .collect();
    assert_eq!(turns, [Some("MARKER-2".to_owned())]);
}
