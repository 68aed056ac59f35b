//! Whole lives: sessions at a steady rate whose pods are put on nodes, start and end by themselves, all at the same time.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::Result;
use jiff::Timestamp;

use super::{
    ACCOUNT, Options, Table,
    audit::{Audit, Write},
    created,
    load::Load,
    nodes::{Ends, Nodes},
    plane::{Operator, Plane},
    quantile, settle, until,
};

/// Runs the load and waits until every session's end is recorded.
pub async fn measure(options: &Options, table: &mut Table) -> Result<()> {
    let (rate, seconds) = options.lives;
    let sessions = (rate * seconds).round() as usize;
    let plane = Plane::start()?;
    let _nodes = Nodes::start(&plane, Ends::All)?;
    let operator = plane.operator(&options.operator).await?;
    let client = plane.client().await?;
    let load = Load::for_operator(plane.client().await?);
    let mut audit = Audit::new(plane.audit_log());
    // The namespace's own objects and everybody's connections are not part of a life.
    load.run("first", 10, rate).await?;
    settle(&client, "first-", "Succeeded", 10, &mut audit, &mut Vec::new()).await?;

    let before = (operator.cpu()?, operator.writes().await.unwrap_or_default());
    let mut writes = Vec::new();
    load.run("life", sessions, rate).await?;
    let mut told = Vec::new();
    until("all ends to be recorded", async || {
        writes.extend(audit.read()?);
        told = delays(&writes);
        Ok(told.len() >= sessions)
    })
    .await?;
    let used = operator.cpu()?.saturating_sub(before.0).as_secs_f64() * 1e3 / sessions as f64;
    settle(&client, "life-", "Succeeded", sessions, &mut audit, &mut writes).await?;

    told.sort_by(f64::total_cmp);
    let (p50, p99) = (quantile(&told, 0.5), quantile(&told, 0.99));
    table.tell(
        &format!("whole lives, {rate}/s for {seconds} s ({sessions} sessions): end → recorded"),
        format!("p50 {p50:.0} ms, p99 {p99:.0} ms"),
    );
    table.hold(
        "processor time of the operator, whole life",
        format!("{used:.2} ms each"),
        "≤ 2 ms",
        used <= 2.0,
    );
    let made = created(&writes, "jobs").count();
    table.hold(
        "Jobs made for them",
        made.to_string(),
        sessions.to_string(),
        made == sessions,
    );
    count(&operator, before.1, &writes, sessions, table).await;
    operator.stop().await
}

/// Tells what the operator wrote for these lives.
async fn count(operator: &Operator, before: f64, writes: &[Write], lives: usize, table: &mut Table) {
    let own: Vec<_> = writes
        .iter()
        .filter(|write| write.user == ACCOUNT && write.resource != "leases")
        .collect();
    let counted = own.iter().filter(|write| write.counts()).count();
    let events = own.len() - counted;
    let each = |count: usize| count as f64 / lives as f64;
    table.hold(
        "API writes in a session's life",
        format!("{:.2} ({})", each(counted), by_kind(&own, lives)),
        "≤ 8",
        each(counted) <= 8.0,
    );
    table.hold(
        "Events in a session's life",
        format!("{:.2}", each(events)),
        "≤ 4",
        each(events) <= 4.0,
    );
    let said = (operator.writes().await.unwrap_or_default() - before) as usize;
    table.hold(
        "the same by the operator's own counter",
        format!("{said} of {} in the audit log", own.len()),
        "equal",
        said == own.len(),
    );
}

fn by_kind(writes: &[&Write], lives: usize) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for write in writes.iter().filter(|write| write.counts()) {
        *counts.entry(format!("{} {}", write.verb, write.resource)).or_default() += 1;
    }
    let parts: Vec<_> = counts
        .iter()
        .map(|(what, count)| format!("{what} {:.2}", *count as f64 / lives as f64))
        .collect();
    parts.join(", ")
}

/// Milliseconds from each end, as soon as kwok asked to write it, to the operator's last word on the session.
fn delays(writes: &[Write]) -> Vec<f64> {
    let session = |pod: &'_ str| pod.rsplit_once("-job-").map(|(session, _)| session.to_owned());
    let own = |write: &&Write| write.user == ACCOUNT;
    // Only of an ended pod it takes the finalizer off, and nobody writes the status of one that has ended.
    let let_go: HashSet<_> = writes
        .iter()
        .filter(own)
        .filter(|write| write.resource == "pods")
        .filter_map(|write| session(&write.name))
        .collect();
    let told: HashMap<&str, Timestamp> = writes
        .iter()
        .filter(own)
        .filter(|write| write.resource == "agenticsessions/status")
        .map(|write| (&*write.name, write.at))
        .collect();
    let ended: HashMap<_, Timestamp> = writes
        .iter()
        .filter(|write| write.user != ACCOUNT && write.resource == "pods/status")
        .filter_map(|write| Some((session(&write.name)?, write.asked)))
        .collect();
    ended
        .iter()
        .filter(|(name, _)| let_go.contains(*name))
        .filter_map(|(name, at)| Some(told.get(&**name)?.duration_since(*at).as_secs_f64() * 1e3))
        .collect()
}
