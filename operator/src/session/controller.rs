//! What makes the session controller look: watches, timers, failures.

use std::{sync::Arc, time::Duration};

use crds::AgenticSession;
use futures::{Stream, StreamExt as _};
use jiff::SignedDuration;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ObjectReference, Pod},
};
use kube::{
    Api, Resource as _,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use protocol::names::label;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    Error, Settled,
    lean::{self, Lean},
    memory::Key,
    queue::Turn,
};
use crate::{
    backoff::jittered,
    context::{Context, watching},
    events::Note,
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
    // Each in a task of its own: what wakes one wakes nobody else.
    let mut hearing = JoinSet::new();
    hearing.spawn(sessions(context.clone()));
    hearing.spawn(jobs(context.clone()));
    hearing.spawn(pods(context.clone()));
    hearing.spawn(nudged(context.clone()));
    hearing.spawn(sweep(context.clone()));
    let mut looks = JoinSet::new();
    let look_at_all = async {
        context.memory.listed(LONGEST_LIST).await;
        loop {
            tokio::select! {
                Some(done) = looks.join_next() => went_well(done),
                Some(ended) = hearing.join_next() => went_well(ended),
                key = context.queue.next() => drop(looks.spawn(look(context.clone(), key))),
            }
        }
    };
    stop.run_until_cancelled(look_at_all).await;
    while let Some(done) = looks.join_next().await {
        went_well(done);
    }
}

/// A panic of a task is the operator's own.
fn went_well(done: Result<(), JoinError>) {
    if let Err(error) = done
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}

async fn sessions(context: Arc<Context>) {
    let events = watcher(context.api::<lean::Session>(), watching()).default_backoff();
    for_each(&context, "sessions", events, |event| {
        let gone = match &event {
            watcher::Event::Delete(session) => Some(super::memory::key(&session.metadata)),
            _ => None,
        };
        let concerned = context.memory.session_event(event);
        if let Some((namespace, name)) = gone {
            // A reconcile comes only for what is there.
            context.queue.forget(&namespace, &name);
            context.gate.gone(&namespace, &name);
        }
        concerned
    })
    .await;
}

async fn jobs(context: Arc<Context>) {
    let ours = watching().labels(&format!("{}={}", label::MANAGED_BY, label::MANAGER));
    let events = watcher(context.api::<Lean<Job>>(), ours).default_backoff();
    for_each(&context, "Jobs", events, |event| context.memory.job_event(event)).await;
}

async fn pods(context: Arc<Context>) {
    let ours = watching().labels(label::SESSION_UID);
    let events = watcher(context.api::<Lean<Pod>>(), ours).default_backoff();
    for_each(&context, "pods", events, |event| {
        context.leaving.see(&event);
        context.strays.see(&event);
        context.bare.see(&event);
        context.memory.pod_event(event)
    })
    .await;
}

/// Has the sessions looked at that the events of a watch concern. A watch that fails is begun again.
async fn for_each<K, C: IntoIterator<Item = Key>>(
    context: &Context,
    what: &'static str,
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
    mut see: impl FnMut(watcher::Event<K>) -> C,
) {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                for session in see(event) {
                    if context.memory.is_new(&session) {
                        context.queue.push_new(session);
                    } else {
                        context.queue.push(session);
                    }
                }
                // What outlived its session, and is over, gives its place to the next.
                context.gate.remains(&context.memory);
            }
            Err(error) => tracing::debug!(what, %error, "watch"),
        }
    }
}

/// Sessions whose turn it is to have a place, or that a change of their namespace's settings may concern.
async fn nudged(context: Arc<Context>) {
    let mut nudges = std::pin::pin!(context.gate.nudges());
    while let Some((namespace, name)) = nudges.next().await {
        if context.memory.has(&namespace, &name) {
            context.queue.push((namespace, name));
        }
    }
}

async fn sweep(context: Arc<Context>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        super::gate::sweep(&context);
    }
}

async fn look(context: Arc<Context>, mut turn: Turn) {
    let _under_way = context.under_way.token();
    context.metrics.waited(turn.waited);
    let timer = context.metrics.reconcile_started();
    let (namespace, name) = &*turn.key;
    let look = Box::pin(super::reconcile(&context, namespace, name));
    let result = tokio::time::timeout(LONGEST_RECONCILE, look)
        .await
        .unwrap_or(Err(Error::TimedOut));
    timer.finished(result.as_ref().map_or_else(Error::label, |_| "ok"));
    let again = match result {
        Ok(settled) => {
            if !matches!(settled, Settled::Kept { .. }) {
                context.backoff.forget(namespace, name);
            }
            after(&context, namespace, name, settled)
        }
        Err(error) => Some(after_error(&context, namespace, name, &error)),
    };
    turn.again = again;
}

/// When to look again though nothing is heard.
fn after(context: &Context, namespace: &str, name: &str, settled: Settled) -> Option<Duration> {
    match settled {
        Settled::Gone | Settled::Over => None,
        Settled::Unreadable(why) => {
            if context.memory.is_untold(namespace, name) {
                tell_unreadable(context, namespace, name, &why);
            }
            None
        }
        Settled::Kept { why, wake } => {
            let wait = context.backoff.next(namespace, name);
            tracing::warn!(session = name, namespace, why, "what should go stays");
            Some(wake.map_or(wait, |wake| wait.min(bounded(wake))))
        }
        Settled::Live { wake } => Some(wake.map_or_else(|| jittered(SAFETY), bounded)),
    }
}

fn bounded(wake: SignedDuration) -> Duration {
    Duration::try_from(wake)
        .unwrap_or_default()
        .clamp(Duration::from_millis(100), SAFETY)
}

fn tell_unreadable(context: &Context, namespace: &str, name: &str, why: &str) {
    let about = ObjectReference {
        api_version: Some(AgenticSession::api_version(&()).into_owned()),
        kind: Some(AgenticSession::kind(&()).into_owned()),
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        uid: context.memory.uid(namespace, name),
        ..ObjectReference::default()
    };
    tracing::warn!(session = name, namespace, why, "session cannot be read");
    let text = format!("The session cannot be read: {why}. Delete it and create it anew with the installed CRD.");
    let note = Note {
        warning: true,
        reason: "ConfigError".to_owned(),
        text,
        action: "Read",
    };
    context.events.publish(&about, note);
}

fn after_error(context: &Context, namespace: &str, name: &str, error: &Error) -> Duration {
    if error.is_race() {
        tracing::debug!(session = name, namespace, %error, "observed again");
        return context.backoff.next_race(namespace, name);
    }
    context.gate.stumbled(namespace, name);
    let wait = context.backoff.next(namespace, name);
    let why = chain(error);
    tracing::warn!(
        session = name,
        namespace,
        error = why,
        wait_ms = wait.as_millis() as u64,
        "reconcile failed"
    );
    wait
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
