//! Frees deleted pods whose session is gone: nobody will read their report.
//!
//! The session controller frees the pods of sessions that live. It hears nothing of pods whose session does not.

use std::{
    marker::PhantomData,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt as _,
    core::PartialObjectMeta,
    runtime::{
        Controller, WatchStreamExt as _,
        controller::{Action, Config},
        reflector,
        watcher::{self, Event},
    },
};
use protocol::names::{REPORT_FINALIZER, label};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::jittered,
    context::Context,
    events::Note,
    session::{self, ApplyError, Found, Lean, ObserveError},
};

type Meta = PartialObjectMeta<Pod>;

/// How often a pod that waits for its session's controller is looked at: should the session go first, nothing tells of it.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// A pod that could not be judged or freed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its session could not be read.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// Its finalizer could not be removed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// Pods that are being deleted and that our finalizer holds, as the watch of all pods tells of them.
pub struct Leaving {
    sender: mpsc::UnboundedSender<Event<Meta>>,
    receiver: Mutex<Option<mpsc::UnboundedReceiver<Event<Meta>>>>,
}

impl Default for Leaving {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            sender,
            receiver: Mutex::new(Some(receiver)),
        }
    }
}

impl Leaving {
    /// Notes what concerns such pods.
    pub fn see(&self, event: &Event<Lean<Pod>>) {
        let event = match event {
            Event::Init => Event::Init,
            Event::InitDone => Event::InitDone,
            Event::InitApply(Lean(pod)) if is_leaving(pod) => Event::InitApply(meta(pod)),
            Event::Apply(Lean(pod)) if is_leaving(pod) => Event::Apply(meta(pod)),
            // Nobody holds it any more, or it is gone.
            Event::Apply(Lean(pod)) | Event::Delete(Lean(pod)) if pod.metadata.deletion_timestamp.is_some() => {
                Event::Delete(meta(pod))
            }
            // One that is not being deleted never was.
            Event::InitApply(_) | Event::Apply(_) => return,
            Event::Delete(Lean(pod)) => Event::Delete(meta(pod)),
        };
        // Nobody listens any more when the operator is stopping.
        let _ = self.sender.send(event);
    }
}

fn is_leaving(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some() && pod.finalizers().iter().any(|f| f == REPORT_FINALIZER)
}

fn meta(pod: &Pod) -> Meta {
    let mut metadata = pod.metadata.clone();
    metadata.annotations = None;
    PartialObjectMeta {
        types: None,
        metadata,
        _phantom: PhantomData,
    }
}

/// Runs until `stop`.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let events = context.leaving.receiver.lock().ok().and_then(|mut held| held.take());
    let Some(events) = events else { return };
    let (reader, writer) = reflector::store();
    let told = stream::unfold(events, |mut events| async {
        events
            .recv()
            .await
            .map(|event| (Ok::<_, watcher::Error>(event), events))
    });
    let trigger = told.reflect(writer).applied_objects();
    Controller::for_stream(trigger, reader)
        .with_config(Config::default().concurrency(context.settings.concurrency))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, on_error, context)
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::debug!(%error, "pod controller");
            }
        })
        .await;
}

