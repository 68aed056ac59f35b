//! Watches over the sessions of tasks: holds the limits of tasks that share a session, denies what nobody can be asked,
//! counts what is done, and removes what ended long ago.
//!
//! All of it is derived from sessions and their records, so that a gateway that starts goes on where another stopped; what it
//! tells a runner has an id of its own, so that several gateways say it once.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use kube::{ResourceExt as _, api::DynamicObject};
use protocol::{
    frame::{GatewayFrame, Interrupt, PermissionResponse},
    identity::PROMPT_COMMAND,
    names::{annotation, label},
};
use serde_json::{json, value::RawValue};
use sha2::{Digest as _, Sha256};
use tokio::{sync::broadcast::error::RecvError, time::Instant};

use super::{
    active::{active, clean_up},
    folds::Fold,
};
use crate::{
    Gateway,
    api::tasks::{Kept as Asked, Limits},
    commands,
    live::Event,
    project::tasks::{MAX_TURNS, Status, TIMEOUT, Task},
    retention,
    sessions::{Target, View},
};

/// How often sessions are looked for that nobody watches over.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long after a failure it is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// What an agent is told that asks for leave.
const DENIED: &str = "Nobody is there to allow this: go on without it.";

/// The sessions that are watched over (by UID), and whether a task is being worked on in each.
#[derive(Debug, Default)]
pub struct Kept {
    sessions: Mutex<HashMap<String, bool>>,
}

impl Kept {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, bool>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tasks that are being worked on or wait.
    pub fn busy(&self) -> usize {
        self.lock().values().filter(|busy| **busy).count()
    }
}

/// Forgets a session when its watch ends, however it ends.
struct Watch {
    gateway: Arc<Gateway>,
    uid: String,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.gateway.compat.kept.lock().remove(&self.uid);
    }
}

/// Looks for sessions of tasks and removes those that ended long ago, until the gateway stops.
pub async fn run(gateway: Arc<Gateway>) {
    if !gateway.compat.settings.tasks {
        return;
    }
    let every = gateway.compat.settings.cleanup_every;
    let mut cleaned = Instant::now();
    while gateway
        .shutdown
        .run_until_cancelled(tokio::time::sleep(LOOK_EVERY))
        .await
        .is_some()
    {
        if !gateway.watched.is_synced() {
            continue;
        }
        let entries = active(&gateway, None);
        gateway.metrics.active_sessions(entries.len());
        for entry in entries {
            if let Ok(object) = serde_json::from_str::<DynamicObject>(entry.item.get())
                && let Some(target) = Target::new(&object.namespace().unwrap_or_default(), &object.name_any())
            {
                watch(&gateway, target, &entry.uid);
            }
        }
        if cleaned.elapsed() >= every {
            cleaned = Instant::now();
            clean_up(&gateway).await;
        }
    }
}

/// Watches over a session until it has ended, unless somebody does already.
pub fn keep(gateway: &Arc<Gateway>, target: &Target, object: &DynamicObject) {
    watch(gateway, target.clone(), &object.uid().unwrap_or_default());
}

fn watch(gateway: &Arc<Gateway>, target: Target, uid: &str) {
    match gateway.compat.kept.lock().entry(uid.to_owned()) {
        Entry::Occupied(_) => return,
        Entry::Vacant(place) => place.insert(true),
    };
    let watch = Watch {
        gateway: gateway.clone(),
        uid: uid.to_owned(),
    };
    gateway.tasks.spawn(async move {
        let gateway = watch.gateway.clone();
        let mut keeper = Keeper {
            target,
            uid: watch.uid.clone(),
            counted: HashSet::new(),
            limits: HashMap::new(),
            told: HashSet::new(),
            working: None,
            looked: None,
            object: None,
        };
        let kept = async {
            while let Err(error) = keeper.run(&gateway).await {
                tracing::warn!(session = keeper.target.name(), %error, "a session of tasks is not watched over");
                tokio::time::sleep(AGAIN).await;
            }
        };
        gateway.shutdown.run_until_cancelled(kept).await;
    });
}

/// Since when a task is being worked on. Clocks of machines jump and differ, so the time is counted from when we saw it.
struct Working {
    command: String,
    seen: Instant,
    before: Duration,
}

struct Keeper {
    target: Target,
    uid: String,
    /// Tasks that were counted, by their commands.
    counted: HashSet<String>,
    /// Limits of tasks, by their commands.
    limits: HashMap<String, Limits>,
    /// Commands that were given.
    told: HashSet<String>,
    /// The task that is being worked on, by its command.
    working: Option<Working>,
    /// When it was looked last.
    looked: Option<Instant>,
    object: Option<DynamicObject>,
}

