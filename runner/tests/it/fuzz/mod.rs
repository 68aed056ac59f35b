//! Everything that reads what others wrote, fed with recordings, frames and files that were changed at random: nothing
//! panics, nothing waits for ever, and what cannot be read is kept or counted.
//!
//! In CI a few cases, by a seed that is printed; `cargo xtask fuzz --times N --seed N` takes N times as many.

mod mutate;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{Ack, GatewayFrame, Interrupt, RunnerFrame, UserMessage, Welcome};
use protocol::record::{SessionBody, UserBody};
use protocol::report::Delivery;
use protocol::{Kind, Outcome, Record};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use rand::{Rng as _, SeedableRng as _};
use runner::agent::frame::codec;
use runner::agent::{Exit, FromShim, Hello, Spawn, ToShim};
use runner::cli::{Lines, RawLine, wire};
use runner::config::{Config, Gateway};
use runner::history::History;
use runner::journal::Journal;
use runner::langfuse::spans::Tracer;
use runner::redact::Vault;
use runner::spool::Spool;
use runner::transcript::{Format, Transcript};
use serde_json::Value;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::codec::Framed;
use uuid::Uuid;

use crate::common::{Session, script, text};
use crate::pod::{agent_container, config, drive};
use crate::replay::recordings;
use mutate::{mutate, pieces};

/// Seed, and how many cases: so many in CI, and `RUNNER_FUZZ` times as many else.
fn dice(in_ci: u32) -> (StdRng, u32) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("RUNNER_SEED").unwrap_or_else(rand::random::<u64>);
    let cases = in_ci * number("RUNNER_FUZZ").unwrap_or(1) as u32;
    eprintln!("RUNNER_SEED={seed}, {cases} cases");
    (StdRng::seed_from_u64(seed), cases)
}

/// A recording of which some lines were changed.
fn damaged(random: &mut StdRng, recordings: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (_, stream) = recordings.choose(random).unwrap();
    let mut lines: Vec<Vec<u8>> = stream.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    for line in &mut lines {
        if random.random_ratio(1, 4) {
            mutate(random, line);
        }
    }
    if random.random_ratio(1, 8) {
        lines.shuffle(random);
    }
    lines.join(&b'\n')
}

fn cut(pieces: &[&[u8]]) -> Vec<RawLine> {
    let (mut lines, mut found) = (Lines::default(), Vec::new());
    for piece in pieces {
        lines.push(piece, |line| found.push(line));
    }
    found.extend(lines.finish());
    found
}

#[tokio::test]
async fn lines_of_the_cli_are_kept_whatever_is_in_them() {
    let (mut random, cases) = dice(60);
    let recordings = recordings();
    for case in 0..cases {
        let stream = damaged(&mut random, &recordings);
        let lines = cut(&[&stream]);
        assert_eq!(
            lines,
            cut(&pieces(&mut random, &stream)),
            "case {case}: the pieces do not matter"
        );

        let dir = tempfile::tempdir().unwrap();
        let mut journal = journal(Spool::open(dir.path(), |_| {}).unwrap());
        for line in &lines {
            if let RawLine::Whole(line) = line {
                if let Ok(line) = std::str::from_utf8(line) {
                    let _ = wire::event(line);
                }
                journal.cli(line).unwrap();
            }
        }
        let last = journal.end(Outcome::Lost).unwrap();
        journal.spool().durable(last).await.unwrap();
        drop(journal);

        let (mut history, mut spans) = (History::default(), Tracer::new("uid", 1, false));
        let mut kept = Vec::new();
        Spool::open(dir.path(), |record| {
            history.observe(record);
            spans.record(record);
            if record.kind == Kind::Cli {
                kept.push(original(record));
            }
        })
        .unwrap();
        spans.finish(jiff::Timestamp::UNIX_EPOCH, None);
        let whole = lines.iter().filter_map(|line| match line {
            RawLine::Whole(line) => Some(line.trim_ascii().to_vec()),
            RawLine::TooLong(_) => None,
        });
        assert_eq!(
            kept,
            whole.collect::<Vec<_>>(),
            "case {case}: each line is in a record of its own"
        );
    }
}