async fn reconcile(pod: Arc<Meta>, context: Arc<Context>) -> Result<Action, Error> {
    let _under_way = context.under_way.token();
    // The finalizer matters only to a pod that is being deleted.
    let Some(deleted) = pod.metadata.deletion_timestamp.as_ref() else {
        return Ok(Action::await_change());
    };
    if !pod.finalizers().iter().any(|f| f == REPORT_FINALIZER) {
        return Ok(Action::await_change());
    }
    let namespace = pod.namespace().unwrap_or_default();
    let (Some(name), Some(uid)) = (pod.labels().get(label::SESSION), pod.labels().get(label::SESSION_UID)) else {
        return free(&context, &namespace, &pod).await;
    };
    match session::find(&context.client, &namespace, name).await? {
        Found::Gone => free(&context, &namespace, &pod).await,
        Found::Live(session) if session.uid().as_deref() != Some(uid) => free(&context, &namespace, &pod).await,
        // Its controller reads the report and frees the pod.
        Found::Live(_) => Ok(Action::requeue(jittered(LOOK_AGAIN))),
        Found::Unreadable { why, .. } => {
            // The deletion's time is when it ends by: grace is in it.
            let now = context.clock.now();
            let held = now.time.duration_since(deleted.0);
            let left = SignedDuration::from_secs(context.settings.timing.hold_unreadable.into()) - held;
            if !now.is_sure {
                return Ok(Action::requeue(LOOK_AGAIN));
            }
            if let Ok(left) = Duration::try_from(left)
                && !left.is_zero()
            {
                return Ok(Action::requeue(left.min(LOOK_AGAIN)));
            }
            let text = format!(
                "The report of pod {} is given up: session {name} cannot be read: {why}",
                pod.name_any()
            );
            let note = Note {
                warning: true,
                reason: "ReportLost".to_owned(),
                text,
                action: "Release",
            };
            context.events.publish(&kube::Resource::object_ref(&*pod, &()), note);
            free(&context, &namespace, &pod).await
        }
    }
}

async fn free(context: &Context, namespace: &str, pod: &Meta) -> Result<Action, Error> {
    session::release(
        &context.client,
        namespace,
        &pod.name_any(),
        &pod.uid().unwrap_or_default(),
    )
    .await?;
    Ok(Action::await_change())
}

#[expect(clippy::needless_pass_by_value, reason = "the signature that the controller calls")]
fn on_error(pod: Arc<Meta>, error: &Error, _: Arc<Context>) -> Action {
    let race = matches!(error, Error::Apply(error) if error.is_race());
    if race {
        return Action::requeue(jittered(Duration::from_millis(100)));
    }
    tracing::warn!(pod = pod.name_any(), namespace = pod.namespace(), %error, "failed to free a pod");
    Action::requeue(jittered(Duration::from_secs(5)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(deleted: bool, finalizers: &[&str]) -> Lean<Pod> {
        let metadata = json!({
            "namespace": "poets", "name": "p", "finalizers": finalizers, "annotations": {"long": "x"},
            "deletionTimestamp": deleted.then_some("2026-01-02T03:04:05Z"),
        });
        Lean(serde_json::from_value(json!({"metadata": metadata})).unwrap())
    }

    #[test]
    fn a_pod_is_told_of_from_its_deletion_to_its_release() {
        let leaving = Leaving::default();
        let mut told = leaving.receiver.lock().unwrap().take().unwrap();
        let mut tell = |event: Event<Lean<Pod>>| {
            leaving.see(&event);
            told.try_recv().ok().map(|event| match event {
                Event::Apply(pod) | Event::InitApply(pod) => {
                    assert_eq!((pod.name_any().as_str(), pod.metadata.annotations), ("p", None));
                    "held"
                }
                Event::Delete(_) => "gone",
                Event::Init => "list",
                Event::InitDone => "listed",
            })
        };
        let held = ["other/a", REPORT_FINALIZER];
        assert_eq!(tell(Event::Init), Some("list"));
        assert_eq!(tell(Event::InitApply(pod(true, &held))), Some("held"));
        assert_eq!(tell(Event::InitApply(pod(true, &["other/a"]))), None);
        assert_eq!(tell(Event::InitApply(pod(false, &held))), None);
        assert_eq!(tell(Event::InitDone), Some("listed"));
        assert_eq!(tell(Event::Apply(pod(false, &held))), None, "it works");
        assert_eq!(tell(Event::Apply(pod(true, &held))), Some("held"));
        assert_eq!(tell(Event::Apply(pod(true, &["other/a"]))), Some("gone"), "let go");
        assert_eq!(tell(Event::Delete(pod(true, &held))), Some("gone"));
        assert_eq!(tell(Event::Delete(pod(false, &held))), Some("gone"));
    }
}