impl Keeper {
    async fn run(&mut self, gateway: &Gateway) -> Result<(), crate::api::ApiError> {
        let channel = gateway.live.channel(&self.uid);
        let mut events = channel.subscribe();
        let Some(object) = gateway.sessions.get(&self.target).await? else {
            return Ok(());
        };
        if object.uid().as_deref() != Some(self.uid.as_str()) {
            return Ok(());
        }
        let mut seen = gateway.watched.follow(&self.target, View::from(&object));
        self.object = Some(object);
        let shared = gateway.compat.folds.of(&self.uid);
        loop {
            let view = seen.borrow_and_update().clone().filter(|view| view.uid == self.uid);
            let deadline = {
                let mut fold = shared.lock().await;
                fold.catch_up(&*gateway.log, &self.uid).await?;
                self.count(gateway, &fold, view.as_ref());
                let deadline = self.hold(gateway, &fold, view.as_ref()).await?;
                self.looked = Some(Instant::now());
                deadline
            };
            let Some(view) = view else { return Ok(()) };
            if view.phase.is_terminal() && !view.starting && self.has_all(gateway, &view).await? {
                return Ok(());
            }
            self.wait(&mut events, &mut seen, deadline).await;
        }
    }

    /// Whether the records that may still come can be waited for no longer.
    async fn has_all(&self, gateway: &Gateway, view: &View) -> Result<bool, crate::api::ApiError> {
        let progress = gateway.log.state(&self.uid).await?.progress;
        let complete = progress.ended >= view.attempt && progress.acked >= progress.last;
        let waited = view
            .ended
            .is_none_or(|ended| Timestamp::now().duration_since(ended) >= crate::follow::PATIENCE);
        Ok(complete || waited)
    }

