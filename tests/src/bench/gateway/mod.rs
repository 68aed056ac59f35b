//! The gateway: what it stores a second beside bare inserts into the same SQLite, how soon a client has a record, what
//! catching up takes, and what it holds in memory.

mod cluster;
mod peers;
mod postgres;
mod raw;

use std::{collections::BTreeMap, ops::RangeInclusive, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

pub use self::raw::{RawOptions, raw_inserts};
use self::{
    peers::{Process, Runner, Watcher},
    raw::raw_rate,
};
use super::{
    machine,
    table::{Table, quantile},
};

/// The core that gateway and bare inserts have to themselves, as far as the machine lets them.
const CORE: usize = 1;
/// Frames under way of one runner.
const WINDOW: u64 = 4;
/// Text of a record: with what is around it about 500 bytes.
const TEXT: usize = 330;

/// What is measured, and how much of it.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The gateway's release binary.
    #[arg(long, env = "GATEWAY_BINARY")]
    gateway: PathBuf,
    /// Records of each rate, per turn.
    #[arg(long, default_value_t = 60_000)]
    records: u64,
    /// Turns of gateway and bare inserts.
    #[arg(long, default_value_t = 3)]
    turns: usize,
    /// Watchers of one session.
    #[arg(long, value_delimiter = ',', default_value = "1,1000")]
    watchers: Vec<usize>,
    /// Records that the watchers are shown, 20 a second.
    #[arg(long, default_value_t = 200)]
    shown: u64,
    /// Records that a late reader catches up with.
    #[arg(long, default_value_t = 1_000_000)]
    backlog: u64,
    /// Live sessions.
    #[arg(long, default_value_t = 1_000)]
    sessions: usize,
    /// Connections, those of the sessions' runners included.
    #[arg(long, default_value_t = 10_000)]
    connections: usize,
}

/// Measures and prints.
pub async fn run(options: Options) -> Result<()> {
    raise_files(options.connections as u64 + 2000)?;
    let machine = machine::describe();
    let mut table = Table::default();
    for batch in [100, 1000] {
        durable(&options, batch, &mut table).await?;
    }
    many_runners(&options, &mut table).await?;
    for watchers in &options.watchers {
        latency(&options, *watchers, &mut table).await?;
    }
    catch_up(&options, &mut table).await?;
    postgres::measure(&options, &mut table).await?;
    memory(&options, &mut table).await?;
    println!(
        "\n{machine}; {}. Records of {} bytes; gateway and bare inserts bound to one core, taking turns; clients and PostgreSQL on the others.\n\n{}",
        jiff::Timestamp::now(),
        peers::record(1, &"x".repeat(TEXT)).len(),
        table.markdown()
    );
    Ok(())
}

/// For us and for the gateway, which inherits it.
fn raise_files(wanted: u64) -> Result<()> {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if limit.current.is_none_or(|now| now >= wanted) {
        return Ok(());
    }
    limit.current = Some(wanted);
    // Above what is allowed only root can go.
    limit.maximum = limit.maximum.map(|most| most.max(wanted));
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)
        .with_context(|| format!("failed to allow {wanted} open files: raise `ulimit -Hn`"))
}

struct Bench {
    process: Process,
    _folder: tempfile::TempDir,
}

