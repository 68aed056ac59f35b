//! Kubernetes Events: what happened to a session, for `kubectl describe`.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Somebody should look.
    pub warning: bool,
    /// One word.
    pub reason: String,
    /// What happened.
    pub text: String,
    /// What was done.
    pub action: &'static str,
}

/// Tells of sessions.
#[derive(Clone)]
pub struct Events {
    recorder: Recorder,
}

impl Events {
    /// Events in the name of `instance`.
    pub fn new(client: Client, instance: &str) -> Self {
        let reporter = Reporter {
            controller: "agentic-operator".to_owned(),
            instance: Some(instance.to_owned()),
        };
        Self {
            recorder: Recorder::new(client, reporter),
        }
    }

    /// Tells. An Event that cannot be written is logged: nothing rests on it.
    pub async fn publish(&self, about: &ObjectReference, note: Note) {
        let event = Event {
            type_: if note.warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: note.reason,
            // The API server refuses longer ones.
            note: Some(note.text.chars().take(512).collect()),
            action: note.action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, about).await {
            tracing::warn!(session = about.name, namespace = about.namespace, %error, "failed to write an Event");
        }
    }
}
