//! The phases of a namespace's one session as a watch shows them.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use crds::{AgenticSession, Phase};
use futures::StreamExt as _;
use kube::Api;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The phases of a session that nothing happens to.
pub const ORDER: [Phase; 4] = [Phase::Pending, Phase::Creating, Phase::Running, Phase::Completed];

/// Collects phases, repetitions apart, until it is dropped.
#[derive(Debug)]
pub struct Phases {
    seen: Arc<Mutex<Vec<Phase>>>,
    watching: JoinHandle<()>,
}

impl Phases {
    /// Begins to watch; from its return on nothing is missed.
    pub async fn watch(sessions: Api<AgenticSession>) -> Result<Self> {
        let seen: Arc<Mutex<Vec<Phase>>> = Arc::default();
        let (ready, began) = oneshot::channel();
        let watching = tokio::spawn(record(sessions, ready, Arc::clone(&seen)));
        let phases = Self { seen, watching };
        began.await.context("the watch ended before it began")?;
        Ok(phases)
    }

    /// The phases so far.
    pub fn seen(&self) -> Vec<Phase> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn record(sessions: Api<AgenticSession>, ready: oneshot::Sender<()>, seen: Arc<Mutex<Vec<Phase>>>) {
    let mut ready = Some(ready);
    let mut events = pin!(watcher(sessions, watcher::Config::default()));
    while let Some(event) = events.next().await {
        if matches!(event, Ok(Event::InitDone))
            && let Some(ready) = ready.take()
        {
            // Nobody waits any more when the test has failed meanwhile.
            let _ = ready.send(());
        }
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
