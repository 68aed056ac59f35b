//! Sees to it that each namespace has the policy that it should have.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicySpec};
use kube::{
    Api, Resource as _, ResourceExt as _,
    api::{DeleteParams, ListParams, ObjectMeta, PostParams, Preconditions},
    runtime::{
        WatchStreamExt as _,
        watcher::{Event, watcher},
    },
};
use protocol::names::label;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{NAME, Seen, Step, is_ours, policy, spec, step};
use crate::{
    context::{Context, watching},
    events::Note,
};

/// How often all namespaces are looked at.
const TICK: Duration = Duration::from_secs(15);
/// Who changes a policy back at once, again and again, is answered at this pace.
const AGAIN: Duration = Duration::from_secs(10);
/// A write that takes longer is given up until the next tick.
const LONGEST_WRITE: Duration = Duration::from_secs(30);

/// Watches the policies until `stop`, and sees to it that each namespace has what it should.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let mut keeper = Keeper::new(&context);
    let of_our_name = watching().fields(&format!("metadata.name={NAME}"));
    let changes = watcher(context.api::<NetworkPolicy>(), of_our_name)
        .default_backoff()
        .take_until(stop.clone().cancelled_owned());
    let mut changes = std::pin::pin!(changes);
    let kept = Duration::from_secs(context.settings.timing.network_kept.into());
    let mut tick = tokio::time::interval(TICK.min(kept.max(Duration::from_secs(1))));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let looked_at = tokio::select! {
            change = changes.next() => match change {
                None => return,
                Some(Ok(event)) => keeper.see(event),
                Some(Err(error)) => {
                    tracing::warn!(%error, "failed to watch NetworkPolicies");
                    continue;
                }
            },
            _ = tick.tick() => {
                if !*context.network.listed.borrow() {
                    continue;
                }
                keeper.all()
            }
        };
        tokio::select! {
            () = keeper.look_at(looked_at) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// What is known of namespaces between two looks.
struct Keeper<'a> {
    context: &'a Context,
    wanted: Option<NetworkPolicySpec>,
    /// Namespaces of a list that is not complete.
    listing: HashMap<String, Seen>,
    /// UID and generation of a policy as we wrote it: whatever the API server made of our words counts as our words.
    written: HashMap<String, (String, Option<i64>)>,
    /// Since when a namespace needs no policy.
    idle: HashMap<String, Instant>,
    /// When something was done about a namespace.
    done: HashMap<String, Instant>,
    /// Namespace and UID of policies that are not ours, and were told of.
    told: HashSet<(String, String)>,
}

impl<'a> Keeper<'a> {
    fn new(context: &'a Context) -> Self {
        Self {
            context,
            wanted: context.settings.session_egress.as_ref().map(spec),
            listing: HashMap::new(),
            written: HashMap::new(),
            idle: HashMap::new(),
            done: HashMap::new(),
            told: HashSet::new(),
        }
    }

    /// Takes in what the watch tells; answers the namespaces that it concerns.
    fn see(&mut self, event: Event<NetworkPolicy>) -> Vec<String> {
        match event {
            Event::Init => {
                self.listing.clear();
                Vec::new()
            }
            Event::InitApply(policy) => {
                let seen = self.read(&policy);
                self.listing.insert(policy.namespace().unwrap_or_default(), seen);
                Vec::new()
            }
            Event::InitDone => {
                *self.context.network.seen() = std::mem::take(&mut self.listing);
                self.context.network.listed.send_replace(true);
                self.all()
            }
            Event::Apply(policy) => {
                let (namespace, seen) = (policy.namespace().unwrap_or_default(), self.read(&policy));
                self.context.network.seen().insert(namespace.clone(), seen);
                vec![namespace]
            }
            Event::Delete(policy) => {
                let namespace = policy.namespace().unwrap_or_default();
                self.context.network.seen().remove(&namespace);
                vec![namespace]
            }
        }
    }

    fn read(&self, policy: &NetworkPolicy) -> Seen {
        let uid = policy.uid().unwrap_or_default();
        let written = policy
            .namespace()
            .and_then(|namespace| self.written.get(&namespace))
            .is_some_and(|(of, generation)| *of == uid && *generation == policy.metadata.generation);
        Seen {
            uid,
            ours: is_ours(policy),
            right: written || policy.spec == self.wanted,
        }
    }

    /// Namespaces that have sessions or a policy.
    fn all(&self) -> Vec<String> {
        let mut all = self.occupied();
        all.extend(self.context.network.seen().keys().cloned());
        all.into_iter().collect()
    }

    fn occupied(&self) -> HashSet<String> {
        self.context.memory.occupied()
    }

