//! The trace collector over HTTP: that it takes what Langfuse takes, refuses what Langfuse refuses, and can be asked alike.

use std::io::Write as _;

use anyhow::{Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message as _;
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tests::http::client;
use tests::traces::{FAKE_PUBLIC_KEY, FAKE_SECRET_KEY, Fault, TraceCollector};

fn span(id: u8, parent: Option<u8>, name: &str, attributes: &[(&str, &str)]) -> Span {
    let attribute = |&(key, value): &(&str, &str)| KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue {
            value: Some(any_value::Value::StringValue(value.to_owned())),
        }),
        ..KeyValue::default()
    };
    Span {
        trace_id: vec![7; 16],
        span_id: vec![id; 8],
        parent_span_id: parent.map(|parent| vec![parent; 8]).unwrap_or_default(),
        name: name.to_owned(),
        start_time_unix_nano: 1_700_000_000_000_000_000 + u64::from(id),
        end_time_unix_nano: 1_700_000_001_000_000_000,
        attributes: attributes.iter().map(attribute).collect(),
        ..Span::default()
    }
}

fn two_spans() -> Vec<Span> {
    let wide = [
        ("langfuse.trace.name", "hello"),
        ("langfuse.session.id", "hello-session"),
    ];
    let root = [
        ("langfuse.observation.type", "agent"),
        ("langfuse.observation.input", "the prompt"),
    ];
    let generation = [
        ("langfuse.observation.type", "generation"),
        ("langfuse.observation.model.name", "claude-opus-5-5"),
        (
            "langfuse.observation.usage_details",
            r#"{"input":12,"output":3,"cache_read_input_tokens":100,"bad":1.5}"#,
        ),
        ("langfuse.observation.input", r#"[{"role":"user","content":"marker"}]"#),
    ];
    vec![
        span(1, None, "agent-session", &[&wide[..], &root[..]].concat()),
        span(2, Some(1), "llm-call", &[&wide[..], &generation[..]].concat()),
    ]
}

fn export(collector: &TraceCollector, spans: Vec<Span>) -> Result<RequestBuilder> {
    export_as(FAKE_SECRET_KEY, collector, spans)
}

fn export_as(secret: &str, collector: &TraceCollector, spans: Vec<Span>) -> Result<RequestBuilder> {
    let scope_spans = vec![ScopeSpans {
        spans,
        ..ScopeSpans::default()
    }];
    let request = ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            scope_spans,
            ..ResourceSpans::default()
        }],
    };
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&request.encode_to_vec())?;
    let request = client().post(format!("{}/api/public/otel/v1/traces", collector.url()));
    Ok(request
        .basic_auth(FAKE_PUBLIC_KEY, Some(secret))
        .header("content-type", "application/x-protobuf")
        .header("content-encoding", "gzip")
        .header("x-langfuse-ingestion-version", "4")
        .body(packed.finish()?))
}

async fn get(collector: &TraceCollector, path: &str) -> Result<Value> {
    let request = client().get(format!("{}{path}", collector.url()));
    Ok(request
        .basic_auth(FAKE_PUBLIC_KEY, Some(FAKE_SECRET_KEY))
        .send()
        .await?
        .error_for_status()?
        .json()
        .await?)
}

#[tokio::test]
async fn a_trace_is_found_by_name_with_its_observations() -> Result<()> {
    let collector = TraceCollector::start().await?;
    ensure!(export(&collector, two_spans())?.send().await?.status() == StatusCode::OK);
    let traces = get(&collector, "/api/public/traces?name=hello").await?;
    let trace = &traces["data"][0];
    ensure!(
        trace["name"] == "hello" && trace["sessionId"] == "hello-session",
        "{traces}"
    );
    ensure!(
        trace["input"] == "the prompt" && traces["meta"]["totalItems"] == 1,
        "{traces}"
    );
    let id = trace["id"].as_str().unwrap_or_default();

    let found = get(
        &collector,
        &format!("/api/public/observations?traceId={id}&type=GENERATION"),
    )
    .await?;
    let generation = &found["data"][0];
    ensure!(
        generation["model"] == "claude-opus-5-5" && generation["parentObservationId"] == "0101010101010101",
        "{found}"
    );
    ensure!(
        generation["usageDetails"] == json!({ "input": 12, "output": 3, "cache_read_input_tokens": 100 }),
        "{found}"
    );
    ensure!(
        generation["usage"]["input"] == 112 && generation["usage"]["total"] == 115,
        "{found}"
    );
    ensure!(generation["input"][0]["content"] == "marker", "{found}");

    let raw = get(&collector, &format!("/api/public/v2/observations?traceId={id}")).await?;
    ensure!(
        raw["data"][1]["input"] == r#"[{"role":"user","content":"marker"}]"#,
        "{raw}"
    );
    let other = get(&collector, "/api/public/traces?name=other").await?;
    ensure!(other["data"] == json!([]), "{other}");
    Ok(())
}

#[tokio::test]
async fn the_same_span_sent_twice_is_one_observation_unless_its_start_differs() -> Result<()> {
    let collector = TraceCollector::start().await?;
    for _ in 0..2 {
        export(&collector, two_spans())?.send().await?.error_for_status()?;
    }
    ensure!(collector.observations().len() == 2);
    let mut later = two_spans();
    later[1].start_time_unix_nano += 1;
    export(&collector, later)?.send().await?.error_for_status()?;
    ensure!(collector.observations().len() == 3);
    Ok(())
}

#[tokio::test]
async fn what_langfuse_refuses_is_refused() -> Result<()> {
    let collector = TraceCollector::start().await?;
    let mut malformed = two_spans();
    malformed[1].span_id = vec![1; 7];
    let wrong = [
        (export_as("sk-lf-fake-wrong", &collector, two_spans())?, 401),
        (export(&collector, malformed)?, 400),
        (export(&collector, two_spans())?.body("not packed"), 400),
    ];
    for (request, expected) in wrong {
        let answer = request.send().await?;
        ensure!(answer.status().as_u16() == expected, "{answer:?}");
    }
    ensure!(collector.observations().is_empty(), "a refused export leaves nothing");
    ensure!(collector.exports().len() == 3);
    Ok(())
}

#[tokio::test]
async fn it_fails_for_as_long_as_it_is_told() -> Result<()> {
    let collector = TraceCollector::start().await?;
    collector.fail(Fault {
        status: Some(503),
        times: 2,
        retry_after: None,
    });
    for expected in [503, 503, 200] {
        ensure!(export(&collector, two_spans())?.send().await?.status().as_u16() == expected);
    }
    let statuses: Vec<_> = collector.exports().iter().map(|export| export.status).collect();
    ensure!(statuses == [503, 503, 200], "{statuses:?}");
    Ok(())
}
