//! The settings of the namespaces, as a watch has them.

use std::{sync::Arc, time::Duration};

use crds::{ProjectSettings, ProjectSettingsSpec, project_settings::NAME};
use futures::StreamExt as _;
use kube::{
    Api, Client, ResourceExt as _,
    core::{DeserializeGuard, Status},
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher,
    },
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::context::{Context, watching};

/// Settings that may be ones of another schema.
type Guarded = DeserializeGuard<ProjectSettings>;

/// How long the first list may fail before sessions are told.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it may be refused: rights that are installed together with the operator may come a moment after it, and all sessions
/// would be told, and then told that it is over.
const REFUSED_PATIENCE: Duration = Duration::from_secs(5);

/// Why the settings of a namespace are not known.
#[derive(Clone, Debug)]
pub enum Unknown {
    /// They cannot be read as this operator's schema has them.
    Unreadable(String),
    /// The API server does not give them.
    Withheld(String),
}

/// How far the first list has come.
#[derive(Clone, Debug)]
enum Listing {
    UnderWay,
    Fails(String),
    Complete,
}

/// The settings of the namespaces.
pub struct Projects {
    store: Store<Guarded>,
    writer: std::sync::Mutex<Option<Writer<Guarded>>>,
    /// Not the store's own word for it: that wakes one of those who wait, and they may be many.
    listing: watch::Sender<Listing>,
}

impl Default for Projects {
    fn default() -> Self {
        let (store, writer) = reflector::store();
        Self {
            store,
            writer: std::sync::Mutex::new(Some(writer)),
            listing: watch::Sender::new(Listing::UnderWay),
        }
    }
}

impl Projects {
    /// The settings of a namespace, empty ones where it has none.
    ///
    /// Waits until the watch has delivered, or fails: nothing begins without the admin's word.
    pub async fn of(&self, namespace: &str) -> Result<Arc<ProjectSettingsSpec>, Unknown> {
        let mut listing = self.listing.subscribe();
        let listing = listing.wait_for(|listing| !matches!(listing, Listing::UnderWay)).await;
        match listing.as_deref() {
            Err(_) => return Err(Unknown::Withheld("the operator is stopping".to_owned())),
            Ok(Listing::Fails(why)) => return Err(Unknown::Withheld(why.clone())),
            Ok(Listing::UnderWay | Listing::Complete) => {}
        }
        match self.store.get(&ObjectRef::new(NAME).within(namespace)).as_deref() {
            None => Ok(Arc::default()),
            Some(DeserializeGuard(Ok(settings))) => Ok(Arc::new(settings.spec.clone())),
            Some(DeserializeGuard(Err(unreadable))) => Err(Unknown::Unreadable(unreadable.error.clone())),
        }
    }

    fn fails(&self, error: &watcher::Error) {
        let why = match refusal(error) {
            Some(status) => status.message.clone(),
            None => error.to_string(),
        };
        self.listing.send_if_modified(|listing| {
            let under_way = !matches!(listing, Listing::Complete);
            if under_way {
                *listing = Listing::Fails(why);
            }
            under_way
        });
    }

    /// Answers whether sessions were told that it fails.
    fn complete(&self) -> bool {
        matches!(self.listing.send_replace(Listing::Complete), Listing::Fails(_))
    }
}

fn refusal(error: &watcher::Error) -> Option<&Status> {
    let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error else {
        return None;
    };
    withholds(status).then_some(&**status)
}

/// A right is missing, or the kind.
fn withholds(status: &Status) -> bool {
    matches!(status.code, 401 | 403 | 404)
}

/// The settings of a namespace as the API server has them now: the watch may be behind the session that was made after them.
pub async fn read(client: &Client, namespace: &str) -> kube::Result<Result<Arc<ProjectSettingsSpec>, Unknown>> {
    let settings: Api<Guarded> = Api::namespaced(client.clone(), namespace);
    match settings.get(NAME).await {
        Ok(DeserializeGuard(Ok(settings))) => Ok(Ok(Arc::new(settings.spec))),
        Ok(DeserializeGuard(Err(unreadable))) => Ok(Err(Unknown::Unreadable(unreadable.error))),
        Err(kube::Error::Api(status)) if is_not_there(&status) => Ok(Ok(Arc::default())),
        Err(kube::Error::Api(status)) if withholds(&status) => Ok(Err(Unknown::Withheld(status.message))),
        Err(error) => Err(error),
    }
}

/// Of a kind that is not installed the answer names no object: what an admin has decided is not known then.
fn is_not_there(status: &Status) -> bool {
    status.is_not_found() && status.details.as_ref().is_some_and(|details| details.name == NAME)
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
    let mut fails_since = None;
    while let Some(change) = changes.next().await {
        // The store has it by now, and of a list all when it is complete.
        let concerned = match change {
            Ok(watcher::Event::Apply(settings) | watcher::Event::Delete(settings)) => {
                settings.namespace().into_iter().collect()
            }
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => Vec::new(),
            Ok(watcher::Event::InitDone) => {
                if context.projects.complete() {
                    context
                        .memory
                        .keys()
                        .into_iter()
                        .for_each(|key| context.queue.push(key));
                }
                context.gate.namespaces()
            }
            Err(error) => {
                tracing::warn!(%error, "failed to watch ProjectSettings");
                let since = *fails_since.get_or_insert_with(Instant::now);
                let patience = if refusal(&error).is_some() {
                    REFUSED_PATIENCE
                } else {
                    PATIENCE
                };
                if since.elapsed() >= patience {
                    context.projects.fails(&error);
                }
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
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn all_who_wait_for_the_first_list_go_on_when_it_is_there() {
        let projects = Projects::default();
        let mut waiting: FuturesUnordered<_> = (0..9).map(|_| projects.of("poets")).collect();
        assert!(
            waiting.next().now_or_never().is_none(),
            "nothing begins without the admin's word"
        );
        projects.complete();
        // As a controller polls: only those that were woken.
        for _ in 0..9 {
            assert!(matches!(waiting.next().now_or_never(), Some(Some(Ok(_)))));
        }
    }

    #[test]
    fn a_namespace_without_settings_is_told_from_a_cluster_without_the_kind() {
        let answer = |json| serde_json::from_value::<Status>(json).unwrap();
        let none = answer(json!({
            "code": 404, "reason": "NotFound", "message": "projectsettings \"projectsettings\" not found",
            "details": {"name": NAME, "group": "vteam.ambient-code", "kind": "projectsettings"},
        }));
        let no_kind = Status::failure("404 page not found", "Failed to parse error data").with_code(404);
        assert!(is_not_there(&none));
        assert!(!is_not_there(&no_kind) && withholds(&no_kind));
    }
}