    async fn look_at(&mut self, namespaces: Vec<String>) {
        // Before the first lists nobody knows where sessions are.
        if namespaces.is_empty() || !self.context.memory.is_listed() {
            return;
        }
        let occupied = self.occupied();
        for namespace in namespaces {
            let needed = self.needed(&namespace, occupied.contains(&namespace));
            let seen = self.context.network.seen().get(&namespace).cloned();
            let step = step(needed, seen.as_ref());
            let recent = self.done.get(&namespace).is_some_and(|at| at.elapsed() < AGAIN);
            if step == Step::Nothing || recent {
                continue;
            }
            self.done.insert(namespace.clone(), Instant::now());
            let uid = seen.map(|seen| seen.uid).unwrap_or_default();
            let doing = self.carry_out(step, &namespace, &uid);
            match tokio::time::timeout(LONGEST_WRITE, doing).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(namespace, ?step, %error, "failed to see to the NetworkPolicy"),
                Err(_) => tracing::warn!(namespace, ?step, "the API server is slow or does not answer"),
            }
        }
        self.done.retain(|_, at| at.elapsed() < AGAIN);
    }

    /// Whether a namespace is to have a policy. For a while after the last session, too: sessions come one after another.
    fn needed(&mut self, namespace: &str, occupied: bool) -> bool {
        if self.wanted.is_none() {
            return false;
        }
        if occupied {
            self.idle.remove(namespace);
            return true;
        }
        if !self.context.network.seen().contains_key(namespace) {
            self.idle.remove(namespace);
            return false;
        }
        let kept = Duration::from_secs(self.context.settings.timing.network_kept.into());
        let since = self.idle.entry(namespace.to_owned()).or_insert_with(Instant::now);
        since.elapsed() < kept
    }

    async fn carry_out(&mut self, step: Step, namespace: &str, uid: &str) -> kube::Result<()> {
        let policies: Api<NetworkPolicy> = Api::namespaced(self.context.client.clone(), namespace);
        match step {
            Step::Nothing => Ok(()),
            Step::Make => self.make(&policies, namespace).await,
            Step::PutRight => self.put_right(&policies, namespace, uid).await,
            Step::Remove => self.remove(&policies, namespace, uid).await,
            Step::TellForeign => {
                self.tell_foreign(namespace, uid);
                Ok(())
            }
        }
    }

    async fn make(&mut self, policies: &Api<NetworkPolicy>, namespace: &str) -> kube::Result<()> {
        let Some(egress) = &self.context.settings.session_egress else {
            return Ok(());
        };
        match policies
            .create(&PostParams::default(), &policy(namespace, egress))
            .await
        {
            Ok(made) => {
                self.wrote(namespace, &made);
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whatever else its metadata say stays.
    async fn put_right(&mut self, policies: &Api<NetworkPolicy>, namespace: &str, uid: &str) -> kube::Result<()> {
        let Some(mut policy) = policies.get_opt(NAME).await? else {
            return Ok(());
        };
        if policy.uid().as_deref() != Some(uid) || !is_ours(&policy) {
            return Ok(());
        }
        policy.spec.clone_from(&self.wanted);
        // With the version that was read: what somebody changes at this moment is not lost.
        match policies.replace(NAME, &PostParams::default(), &policy).await {
            Ok(written) => {
                tracing::info!(namespace, policy = NAME, "put right");
                self.wrote(namespace, &written);
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn wrote(&mut self, namespace: &str, policy: &NetworkPolicy) {
        let as_written = (policy.uid().unwrap_or_default(), policy.metadata.generation);
        self.written.insert(namespace.to_owned(), as_written);
        let seen = self.read(policy);
        // The watch may have told of it already, as something that is not right yet.
        if let Some(known) = self.context.network.seen().get_mut(namespace)
            && known.uid == seen.uid
        {
            *known = seen;
        }
    }

    /// Decided once more on live reads: what the watches tell may be behind.
    async fn remove(&mut self, policies: &Api<NetworkPolicy>, namespace: &str, uid: &str) -> kube::Result<()> {
        if self.wanted.is_some() {
            let sessions: Api<kube::core::PartialObjectMeta<crds::AgenticSession>> =
                Api::namespaced(self.context.client.clone(), namespace);
            if !sessions.list(&ListParams::default().limit(1)).await?.items.is_empty() {
                return Ok(());
            }
        }
        let Some(policy) = policies.get_opt(NAME).await?.filter(is_ours) else {
            return Ok(());
        };
        let this_one = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                resource_version: policy.resource_version(),
            }),
            ..DeleteParams::default()
        };
        match policies.delete(NAME, &this_one).await {
            Ok(_) => tracing::info!(namespace, policy = NAME, "deleted"),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
            Err(error) => return Err(error),
        }
        self.written.remove(namespace);
        self.idle.remove(namespace);
        Ok(())
    }

    fn tell_foreign(&mut self, namespace: &str, uid: &str) {
        if !self.told.insert((namespace.to_owned(), uid.to_owned())) {
            return;
        }
        let policy = NetworkPolicy {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                namespace: Some(namespace.to_owned()),
                uid: Some(uid.to_owned()),
                ..ObjectMeta::default()
            },
            ..NetworkPolicy::default()
        };
        let text = format!(
            "This NetworkPolicy is not the operator's and is left as it is: it alone says what the pods of sessions in this namespace may \
             reach. Delete it, or label it {}={}, and the operator's takes its place.",
            label::MANAGED_BY,
            label::MANAGER
        );
        tracing::warn!(namespace, policy = NAME, "not ours: left as it is");
        let note = Note {
            warning: true,
            reason: "NameConflict".to_owned(),
            text,
            action: "Protect",
        };
        self.context.events.publish(&policy.object_ref(&()), note);
    }
}
