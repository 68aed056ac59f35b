//! Which sessions of tasks are active, and which ended long ago and are removed.

use std::collections::HashSet;

use crds::Phase;
use jiff::{SignedDuration, Timestamp};
use kube::{ResourceExt as _, api::DynamicObject};
use protocol::names::api;
use serde_json::Value;

use crate::{
    Gateway,
    catalog::Entry,
    sessions::{Error, Target, View},
};

/// The sessions of tasks that are active; of all namespaces when none is named.
pub fn active(gateway: &Gateway, namespace: Option<&str>) -> Vec<Entry> {
    let mut entries = gateway.watched.of_api(namespace, api::TASKS);
    entries.retain(|entry| !entry.phase.is_terminal() && !is_held(entry));
    entries
}

/// Has also those sessions of tasks known that other gateways created a moment ago, before the watch tells of them.
pub async fn see_all(gateway: &Gateway, namespace: &str) -> Result<(), Error> {
    let known = gateway.watched.of_api(Some(namespace), api::TASKS);
    let known: HashSet<_> = known.iter().map(|entry| entry.uid.as_str()).collect();
    for (name, uid) in gateway.sessions.names_of_api(namespace, api::TASKS).await? {
        if known.contains(uid.as_str()) {
            continue;
        }
        if let Some(target) = Target::new(namespace, &name)
            && let Some(object) = gateway.sessions.get(&target).await?
        {
            gateway.watched.list(&object);
        }
    }
    Ok(())
}

/// Whether a session was stopped before it began: it has no pod.
fn is_held(entry: &Entry) -> bool {
    let suspended = || {
        let item: Value = serde_json::from_str(entry.item.get()).unwrap_or_default();
        item["spec"]["suspend"] == true
    };
    entry.phase == Phase::Pending && suspended()
}

/// Deletes sessions of tasks that ended long enough ago.
pub(super) async fn clean_up(gateway: &Gateway) {
    let now = Timestamp::now();
    for entry in gateway.watched.of_api(None, api::TASKS) {
        let Ok(object) = serde_json::from_str::<DynamicObject>(entry.item.get()) else {
            continue;
        };
        let Some(target) = Target::new(&object.namespace().unwrap_or_default(), &object.name_any()) else {
            continue;
        };
        let view = View::from(&object);
        let over = view.ended.filter(|_| view.phase.is_terminal() && !view.starting);
        let keep = SignedDuration::try_from(gateway.compat.settings.keep_ended).unwrap_or(SignedDuration::MAX);
        if over.is_none_or(|ended| now.duration_since(ended) < keep) {
            continue;
        }
        // What the list says may be old: only that very session, as it then was, is deleted.
        match gateway.sessions.delete_as_it_is(&target, &object).await {
            Ok(true) => {
                gateway.watched.unlist(&target, Some(&entry.uid));
                tracing::info!(
                    namespace = target.namespace(),
                    session = target.name(),
                    "session of tasks removed: it ended long ago"
                );
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "session of tasks not removed"),
        }
    }
}
