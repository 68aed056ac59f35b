//! Which sessions of tasks are active, and which ended long ago and are removed.

use std::collections::HashSet;

use crds::Phase;
use jiff::{SignedDuration, Timestamp};
use kube::{ResourceExt as _, api::DynamicObject};
use protocol::names::api;

use crate::{
    Gateway,
    catalog::Entry,
    retention,
    sessions::{Error, Target, View},
};

/// The sessions of tasks that are active; of all namespaces when none is named.
pub fn active(gateway: &Gateway, namespace: Option<&str>) -> Vec<Entry> {
    let mut entries = gateway.watched.of_api(namespace, api::TASKS);
    entries.retain(|entry| !entry.phase.is_terminal() && !object(entry).is_some_and(|object| is_held(&object)));
    entries
}

/// Sessions of tasks that a namespace has at most, ended ones included.
pub const MOST_KEPT: usize = 1000;

/// How many of them are removed for one that comes.
const AT_ONCE: usize = 8;

/// Removes the sessions that ended first, as far as there would be more than [`MOST_KEPT`] with another one. `false`: too few
/// have ended.
pub async fn make_room(gateway: &Gateway, namespace: &str) -> Result<bool, Error> {
    let entries = gateway.watched.of_api(Some(namespace), api::TASKS);
    let excess = (entries.len() + 1).saturating_sub(MOST_KEPT);
    if excess == 0 {
        return Ok(true);
    }
    let mut over: Vec<_> = entries
        .iter()
        .filter_map(object)
        .filter_map(|object| Some((over(&object)?, object)))
        .collect();
    over.sort_by_key(|(ended, _)| *ended);
    // However many there are: whoever asks does not wait for all of them, and each who asks removes more than it adds.
    let mut made = false;
    for (_, object) in over.into_iter().take(excess.min(AT_ONCE)) {
        made |= removed(gateway, &object).await?;
    }
    Ok(made)
}

fn object(entry: &Entry) -> Option<DynamicObject> {
    serde_json::from_str(entry.item.get()).ok()
}

/// When a session ended, or was created that was stopped before it began.
fn over(object: &DynamicObject) -> Option<Timestamp> {
    if is_held(object) {
        return object.creation_timestamp().map(|time| time.0);
    }
    let view = View::from(object);
    view.ended.filter(|_| view.phase.is_terminal() && !view.starting)
}

/// Removes a session. What is known of it may be old: only that very session, as it then was, is deleted.
async fn removed(gateway: &Gateway, object: &DynamicObject) -> Result<bool, Error> {
    let Some(target) = Target::new(&object.namespace().unwrap_or_default(), &object.name_any()) else {
        return Ok(false);
    };
    let removed = gateway.sessions.delete_as_it_is(&target, object).await?;
    if removed {
        gateway.watched.unlist(&target, object.uid().as_deref());
    }
    Ok(removed)
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
pub fn is_held(object: &DynamicObject) -> bool {
    object.data["spec"]["suspend"] == true && View::from(object).phase == Phase::Pending
}

/// Deletes sessions of tasks that ended long enough ago.
pub(super) async fn clean_up(gateway: &Gateway) {
    let now = Timestamp::now();
    let keep = SignedDuration::try_from(gateway.compat.settings.keep_ended).unwrap_or(SignedDuration::MAX);
    let entries = gateway.watched.of_api(None, api::TASKS);
    let old = |object: &DynamicObject| over(object).is_some_and(|ended| now.duration_since(ended) >= keep);
    let old: Vec<_> = entries.iter().filter_map(object).filter(old).collect();
    if old.is_empty() {
        return;
    }
    if let Err(why) = retention::clock_is_right(gateway, now).await {
        tracing::warn!(why, "no sessions of tasks are removed: this clock may be wrong");
        return;
    }
    for object in old {
        let (namespace, session) = (object.namespace(), object.name_any());
        match removed(gateway, &object).await {
            Ok(true) => tracing::info!(namespace, session, "session of tasks removed: it ended long ago"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "session of tasks not removed"),
        }
    }
}
