//! The settings of the namespaces, as a watch has them.

use std::sync::Arc;

use crds::{ProjectSettings, ProjectSettingsSpec, project_settings::NAME};
use futures::{StreamExt as _, TryStreamExt as _};
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
    /// What the store has taken by now.
    fn see(&self, event: &watcher::Event<Guarded>) {
        if matches!(event, watcher::Event::InitDone) {
            self.listed.send_replace(true);
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
        .inspect_ok(|event| context.projects.see(event))
        .touched_objects()
        .take_until(stop.cancelled_owned());
    let mut changes = std::pin::pin!(changes);
    while let Some(change) = changes.next().await {
        match change {
            Ok(settings) => context.gate.settings_changed(&settings.namespace().unwrap_or_default()),
            Err(error) => tracing::warn!(%error, "failed to watch ProjectSettings"),
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
        projects.see(&watcher::Event::InitDone);
        // As a controller polls: only those that were woken.
        for _ in 0..9 {
            assert!(matches!(waiting.next().now_or_never(), Some(Some(Ok(_)))));
        }
    }
}
