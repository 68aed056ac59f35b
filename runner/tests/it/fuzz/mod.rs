//! Everything that reads what others wrote, fed with recordings, frames and files that were changed at random: nothing
//! panics, nothing waits for ever, and what cannot be read is kept or counted.
//!
//! In CI a few cases, by a seed that is printed; `cargo xtask fuzz --times N --seed N` takes N times as many.

mod gateway;
mod mutate;
mod shim;

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::StreamExt as _;
use protocol::record::{SessionBody, UserBody};
use protocol::{Kind, Outcome, Record};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use rand::{Rng as _, SeedableRng as _};
use runner::agent::{Exit, FromShim, Hello, Spawn, ToShim};
use runner::cli::{Lines, RawLine, wire};
use runner::history::History;
use runner::journal::Journal;
use runner::langfuse::spans::Tracer;
use runner::redact::Vault;
use runner::spool::Spool;
use runner::transcript::{Format, Transcript};
use serde_json::Value;
use uuid::Uuid;

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

/// Cases that are tried at the same time: most of the time they wait for something.
const AT_ONCE: usize = 8;

/// Tries each of the cases, by a seed of its own, and says how far it is.
async fn each<T>(random: &mut StdRng, cases: u32, try_one: impl AsyncFn(u32, u64) -> T) -> Vec<T> {
    let seeds: Vec<u64> = (0..cases).map(|_| random.random()).collect();
    let try_one = &try_one;
    let tries = (0..cases)
        .zip(seeds)
        .map(|(case, seed)| async move { try_one(case, seed).await });
    let mut tries = futures::stream::iter(tries).buffer_unordered(AT_ONCE);
    let mut results = Vec::new();
    while let Some(result) = tries.next().await {
        results.push(result);
        told(results.len(), cases);
    }
    results
}

/// Says how far it is, now and then.
fn told(done: usize, cases: u32) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    if done.is_multiple_of((cases as usize / 10).max(1)) {
        eprintln!("{done} of {cases}: {name}");
    }
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
        told(case as usize + 1, cases);
    }
}

/// A journal whose first turn has begun.
pub fn journal(spool: Spool) -> Journal {
    let quiet = Transcript::new(Format::Quiet, None);
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
        told(case as usize + 1, cases);
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
