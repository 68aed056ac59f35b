//! The one status write of a reconcile, and the Events that tell of it.

use crds::{AgenticSession, AgenticSessionStatus, Phase, condition};
use kube::{
    Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use protocol::Reason;
use serde_json::{Value, json};

use super::conditions;
use crate::{events::Note, writes};

/// Manager of the fields that are written here.
pub const FIELD_MANAGER: &str = "agentic-operator/session";

/// A status that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("failed to write the status of session {session}")]
pub struct Error {
    /// Whose.
    pub session: String,
    /// Why not.
    #[source]
    pub source: kube::Error,
}

impl Error {
    /// The session changed since it was read: observing again settles it.
    pub fn is_race(&self) -> bool {
        matches!(&self.source, kube::Error::Api(status) if status.is_conflict() || status.is_not_found())
    }
}

/// Writes what changed, and answers the version that the session then has; `None` when nothing did.
///
/// The body carries the version of the session that was read in this reconcile: what was decided on an older one is refused with 409.
pub async fn update(
    client: &Client,
    session: &AgenticSession,
    next: &AgenticSessionStatus,
) -> Result<Option<String>, Error> {
    if session.status.as_ref() == Some(next) {
        return Ok(None);
    }
    let name = session.name_any();
    let body = json!({
        "metadata": {"resourceVersion": session.metadata.resource_version},
        "status": change(session.status.as_ref(), next),
    });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let namespace = session.namespace().unwrap_or_default();
    writes::patch_status::<AgenticSession>(client, &namespace, &name, &params, &Patch::Merge(&body))
        .await
        .map(Some)
        .map_err(|source| Error { session: name, source })
}

/// All that status says next, and a null for what it says no more.
///
/// Not by apply: it would leave what somebody else has written once too, such as a restore of a backup, and a pod of long ago would be the
/// session's for ever.
fn change(before: Option<&AgenticSessionStatus>, next: &AgenticSessionStatus) -> Value {
    let fields = |status| serde_json::to_value(status).unwrap_or_default();
    let (before, mut next) = (fields(before), fields(Some(next)));
    if let (Some(before), Some(next)) = (before.as_object(), next.as_object_mut()) {
        for gone in before.keys() {
            next.entry(gone).or_insert(Value::Null);
        }
    }
    next
}

/// What people are told of a change: at most one Event for a transition, and one for a start request without effect.
pub fn notes(old: &AgenticSessionStatus, next: &AgenticSessionStatus) -> Vec<Note> {
    let mut notes = Vec::new();
    let phase_is_new = old.phase != next.phase || old.attempt != next.attempt;
    let reason_is_new = old.reason != next.reason;
    if phase_is_new || (reason_is_new && next.phase != Phase::Stopping) {
        let reason = next.reason.clone().unwrap_or_else(|| next.phase.as_str().to_owned());
        notes.push(Note {
            warning: is_warning(next),
            reason,
            text: next.message.clone().unwrap_or_default(),
            action: next.phase.as_str(),
        });
    }
    if next.attempt == old.attempt && next.agent_restarts > old.agent_restarts {
        notes.push(Note {
            warning: true,
            reason: "AgentRestarted".to_owned(),
            text: next.message.clone().unwrap_or_default(),
            action: "Restart",
        });
    }
    if lost(next) && !lost(old) {
        let said = conditions::find(next, condition::EVENTS_DELIVERED);
        notes.push(Note {
            warning: true,
            reason: "EventsLost".to_owned(),
            text: said.map(|c| c.message.clone()).unwrap_or_default(),
            action: "Drain",
        });
    }
    let new_run = old.run != next.run;
    if old.handled_start_request != next.handled_start_request && !new_run && old.run.is_some() {
        notes.push(Note {
            warning: false,
            reason: "StartRequestIgnored".to_owned(),
            text: format!(
                "A start was asked for while the session was {} or suspended, or its workspace was gone: nothing was done.",
                old.phase
            ),
            action: "Start",
        });
    }
    notes
}

fn lost(status: &AgenticSessionStatus) -> bool {
    conditions::denied(status, condition::EVENTS_DELIVERED) == Some(condition::LOST)
}

fn is_warning(status: &AgenticSessionStatus) -> bool {
    let usual = [
        Reason::Creating,
        Reason::Running,
        Reason::Completed,
        Reason::Suspended,
        Reason::Queued,
        Reason::StoppedByUser,
        Reason::Inactivity,
    ];
    !usual
        .iter()
        .any(|reason| status.reason.as_deref() == Some(reason.as_str()))
}
