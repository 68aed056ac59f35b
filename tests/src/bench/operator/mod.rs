//! The operator beside clients that make the same claim and Job for each session, in one run.
//!
//! Both are timed by the API server's audit log: from the answer to the session's creation to the answer to its Job's. They take
//! turns, slice by slice, so that whatever else the machine does falls on both, and each has a control plane to itself, so that
//! neither waits for what the other has left there.

mod admit;
mod audit;
mod burst;
mod lives;
mod load;
mod many;
mod nodes;
mod plane;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use tokio::time::Instant;

use self::{
    audit::{Audit, Write},
    nodes::pods,
    plane::ACCOUNT,
};
use super::{
    machine,
    table::{Table, quantile},
};

/// What stands above the table.
const ABOUT: &str = "\
The operator as it is shipped on a bare control plane (etcd, API server, controller manager, no scheduler). Beside it two clients, each on a control
plane of its own: a bare one, which makes a session's claim and Job by itself and nothing else, and one that then records it, with the status and the
Event that the operator writes. All take turns, slice by slice, and are timed by the API server's audit log, from the answer to the session's creation
to the answer to its Job's. Where pods run, kube-scheduler puts them on nodes of kwok, which starts them at once and ends them after 0.5 to 1.5 s with
the runner's report; claims stay without volumes, and no container runs. Memory is resident memory; processor time is the process's own, all threads.
Everything shares the machine's cores. At 75/s the API server collects its garbage about once a second, on every core that it can get, and the longest
waits are from those moments; a status makes more garbage than a claim and a Job, which is why the client that records waits longer too.";

/// How long anything may take that should come by itself.
const PATIENCE: Duration = Duration::from_mins(5);
/// For how long nothing may be written before all is called settled.
const QUIET: Duration = Duration::from_secs(3);

/// What is measured, and how much of it.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The operator's release binary.
    #[arg(long, env = "OPERATOR_BINARY")]
    operator: PathBuf,
    /// Sessions a second, and for how many seconds, of each load.
    #[arg(long, value_delimiter = ',', default_value = "25x12,75x20", value_parser = parse_load)]
    loads: Vec<(f64, f64)>,
    /// Slices into which each load is cut; operator and bare clients take turns.
    #[arg(long, default_value_t = 4)]
    slices: usize,
    /// Sessions a second that are followed through their whole life, and for how many seconds; 0x0 for none.
    #[arg(long, default_value = "25x20", value_parser = parse_load)]
    lives: (f64, f64),
    /// Sessions that are there when the operator is started again.
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// How many of them have a running pod; the others have ended.
    #[arg(long, default_value_t = 1_000)]
    live: usize,
    /// Sessions that wait for a place in their namespace.
    #[arg(long, default_value_t = 15_000)]
    pending: usize,
    /// Places that they are then given.
    #[arg(long, default_value_t = 2_000)]
    admitted: usize,
}

fn parse_load(text: &str) -> Result<(f64, f64), String> {
    let parts = text
        .split_once('x')
        .and_then(|(rate, seconds)| Some((rate.parse().ok()?, seconds.parse().ok()?)));
    parts.ok_or_else(|| format!("failed to read {text:?}: give <sessions a second>x<seconds>, such as 25x12"))
}

/// Measures and prints.
pub async fn run(options: Options) -> Result<()> {
    let mut table = Table::default();
    let machine = machine::describe();
    eprintln!("part 1 of 4: loads (about 3 min)");
    let version = burst::measure(&options, &mut table).await?;
    let (rate, seconds) = options.lives;
    if rate * seconds > 0.0 {
        eprintln!("part 2 of 4: whole lives, {rate}/s (about 1 min)");
        lives::measure(&options, &mut table).await?;
    }
    if options.sessions > 0 {
        eprintln!("part 3 of 4: {} sessions (about 3 min)", options.sessions);
        many::measure(&options, &mut table).await?;
    }
    if options.pending > 0 {
        eprintln!("part 4 of 4: {} sessions that wait (about 4 min)", options.pending);
        admit::measure(&options, &mut table).await?;
    }
    println!(
        "\n{ABOUT}\n\n{machine} before the run; Kubernetes {version}, {}; {}.\n\n{}",
        nodes::about()?,
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        table.markdown()
    );
    Ok(())
}

fn created<'a>(writes: &'a [Write], resource: &'a str) -> impl Iterator<Item = &'a Write> {
    writes
        .iter()
        .filter(move |write| write.verb == "create" && write.resource == resource)
}

fn jobs_created(writes: &[Write], prefix: &str) -> usize {
    created(writes, "jobs")
        .filter(|write| write.name.starts_with(&format!("{prefix}-")))
        .count()
}

/// Waits until so many sessions of a prefix have a pod in this phase and the operator has nothing more to write.
async fn settle(
    client: &Client,
    prefix: &str,
    phase: &str,
    sessions: usize,
    audit: &mut Audit,
    writes: &mut Vec<Write>,
) -> Result<()> {
    until("all pods", async || Ok(pods(client, prefix, phase).await? >= sessions)).await?;
    let mut silent_since = Instant::now();
    until("the operator to settle", async || {
        let fresh = audit.read()?;
        if fresh.iter().any(|write| write.user == ACCOUNT && write.counts()) {
            silent_since = Instant::now();
        }
        writes.extend(fresh);
        Ok(silent_since.elapsed() >= QUIET)
    })
    .await
}

/// Counts the operator's writes while there is nothing to do.
async fn quiet(audit: &mut Audit, writes: &mut Vec<Write>, what: &str, table: &mut Table) -> Result<()> {
    tokio::time::sleep(Duration::from_secs(20)).await;
    let fresh = audit.read()?;
    let count = fresh
        .iter()
        .filter(|write| write.user == ACCOUNT && write.resource != "leases")
        .count();
    writes.extend(fresh);
    table.hold(what, count.to_string(), "0", count == 0);
    Ok(())
}

fn mib(value: f64) -> String {
    format!("{value:.1} MiB")
}

/// Asks until the answer is yes.
async fn until(what: &str, mut ask: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !ask().await.with_context(|| format!("while waiting for {what}"))? {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
