//! Recordings of the real CLI, run again through everything that reads its lines. `cargo xtask record-cli` makes them anew.

use std::path::{Path, PathBuf};

use protocol::record::SessionBody;
use protocol::{Kind, Outcome, Record};
use rand::{Rng as _, SeedableRng as _};
use runner::cli::{Event, Lines, RawLine, Turn, outcome, wire};
use runner::history::History;
use runner::langfuse::spans::Tracer;
use runner::proxy::Witness;
use runner::spool::Spool;
use serde_json::Value;
use tokio::time::Instant;

use crate::fuzz::journal;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recordings")
}

pub fn recordings() -> Vec<(String, Vec<u8>)> {
    let files = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let mut recordings: Vec<_> = files
        .map(|path| {
            (
                path.file_stem().unwrap().to_str().unwrap().to_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect();
    recordings.sort();
    assert!(!recordings.is_empty());
    recordings
}

/// Cuts a stream into pieces of any length, and those into lines.
fn lines(stream: &[u8], seed: u64) -> Vec<RawLine> {
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let (mut cutter, mut found, mut at) = (Lines::default(), Vec::new(), 0);
    while at < stream.len() {
        let end = (at + random.random_range(1..5_000)).min(stream.len());
        cutter.push(&stream[at..end], |line| found.push(line));
        at = end;
    }
    found.extend(cutter.finish());
    found
}

fn events(lines: &[RawLine]) -> Vec<Event> {
    let event = |line: &RawLine| match line {
        RawLine::Whole(line) => std::str::from_utf8(line).ok().and_then(wire::event),
        RawLine::TooLong(_) => None,
    };
    lines.iter().filter_map(event).collect()
}

/// What a recording comes to.
fn told(name: &str, events: &[Event]) -> String {
    let now = Instant::now();
    let (mut turn, mut results, mut taken) = (Turn::default(), Vec::new(), 0);
    for event in events {
        turn.observe(event, now);
        match event {
            Event::Result(result) => results.push(format!("{:?}", outcome(result, &Witness::default()))),
            Event::Started(_) => taken += 1,
            _ => {}
        }
    }
    let over = turn.over_at() == Some(now);
    format!(
        "{name}: {}, {taken} messages taken up, over: {over}\n",
        results.join(", ")
    )
}

#[tokio::test]
async fn every_recording_comes_to_what_happened() {
    let told: String = recordings()
        .iter()
        .map(|(name, stream)| told(name, &events(&lines(stream, 1))))
        .collect();
    insta::assert_snapshot!(told, @"
    background: Succeeded, Succeeded, 1 messages taken up, over: true
    clear: Succeeded, Succeeded, Succeeded, 3 messages taken up, over: true
    folded: Succeeded, 2 messages taken up, over: true
    interrupt: StoppedByUser, Succeeded, 2 messages taken up, over: true
    overloaded: ModelUnavailable, 1 messages taken up, over: true
    question: StoppedByUser, 1 messages taken up, over: true
    subagent: Succeeded, 1 messages taken up, over: true
    tools: Succeeded, 1 messages taken up, over: true
    ");
}

#[tokio::test]
async fn the_order_of_keys_and_unknown_lines_and_broken_ones_change_nothing() {
    for (name, stream) in recordings() {
        let expected = events(&lines(&stream, 2));
        let mut mutated = Vec::new();
        for line in stream.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            mutated.extend_from_slice(&reversed(line));
            mutated.extend_from_slice(b"\nnot JSON {\n\xff\xfe broken\n[1,2]\n");
        }
        assert_eq!(events(&lines(&mutated, 3)), expected, "{name}");
        let mut strange = Vec::new();
        for line in stream.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            strange.extend_from_slice(line);
            strange.extend_from_slice(
                b"\n{\"type\":\"of_tomorrow\",\"message\":7,\"uuid\":null}\n{\"subtype\":\"x\",\"type\":\"system\"}\n",
            );
        }
        let known: Vec<_> = events(&lines(&strange, 4));
        let known = told(&name, &known);
        assert_eq!(known, told(&name, &expected));
    }
}

/// The same object with its keys the other way round.
fn reversed(line: &[u8]) -> Vec<u8> {
    let fields: serde_json::Map<String, Value> = serde_json::from_slice(line).unwrap();
    let fields: Vec<String> = fields
        .iter()
        .rev()
        .map(|(key, value)| format!("{}:{value}", Value::from(key.as_str())))
        .collect();
    format!("{{{}}}", fields.join(",")).into_bytes()
}

#[tokio::test]
async fn every_recording_is_kept_as_it_came_and_gives_the_same_spans_again() {
    for (name, stream) in recordings() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), |_| {}).unwrap();
        let mut journal = journal(spool);
        let lines = lines(&stream, 5);
        for line in &lines {
            let RawLine::Whole(line) = line else {
                panic!("no line is too long")
            };
            journal.cli(line).unwrap();
        }
        let outcome = Outcome::Succeeded;
        journal.session(&SessionBody::TurnEnded { turn: 1, outcome }).unwrap();
        let rounds = journal.history().rounds;
        let last = journal.end(outcome).unwrap();
        journal.spool().durable(last).await.unwrap();
        drop(journal);

        let mut records: Vec<Record> = Vec::new();
        let mut history = History::default();
        Spool::open(dir.path(), |record| {
            history.observe(record);
            records.push(record.clone());
        })
        .unwrap();
        assert_eq!(history.rounds, rounds, "{name}");
        let kept: Vec<_> = records.iter().filter(|record| record.kind == Kind::Cli).collect();
        assert_eq!(kept.len(), lines.len());
        for (record, line) in kept.iter().zip(&lines) {
            assert_eq!(&RawLine::Whole(record.body.get().as_bytes().to_vec()), line, "{name}");
        }
        let spans = || {
            let mut spans = Tracer::new("6fa459ea-ee8a-3ca4-894e-db77e160355e", 1, false);
            for record in &records {
                spans.record(record);
            }
            spans.finish(records.last().unwrap().ts, Some(outcome));
            format!("{:?}", spans.take_ready())
        };
        let (first, again) = (spans(), spans());
        assert_eq!(first, again, "{name}");
        assert!(first.contains("agent-session"), "{name}: {first}");
    }
}
