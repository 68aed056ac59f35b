//! Sessions at a steady rate whose pods are put on a node, start and end by themselves, all at the same time.

use std::{collections::HashMap, time::Duration};

use anyhow::Result;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::{
    ACCOUNT, Table,
    audit::{Audit, Write},
    created,
    load::Load,
    plane::{Operator, Plane},
    pods::Kubelet,
    quantile, until,
};

/// How often the pods are moved on.
const TICK: Duration = Duration::from_millis(250);

/// Runs the load and waits until every session's end is recorded.
pub async fn measure(
    (rate, seconds): (f64, f64),
    plane: &Plane,
    operator: &Operator,
    kubelet: &Kubelet,
    audit: &mut Audit,
    table: &mut Table,
) -> Result<()> {
    let sessions = (rate * seconds).round() as usize;
    if sessions == 0 {
        return Ok(());
    }
    let cpu = operator.cpu()?;
    let (mut writes, mut ended) = (Vec::new(), HashMap::new());
    let load = Load::for_operator(plane.client().await?);
    let moving = async {
        loop {
            ended.extend(tick(kubelet).await?);
            if ended.len() >= sessions {
                return anyhow::Ok(());
            }
            tokio::time::sleep(TICK).await;
        }
    };
    tokio::try_join!(load.run("churn", sessions, rate), moving)?;
    let mut told = Vec::new();
    until("all ends to be recorded", async || {
        writes.extend(audit.read()?);
        told = delays(&writes, &ended);
        Ok(told.len() >= sessions)
    })
    .await?;
    let used = operator.cpu()?.saturating_sub(cpu).as_secs_f64() * 1e3 / sessions as f64;
    let made = created(&writes, "jobs")
        .filter(|job| job.name.starts_with("churn-"))
        .count();
    told.sort_by(f64::total_cmp);
    table.tell(
        &format!(
            "pods that start and end by themselves, {rate}/s for {seconds} s ({sessions} sessions): end → recorded"
        ),
        format!(
            "p50 {:.0} ms, p99 {:.0} ms",
            quantile(&told, 0.5),
            quantile(&told, 0.99)
        ),
    );
    table.hold(
        "processor time of the operator, whole life at that rate",
        format!("{used:.2} ms each"),
        "≤ 2 ms",
        used <= 2.0,
    );
    table.hold(
        "Jobs made for them",
        made.to_string(),
        sessions.to_string(),
        made == sessions,
    );
    Ok(())
}

/// Starts pods that have not started, and ends those that were started before; answers whose ended when.
async fn tick(kubelet: &Kubelet) -> Result<Vec<(String, Timestamp)>> {
    let pods = kubelet.of("churn-").await?;
    let in_phase = |phase: &str| -> Vec<Pod> {
        let is = |pod: &&Pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some(phase);
        pods.iter().filter(is).cloned().collect()
    };
    let running = in_phase("Running");
    // Before it: what is measured is too long rather than too short.
    let now = Timestamp::now();
    kubelet.succeed(&running).await?;
    kubelet.start(&in_phase("Pending")).await?;
    let session = |pod: &Pod| pod.labels().get(protocol::names::label::SESSION).cloned();
    Ok(running.iter().filter_map(|pod| Some((session(pod)?, now))).collect())
}

/// Milliseconds from each end to the operator's last word on the session.
fn delays(writes: &[Write], ended: &HashMap<String, Timestamp>) -> Vec<f64> {
    let mut last: HashMap<&str, Timestamp> = HashMap::new();
    for write in writes {
        if write.user == ACCOUNT && write.resource == "agenticsessions/status" {
            last.insert(&write.name, write.at);
        }
    }
    let freed: std::collections::HashSet<&str> = writes
        .iter()
        .filter(|write| write.user == ACCOUNT && write.resource == "pods")
        .filter_map(|write| write.name.rsplit_once("-job-").map(|(session, _)| session))
        .collect();
    ended
        .iter()
        .filter(|(name, _)| freed.contains(&***name))
        .filter_map(|(name, at)| Some(last.get(&**name)?.duration_since(*at).as_secs_f64() * 1e3))
        .map(|delay| delay.max(0.0))
        .collect()
}
