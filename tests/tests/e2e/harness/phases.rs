//! The phases of a session as a watch shows them.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use crds::{AgenticSession, Phase};
use futures::StreamExt as _;
use kube::Api;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::task::JoinHandle;

/// Collects phases, repetitions apart, until it is dropped.
#[derive(Debug)]
pub struct Phases {
    seen: Arc<Mutex<Vec<Phase>>>,
    watching: JoinHandle<()>,
}

impl Phases {
    /// Begins to watch a session that need not exist yet.
    pub fn watch(sessions: Api<AgenticSession>, name: &str) -> Self {
        let seen: Arc<Mutex<Vec<Phase>>> = Arc::default();
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let watching = tokio::spawn(record(sessions, config, Arc::clone(&seen)));
        Self { seen, watching }
    }

    /// The phases so far.
    pub fn seen(&self) -> Vec<Phase> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn record(sessions: Api<AgenticSession>, config: watcher::Config, seen: Arc<Mutex<Vec<Phase>>>) {
    let mut events = pin!(watcher(sessions, config));
    while let Some(event) = events.next().await {
        let Ok(Event::Apply(session) | Event::InitApply(session)) = event else {
            continue;
        };
        let phase = session.status.unwrap_or_default().phase;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.last() != Some(&phase) {
            seen.push(phase);
        }
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        self.watching.abort();
    }
}
