//! The runner beside the CLI alone and beside the Python SDK: same task, same mock model, same CLI, taking turns.

mod measure;
mod peers;
pub(super) mod table;

use std::{ffi::OsString, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::{
    measure::{Sample, measure},
    peers::{Bench, Peer},
    table::{median, minimum},
};
use crate::{paths, progress};

/// Runs of each peer when nothing is said; a median of fewer says little on a busy machine.
const RUNS: usize = 15;
/// Messages of the stream.
const MESSAGES: u32 = 200_000;
/// Runs of the stream.
const STREAMS: usize = 3;
/// Bytes of the long line: a picture that the CLI read.
const LONG: u32 = 1_350_000;
/// Model calls through the proxy and beside it.
const CALLS: u32 = 200;
/// How long anything may take.
const DEADLINE: Duration = Duration::from_mins(3);

/// `cargo xtask bench runner [--runs N] [--write]`.
pub(super) fn run(arguments: &[OsString]) -> Result<()> {
    let (mut runs, mut write) = (RUNS, false);
    let mut words = arguments.iter().filter_map(|word| word.to_str());
    while let Some(word) = words.next() {
        match word {
            "--write" => write = true,
            "--runs" => {
                runs = words
                    .next()
                    .and_then(|n| n.parse().ok())
                    .context("--runs needs a number")?;
            }
            other => bail!("{other:?} is no argument of `bench runner`: give --runs N or --write"),
        }
    }
    let bench = Bench::prepare()?;
    let mut report = heading(&bench, runs);
    report += &progress::step("a session of one answer", || session(&bench, runs))?;
    report += &progress::step("200,000 messages", || stream(&bench))?;
    report += &progress::step("a line of 1.35 MB", || long_line(&bench))?;
    report += &progress::step("time to the first token", || first_token(&bench))?;
    println!("{report}");
    if write {
        table::write(&paths::workspace().join("docs/benchmarks.md"), "runner", &report)?;
    }
    Ok(())
}

fn heading(bench: &Bench, runs: usize) -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("? unknown");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let size = fs::metadata(&bench.runner).map_or(0, |meta| meta.len());
    format!(
        "## Runner\n\n`cargo xtask bench runner [--runs N] [--write]`: the runner beside the CLI alone and beside the Python SDK, same task, same mock \
         model, same CLI, taking turns.\n\n\
         {} {cores} cores, load {} before the run. Claude Code {}, Python {}, claude-agent-sdk {}. {runs} runs of each, taking turns. \
         The runner's binary has {:.1} MB.\n\n",
        cpu.trim_start_matches([' ', '\t', ':']),
        load.split(' ').next().unwrap_or("?"),
        crate::claude_cli::VERSION,
        bench.python_version,
        peers::SDK,
        size as f64 / 1e6,
    )
}

/// A prompt, one answer, the end.
fn session(bench: &Bench, runs: usize) -> Result<String> {
    let prompt = r#"@mock {"steps":[{"text":"Hello from the mock."}]}"#;
    let mut samples: [Vec<Sample>; 3] = Default::default();
    // The first round warms the page cache and does not count.
    for round in 0..=runs {
        for (peer, samples) in Peer::ALL.into_iter().zip(&mut samples) {
            let sample = measure(|home| bench.command(peer, &bench.cli, home, prompt), DEADLINE)?;
            if sample.code != Some(0) {
                bail!("{} ended with {:?}: {}", peer.name(), sample.code, sample.stderr);
            }
            if round > 0 {
                samples.push(sample);
            }
        }
    }
    Ok(table::sessions(&samples))
}

/// Many messages through each peer; what the fake CLI itself costs is taken off.
fn stream(bench: &Bench) -> Result<String> {
    let says = format!("lines:{MESSAGES}");
    let mut rows = Vec::new();
    let mut cpu: [Vec<f64>; 3] = Default::default();
    let mut wall: [Vec<f64>; 3] = Default::default();
    let mut peak: [u64; 3] = [0; 3];
    for _ in 0..STREAMS {
        for (at, peer) in Peer::ALL.into_iter().enumerate() {
            let sample = measure(|home| bench.fake(peer, home, &says), DEADLINE)?;
            if sample.code != Some(0) {
                bail!("{} ended with {:?}: {}", peer.name(), sample.code, sample.stderr);
            }
            cpu[at].push(sample.cpu.as_secs_f64());
            wall[at].push(sample.result.as_secs_f64());
            peak[at] = peak[at].max(sample.own_pss);
        }
    }
    for (at, peer) in Peer::ALL.into_iter().enumerate().skip(1) {
        let micros = |pick: fn(&[f64]) -> f64| (pick(&cpu[at]) - pick(&cpu[0])) / f64::from(MESSAGES) * 1e6;
        rows.push(format!(
            "| {} | {:.1} | {:.1} | {:.2} | {:.1} |\n",
            peer.name(),
            micros(median),
            micros(minimum),
            median(&wall[at]),
            peak[at] as f64 / 1024.0,
        ));
    }
    Ok(format!(
        "{MESSAGES} messages of a CLI that only writes, {STREAMS} runs; it needs {:.2} s alone. The runner puts every one on disk.\n\n\
         | | CPU per message, µs | least | time to result, s | memory at most, MiB |\n| --- | --- | --- | --- | --- |\n{}\n",
        median(&wall[0]),
        rows.concat()
    ))
}

fn long_line(bench: &Bench) -> Result<String> {
    let mut said = vec!["A line of 1.35 MB:".to_owned()];
    for peer in [Peer::Runner, Peer::Sdk] {
        let sample = measure(|home| bench.fake(peer, home, &format!("long:{LONG}")), DEADLINE)?;
        let outcome = match sample.code {
            Some(0) => "passes".to_owned(),
            _ => format!(
                "ends it ({})",
                complaint(&sample.stderr).chars().take(110).collect::<String>()
            ),
        };
        said.push(format!("{}: {outcome}.", peer.name()));
    }
    Ok(said.join(" ") + "\n\n")
}

/// What the proxy adds until the first token of an answer.
fn first_token(bench: &Bench) -> Result<String> {
    let mut took = Value::Null;
    let sample = measure(
        |home| {
            let started = bench.fake(Peer::Runner, home, &format!("calls:{CALLS}"))?;
            fs::write(
                home.join("work/direct"),
                format!("{} {}", bench.model_url(), peers::KEY),
            )?;
            Ok(started)
        },
        DEADLINE,
    )?;
    if let Some(text) = sample.left.get("took.json") {
        took = serde_json::from_str(text)?;
    }
    let times = |side: &str| -> Vec<f64> {
        took[side]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|t| Some(t.as_f64()? * 1_000.0))
            .collect()
    };
    let (direct, proxy) = (times("direct"), times("proxy"));
    if direct.is_empty() || proxy.is_empty() {
        bail!("no model call was made: {}", sample.stderr);
    }
    Ok(format!(
        "First token of {CALLS} model calls of 48 KB: {:.2} ms (least {:.2}) straight from the mock, {:.2} ms (least {:.2}) through the \
         proxy, which has then written the opening of the usage record to disk.\n",
        median(&direct),
        minimum(&direct),
        median(&proxy),
        minimum(&proxy),
    ))
}

/// The line that says what went wrong, among those of what it tore down.
fn complaint(stderr: &str) -> &str {
    let mut lines = stderr.lines();
    lines
        .clone()
        .find(|line| line.contains("Error: "))
        .or(lines.next_back())
        .unwrap_or_default()
}

/// Runs a program to its end.
fn output(command: &mut Command) -> Result<String> {
    crate::command::output(command)
}

fn made(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))
}
