//! Many sessions that wait for a place, and how fast they get it when there are places.

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::Request;
use kube::Client;
use serde_json::json;

use super::{
    ACCOUNT, Options, Table,
    audit::Audit,
    created, jobs_created,
    load::create_session,
    machine, mib,
    plane::{NAMESPACE, Plane},
    until,
};

/// Fast enough for making what only waits.
const AT_ONCE: usize = 32;

/// Fills a namespace's queue, makes room, and takes the time by the Jobs that are made.
pub async fn measure(options: &Options, table: &mut Table) -> Result<()> {
    let (pending, admitted) = (options.pending, options.admitted.min(options.pending));
    let plane = Plane::start()?;
    let client = plane.client().await?;
    let mut audit = Audit::new(plane.audit_log());
    places(&client, 0).await?;
    let operator = plane.operator(&options.operator).await?;
    let maker = &client;
    stream::iter(0..pending)
        .map(|n| async move { create_session(maker, NAMESPACE, &format!("queued-{n}"), json!({})).await })
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let mut writes = Vec::new();
    until("all sessions to be queued", async || {
        writes.extend(audit.read()?);
        let told = |write: &&super::audit::Write| write.user == ACCOUNT && write.resource == "agenticsessions/status";
        let names: std::collections::HashSet<_> = writes.iter().filter(told).map(|write| &*write.name).collect();
        Ok(names.len() >= pending)
    })
    .await?;
    let (now, most) = machine::resident(operator.pid())?;
    table.tell(
        &format!("memory with {pending} sessions that wait for a place"),
        format!("{}, at most {}", mib(now), mib(most)),
    );

    let cpu = operator.cpu()?;
    places(&client, admitted).await?;
    until("all places to be taken", async || {
        writes.extend(audit.read()?);
        Ok(jobs_created(&writes, "queued") >= admitted)
    })
    .await?;
    let used = operator.cpu()?.saturating_sub(cpu).as_secs_f64() * 1e3 / admitted.max(1) as f64;
    let times: Vec<_> = created(&writes, "jobs").map(|write| write.at).collect();
    let (first, last) = (times.iter().min(), times.iter().max());
    let took = first.zip(last).context("no Job was made")?;
    let rate = (times.len().saturating_sub(1)) as f64 / took.1.duration_since(*took.0).as_secs_f64().max(1e-3);
    table.hold(
        &format!("admissions, {admitted} places for {pending} sessions that wait"),
        format!("{rate:.0}/s, {used:.2} ms of processor time each"),
        "≥ 100/s",
        rate >= 100.0,
    );
    table.hold(
        "Jobs beyond the places",
        (times.len() - admitted).to_string(),
        "0",
        times.len() == admitted,
    );
    operator.stop().await
}

/// So many sessions may run in the namespace from now on.
async fn places(client: &Client, limit: usize) -> Result<()> {
    let settings = json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "ProjectSettings",
        "metadata": {"name": "projectsettings"}, "spec": {"maxConcurrentSessions": limit},
    });
    let path = format!(
        "/apis/vteam.ambient-code/v1alpha1/namespaces/{NAMESPACE}/projectsettings/projectsettings?fieldManager=bench&force=true"
    );
    let request = Request::patch(path)
        .header("content-type", "application/apply-patch+yaml")
        .body(serde_json::to_vec(&settings)?)?;
    client.request_text(request).await.context("failed to set the places")?;
    Ok(())
}