    async fn wait(
        &self,
        events: &mut tokio::sync::broadcast::Receiver<Event>,
        seen: &mut tokio::sync::watch::Receiver<crate::watch::Seen>,
        most: Option<Duration>,
    ) {
        let most = most
            .unwrap_or(Duration::MAX)
            .clamp(Duration::from_millis(50), Duration::from_secs(30));
        let stored = async {
            loop {
                match events.recv().await {
                    Ok(Event::Delta(_)) => {}
                    Ok(Event::Stored { .. }) | Err(RecvError::Lagged(_)) => return,
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        tokio::select! {
            () = stored => {}
            changed = seen.changed() => if changed.is_err() {
                tokio::time::sleep(AGAIN).await;
            },
            () = tokio::time::sleep(most) => {}
        }
    }

    /// Counts the tasks that are over.
    fn count(&mut self, gateway: &Gateway, fold: &Fold, view: Option<&View>) {
        let mut busy = fold.tasks.open().is_some();
        let over = view.is_none_or(|view| view.phase.is_terminal() && !view.starting);
        if fold.tasks.all().is_empty() {
            busy = !over;
        }
        for task in fold.tasks.all() {
            let mut task = task.clone();
            if let Some(view) = view
                && over
            {
                let at = view.ended.unwrap_or_else(Timestamp::now);
                task.end_with_session(view.phase, view.reason.as_deref(), view.message.as_deref(), at);
            }
            self.count_one(gateway, &task);
        }
        if let Some(busy_now) = gateway.compat.kept.lock().get_mut(&self.uid) {
            *busy_now = busy && !over;
        }
    }

    fn count_one(&mut self, gateway: &Gateway, task: &Task) {
        // What ended before this gateway began was counted by the one before.
        let Some(ended) = task
            .ended
            .filter(|ended| task.is_over() && *ended >= gateway.compat.started)
        else {
            return;
        };
        if !self.counted.insert(task.command.clone()) {
            return;
        }
        let duration = ended.duration_since(task.begun);
        gateway.metrics.task(task.status, duration, &task.usage);
        let id = self.task_id(&task.command);
        let message = match task.status {
            Status::Completed => "Task completed",
            Status::Interrupted => "Task interrupted",
            Status::Running | Status::Failed => "Task failed",
        };
        tracing::info!(
            task_id = id,
            duration_ms = duration.as_millis().max(0) as u64,
            tokens_used = task.usage.total(),
            session = self.target.name(),
            namespace = self.target.namespace(),
            reason = task.reason,
            "{message}"
        );
    }

    fn task_id(&self, command: &str) -> String {
        let first = || {
            let object = self.object.as_ref()?;
            object.annotations().get(annotation::TASK_ID).cloned()
        };
        let first = (command == PROMPT_COMMAND).then(first).flatten();
        first.unwrap_or_else(|| command.to_owned())
    }

    /// Holds the limits of the task whose work goes on, in a session that others share. When it must be looked again.
    async fn hold(
        &mut self,
        gateway: &Gateway,
        fold: &Fold,
        view: Option<&View>,
    ) -> Result<Option<Duration>, crate::api::ApiError> {
        let shared = self
            .object
            .as_ref()
            .is_some_and(|object| object.labels().contains_key(label::WORKSPACE));
        let (Some(view), Some(task), true) = (view, fold.tasks.worked_on(), shared) else {
            return Ok(None);
        };
        for question in &task.questions {
            self.deny(gateway, view, question).await?;
        }
        let limits = self.limits_of(gateway, &task.command).await?;
        let Some(limits) = limits else { return Ok(None) };
        let timeout = Duration::from_secs(u64::from(limits.timeout));
        let left = timeout.saturating_sub(self.worked(gateway, task, timeout).await);
        let most = u64::from(limits.max_turns);
        let rounds = task.rounds + task.rounds_by_itself;
        let turn = task.by_itself.unwrap_or(task.turn);
        if rounds > most || (rounds == most && task.goes_on && !task.is_over()) {
            self.interrupt(gateway, view, MAX_TURNS, turn).await?;
        } else if left.is_zero() {
            self.interrupt(gateway, view, TIMEOUT, turn).await?;
            return Ok(None);
        }
        Ok(Some(left))
    }

    /// How long a task has been worked on.
    async fn worked(&mut self, gateway: &Gateway, task: &Task, timeout: Duration) -> Duration {
        if let Some(working) = self.working.as_ref().filter(|working| working.command == task.command) {
            return working.before.saturating_add(working.seen.elapsed());
        }
        let (seen, now) = (Instant::now(), Timestamp::now());
        // Its beginning was written by the clock of its node, which may be ahead or behind.
        let mut before = Duration::try_from(now.duration_since(task.begun)).unwrap_or_default();
        if let Some(looked) = self.looked {
            before = before.min(seen - looked);
        } else if before >= timeout
            && let Err(why) = retention::clock_is_right(gateway, now).await
        {
            tracing::warn!(
                session = self.target.name(),
                why,
                "a task's time is counted from now on: this clock may be wrong"
            );
            before = Duration::ZERO;
        }
        let command = task.command.clone();
        self.working = Some(Working { command, seen, before });
        before
    }

    async fn limits_of(&mut self, gateway: &Gateway, command: &str) -> Result<Option<Limits>, crate::api::ApiError> {
        if let Some(limits) = self.limits.get(command) {
            return Ok(Some(*limits));
        }
        let asked = if command == PROMPT_COMMAND {
            let object = self.object.as_ref();
            object.and_then(|object| object.annotations().get(annotation::TASK_ASKED).cloned())
        } else {
            let command = gateway.log.command(&self.uid, command).await?;
            command.map(|command| command.asked)
        };
        let asked: Option<Asked> = asked.and_then(|asked| serde_json::from_str(&asked).ok());
        let limits = asked.map(|asked| asked.limits);
        if let Some(limits) = limits {
            self.limits.insert(command.to_owned(), limits);
        }
        Ok(limits)
    }

    async fn interrupt(
        &mut self,
        gateway: &Gateway,
        view: &View,
        why: &str,
        turn: u32,
    ) -> Result<(), crate::api::ApiError> {
        let id = commands::own_id(why, turn);
        let frame = GatewayFrame::Interrupt(Interrupt { id: id.clone(), turn });
        self.tell(gateway, view, frame, id).await
    }

    async fn deny(&mut self, gateway: &Gateway, view: &View, question: &str) -> Result<(), crate::api::ApiError> {
        let id = commands::own_id("deny", &hex::encode(Sha256::digest(question))[..32]);
        let response = json!({"behavior": "deny", "message": DENIED}).to_string();
        let Ok(response) = RawValue::from_string(response) else {
            return Ok(());
        };
        let frame = GatewayFrame::PermissionResponse(PermissionResponse {
            id: id.clone(),
            request_id: question.to_owned(),
            response,
        });
        self.tell(gateway, view, frame, id).await
    }

    async fn tell(
        &mut self,
        gateway: &Gateway,
        view: &View,
        frame: GatewayFrame,
        id: String,
    ) -> Result<(), crate::api::ApiError> {
        if !self.told.insert(id.clone()) {
            return Ok(());
        }
        match commands::send_own(gateway, &self.target, view, frame).await {
            // It is over first.
            Ok(_) | Err(commands::Error::Over { .. }) => Ok(()),
            Err(error) => {
                self.told.remove(&id);
                Err(error.into())
            }
        }
    }
}
