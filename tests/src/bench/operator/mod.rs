//! The operator beside a client that makes the same claim and Job for each session, in one run on one control plane.
//!
//! Both are timed by the API server's audit log: from the answer to the session's creation to the answer to its Job's. They take
//! turns, slice by slice, so that whatever else the machine does falls on both.

mod admit;
mod audit;
mod lives;
mod load;
mod many;
mod nodes;
mod plane;

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use tokio::time::Instant;

use self::{
    audit::{Audit, Write},
    load::{Children, Load, Side, create_session},
    nodes::pods,
    plane::{ACCOUNT, Plane},
};
use super::{
    machine,
    table::{Table, quantile},
};

/// What stands above the table.
const ABOUT: &str = "\
The operator as it is shipped on a bare control plane (etcd, API server, controller manager, no scheduler), and a client that makes the same claim
and Job for each session by itself; both take turns, slice by slice, and are timed by the API server's audit log, from the answer to the session's
creation to the answer to its Job's. Where pods run, kube-scheduler puts them on nodes of kwok, which starts them at once and ends them after 0.5 to
1.5 s with the runner's report; claims stay without volumes, and no container runs. Memory is resident memory; processor time is the process's own, all
threads. Everything shares the machine's cores. At 75/s the API server collects its garbage about once a second, on every core that it can get, and the
longest waits are from those moments: a session made through the operator has a watch's event more on its way, and a status and an Event beside it.";

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
    /// Slices into which each load is cut; operator and bare client take turns.
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
    let version = burst(&options, &mut table).await?;
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

/// Loads in turns with the bare client; pods wait.
async fn burst(options: &Options, table: &mut Table) -> Result<String> {
    eprintln!("part 1 of 4: loads (about 2 min)");
    let plane = Plane::start()?;
    let operator = plane.operator(&options.operator).await?;
    tokio::time::sleep(QUIET).await;
    let (idle, _) = machine::resident(operator.pid())?;
    table.hold("memory, idle", mib(idle), "≤ 15 MiB", idle <= 15.0);

    let client = plane.client().await?;
    let children = Arc::new(template(&client).await?);
    let mut audit = Audit::new(plane.audit_log());
    let mut writes = audit.read()?;
    let (before, mut bare) = (operator.cpu()?, Duration::ZERO);
    for (number, (rate, seconds)) in options.loads.iter().enumerate() {
        let started = writes.len();
        bare += take_turns(
            &plane,
            &children,
            options.slices,
            number,
            (*rate, *seconds),
            &mut audit,
            &mut writes,
        )
        .await?;
        compare(*rate, *seconds, number, &writes[started..], table);
    }
    let sessions = count_created(&writes, "load-");
    table.tell(
        "processor time of the bare client, its two requests",
        format!(
            "{:.2} ms each session",
            bare.as_secs_f64() * 1e3 / sessions.max(1) as f64
        ),
    );
    settle(&client, "load-", "Pending", sessions, &mut audit, &mut writes).await?;
    let used = operator.cpu()?.saturating_sub(before).as_secs_f64() * 1e3 / sessions.max(1) as f64;
    table.hold(
        "processor time of the operator, session → waiting pod",
        format!("{used:.2} ms each"),
        "≤ 2 ms",
        used <= 2.0,
    );
    let (now, most) = machine::resident(operator.pid())?;
    table.hold(
        &format!("memory with {sessions} sessions whose pods wait"),
        format!("{}, at most {}", mib(now), mib(most)),
        "≤ 25 MiB",
        now <= 25.0,
    );
    quiet(&mut audit, &mut writes, "writes in 20 s while all pods wait", table).await?;
    let version = plane.version()?;
    operator.stop().await?;
    Ok(version)
}

/// Has the operator make what the bare client then makes.
async fn template(client: &Client) -> Result<Children> {
    let name = "template-of-the-bench";
    let uid = create_session(client, plane::NAMESPACE, name, serde_json::json!({})).await?;
    until("the pod of the first session", async || {
        Ok(pods(client, name, "Pending").await? == 1)
    })
    .await?;
    Children::of(client, name, &uid).await
}

/// Answers the processor time that claims and Jobs cost the bare client: it makes the sessions of both.
async fn take_turns(
    plane: &Plane,
    children: &Arc<Children>,
    slices: usize,
    number: usize,
    (rate, seconds): (f64, f64),
    audit: &mut Audit,
    writes: &mut Vec<Write>,
) -> Result<Duration> {
    let (own, mut cost) = (std::process::id(), [Duration::ZERO; 2]);
    let each = (rate * seconds / slices.max(1) as f64).round() as usize;
    let operators = Load::for_operator(plane.client().await?);
    let bare = Load::bare(plane.client().await?, children.clone());
    for slice in 0..slices {
        for (load, side) in [(&operators, Side::Operator), (&bare, Side::Bare)] {
            let prefix = format!("{}{number}-{slice}", prefix_of(side));
            let before = machine::cpu(own)?;
            load.run(&prefix, each, rate).await?;
            cost[usize::from(side == Side::Bare)] += machine::cpu(own)?.saturating_sub(before);
            // The next slice does not begin in this one's backlog.
            until("the Jobs of a slice", async || {
                writes.extend(audit.read()?);
                Ok(jobs_created(writes, &prefix) >= each)
            })
            .await?;
        }
    }
    Ok(cost[1].saturating_sub(cost[0]))
}

fn prefix_of(side: Side) -> &'static str {
    match side {
        Side::Operator => "load-",
        Side::Bare => "bare-",
    }
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

fn count_created(writes: &[Write], prefix: &str) -> usize {
    created(writes, "agenticsessions")
        .filter(|write| write.name.starts_with(prefix))
        .count()
}

/// Milliseconds from each session to its Job, sorted.
fn latencies(writes: &[Write], prefix: &str) -> Vec<f64> {
    let sessions: HashMap<_, _> = created(writes, "agenticsessions")
        .map(|write| (&*write.name, write.at))
        .collect();
    let mut found: Vec<f64> = created(writes, "jobs")
        .filter(|write| write.name.starts_with(prefix))
        .filter_map(|job| Some(job.at.duration_since(*sessions.get(job.name.strip_suffix("-job")?)?)))
        .map(|took| took.as_secs_f64() * 1e3)
        .collect();
    found.sort_by(f64::total_cmp);
    found
}

fn compare(rate: f64, seconds: f64, number: usize, writes: &[Write], table: &mut Table) {
    let of = |side: Side| {
        let found = latencies(writes, &format!("{}{number}-", prefix_of(side)));
        (found.len(), quantile(&found, 0.5), quantile(&found, 0.99))
    };
    let (count, p50, p99) = of(Side::Operator);
    let (_, bare_p50, bare_p99) = of(Side::Bare);
    let (r50, r99) = (p50 / bare_p50, p99 / bare_p99);
    table.tell(
        &format!("session → Job, {rate}/s for {seconds} s ({count} sessions): the bare client"),
        format!("p50 {bare_p50:.1} ms, p99 {bare_p99:.1} ms"),
    );
    // Above the rate that the bound on the median is made for, what counts is to keep up.
    let holds = r99 <= 2.0 && (rate > 25.0 || r50 <= 1.2);
    table.hold(
        &format!("session → Job, {rate}/s: the operator"),
        format!("p50 {p50:.1} ms, p99 {p99:.1} ms: {r50:.2} × and {r99:.2} ×"),
        if rate > 25.0 {
            "p99 ≤ 2 ×"
        } else {
            "p50 ≤ 1.2 ×, p99 ≤ 2 ×"
        },
        holds,
    );
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
