//! An operator that is started where there are many sessions already.

use std::time::Duration;

use anyhow::{Context as _, Result};
use crds::AgenticSession;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use super::{
    Options, QUIET, Table,
    audit::Audit,
    load::{Load, create_session},
    machine, mib,
    nodes::{Ends, Nodes},
    plane::{ACCOUNT, NAMESPACE, Plane},
    quiet, settle, until,
};

/// Fast enough for making what is only there to be there.
const AT_ONCE: usize = 32;

/// Makes the sessions, starts the operator again, and measures what that costs.
pub async fn measure(options: &Options, table: &mut Table) -> Result<()> {
    let plane = Plane::start()?;
    let client = plane.client().await?;
    let nodes = Nodes::start(&plane, Ends::Only("live-0"))?;
    let mut audit = Audit::new(plane.audit_log());
    let mut writes = Vec::new();

    let operator = plane.operator(&options.operator).await?;
    Load::for_operator(plane.client().await?)
        .run("live", options.live + 1, 75.0)
        .await?;
    for (phase, pods) in [("Running", options.live), ("Succeeded", 1)] {
        settle(&client, "live-", phase, pods, &mut audit, &mut writes).await?;
    }
    drop(nodes);
    operator.stop().await?;
    let ended = options.sessions.saturating_sub(options.live + 1);
    end_sessions(&client, ended).await?;
    audit.read()?;

    let operator = plane.operator(&options.operator).await?;
    let all = options.sessions as f64;
    until("all sessions to be reconciled", async || {
        let looks = operator.metric("agentic_operator_reconciles_total").await;
        Ok(looks.is_some_and(|looks| looks >= all))
    })
    .await?;
    let took = operator.since.elapsed().as_secs_f64();
    let cpu = operator.cpu()?.as_secs_f64();
    table.tell(
        &format!(
            "start with {} sessions, {} of them live: all reconciled",
            options.sessions, options.live
        ),
        format!("{took:.1} s, {cpu:.1} s of processor time"),
    );
    tokio::time::sleep(QUIET).await;
    let count = audit
        .read()?
        .iter()
        .filter(|write| write.user == ACCOUNT && write.counts())
        .count();
    table.hold("writes by that", count.to_string(), "0", count == 0);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (now, most) = machine::resident(operator.pid())?;
    table.hold(
        &format!(
            "memory with {} sessions, {} of them live",
            options.sessions, options.live
        ),
        format!("{}, at most {}", mib(now), mib(most)),
        "≤ 60 MiB",
        now <= 60.0,
    );
    quiet(&mut audit, &mut writes, "writes in 20 s with that many", table).await?;
    operator.stop().await
}

/// Makes sessions that ended as one did that the operator has recorded.
async fn end_sessions(client: &Client, count: usize) -> Result<()> {
    let sessions: Api<AgenticSession> = Api::namespaced(client.clone(), NAMESPACE);
    let found = sessions.list(&ListParams::default()).await?.items;
    let status = found
        .iter()
        .filter_map(|session| session.status.as_ref())
        .find(|status| status.phase.is_terminal())
        .context("no session has ended")?;
    let mut status = serde_json::to_value(status)?;
    for gone in ["podName", "podUID"] {
        status[gone] = Value::Null;
    }
    let (sessions, status) = (&sessions, &status);
    stream::iter(0..count)
        .map(|n| async move {
            let name = format!("ended-{n}");
            create_session(client, NAMESPACE, &name, json!({})).await?;
            let mut status = status.clone();
            status["jobName"] = json!(format!("{name}-job"));
            let patch = Patch::Merge(json!({"status": status}));
            sessions.patch_status(&name, &PatchParams::default(), &patch).await?;
            anyhow::Ok(())
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}
