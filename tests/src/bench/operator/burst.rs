//! Loads, in turns with the bare clients, each on a control plane of its own; pods wait.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::Result;
use kube::Client;

use super::{
    Options, QUIET, Table,
    audit::{Audit, Write},
    created, jobs_created,
    load::{Children, Load, Side, create_session},
    machine, mib,
    nodes::pods,
    plane::{NAMESPACE, Plane},
    quantile, quiet, settle, until,
};

/// With what the names of a load's sessions begin.
const PREFIX: &str = "load-";

/// Measures all loads; answers the version of Kubernetes.
pub async fn measure(options: &Options, table: &mut Table) -> Result<String> {
    let plane = Plane::start()?;
    let operator = plane.operator(&options.operator).await?;
    tokio::time::sleep(QUIET).await;
    let (idle, _) = machine::resident(operator.pid())?;
    table.hold("memory, idle", mib(idle), "≤ 15 MiB", idle <= 15.0);

    let version = plane.version()?;
    let children = Arc::new(template(&plane.client().await?).await?);
    let mut sides = [
        Turns::new(Side::Operator, plane, &children).await?,
        Turns::new(Side::Bare, Plane::start()?, &children).await?,
        Turns::new(Side::Recording, Plane::start()?, &children).await?,
    ];
    let before = operator.cpu()?;
    for (number, (rate, seconds)) in options.loads.iter().enumerate() {
        let each = (rate * seconds / options.slices.max(1) as f64).round() as usize;
        for slice in 0..options.slices {
            for side in &mut sides {
                side.take(&format!("{PREFIX}{number}-{slice}"), each, *rate).await?;
            }
        }
        compare(*rate, *seconds, &format!("{PREFIX}{number}-"), &sides, table);
    }
    let [mut operators, bare, _] = sides;
    let sessions = sessions(&operators.writes, PREFIX).len();
    let each = |time: Duration| time.as_secs_f64() * 1e3 / sessions.max(1) as f64;
    // The client makes the sessions on both sides.
    let requests = each(bare.processor_time.saturating_sub(operators.processor_time));
    table.tell(
        "processor time of the bare client, its two requests",
        format!("{requests:.2} ms each session"),
    );
    let client = operators.plane.client().await?;
    let (audit, writes) = (&mut operators.audit, &mut operators.writes);
    settle(&client, PREFIX, "Pending", sessions, audit, writes).await?;
    let used = each(operator.cpu()?.saturating_sub(before));
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
    quiet(audit, writes, "writes in 20 s while all pods wait", table).await?;
    operator.stop().await?;
    Ok(version)
}

/// Has the operator write what the bare clients then write.
async fn template(client: &Client) -> Result<Children> {
    let name = "template-of-the-bench";
    let uid = create_session(client, NAMESPACE, name, serde_json::json!({})).await?;
    until("the pod of the first session", async || {
        Ok(pods(client, name, "Pending").await? == 1)
    })
    .await?;
    tokio::time::sleep(QUIET).await;
    Children::of(client, name, &uid).await
}

/// One side, and what it did on its control plane.
struct Turns {
    plane: Plane,
    load: Load,
    audit: Audit,
    writes: Vec<Write>,
    /// Of the client.
    processor_time: Duration,
}

impl Turns {
    async fn new(side: Side, plane: Plane, children: &Arc<Children>) -> Result<Self> {
        Ok(Self {
            load: Load::of_side(
                plane.client().await?,
                side,
                children.clone(),
                plane.operators_client().await?,
            ),
            audit: Audit::new(plane.audit_log()),
            plane,
            writes: Vec::new(),
            processor_time: Duration::ZERO,
        })
    }

    /// One slice; returns when all Jobs are there, so that the next does not begin in this one's backlog.
    async fn take(&mut self, prefix: &str, sessions: usize, rate: f64) -> Result<()> {
        let own = std::process::id();
        let before = machine::cpu(own)?;
        self.load.run(prefix, sessions, rate).await?;
        self.processor_time += machine::cpu(own)?.saturating_sub(before);
        until("the Jobs of a slice", async || {
            self.writes.extend(self.audit.read()?);
            Ok(jobs_created(&self.writes, prefix) >= sessions)
        })
        .await
    }

    /// Milliseconds from each session to its Job: how many there are, their median and their p99.
    fn latencies(&self, prefix: &str) -> (usize, f64, f64) {
        let sessions = sessions(&self.writes, prefix);
        let mut found: Vec<f64> = created(&self.writes, "jobs")
            .filter_map(|job| Some(job.at.duration_since(sessions.get(job.name.strip_suffix("-job")?)?.at)))
            .map(|took| took.as_secs_f64() * 1e3)
            .collect();
        found.sort_by(f64::total_cmp);
        (found.len(), quantile(&found, 0.5), quantile(&found, 0.99))
    }
}

/// The creations of sessions, by name.
fn sessions<'a>(writes: &'a [Write], prefix: &str) -> HashMap<&'a str, &'a Write> {
    created(writes, "agenticsessions")
        .filter(|write| write.name.starts_with(prefix))
        .map(|write| (&*write.name, write))
        .collect()
}

fn compare(rate: f64, seconds: f64, prefix: &str, sides: &[Turns; 3], table: &mut Table) {
    let [operators, bare, recording] = sides.each_ref().map(|side| side.latencies(prefix));
    let (count, p50, p99) = operators;
    let (r50, r99) = (p50 / bare.1, p99 / bare.2);
    table.tell(
        &format!("session → Job, {rate}/s for {seconds} s ({count} sessions): the bare client"),
        format!("p50 {:.1} ms, p99 {:.1} ms", bare.1, bare.2),
    );
    table.tell(
        &format!("session → Job, {rate}/s: the client that also records it"),
        format!("p50 {:.1} ms, p99 {:.1} ms", recording.1, recording.2),
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