/// A journal whose first turn has begun.
pub fn journal(spool: Spool) -> Journal {
    let quiet = Transcript::new(Format::Quiet);
    let mut journal = Journal::new(spool, History::default(), Vault::default(), None, quiet, 1);
    let started = SessionBody::AttemptStarted {
        run: 1,
        pod_uid: String::new(),
        runner_version: "0".into(),
    };
    journal.session(&started).unwrap();
    let prompt = UserBody {
        command: "prompt".into(),
        uuid: Uuid::from_u128(1),
        text: "MARK".into(),
    };
    journal.user(&prompt).unwrap();
    journal
}

/// The line that a record was made of.
fn original(record: &Record) -> Vec<u8> {
    use base64::Engine as _;

    let body = record.body.get();
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    let only = |name: &str| {
        value
            .as_object()
            .filter(|fields| fields.len() == 1)?
            .get(name)?
            .as_str()
            .map(str::to_owned)
    };
    if let Some(text) = only("text") {
        return text.trim_ascii().as_bytes().to_vec();
    }
    if let Some(text) = only("base64") {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
        return bytes.trim_ascii().to_vec();
    }
    body.as_bytes().to_vec()
}

#[tokio::test]
async fn a_spool_gives_only_what_was_written_whatever_became_of_its_files() {
    let (mut random, cases) = dice(40);
    let recordings = recordings();
    for case in 0..cases {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = journal(Spool::open(dir.path(), |_| {}).unwrap());
        for line in cut(&[&recordings[0].1]) {
            if let RawLine::Whole(line) = line {
                journal.cli(&line).unwrap();
            }
        }
        drop(journal);
        let mut written = BTreeSet::new();
        Spool::open(dir.path(), |record| {
            written.insert(serde_json::to_string(record).unwrap());
        })
        .unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            // What stands in the header is the spool's name; the entries are what is checked.
            let mut entries = bytes.split_off(bytes.len().min(44 * usize::from(random.random_ratio(3, 4))));
            mutate(&mut random, &mut entries);
            bytes.extend(entries);
            std::fs::write(&path, bytes).unwrap();
        }
        let mut last = 0;
        let mut see = |record: &Record| {
            assert!(record.seq > last, "case {case}: {} after {last}", record.seq);
            last = record.seq;
            let known = written.contains(&serde_json::to_string(record).unwrap());
            assert!(known || record.kind == Kind::Gap, "case {case}: {record:?}");
        };
        let mut spool = Spool::open(dir.path(), &mut see).unwrap();
        let body = serde_json::value::to_raw_value("after").unwrap();
        let next = spool.append(2, 0, Kind::Log, body).unwrap().seq;
        spool.durable(next).await.unwrap();
        drop(spool);
        let mut again = Vec::new();
        Spool::open(dir.path(), |record| again.push(record.seq)).unwrap();
        assert_eq!(again.last(), Some(&next), "case {case}: it goes on");
    }
}

#[test]
fn frames_are_read_as_they_were_meant_or_refused() {
    let (mut random, cases) = dice(2_000);
    let (to, from) = frames();
    for case in 0..cases {
        let mut bytes = [to.as_slice(), from.as_slice()]
            .concat()
            .choose(&mut random)
            .unwrap()
            .to_vec();
        mutate(&mut random, &mut bytes);
        if let Ok(frame) = FromShim::decode(bytes.clone().into()) {
            assert_eq!(FromShim::decode(frame.encode()).unwrap(), frame, "case {case}");
        }
        if let Ok(frame) = ToShim::decode(bytes.into()) {
            for bytes in frame.encode() {
                ToShim::decode(bytes).unwrap();
            }
        }
    }
}

