//! What makes the session controller look: watches, timers, failures.

use std::{sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, ResourceExt as _,
    runtime::{
        Controller, WatchStreamExt as _,
        controller::{Action, Config},
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use protocol::names::label;
use tokio_util::sync::CancellationToken;

use super::{
    Error, Settled,
    lean::{self, Lean},
    memory::Meta,
};
use crate::{
    backoff::jittered,
    context::{Context, watching},
    events::Note,
    tasks,
};

/// A reconcile that takes longer is given up: the client's own retries may go on for minutes.
const LONGEST_RECONCILE: Duration = Duration::from_mins(1);
/// How long the first lists may take before sessions are looked at without them.
const LONGEST_LIST: Duration = Duration::from_secs(30);
/// How often a settled session is looked at though nothing was heard of it: watches may miss.
const SAFETY: Duration = Duration::from_mins(10);
/// How often places are looked for that sessions hold which went while the watch was away.
const SWEEP: Duration = Duration::from_mins(1);

/// Runs until `stop`, then waits for the reconciles that are under way.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let (reader, writer) = reflector::store();
    let seen = context.clone();
    let trigger = watcher(context.api::<lean::Session>(), watching())
        .default_backoff()
        .map_ok(move |event| {
            let event = seen.memory.session_event(event);
            // A reconcile comes only for what is there.
            if let watcher::Event::Delete(session) = &event {
                seen.gate
                    .gone(&session.namespace().unwrap_or_default(), &session.name_any());
            }
            event
        })
        .reflect(writer)
        .applied_objects();
    let trigger = stream::select(tasks::apart(trigger), nudged(&context, reader.clone()));
    let sweeping = tasks::spawn(sweep(context.clone(), reader.clone(), stop.clone()));
    let ours = watching().labels(&format!("{}={}", label::MANAGED_BY, label::MANAGER));
    let memory = context.clone();
    let jobs = watcher(context.api::<Lean<Job>>(), ours)
        .default_backoff()
        .map(move |event| concerned("Jobs", event, |event| memory.memory.job_event(event)))
        .flat_map(stream::iter);
    let (memory, leaving) = (context.clone(), context.clone());
    let pods = watcher(context.api::<Lean<Pod>>(), watching().labels(label::SESSION_UID))
        .default_backoff()
        .inspect_ok(move |event| {
            leaving.leaving.see(event);
            leaving.strays.see(event);
            leaving.bare.see(event);
        })
        .map(move |event| concerned("pods", event, |event| memory.memory.pod_event(event)))
        .flat_map(stream::iter);
    Controller::for_stream(trigger, reader)
        .with_config(Config::default().concurrency(context.settings.concurrency))
        .reconcile_on(tasks::apart(jobs))
        .reconcile_on(tasks::apart(pods))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, on_error, context)
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::debug!(%error, "session controller");
            }
        })
        .await;
    drop(sweeping);
}

/// Sessions whose turn it is, or that a change of their namespace's settings may concern.
fn nudged(context: &Arc<Context>, sessions: Store<Meta>) -> impl Stream<Item = Result<Meta, watcher::Error>> + use<> {
    let turns = context.clone();
    context.gate.nudges().filter_map(move |nudge| {
        let found = sessions.get(&nudge);
        if found.is_none() {
            // It may have been its turn.
            let namespace = nudge.namespace.as_deref().unwrap_or_default();
            if let Some(next) = turns.turns.pass(namespace) {
                turns.gate.look_at(namespace, next);
            }
        }
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

/// The sessions that an event concerns. A watch that fails is begun again.
fn concerned<E>(
    what: &'static str,
    event: watcher::Result<E>,
    see: impl FnOnce(E) -> Vec<ObjectRef<Meta>>,
) -> Vec<ObjectRef<Meta>> {
    event.map_or_else(
        |error| {
            tracing::debug!(what, %error, "watch");
            Vec::new()
        },
        see,
    )
}

async fn reconcile(session: Arc<Meta>, context: Arc<Context>) -> Result<Action, Error> {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let _under_way = context.under_way.token();
    context.memory.listed(LONGEST_LIST).await;
    let Some(_turn) = Turn::begin(&context, &namespace, &name) else {
        return Ok(Action::await_change());
    };
    if let Some(waited) = context.memory.taken(&namespace, &name) {
        context.metrics.waited(waited);
    }
    let timer = context.metrics.reconcile_started();
    let (looking, session_name) = (context.clone(), name.clone());
    let session_namespace = namespace.clone();
    // The answers that it waits for wake it alone, and not all watches with it.
    let look =
        tasks::joined(async move { Box::pin(super::reconcile(&looking, &session_namespace, &session_name)).await });
    let result = tokio::time::timeout(LONGEST_RECONCILE, look)
        .await
        .unwrap_or(Err(Error::TimedOut));
    timer.finished(result.as_ref().map_or_else(Error::label, |_| "ok"));
    let settled = result?;
    context.backoff.forget(&namespace, &name);
    Ok(match settled {
        Settled::Gone | Settled::Over => Action::await_change(),
        Settled::Unreadable(why) => {
            tell_unreadable(&context, &session, &why);
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

/// A look that is under way. However it ends, the next of the namespace comes.
struct Turn<'a> {
    context: &'a Context,
    namespace: &'a str,
}

impl<'a> Turn<'a> {
    /// `None` when it is others' turn: it comes again when it is its own.
    fn begin(context: &'a Context, namespace: &'a str, name: &str) -> Option<Self> {
        let begun = context.turns.begin(namespace, name);
        begun.then_some(Self { context, namespace })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(next) = self.context.turns.end(self.namespace) {
            self.context.gate.look_at(self.namespace, next);
        }
    }
}

fn tell_unreadable(context: &Context, session: &Meta, why: &str) {
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
    context.events.publish(&about, note);
}

#[expect(clippy::needless_pass_by_value, reason = "the signature that the controller calls")]
fn on_error(session: Arc<Meta>, error: &Error, context: Arc<Context>) -> Action {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    if error.is_race() {
        tracing::debug!(session = name, namespace, %error, "observed again");
        return Action::requeue(context.backoff.next_race(&namespace, &name));
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
