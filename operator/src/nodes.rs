//! Ends the pods of nodes that are lost, as Kubernetes' own pod garbage collector ends those of nodes that are deleted.
//!
//! A pod that is held by a finalizer on a node that does not answer never becomes terminal by itself: its session would wait for
//! ever. What is left of it there is fenced off by the runner's lease on the volume.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions},
    runtime::{WatchStreamExt as _, watcher},
};
use protocol::names::label;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::jittered,
    context::{Context, watching},
};

/// How often the pods of lost nodes are looked at: new ones may be found there, and writes may fail.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// A pod that could not be ended.
#[derive(Debug, thiserror::Error)]
#[error("failed to {verb} of lost node {node}")]
struct Error {
    verb: &'static str,
    node: String,
    #[source]
    source: kube::Error,
}

/// Nodes that do not answer, and since when.
#[derive(Debug, Default)]
struct Silent(HashMap<String, Timestamp>);

impl Silent {
    fn see(&mut self, node: &Node) {
        let name = node.name_any();
        match silent_since(node) {
            Some(since) => self.0.insert(name, since),
            None => self.0.remove(&name),
        };
    }

    /// Those that are silent for longer than `bound`.
    fn lost(&self, bound: SignedDuration, now: Timestamp) -> impl Iterator<Item = (&str, Timestamp)> {
        let lost = move |since: Timestamp| now.duration_since(since) >= bound;
        self.0
            .iter()
            .filter(move |(_, since)| lost(**since))
            .map(|(node, since)| (&**node, *since))
    }
}

/// `Unknown` is what the node controller writes when the kubelet has not been heard of; `False` is the kubelet's own word.
fn silent_since(node: &Node) -> Option<Timestamp> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|c| c.type_ == "Ready")?;
    (ready.status == "Unknown").then(|| ready.last_transition_time.as_ref().map_or(Timestamp::MAX, |t| t.0))
}

/// Runs until `stop`.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let watching = watch(&context);
    tokio::select! {
        () = stop.cancelled() => {}
        () = watching => {}
    }
}

async fn watch(context: &Context) {
    let nodes: Api<Node> = Api::all(context.client.clone());
    let mut events = std::pin::pin!(watcher(nodes, watching()).default_backoff());
    let mut silent = Silent::default();
    let mut listing = Silent::default();
    let mut tick = tokio::time::interval(jittered(LOOK_AGAIN));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(watcher::Event::Apply(node))) => silent.see(&node),
                Some(Ok(watcher::Event::Delete(node))) => { silent.0.remove(&node.name_any()); }
                Some(Ok(watcher::Event::Init)) => listing = Silent::default(),
                Some(Ok(watcher::Event::InitApply(node))) => listing.see(&node),
                Some(Ok(watcher::Event::InitDone)) => silent = std::mem::take(&mut listing),
                Some(Err(error)) => tracing::warn!(%error, "failed to watch nodes: pods of lost nodes are not ended"),
                None => return,
            },
            _ = tick.tick() => {
                let bound = SignedDuration::from_secs(context.settings.timing.node_loss.into());
                for (node, since) in silent.lost(bound, Timestamp::now()) {
                    let _under_way = context.under_way.token();
                    if let Err(error) = end_pods(context, node, since).await {
                        tracing::warn!(node, error = %error, cause = %error.source, "pods of a lost node");
                    }
                }
            }
        }
    }
}

async fn end_pods(context: &Context, node: &str, since: Timestamp) -> Result<(), Error> {
    let failed = |verb| {
        let node = node.to_owned();
        move |source| Error { verb, node, source }
    };
    let ours = ListParams::default()
        .labels(label::SESSION_UID)
        .fields(&format!("spec.nodeName={node}"));
    let pods = context
        .api::<Pod>()
        .list(&ours)
        .await
        .map_err(failed("list the pods"))?;
    for pod in pods {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let over = matches!(phase, Some("Succeeded" | "Failed"));
        if over && pod.metadata.deletion_timestamp.is_none() {
            continue;
        }
        tracing::warn!(
            pod = pod.name_any(),
            namespace = pod.namespace(),
            node,
            "ended with its lost node"
        );
        end(context, &pod, over, node, since)
            .await
            .map_err(failed("end a pod"))?;
    }
    Ok(())
}

/// What `pkg/controller/podgc` does. Gone or replaced is done.
async fn end(context: &Context, pod: &Pod, over: bool, node: &str, since: Timestamp) -> kube::Result<()> {
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let name = pod.name_any();
    if !over {
        let now = Timestamp::now();
        let message = format!("Node {node} has not been heard of since {since}.");
        let disruption = json!({
            "type": "DisruptionTarget", "status": "True", "reason": "NodeLost", "message": message,
            "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        });
        let patch = json!({
            "metadata": {"uid": pod.uid()},
            "status": {"phase": "Failed", "conditions": [disruption]},
        });
        let ended = pods
            .patch_status(&name, &PatchParams::default(), &Patch::Strategic(&patch))
            .await;
        gone_is_done(ended)?;
    }
    let now = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: pod.uid(),
            ..Preconditions::default()
        }),
        ..DeleteParams::default()
    };
    gone_is_done(pods.delete(&name, &now).await)
}

fn gone_is_done<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, ready: &str, since: i64) -> Node {
        let since = Timestamp::from_second(since).unwrap().to_string();
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "status": {"conditions": [
                {"type": "MemoryPressure", "status": "Unknown", "lastTransitionTime": "2020-01-01T00:00:00Z"},
                {"type": "Ready", "status": ready, "lastTransitionTime": since},
            ]},
        }))
        .unwrap()
    }

    #[test]
    fn a_node_is_lost_when_it_was_silent_for_long_enough_and_not_when_its_kubelet_complains() {
        let mut silent = Silent::default();
        silent.see(&node("dead", "Unknown", 1_000));
        silent.see(&node("sick", "False", 1_000));
        silent.see(&node("back", "Unknown", 1_000));
        silent.see(&node("back", "True", 1_200));
        let lost = |now| {
            let now = Timestamp::from_second(now).unwrap();
            let lost = silent.lost(SignedDuration::from_secs(300), now);
            lost.map(|(node, _)| node.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(lost(1_299), [""; 0]);
        assert_eq!(lost(1_300), ["dead"]);
    }
}