/// One frame of each kind, to the shim and from it.
fn frames() -> (Vec<Bytes>, Vec<Bytes>) {
    let spawn = Spawn {
        argv: vec!["true".into()],
        env: vec![("A".into(), "b".into())],
        env_default: Vec::new(),
        cwd: "/".into(),
    };
    let to = [
        ToShim::Spawn(spawn),
        ToShim::Stdin(Bytes::from_static(b"{}\n")),
        ToShim::CloseStdin,
        ToShim::Signal(15),
        ToShim::KillAll,
        ToShim::Quit,
    ];
    let from = [
        hello(),
        FromShim::Stdout(Bytes::from_static(b"{\"type\":\"result\"}\n")),
        FromShim::Stderr(Bytes::from_static(b"x\n")),
        FromShim::Exit(Exit::default()),
        FromShim::SpawnFailed("no".into()),
        FromShim::Killed,
    ];
    (
        to.iter().flat_map(ToShim::encode).collect(),
        from.iter().map(FromShim::encode).collect(),
    )
}

fn hello() -> FromShim {
    FromShim::Hello(Hello {
        boot_id: Uuid::new_v4().to_string(),
        missing: Vec::new(),
        oom_kills: 0,
    })
}

/// A shim that an agent has taken over: it answers with recordings and frames that were changed, ends when it likes, and
/// comes again.
async fn taken_over(listener: UnixListener, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let recordings = recordings();
    let (_, frames) = frames();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = answer(stream, &mut random, &recordings, &frames).await;
    }
}

async fn answer(
    stream: UnixStream,
    random: &mut StdRng,
    recordings: &[(String, Vec<u8>)],
    frames: &[Bytes],
) -> std::io::Result<()> {
    use tokio::io::AsyncWriteExt as _;

    let mut shim = Framed::new(stream, codec());
    shim.send(hello().encode()).await?;
    // What is said to it is taken, or not.
    for _ in 0..random.random_range(0..3) {
        shim.next().await;
    }
    let stream = damaged(random, recordings);
    for piece in pieces(random, &stream) {
        let mut bytes = FromShim::Stdout(Bytes::copy_from_slice(piece)).encode();
        if random.random_ratio(1, 20) {
            bytes = frames.choose(random).unwrap().clone();
        }
        if random.random_ratio(1, 20) {
            let mut changed = bytes.to_vec();
            mutate(random, &mut changed);
            bytes = changed.into();
        }
        shim.send(bytes).await?;
        if random.random_ratio(1, 60) {
            let noise: Vec<u8> = (0..random.random_range(1..64)).map(|_| random.random()).collect();
            shim.get_mut().write_all(&noise).await?;
        }
    }
    shim.send(FromShim::Exit(Exit::default()).encode()).await
}

#[tokio::test]
async fn a_shim_that_says_anything_at_all_ends_the_attempt_and_nothing_else() {
    let (mut random, cases) = dice(12);
    for case in 0..cases {
        let session = Session::new().await;
        let mut config = config(&session, &script("MARK", &[text("Done.")]));
        // It may also say nothing more for as long as it likes.
        config.limits.timeout = Some(3);
        let listener = UnixListener::bind(session.state().join("agent.sock")).unwrap();
        let seed = random.random();
        let shim = tokio::spawn(taken_over(listener, seed));
        let outcome = drive(config).await;
        shim.abort();
        eprintln!("case {case}: {outcome:?}");
        let report = session.report();
        assert_eq!(report.outcome, outcome, "case {case}");
        assert_ne!(outcome, Outcome::Running, "case {case}");
        let records = session.records();
        assert!(
            records.iter().map(|record| record.seq).eq(1..=records.len() as u64),
            "case {case}"
        );
        assert_eq!(records.last().unwrap().kind, Kind::End, "case {case}");
        assert!(report.usage.total() == 0 && report.cost_usd.is_none_or(|cost| cost == protocol::NanoUsd::default()));
    }
}

