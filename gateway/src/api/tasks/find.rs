//! Which session a task is in. Nothing but the sessions themselves and their commands remembers it.

use jiff::Timestamp;
use kube::{ResourceExt as _, api::DynamicObject};
use protocol::{
    identity::PROMPT_COMMAND,
    names::{annotation, api, label},
};
use serde_json::Value;

use super::{
    super::{ApiError, compat::Who, list::synced},
    new::{self, Kept},
};
use crate::{
    Gateway,
    catalog::Entry,
    sessions::{Target, View},
    store::commands::Command,
};

/// A task that was found.
pub(super) struct Found {
    /// Its id.
    pub id: String,
    /// Its session.
    pub target: Target,
    /// Its session, read live.
    pub object: DynamicObject,
    /// The part of its session that matters.
    pub view: View,
    /// The command that brings it to the agent.
    pub command: String,
    /// That command, when it did not come with the session.
    pub sent: Option<Command>,
}

impl Found {
    /// What it asked for.
    pub fn asked(&self) -> Option<Kept> {
        let asked = match &self.sent {
            Some(command) => &command.asked,
            None => self.object.annotations().get(annotation::TASK_ASKED)?,
        };
        serde_json::from_str(asked).ok()
    }

    /// When it was submitted.
    pub fn created(&self) -> Timestamp {
        match &self.sent {
            Some(command) => command.created,
            None => self
                .object
                .creation_timestamp()
                .map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        }
    }
}

/// The session that a task created, if it is the caller's.
async fn created_by(gateway: &Gateway, who: &Who, id: &str) -> Result<Option<(Target, DynamicObject)>, ApiError> {
    let Some(target) = Target::new(&who.namespace, &new::session_name(&who.owner, id)) else {
        return Ok(None);
    };
    let object = gateway.sessions.get(&target).await?;
    Ok(object
        .filter(|object| is_of(object, who, id))
        .map(|object| (target, object)))
}

fn is_of(object: &DynamicObject, who: &Who, id: &str) -> bool {
    let text = |name| object.annotations().get(name).map(String::as_str);
    text(annotation::TASK_ID) == Some(id) && text(annotation::TASK_OWNER) == Some(who.owner.as_str())
}

/// The session that a task created.
pub(super) async fn session_of(gateway: &Gateway, who: &Who, id: &str) -> Result<Option<Target>, ApiError> {
    Ok(created_by(gateway, who, id).await?.map(|(target, _)| target))
}

/// A task of the caller's.
pub(super) async fn find(gateway: &Gateway, who: &Who, id: &str) -> Result<Option<Found>, ApiError> {
    if !crate::commands::is_id(id) {
        return Ok(None);
    }
    if let Some((target, object)) = created_by(gateway, who, id).await? {
        return Ok(Some(Found {
            id: id.to_owned(),
            view: View::from(&object),
            target,
            object,
            command: PROMPT_COMMAND.to_owned(),
            sent: None,
        }));
    }
    for entry in shared(gateway, who, None).await? {
        let Some(command) = gateway.log.command(&entry.uid, id).await? else {
            continue;
        };
        let Some(target) = Target::new(&who.namespace, &entry.key.1) else {
            continue;
        };
        let object = gateway.sessions.get(&target).await?;
        let object = object.filter(|object| object.uid().as_deref() == Some(entry.uid.as_str()));
        // What else was sent to that session, such as an interrupt, is no task.
        let is_task = serde_json::from_str::<Kept>(&command.asked).is_ok();
        if let Some(object) = object.filter(|_| is_task) {
            return Ok(Some(Found {
                id: id.to_owned(),
                view: View::from(&object),
                target,
                object,
                command: command.id.clone(),
                sent: Some(command),
            }));
        }
    }
    Ok(None)
}

/// The caller's sessions that tasks share, newest first; of one workspace, by its key, or of all.
pub(super) async fn shared(gateway: &Gateway, who: &Who, key: Option<&str>) -> Result<Vec<Entry>, ApiError> {
    synced(gateway).await?;
    let mut found = gateway.watched.of_api(Some(&who.namespace), api::TASKS);
    found.retain(|entry| {
        let item: Value = serde_json::from_str(entry.item.get()).unwrap_or_default();
        let metadata = &item["metadata"];
        let of = metadata["labels"][label::WORKSPACE].as_str();
        let owned = metadata["annotations"][annotation::TASK_OWNER] == who.owner.as_str();
        owned && of.is_some_and(|of| key.is_none_or(|key| key == of))
    });
    Ok(found)
}
