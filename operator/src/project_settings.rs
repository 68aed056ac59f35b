//! The settings of the namespaces, as a watch has them.

use std::sync::Arc;

use crds::{ProjectSettings, ProjectSettingsSpec, project_settings::NAME};
use futures::StreamExt as _;
use kube::{
    Api, Client, ResourceExt as _,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher,
    },
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::context::{Context, watching};

/// Settings that may be ones of another schema.
type Guarded = DeserializeGuard<ProjectSettings>;

/// The settings of the namespaces.
pub struct Projects {
    store: Store<Guarded>,
    writer: std::sync::Mutex<Option<Writer<Guarded>>>,
    /// The first list is complete. Not the store's own word for it: that wakes one of those who wait, and they may be many.
    listed: watch::Sender<bool>,
}

impl Default for Projects {
    fn default() -> Self {
        let (store, writer) = reflector::store();
        Self {
            store,
            writer: std::sync::Mutex::new(Some(writer)),
            listed: watch::Sender::new(false),
        }
    }
}

impl Projects {
    /// The settings of a namespace, empty ones where it has none; in words why they cannot be read.
    ///
    /// Waits until the watch has delivered: nothing begins without the admin's word.
    pub async fn of(&self, namespace: &str) -> Result<Arc<ProjectSettingsSpec>, String> {
        if self.listed.subscribe().wait_for(|listed| *listed).await.is_err() {
            return Err("the operator is stopping".to_owned());
        }
        match self.store.get(&ObjectRef::new(NAME).within(namespace)).as_deref() {
            None => Ok(Arc::default()),
            Some(DeserializeGuard(Ok(settings))) => Ok(Arc::new(settings.spec.clone())),
            Some(DeserializeGuard(Err(unreadable))) => Err(unreadable.error.clone()),
        }
    }
}

/// The settings of a namespace as the API server has them now: the watch may be behind the session that was made after them.
pub async fn read(client: &Client, namespace: &str) -> kube::Result<Result<Arc<ProjectSettingsSpec>, String>> {
    let settings: Api<Guarded> = Api::namespaced(client.clone(), namespace);
    Ok(match settings.get_opt(NAME).await? {
        None => Ok(Arc::default()),
        Some(DeserializeGuard(Ok(settings))) => Ok(Arc::new(settings.spec)),
        Some(DeserializeGuard(Err(unreadable))) => Err(unreadable.error),
    })
}

impl Projects {
    /// How many sessions of a namespace may run at once; none where its settings cannot be read.
    fn limit(&self, namespace: &str) -> Option<u32> {
        match self.store.get(&ObjectRef::new(NAME).within(namespace)).as_deref() {
            None => None,
            Some(DeserializeGuard(Ok(settings))) => settings.spec.max_concurrent_sessions,
            Some(DeserializeGuard(Err(_))) => Some(0),
        }
    }
}

/// Watches until `stop`, and has the sessions looked at that a change may concern.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let writer = context.projects.writer.lock().ok().and_then(|mut writer| writer.take());
    let Some(writer) = writer else { return };
    let changes = watcher(context.api::<Guarded>(), watching())
        .default_backoff()
        .modify(|settings| settings.managed_fields_mut().clear())
        .reflect(writer)
        .take_until(stop.cancelled_owned());
    let mut changes = std::pin::pin!(changes);
    while let Some(change) = changes.next().await {
        // The store has it by now, and of a list all when it is complete.
        let concerned = match change {
            Ok(watcher::Event::Apply(settings) | watcher::Event::Delete(settings)) => {
                settings.namespace().into_iter().collect()
            }
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => Vec::new(),
            Ok(watcher::Event::InitDone) => {
                context.projects.listed.send_replace(true);
                context.gate.namespaces()
            }
            Err(error) => {
                tracing::warn!(%error, "failed to watch ProjectSettings");
                Vec::new()
            }
        };
        for namespace in concerned {
            let limit = context.projects.limit(&namespace);
            context.gate.settings_changed(&namespace, limit);
            // How long they are kept may be another time now, and nothing else would have them looked at.
            context.gate.look_at(&namespace, context.memory.ended(&namespace));
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, stream::FuturesUnordered};

    use super::*;

    #[tokio::test]
    async fn all_who_wait_for_the_first_list_go_on_when_it_is_there() {
        let projects = Projects::default();
        let mut waiting: FuturesUnordered<_> = (0..9).map(|_| projects.of("poets")).collect();
        assert!(
            waiting.next().now_or_never().is_none(),
            "nothing begins without the admin's word"
        );
        projects.listed.send_replace(true);
        // As a controller polls: only those that were woken.
        for _ in 0..9 {
            assert!(matches!(waiting.next().now_or_never(), Some(Some(Ok(_)))));
        }
    }
}