async fn started(options: &Options, sessions: usize, core: Option<usize>) -> Result<Bench> {
    let folder = tempfile::tempdir()?;
    let cluster = cluster::start(sessions).await?;
    let process = Process::start(&options.gateway, folder.path(), cluster, core).await?;
    Ok(Bench {
        process,
        _folder: folder,
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(&values, 0.5)
}

/// One runner whose frames are one commit each, beside transactions of as many inserts.
async fn durable(options: &Options, batch: u64, table: &mut Table) -> Result<()> {
    let text = "x".repeat(TEXT);
    let (mut ours, mut bare, mut cpu, mut bare_cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.turns {
        let (rate, used) = raw_rate(options.records, batch, CORE).await?;
        bare.push(rate);
        bare_cpu.push(used);
        let bench = started(options, 1, Some(CORE)).await?;
        let mut runner = Runner::connect(bench.process.address, 0).await?;
        let (begun, used) = (Instant::now(), machine::cpu(bench.process.pid()?)?);
        runner.deliver(options.records, batch, WINDOW, &text).await?;
        ours.push(options.records as f64 / begun.elapsed().as_secs_f64());
        let used = machine::cpu(bench.process.pid()?)?.saturating_sub(used);
        cpu.push(used.as_secs_f64() * 1e6 / options.records as f64);
    }
    let ratios = ours.iter().zip(&bare).map(|(ours, bare)| ours / bare).collect();
    let (ours, bare, ratio) = (median(ours), median(bare), median(ratios));
    table.hold(
        &format!("acknowledged records a second, {batch} a commit; bare inserts, same commits; ratio"),
        format!(
            "{ours:.0}; {bare:.0}; {:.1} % (processor time a record: {:.2} µs; {:.2} µs)",
            ratio * 100.0,
            median(cpu),
            median(bare_cpu)
        ),
        "≥ 60 %",
        ratio >= 0.6,
    );
    Ok(())
}

/// Many runners at once: the commits form by themselves.
async fn many_runners(options: &Options, table: &mut Table) -> Result<()> {
    const RUNNERS: usize = 32;
    let bench = started(options, RUNNERS, Some(CORE)).await?;
    let each = options.records * 2 / RUNNERS as u64;
    let mut runners = Vec::new();
    for number in 0..RUNNERS {
        runners.push(Runner::connect(bench.process.address, number).await?);
    }
    let begun = Instant::now();
    let tasks = runners.into_iter().map(|mut runner| {
        tokio::spawn(async move {
            let text = "x".repeat(TEXT);
            runner.deliver(each, 50, WINDOW, &text).await
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await??;
    }
    let rate = (each * RUNNERS as u64) as f64 / begun.elapsed().as_secs_f64();
    table.hold(
        &format!("acknowledged records a second, {RUNNERS} runners, 50 a frame"),
        format!("{rate:.0}"),
        "goal 20,000",
        rate >= 20_000.0,
    );
    Ok(())
}

/// From a runner's send to each watcher's receipt, the commit between them.
async fn latency(options: &Options, watchers: usize, table: &mut Table) -> Result<()> {
    let bench = started(options, 1, None).await?;
    let address = bench.process.address;
    let mut runner = Runner::connect(address, 0).await?;
    let mut connected = Vec::new();
    for _ in 0..watchers {
        connected.push(Watcher::connect(address, 0).await?);
    }
    let [p50, p99] = shown(&mut runner, connected, 1..=options.shown).await?;
    table.hold(
        &format!("record sent → {watchers} watchers, fsync included: p50, p99"),
        format!("{p50:.1} ms, {p99:.1} ms"),
        "p99 ≤ 50 ms",
        p99 <= 50.0,
    );
    Ok(())
}

/// Shows these records to the watchers, 20 a second; milliseconds until they had them, p50 and p99.
async fn shown(runner: &mut Runner, watchers: Vec<Watcher>, seqs: RangeInclusive<u64>) -> Result<[f64; 2]> {
    let (news, mut received) = mpsc::unbounded_channel();
    let mut tasks = Vec::new();
    for mut watcher in watchers {
        let (news, seqs) = (news.clone(), seqs.clone());
        tasks.push(tokio::spawn(async move {
            for seq in seqs {
                watcher.until(format!("id: u0/{seq}\n").as_bytes()).await?;
                news.send((seq, Instant::now()))?;
            }
            anyhow::Ok(())
        }));
    }
    drop(news);
    let mut sent = BTreeMap::new();
    let text = "x".repeat(TEXT);
    for seq in seqs {
        let frame = format!(r#"{{"records":[{}]}}"#, peers::record(seq, &text));
        sent.insert(seq, Instant::now());
        runner.text(frame).await?;
        runner.acked(seq).await?;
        sleep(Duration::from_millis(50)).await;
    }
    let mut times = Vec::new();
    while let Some((seq, when)) = received.recv().await {
        times.extend(
            sent.get(&seq)
                .map(|sent| when.duration_since(*sent).as_secs_f64() * 1e3),
        );
    }
    for task in tasks {
        task.await??;
    }
    times.sort_by(f64::total_cmp);
    Ok([quantile(&times, 0.5), quantile(&times, 0.99)])
}

/// A reader that comes late.
async fn catch_up(options: &Options, table: &mut Table) -> Result<()> {
    let bench = started(options, 1, None).await?;
    let mut runner = Runner::connect(bench.process.address, 0).await?;
    runner.deliver(options.backlog, 1000, WINDOW, &"x".repeat(TEXT)).await?;
    let before = machine::resident(bench.process.pid()?)?;
    let begun = Instant::now();
    let mut watcher = Watcher::connect(bench.process.address, 0).await?.with_buffer(1 << 20);
    let bytes = watcher
        .until(format!("id: u0/{}\n", options.backlog).as_bytes())
        .await?;
    let seconds = begun.elapsed().as_secs_f64();
    let after = machine::resident(bench.process.pid()?)?;
    table.tell(
        &format!("one reader catches up with {} records", options.backlog),
        format!(
            "{seconds:.1} s: {:.0} records and {:.0} MB a second; memory {:.0} → {:.0} MiB",
            options.backlog as f64 / seconds,
            bytes as f64 / 1e6 / seconds,
            before.0,
            after.0
        ),
    );
    Ok(())
}

/// Runners that deliver now and then, and clients that wait.
async fn memory(options: &Options, table: &mut Table) -> Result<()> {
    let bench = started(options, options.sessions, None).await?;
    let address = bench.process.address;
    let idle = machine::resident(bench.process.pid()?)?;
    let mut runners = Vec::new();
    for number in 0..options.sessions {
        runners.push(Runner::connect(address, number).await?);
    }
    let text = "x".repeat(TEXT);
    for seq in 1..=3 {
        for runner in &mut runners {
            runner
                .text(format!(r#"{{"records":[{}]}}"#, peers::record(seq, &text)))
                .await?;
        }
        for runner in &mut runners {
            runner.acked(seq).await?;
        }
    }
    let live = machine::resident(bench.process.pid()?)?;
    let mut watchers = Vec::new();
    for number in options.sessions..options.connections {
        watchers.push(Watcher::connect(address, number % options.sessions).await?);
    }
    let full = machine::resident(bench.process.pid()?)?;
    table.tell(
        &format!(
            "memory idle; with {} live sessions; with {} connections",
            options.sessions, options.connections
        ),
        format!(
            "{:.0}; {:.0}; {:.0} MiB (at most {:.0})",
            idle.0, live.0, full.0, full.1
        ),
    );
    Ok(())
}
