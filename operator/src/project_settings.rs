//! The settings of the namespaces, as a watch has them.

use std::sync::Arc;

use crds::{ProjectSettings, ProjectSettingsSpec, project_settings::NAME};
use futures::StreamExt as _;
use kube::{
    ResourceExt as _,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher,
    },
};
use tokio_util::sync::CancellationToken;

use crate::context::{Context, watching};

/// Settings that may be ones of another schema.
type Guarded = DeserializeGuard<ProjectSettings>;

/// The settings of the namespaces.
pub struct Projects {
    store: Store<Guarded>,
    writer: std::sync::Mutex<Option<Writer<Guarded>>>,
}

impl Default for Projects {
    fn default() -> Self {
        let (store, writer) = reflector::store();
        Self {
            store,
            writer: std::sync::Mutex::new(Some(writer)),
        }
    }
}

impl Projects {
    /// The settings of a namespace, empty ones where it has none; in words why they cannot be read.
    ///
    /// Waits until the watch has delivered: nothing begins without the admin's word.
    pub async fn of(&self, namespace: &str) -> Result<Arc<ProjectSettingsSpec>, String> {
        if self.store.wait_until_ready().await.is_err() {
            return Err("the operator is stopping".to_owned());
        }
        match self.store.get(&ObjectRef::new(NAME).within(namespace)).as_deref() {
            None => Ok(Arc::default()),
            Some(DeserializeGuard(Ok(settings))) => Ok(Arc::new(settings.spec.clone())),
            Some(DeserializeGuard(Err(unreadable))) => Err(unreadable.error.clone()),
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
