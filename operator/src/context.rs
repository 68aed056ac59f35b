//! What every reconcile needs.

use std::sync::Arc;

use kube::{Client, runtime::watcher};
use tokio_util::task::TaskTracker;

use crate::{
    backoff::Backoff,
    clock::Clock,
    events::Events,
    metrics::Metrics,
    network::Network,
    orphans::Bare,
    pods::Leaving,
    project_settings::Projects,
    session::{Gate, Memory, Queue},
    settings::Settings,
    strays::Strays,
};

/// Seconds after which a watch is begun anew where it was. One that ends without a word is noticed then; bookmarks make it cheap.
const WATCH: u32 = 60;

/// Objects of one answer when a kind is listed. A session may be a megabyte and a half with labels and annotations, and an answer is
/// held whole, for a moment three times.
pub const PAGE: u32 = 16;

/// How kinds are watched.
pub fn watching() -> watcher::Config {
    watcher::Config::default().timeout(WATCH).page_size(PAGE)
}

/// What every reconcile needs.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What the operator was told at its start.
    pub settings: Settings,
    /// Tells of sessions.
    pub events: Events,
    /// What time it is.
    pub clock: Clock,
    /// Counts.
    pub metrics: Metrics,
    /// Failures in a row, by session.
    pub backoff: Backoff,
    /// What the admins decide.
    pub projects: Projects,
    /// Who may run now.
    pub gate: Arc<Gate>,
    /// Who is looked at, and when.
    pub queue: Arc<Queue>,
    /// What the watches have told.
    pub memory: Memory,
    /// What the pods of sessions may reach.
    pub network: Network,
    /// Pods that may have to be freed.
    pub leaving: Leaving,
    /// Pods that no Job controls.
    pub bare: Bare,
    /// Pods that left the watch, and may be there.
    pub strays: Strays,
    /// Reconciles under way: a token each.
    pub under_way: TaskTracker,
}