/// A gateway that answers each frame with something that was changed, and is a good one in the end.
async fn mad_gateway(kept: Arc<Mutex<Vec<String>>>, seed: u64, mad: u32) -> Gateway {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut random = StdRng::seed_from_u64(seed);
        for connection in 0.. {
            let Ok((stream, _)) = listener.accept().await else {
                return;
            };
            let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
                continue;
            };
            while let Some(Ok(message)) = socket.next().await {
                let Message::Text(text) = message else { continue };
                let frame: RunnerFrame = serde_json::from_str(&text).unwrap();
                let answers = match frame {
                    _ if connection < mad => nonsense(&mut random),
                    RunnerFrame::Hello(hello) => {
                        // What the mad one seemed to have stored counts for nothing.
                        kept.lock().unwrap().clear();
                        let welcome = Welcome {
                            acked_seq: 0,
                            spool: Some(hello.spool),
                        };
                        vec![Message::text(
                            serde_json::to_string(&GatewayFrame::Welcome(welcome)).unwrap(),
                        )]
                    }
                    RunnerFrame::Records(records) => {
                        let mut kept = kept.lock().unwrap();
                        kept.extend(records.iter().map(|record| record.get().to_owned()));
                        let head: protocol::RecordHead = serde_json::from_str(kept.last().unwrap()).unwrap();
                        let ack = GatewayFrame::Ack(Ack { seq: head.seq });
                        vec![Message::text(serde_json::to_string(&ack).unwrap())]
                    }
                    _ => Vec::new(),
                };
                for answer in answers {
                    if socket.send(answer).await.is_err() {
                        break;
                    }
                }
            }
        }
    });
    Gateway { url, token_file: None }
}

fn nonsense(random: &mut StdRng) -> Vec<Message> {
    let frames = [
        GatewayFrame::Welcome(Welcome {
            acked_seq: random.random_range(0..9),
            spool: None,
        }),
        GatewayFrame::Ack(Ack {
            seq: random.random_range(0..9),
        }),
        GatewayFrame::Interrupt(Interrupt {
            id: "c-1".into(),
            turn: 7,
        }),
        GatewayFrame::UserMessage(UserMessage {
            id: "c-2".into(),
            text: "not in a one-shot".into(),
        }),
    ];
    let file = r#"{"file_request":{"id":"f","op":"read","path":"../../etc/passwd","offset":0,"length":9}}"#;
    let mut texts: Vec<String> = frames
        .iter()
        .map(|frame| serde_json::to_string(frame).unwrap())
        .collect();
    texts.push(file.to_owned());
    let mut messages = Vec::new();
    for _ in 0..random.random_range(1..4) {
        let mut bytes = texts.choose(random).unwrap().clone().into_bytes();
        if random.random_ratio(2, 3) {
            mutate(random, &mut bytes);
        }
        messages.push(match (random.random_range(0..8), String::from_utf8(bytes)) {
            (0, _) => Message::Ping(Bytes::from_static(b"?")),
            (1, _) => Message::Close(None),
            (_, Ok(text)) => Message::text(text),
            (_, Err(error)) => Message::binary(error.into_bytes()),
        });
    }
    messages
}

#[tokio::test]
async fn a_gateway_that_says_anything_at_all_keeps_nobody_from_working_and_a_good_one_gets_everything() {
    let (mut random, cases) = dice(6);
    let mut delivered = 0;
    for case in 0..cases {
        let session = Session::new().await;
        let kept = Arc::default();
        let config = Config {
            gateway: Some(mad_gateway(Arc::clone(&kept), random.random(), 3).await),
            ..config(&session, &script("MARK", &[text("Done.")]))
        };
        let _container = agent_container(&session);
        assert_eq!(drive(config).await, Outcome::Succeeded, "case {case}");
        assert_eq!(session.report().result, "Done.", "case {case}");
        session.assert_prompt_once("MARK");
        let spooled: Vec<_> = session
            .records()
            .iter()
            .map(|record| serde_json::to_string(record).unwrap())
            .collect();
        let kept = kept.lock().unwrap();
        assert_eq!(*kept, spooled[spooled.len() - kept.len()..], "case {case}");
        // A number of the mad one's may by chance have been that of the last record. And the time that the last records are
        // given at the end may be over before a good one is reached: then the report says so.
        let events = session.report().events;
        let complete = kept.last().is_some_and(|last| last.contains("\"kind\":\"end\""));
        assert!(
            complete || kept.is_empty() || events != Delivery::Delivered,
            "case {case}: {events:?}"
        );
        delivered += usize::from(complete);
    }
    assert!(delivered > 0, "a good one is reached in time");
}
