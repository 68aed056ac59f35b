//! Kubernetes Events: what happened to a session, for `kubectl describe`.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::Client;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::writes;

/// Written at once, when many wait: nobody waits for them, and sessions come first.
const AT_ONCE: u32 = 4;
/// While no more than so many wait, they are written one after another, so that they are no burst for an API server that has sessions to begin.
const FEW: usize = 64;
/// That wait to be written. What comes beyond is not told: the status says it too.
const WAITING: usize = 2_048;

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
    client: Client,
    instance: String,
    /// The end of the process waits for those that are under way.
    under_way: TaskTracker,
    waiting: Arc<Semaphore>,
    at_once: Arc<Semaphore>,
}

/// What an Event takes of all that are written at once, when so many wait.
fn share(waiting: usize) -> u32 {
    if waiting <= FEW { AT_ONCE } else { 1 }
}

/// The API server refuses notes of more bytes (`NoteLengthLimit` of its validation of events).
fn shortened(mut text: String) -> String {
    const LONGEST: usize = 1_024;
    text.truncate(text.floor_char_boundary(LONGEST));
    text
}

impl Events {
    /// Events in the name of `instance`.
    pub fn new(client: Client, instance: &str, under_way: TaskTracker) -> Self {
        Self {
            client,
            instance: instance.to_owned(),
            under_way,
            waiting: Arc::new(Semaphore::new(WAITING)),
            at_once: Arc::new(Semaphore::new(AT_ONCE as usize)),
        }
    }

    /// Tells, in the background. An Event that cannot be written is logged: nothing rests on it.
    pub fn publish(&self, about: &ObjectReference, note: Note) {
        let Ok(place) = self.waiting.clone().try_acquire_owned() else {
            tracing::warn!(
                session = about.name,
                namespace = about.namespace,
                reason = note.reason,
                "too many Events wait: not told"
            );
            return;
        };
        let (event, at_once) = (self.event(about, note), self.at_once.clone());
        let share = share(WAITING.saturating_sub(self.waiting.available_permits()));
        let client = self.client.clone();
        let namespace = about.namespace.clone().unwrap_or_else(|| "default".to_owned());
        self.under_way.spawn(async move {
            let _place = place;
            // Never closed.
            let _turn = at_once.acquire_many(share).await;
            if let Err(error) = writes::create(&client, &namespace, &event).await {
                let about = event.regarding.unwrap_or_default();
                tracing::warn!(session = about.name, namespace = about.namespace, %error, "failed to write an Event");
            }
        });
    }

    fn event(&self, about: &ObjectReference, note: Note) -> Event {
        // As client-go names them: unique by the time. Randomness keeps those of one instant apart.
        let mut name = about.name.clone().unwrap_or_default();
        name.truncate(200);
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{name}.{:016x}", rand::random::<u64>())),
                namespace: about.namespace.clone(),
                ..ObjectMeta::default()
            },
            action: Some(note.action.to_owned()),
            event_time: Some(MicroTime(Timestamp::now())),
            note: Some(shortened(note.text)),
            reason: Some(note.reason),
            regarding: Some(about.clone()),
            reporting_controller: Some("agentic-operator".to_owned()),
            reporting_instance: Some(self.instance.chars().take(128).collect()),
            type_: Some(if note.warning { "Warning" } else { "Normal" }.to_owned()),
            ..Event::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_written_one_after_another_and_many_four_at_once() {
        assert_eq!(
            [1, FEW, FEW + 1, WAITING].map(|waiting| AT_ONCE / share(waiting)),
            [1, 1, 4, 4]
        );
    }

    #[test]
    fn a_note_of_wide_characters_is_cut_to_what_the_api_server_takes() {
        let cut = shortened("木".repeat(360));
        assert_eq!((cut.len(), cut.chars().count()), (1_023, 341));
        assert_eq!(shortened("short".into()), "short");
    }
}
