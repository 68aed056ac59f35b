//! Whether nothing is left to do, and what is left.

use std::{
    sync::{Mutex, atomic::Ordering},
    time::Duration,
};

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::{
    Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams},
};
use protocol::names::{REPORT_FINALIZER, label};
use serde_json::json;

use super::{
    super::{PATIENCE, operation::Propagation, values::CLAIM},
    Scene,
};
use crate::world::until;

/// Without a write for so long, nothing is left to do.
const QUIET: Duration = Duration::from_secs(2);
/// Reads in that time that are no sign of a loop: the node and session watches begin anew now and then.
const QUIET_READS: usize = 40;
/// Writes to a session that seemed settled: the control plane's own controllers may take longer than [`QUIET`] to do their part (garbage
/// collection above all), and the operator then has to do its own. A loop writes again and again.
const LATE: usize = 3;

impl Scene {
    /// Waits until the operator has seen the session as it is, and says something of it.
    pub async fn observed(&self) {
        until("the session to be observed", async || {
            let Some(session) = self.session().await else {
                return Some(());
            };
            let status = session.status.clone().unwrap_or_default();
            let seen = status.observed_generation == session.metadata.generation && status.reason.is_some();
            (seen || session.metadata.deletion_timestamp.is_some()).then_some(())
        })
        .await;
    }

    /// Waits until nothing is written for a while; then nothing more is, and little is read either.
    pub async fn quiet(&self) {
        let counted = &self.traffic.0;
        for _ in 0..=LATE {
            until("two seconds without a write", async || {
                counted
                    .last_write()
                    .is_none_or(|last| last.elapsed() > QUIET)
                    .then_some(())
            })
            .await;
            let count = || {
                (
                    counted.writes.load(Ordering::SeqCst),
                    counted.reads.load(Ordering::SeqCst),
                )
            };
            let before = count();
            tokio::time::sleep(QUIET / 4).await;
            let after = count();
            let reads = after.1 - before.1;
            assert!(
                reads <= QUIET_READS,
                "a settled session is read {reads} times in {:?}",
                QUIET / 4
            );
            if after.0 == before.0 {
                return;
            }
            println!("written late:\n{}\n{}", counted.story(), self.inventory().await);
        }
        panic!("a settled session is written to, again and again:\n{}", counted.story());
    }

    /// Deletes the session and waits until nothing of it is left but what somebody else made, or what is to be kept.
    pub async fn deleted(&self) {
        self.delete(Propagation::Background).await;
        if self.session().await.is_some() {
            self.gone().await;
        }
        let last = Mutex::new(Vec::new());
        let nothing = until("all of the session to go", async || {
            let left = self.left().await;
            last.lock().unwrap().clone_from(&left);
            left.is_empty().then_some(())
        });
        tokio::select! {
            () = nothing => {}
            () = tokio::time::sleep(PATIENCE) => {
                let inventory = self.inventory().await;
                panic!("left behind: {:?}\n{inventory}", last.lock().unwrap());
            },
        }
    }

    /// All that is there, in short.
    pub async fn inventory(&self) -> String {
        let mut all = Vec::new();
        let list = ListParams::default();
        let short = |kind: &str, meta: &ObjectMeta| {
            let owners: Vec<_> = meta
                .owner_references
                .iter()
                .flatten()
                .map(|owner| format!("{}/{}", owner.kind, owner.uid))
                .collect();
            format!(
                "{kind} {} uid {} deleted {:?} finalizers {:?} owners {owners:?}",
                meta.name.as_deref().unwrap_or(""),
                meta.uid.as_deref().unwrap_or(""),
                meta.deletion_timestamp.as_ref().map(|t| t.0),
                meta.finalizers
            )
        };
        for session in self.world.sessions().list(&list).await.unwrap().items {
            all.push(format!(
                "{} spec {}",
                short("session", &session.metadata),
                serde_json::to_string(&session.spec).unwrap()
            ));
        }
        for pod in self.world.pods().list(&list).await.unwrap().items {
            let status = pod.status.as_ref();
            all.push(format!(
                "{} phase {:?} node {:?}",
                short("pod", &pod.metadata),
                status.and_then(|s| s.phase.as_deref()),
                pod.spec.as_ref().and_then(|s| s.node_name.as_deref())
            ));
        }
        for job in self.world.jobs().list(&list).await.unwrap().items {
            all.push(short("job", &job.metadata));
        }
        for claim in self.api::<PersistentVolumeClaim>().list(&list).await.unwrap().items {
            all.push(short("claim", &claim.metadata));
        }
        all.join("\n")
    }

    async fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        // What somebody holds with a finalizer of their own goes when they let it.
        self.let_all_go().await;
        let all = ListParams::default();
        for pod in self.world.pods().list(&all).await.unwrap().items {
            left.push(format!("pod {} {:?}", pod.name_any(), pod.finalizers()));
        }
        for job in self.world.jobs().list(&all).await.unwrap().items {
            if !job.labels().contains_key("occupies") {
                left.push(format!("job {}", job.name_any()));
            }
        }
        for claim in self.api::<PersistentVolumeClaim>().list(&all).await.unwrap().items {
            let kept = claim.owner_references().is_empty() || claim.name_any() == CLAIM;
            if !kept {
                left.push(format!("claim {}", claim.name_any()));
            }
        }
        left
    }

    /// Takes away the finalizers of tests.
    pub async fn let_all_go(&self) {
        self.let_go::<Pod>().await;
        self.let_go::<k8s_openapi::api::batch::v1::Job>().await;
    }

    async fn let_go<K>(&self)
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        // Its controller may be writing it: then the version is another.
        until("nothing to be held", async || {
            let mut holds = false;
            for object in self.api::<K>().list(&ListParams::default()).await.unwrap().items {
                let meta = object.meta();
                let (tests, others): (Vec<_>, Vec<_>) = object
                    .finalizers()
                    .iter()
                    .partition(|finalizer| finalizer.starts_with("test.example/"));
                if tests.is_empty() {
                    continue;
                }
                holds = true;
                let patch = json!({"metadata": {"finalizers": others, "resourceVersion": meta.resource_version}});
                let _ = self
                    .api::<K>()
                    .patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch))
                    .await;
            }
            (!holds).then_some(())
        })
        .await;
    }

    /// Takes away what is in the way of everybody: quotas, names that are taken, claims that belong to nobody.
    pub async fn clear(&self) {
        self.quota(false).await;
        let occupied = ListParams::default().labels("occupies=yes");
        let _ = self
            .world
            .jobs()
            .delete_collection(&DeleteParams::background(), &occupied)
            .await;
        let claims = self.api::<PersistentVolumeClaim>();
        for claim in claims.list(&ListParams::default()).await.unwrap().items {
            let session = self.session().await;
            let retained = session.as_ref().is_some_and(|session| {
                let kept =
                    session.spec.workspace.as_ref().and_then(|w| w.retention) == Some(crds::session::Retention::Retain);
                kept && claim.labels().get(label::SESSION_UID) == session.uid().as_ref()
            });
            if claim.name_any() != CLAIM && claim.owner_references().is_empty() && !retained {
                let _ = claims.delete(&claim.name_any(), &DeleteParams::default()).await;
            }
        }
        self.let_all_go().await;
    }

    /// Whether our finalizer is on any pod.
    pub async fn holds_pods(&self) -> bool {
        let pods = self.world.pods().list(&ListParams::default()).await.unwrap().items;
        pods.iter()
            .any(|pod| pod.finalizers().iter().any(|f| f == REPORT_FINALIZER))
    }
}
