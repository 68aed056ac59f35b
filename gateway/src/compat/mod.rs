//! The APIs of other systems, whose clients need not change: which are on, in which namespace, and what they allow.

pub mod active;
pub mod folds;
pub mod keeper;
pub mod options;
pub mod places;

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::{Gateway, auth::api_key::Key};

pub use options::Options;

/// Who calls when nobody has to say who they are.
pub const ANONYMOUS: &str = "anonymous";
/// Who calls with the one key of the environment.
pub const CLIENT: &str = "task-api";

/// What these APIs do, fixed at the start.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct Settings {
    /// The task API is served.
    pub tasks: bool,
    /// The claude-code API is served.
    pub claude_code: bool,
    /// Where the sessions are of callers without a key that names a namespace.
    pub namespace: String,
    /// Callers who show nothing are let in.
    pub open: bool,
    /// Names, beside addresses and those of a cluster, by which callers who show nothing reach the gateway.
    pub hosts: Vec<String>,
    /// Requests a minute of callers without a rate of their own.
    pub rate: Option<u32>,
    /// Model of sessions whose request names none.
    pub model: Option<String>,
    /// Rounds of a task that names no number.
    pub max_turns: u32,
    /// Sessions of the task API that may be active at once, in a namespace.
    pub max_concurrent: usize,
    /// Seconds without a task after which a workspace's session is stopped.
    pub idle_seconds: u32,
    /// Seconds that a workspace's session may run in all.
    pub session_seconds: u32,
    /// How often ended sessions are looked for.
    pub cleanup_every: Duration,
    /// How long ended sessions are kept.
    pub keep_ended: Duration,
    /// Requests of the claude-code API that may be under way at once, in a namespace.
    pub request_max: usize,
    /// Seconds that a request of the claude-code API may work.
    pub request_seconds: u32,
    /// Seconds that its session stays after its end.
    pub request_keep_seconds: u32,
    /// Its workspace goes with its pod.
    pub request_ephemeral: bool,
}

/// One after the other in a namespace; nobody waits for another namespace.
#[derive(Debug, Default)]
pub struct Turns(std::sync::Mutex<HashMap<String, Arc<Mutex<()>>>>);

impl Turns {
    /// Waits for the turn of a namespace.
    pub async fn of(&self, namespace: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that nobody has and nobody waits for.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            turns.entry(namespace.to_owned()).or_default().clone()
        };
        turn.lock_owned().await
    }
}

/// What these APIs know while they run.
pub struct Compat {
    /// What they do.
    pub settings: Settings,
    /// When the gateway started.
    pub started: Timestamp,
    /// Who calls when nobody has to say who they are.
    pub anonymous: Option<Arc<Key>>,
    /// Held while a task is taken: what is counted and looked up stays so until it is there.
    pub submit: Turns,
    /// What the records of sessions say of their tasks.
    pub folds: folds::Folds,
    /// Requests of the claude-code API that are under way.
    pub places: places::Places,
    /// Sessions whose tasks are watched over.
    pub kept: keeper::Kept,
}

impl Compat {
    /// With these settings.
    pub fn new(settings: Settings) -> Self {
        let anonymous = settings
            .open
            .then(|| Arc::new(Key::of_namespace(ANONYMOUS, &settings.namespace, settings.rate)));
        Self {
            settings,
            started: Timestamp::now(),
            anonymous,
            submit: Turns::default(),
            folds: folds::Folds::default(),
            places: places::Places::default(),
            kept: keeper::Kept::default(),
        }
    }

    /// Seconds since the gateway started.
    pub fn uptime_seconds(&self) -> u64 {
        let seconds = Timestamp::now().duration_since(self.started).as_secs();
        seconds.max(0) as u64
    }
}

impl Gateway {
    /// Lets callers in who show this key.
    pub fn use_key(&self, shown: Option<&str>) {
        let Settings { namespace, rate, .. } = &self.compat.settings;
        if let Some(shown) = shown.filter(|_| !namespace.is_empty()) {
            self.keys.add(shown, Key::of_namespace(CLIENT, namespace, *rate));
        }
    }
}
