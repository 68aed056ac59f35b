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

/// All nodes: those that do not answer, and since when.
#[derive(Debug, Default)]
struct Nodes(HashMap<String, Option<Timestamp>>);

impl Nodes {
    fn see(&mut self, node: &Node) {
        self.0.insert(node.name_any(), silent_since(node));
    }

    /// Those that are silent for longer than `bound`.
    fn lost(&self, bound: SignedDuration, now: Timestamp) -> Vec<(&str, Timestamp)> {
        let silent = self.0.iter().filter_map(|(node, since)| Some((&**node, (*since)?)));
        silent
            .filter(|(_, since)| now.duration_since(*since) >= bound)
            .collect()
    }

    /// All are silent, or most of several: it is the way to them that is lost, and their pods go on. Kubernetes stops evicting then too.
    fn are_out_of_reach(&self) -> bool {
        let (all, silent) = (self.0.len(), self.0.values().flatten().count());
        silent > 0 && (silent == all || all > 2 && silent * 2 > all)
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
    let (mut known, mut listing) = (Nodes::default(), Nodes::default());
    let mut out_of_reach = false;
    let mut tick = tokio::time::interval(jittered(LOOK_AGAIN));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(watcher::Event::Apply(node))) => known.see(&node),
                Some(Ok(watcher::Event::Delete(node))) => { known.0.remove(&node.name_any()); }
                Some(Ok(watcher::Event::Init)) => listing = Nodes::default(),
                Some(Ok(watcher::Event::InitApply(node))) => listing.see(&node),
                Some(Ok(watcher::Event::InitDone)) => known = std::mem::take(&mut listing),
                Some(Err(error)) => tracing::warn!(%error, "failed to watch nodes: pods of lost nodes are not ended"),
                None => return,
            },
            _ = tick.tick() => {
                let now = context.clock.now();
                if !now.is_sure {
                    continue;
                }
                let bound = SignedDuration::from_secs(context.settings.timing.node_loss.into());
                let lost = known.lost(bound, now.time);
                if known.are_out_of_reach() {
                    if !out_of_reach && !lost.is_empty() {
                        tracing::warn!("most nodes do not answer: nothing is done about their pods");
                    }
                    out_of_reach = true;
                    continue;
                }
                out_of_reach = false;
                for (node, since) in lost {
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
        let now = context.clock.now().time;
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
        let mut nodes = Nodes::default();
        nodes.see(&node("dead", "Unknown", 1_000));
        nodes.see(&node("sick", "False", 1_000));
        nodes.see(&node("back", "Unknown", 1_000));
        nodes.see(&node("back", "True", 1_200));
        let lost = |now| {
            let now = Timestamp::from_second(now).unwrap();
            let lost = nodes.lost(SignedDuration::from_secs(300), now);
            lost.into_iter().map(|(node, _)| node.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(lost(1_299), [""; 0]);
        assert_eq!(lost(1_300), ["dead"]);
    }

    #[test]
    fn nodes_that_are_silent_together_are_out_of_reach_and_not_lost() {
        for (ready, out_of_reach) in [
            (vec!["Unknown"], true),
            (vec!["True"], false),
            (vec!["Unknown", "Unknown"], true),
            (vec!["Unknown", "True"], false),
            (vec!["Unknown", "True", "False"], false),
            (vec!["Unknown", "Unknown", "True"], true),
            (vec!["Unknown", "Unknown", "True", "True"], false),
            (vec![], false),
        ] {
            let mut nodes = Nodes::default();
            for (number, ready) in ready.iter().enumerate() {
                nodes.see(&node(&format!("node-{number}"), ready, 1_000));
            }
            assert_eq!(nodes.are_out_of_reach(), out_of_reach, "{ready:?}");
        }
    }
}
