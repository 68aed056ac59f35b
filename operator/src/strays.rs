//! Pods of sessions that somebody took the session's label off. No watch of ours shows them, and our finalizer holds them: the label
//! is put back.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
    core::PartialObjectMeta,
    runtime::watcher::Event,
};
use protocol::names::{REPORT_FINALIZER, label};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::jittered,
    context::Context,
    session::{self, Lean},
};

type Meta = PartialObjectMeta<Pod>;

/// How often pods are looked for that lost their label while nobody watched.
const SWEEP: Duration = Duration::from_mins(10);
/// Objects of one answer.
const PAGE: u32 = 50;

/// A pod that left the watch with our finalizer: it is gone, or its label is.
struct Stray {
    namespace: String,
    name: String,
    uid: String,
    labels: BTreeMap<String, String>,
}

/// What left the watch.
pub struct Strays {
    sender: mpsc::UnboundedSender<Stray>,
    receiver: Mutex<Option<mpsc::UnboundedReceiver<Stray>>>,
}

impl Default for Strays {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            sender,
            receiver: Mutex::new(Some(receiver)),
        }
    }
}

impl Strays {
    /// Notes what concerns such pods.
    pub fn see(&self, event: &Event<Lean<Pod>>) {
        let Event::Delete(Lean(pod)) = event else { return };
        if !pod.finalizers().iter().any(|f| f == REPORT_FINALIZER) {
            return;
        }
        let ours = [label::SESSION, label::SESSION_UID, label::COMPONENT, label::MANAGED_BY];
        let stray = Stray {
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            // As they were last seen.
            labels: ours
                .into_iter()
                .filter_map(|name| Some((name.to_owned(), pod.labels().get(name)?.clone())))
                .collect(),
        };
        // Nobody listens any more when the operator is stopping.
        let _ = self.sender.send(stray);
    }
}

/// Runs until `stop`.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let strays = context.strays.receiver.lock().ok().and_then(|mut held| held.take());
    let Some(mut strays) = strays else { return };
    let mut next = tokio::time::Instant::now();
    loop {
        let result = tokio::select! {
            () = stop.cancelled() => return,
            stray = strays.recv() => match stray {
                Some(stray) => put_back(&context, &stray).await,
                None => return,
            },
            () = tokio::time::sleep_until(next) => {
                next = tokio::time::Instant::now() + jittered(SWEEP);
                sweep(&context).await
            }
        };
        if let Err(error) = result {
            tracing::warn!(%error, "failed to look after pods without the label of their session");
        }
    }
}

/// A merge of the labels that are missing, to the pod that was seen and no other.
async fn put_back(context: &Context, stray: &Stray) -> kube::Result<()> {
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), &stray.namespace);
    let Some(pod) = pods.get_metadata_opt(&stray.name).await? else {
        return Ok(());
    };
    let held = pod.finalizers().iter().any(|f| f == REPORT_FINALIZER);
    if pod.uid().as_deref() != Some(&*stray.uid) || !held || pod.labels().contains_key(label::SESSION_UID) {
        return Ok(());
    }
    let (namespace, name) = (&stray.namespace, &stray.name);
    tracing::warn!(namespace, pod = name, "the pod has lost its session's label: put back");
    let patch = json!({"metadata": {"uid": stray.uid, "labels": stray.labels}});
    let patched = pods
        .patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch))
        .await;
    match patched {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

async fn sweep(context: &Context) -> kube::Result<()> {
    let lost = format!("{}={},!{}", label::MANAGED_BY, label::MANAGER, label::SESSION_UID);
    let mut page = ListParams::default().labels(&lost).limit(PAGE);
    loop {
        let found = context.api::<Pod>().list_metadata(&page).await?;
        for pod in &found.items {
            if pod.finalizers().iter().any(|f| f == REPORT_FINALIZER) {
                bring_home(context, pod).await?;
            }
        }
        match found.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// Whose a pod is, its Job says; one whose Job is gone is nobody's.
async fn bring_home(context: &Context, pod: &Meta) -> kube::Result<()> {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let uid = pod.uid().unwrap_or_default();
    let owner = pod
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true) && owner.kind == "Job");
    let jobs: Api<Job> = Api::namespaced(context.client.clone(), &namespace);
    let job = match owner {
        Some(owner) => jobs
            .get_metadata_opt(&owner.name)
            .await?
            .filter(|job| job.uid().as_deref() == Some(&*owner.uid)),
        None => None,
    };
    let labels = job.map(|job| job.metadata.labels.unwrap_or_default());
    match labels.filter(|labels| labels.contains_key(label::SESSION_UID)) {
        Some(mut labels) => {
            let ours = [label::SESSION, label::SESSION_UID, label::COMPONENT];
            labels.retain(|name, _| ours.contains(&&**name));
            let stray = Stray {
                namespace,
                name,
                uid,
                labels,
            };
            put_back(context, &stray).await
        }
        // Nobody will read its report.
        None if pod.metadata.deletion_timestamp.is_some() => {
            if let Err(error) = session::release(&context.client, &namespace, &name, &uid).await {
                tracing::warn!(namespace, pod = name, %error, "failed to free a pod");
            }
            Ok(())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use protocol::names::component;

    use super::*;

    #[test]
    fn a_pod_that_left_the_watch_in_our_hold_is_noted_with_the_labels_that_make_it_ours() {
        let strays = Strays::default();
        let mut noted = strays.receiver.lock().unwrap().take().unwrap();
        let labels = json!({
            label::SESSION: "poem", label::SESSION_UID: "u1", label::COMPONENT: component::ATTEMPT,
            label::MANAGED_BY: label::MANAGER, "theirs": "x",
        });
        let pod = |finalizers: serde_json::Value| {
            let metadata =
                json!({"namespace": "poets", "name": "p", "uid": "p1", "finalizers": finalizers, "labels": labels});
            Lean(serde_json::from_value::<Pod>(json!({"metadata": metadata})).unwrap())
        };
        let held = || pod(json!(["other/a", REPORT_FINALIZER]));
        strays.see(&Event::Apply(held()));
        strays.see(&Event::InitApply(held()));
        strays.see(&Event::Delete(pod(json!(["other/a"]))));
        assert!(noted.try_recv().is_err(), "it is there, or gone for good");
        strays.see(&Event::Delete(held()));
        let stray = noted.try_recv().unwrap();
        assert_eq!((&*stray.namespace, &*stray.name, &*stray.uid), ("poets", "p", "p1"));
        let mut expected = labels.clone();
        expected.as_object_mut().unwrap().remove("theirs");
        assert_eq!(json!(stray.labels), expected);
    }
}
