//! What makes the session controller look: watches, timers, failures.

use std::{sync::Arc, time::Duration};

use crds::AgenticSession;
use futures::{Stream, StreamExt as _, stream};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, ResourceExt as _,
    core::PartialObjectMeta,
    runtime::{
        Controller, WatchStreamExt as _,
        controller::{Action, Config},
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use protocol::names::label;
use tokio_util::sync::CancellationToken;

use super::{Error, Settled};
use crate::{backoff::jittered, context::Context, events::Note};

type Meta = PartialObjectMeta<AgenticSession>;

/// A reconcile that takes longer is given up: the client's own retries may go on for minutes.
const LONGEST_RECONCILE: Duration = Duration::from_mins(1);
/// How often a settled session is looked at though nothing was heard of it: watches may miss.
const SAFETY: Duration = Duration::from_mins(10);
/// How often places are looked for that sessions hold which went while the watch was away.
const SWEEP: Duration = Duration::from_mins(1);

/// Runs until `stop`, then waits for the reconciles that are under way.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let (reader, writer) = reflector::store();
    let gone = context.clone();
    let trigger = watcher(context.api::<Meta>(), watcher::Config::default())
        .default_backoff()
        .inspect(move |event| {
            // A reconcile comes only for what is there.
            if let Ok(watcher::Event::Delete(session)) = event {
                gone.gate
                    .gone(&session.namespace().unwrap_or_default(), &session.name_any());
            }
        })
        .modify(|session| session.metadata.managed_fields = None)
        .reflect(writer)
        .applied_objects();
    let ours = watcher::Config::default().labels(&format!("{}={}", label::MANAGED_BY, label::MANAGER));
    let trigger = stream::select(trigger, nudged(&context, reader.clone()));
    let sweeping = tokio::spawn(sweep(context.clone(), reader.clone(), stop.clone()));
    Controller::for_stream(trigger, reader)
        .with_config(Config::default().concurrency(context.settings.concurrency))
        .watches(context.api::<PartialObjectMeta<Job>>(), ours.clone(), |job| {
            session_of(&job)
        })
        .watches(context.api::<PartialObjectMeta<Pod>>(), ours, |pod| session_of(&pod))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, on_error, context)
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::debug!(%error, "session controller");
            }
        })
        .await;
    sweeping.abort();
}

/// Sessions whose turn it is, or that a change of their namespace's settings may concern.
fn nudged(context: &Context, sessions: Store<Meta>) -> impl Stream<Item = Result<Meta, watcher::Error>> + use<> {
    let nudges = stream::iter(context.gate.nudges()).flat_map(|nudges| {
        stream::unfold(nudges, |mut nudges| async {
            nudges.recv().await.map(|nudge| (nudge, nudges))
        })
    });
    nudges.filter_map(move |nudge| {
        let found = sessions.get(&nudge);
        async move { found.map(|session| Ok((*session).clone())) }
    })
}

async fn sweep(context: Arc<Context>, sessions: Store<Meta>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => super::gate::sweep(&context, &sessions),
        }
    }
}

/// Pods are owned by Jobs: the label leads to the session, and the reconcile checks UIDs.
fn session_of<K: kube::Resource>(child: &K) -> Option<ObjectRef<Meta>> {
    let namespace = child.meta().namespace.as_deref()?;
    let name = child.meta().labels.as_ref()?.get(label::SESSION)?;
    Some(ObjectRef::new(name).within(namespace))
}

async fn reconcile(session: Arc<Meta>, context: Arc<Context>) -> Result<Action, Error> {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let _under_way = context.under_way.token();
    let timer = context.metrics.reconcile_started();
    let result = tokio::time::timeout(
        LONGEST_RECONCILE,
        Box::pin(super::reconcile(&context, &namespace, &name)),
    )
    .await
    .unwrap_or(Err(Error::TimedOut));
    timer.finished(result.as_ref().map_or_else(Error::label, |_| "ok"));
    let settled = result?;
    context.backoff.forget(&namespace, &name);
    Ok(match settled {
        Settled::Gone => Action::await_change(),
        Settled::Unreadable(why) => {
            tell_unreadable(&context, &session, &why).await;
            Action::await_change()
        }
        Settled::Live { wake } => {
            let wake = wake.map(|wake| Duration::try_from(wake).unwrap_or_default());
            Action::requeue(wake.map_or_else(
                || jittered(SAFETY),
                |wake| wake.clamp(Duration::from_millis(100), SAFETY),
            ))
        }
    })
}

async fn tell_unreadable(context: &Context, session: &Meta, why: &str) {
    let about = kube::Resource::object_ref(session, &());
    tracing::warn!(
        session = about.name,
        namespace = about.namespace,
        why,
        "session cannot be read"
    );
    let text = format!("The session cannot be read: {why}. Delete it and create it anew with the installed CRD.");
    let note = Note {
        warning: true,
        reason: "ConfigError".to_owned(),
        text,
        action: "Read",
    };
    context.events.publish(&about, note).await;
}

#[expect(clippy::needless_pass_by_value, reason = "the signature that the controller calls")]
fn on_error(session: Arc<Meta>, error: &Error, context: Arc<Context>) -> Action {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    if error.is_race() {
        tracing::debug!(session = name, namespace, %error, "observed again");
        return Action::requeue(jittered(Duration::from_millis(100)));
    }
    context.gate.stumbled(&namespace, &name);
    let wait = context.backoff.next(&namespace, &name);
    let why = chain(error);
    tracing::warn!(
        session = name,
        namespace,
        error = why,
        wait_ms = wait.as_millis() as u64,
        "reconcile failed"
    );
    Action::requeue(wait)
}

/// An error with all that caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |chain, cause| format!("{chain}: {cause}"))
}

impl Context {
    /// Objects of all watched namespaces.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        match self.settings.scope() {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }
}
