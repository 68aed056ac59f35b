//! A namespace in which operations are carried out, and what must hold after each.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crds::{AgenticSession, Phase};
use http::Request;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, ResourceQuota, Secret};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, PropagationPolicy},
    client::Body,
};
use protocol::{
    Outcome,
    names::{REPORT_FINALIZER, label},
};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    operation::{Edit, Happening, Mark, Operation, Propagation, Vocabulary},
    schema::{self, Mutation},
    values::{self, CLAIM, CLASS},
};
use crate::{
    plane::operator_config,
    wire::{self, Fate, Wire, is_watch, is_write},
    world::{Kubelet, World, report, until},
};

/// Every session of a scene.
pub const NAME: &str = "poem";
/// Without a write for so long, nothing is left to do.
const QUIET: Duration = Duration::from_secs(2);
/// Reads in that time that are no sign of a loop: the node and session watches begin anew now and then.
const QUIET_READS: usize = 40;
/// Writes that are remembered, to be told when something does not hold.
const STORY: usize = 30;
/// Writes to a session that seemed settled: the control plane's own controllers may take longer than [`QUIET`] to do their part (garbage
/// collection above all), and the operator then has to do its own. A loop writes again and again.
const LATE: usize = 3;

/// Counts what an operator sends.
#[derive(Clone, Default)]
pub struct Traffic(Arc<Counted>);

#[derive(Default)]
struct Counted {
    writes: AtomicUsize,
    reads: AtomicUsize,
    written: Mutex<VecDeque<(Instant, String)>>,
}

impl Counted {
    fn last_write(&self) -> Option<Instant> {
        self.written.lock().unwrap().back().map(|(at, _)| *at)
    }

    /// The last writes, with how long ago each was.
    fn story(&self) -> String {
        let written = self.written.lock().unwrap();
        let lines = written
            .iter()
            .map(|(at, what)| format!("{:.1} s ago {what}", at.elapsed().as_secs_f64()));
        lines.collect::<Vec<_>>().join("\n")
    }
}

impl Wire for Traffic {
    fn fate(&self, request: &Request<Body>) -> Fate {
        if is_write(request) {
            self.0.writes.fetch_add(1, Ordering::SeqCst);
            let mut written = self.0.written.lock().unwrap();
            if written.len() == STORY {
                written.pop_front();
            }
            written.push_back((Instant::now(), format!("{} {}", request.method(), request.uri().path())));
        } else if !is_watch(request) {
            self.0.reads.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    }
}

/// What came of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// It was taken.
    Taken,
    /// The API server refused it.
    Refused,
    /// There was nothing to act on.
    Nothing,
}

/// A namespace.
pub struct Scene {
    pub world: World,
    pub traffic: Traffic,
    pub vocabulary: Arc<Vocabulary>,
    _kubelet: Kubelet,
}

impl Scene {
    pub async fn new(namespace: &str, vocabulary: Arc<Vocabulary>) -> Self {
        let mut world = World::without_operator(namespace).await;
        world.timing.retry_first_wait = 1;
        world.timing.drain_first_wait = 1;
        let kubelet = world.kubelet();
        let mut scene = Self {
            world,
            traffic: Traffic::default(),
            vocabulary,
            _kubelet: kubelet,
        };
        scene.furnish().await;
        scene.start().await;
        scene
    }

    async fn start(&mut self) {
        let client = wire::client(operator_config(&self.world.namespace).await, self.traffic.clone());
        self.world.start_operator_with(client);
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.world.client.clone(), &self.world.namespace)
    }

    /// What sessions may refer to.
    async fn furnish(&self) {
        use k8s_openapi::api::{core::v1::ServiceAccount, node::v1::RuntimeClass, scheduling::v1::PriorityClass};
        let named = |name: &str| ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        };
        let here = PostParams::default();
        let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}});
        let claim: PersistentVolumeClaim = serde_json::from_value(claim).unwrap();
        let _ = self.api().create(&here, &claim).await;
        let account = ServiceAccount {
            metadata: named(CLASS),
            ..ServiceAccount::default()
        };
        let _ = self.api().create(&here, &account).await;
        let client = &self.world.client;
        let priority = PriorityClass {
            metadata: named(CLASS),
            value: Some(7),
            ..PriorityClass::default()
        };
        let _ = Api::all(client.clone()).create(&here, &priority).await;
        let runtime = RuntimeClass {
            metadata: named(CLASS),
            handler: "runc".to_owned(),
            ..RuntimeClass::default()
        };
        let _ = Api::all(client.clone()).create(&here, &runtime).await;
    }

    pub async fn session(&self) -> Option<AgenticSession> {
        self.world.sessions().get_opt(NAME).await.unwrap()
    }

    /// The newest pod of the session that has not ended.
    pub async fn pod(&self) -> Option<Pod> {
        let of_session = ListParams::default().labels(&format!("{}={NAME}", label::SESSION));
        let mut pods = self.world.pods().list(&of_session).await.unwrap().items;
        pods.retain(|pod| {
            let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
            !matches!(phase, Some("Succeeded" | "Failed")) && pod.metadata.deletion_timestamp.is_none()
        });
        pods.into_iter().max_by_key(kube::ResourceExt::creation_timestamp)
    }

    async fn job(&self) -> Option<String> {
        let name = self.session().await?.status?.job_name?;
        self.world
            .jobs()
            .get_opt(&name)
            .await
            .unwrap()
            .map(|job| job.name_any())
    }

    /// Carries out an operation, and waits until the operator has seen what came of it.
    pub async fn act(&mut self, operation: &Operation) -> Came {
        let came = self.carry_out(operation).await;
        assert!(self.world.operator_is_up(), "the operator ended");
        if came == Came::Taken {
            self.observed().await;
        }
        came
    }

    async fn carry_out(&mut self, operation: &Operation) -> Came {
        match operation {
            Operation::Create { base, changed, queued } => {
                let mut spec = base.spec();
                if let Some(changed) = changed {
                    schema::mutate(&self.vocabulary.session, changed, &mut spec);
                    schema::tidy(&mut spec);
                }
                let labels = if *queued {
                    json!({label::KUEUE_QUEUE: "poets"})
                } else {
                    json!({})
                };
                self.create(spec, labels, json!({})).await
            }
            Operation::Edit(mutation) => self.edit(mutation).await,
            Operation::Suspend(suspend) => self.patch(json!({"spec": {"suspend": suspend}})).await,
            Operation::Click(value) => {
                let click = json!({"ambient-code.io/start-requested-at": value.to_string()});
                self.patch(json!({"metadata": {"annotations": click}})).await
            }
            Operation::Mark(mark) => self.mark(*mark).await,
            Operation::Delete(propagation) => self.delete(*propagation).await,
            Operation::Namesake(name) => self.namesake(name).await,
            Operation::Settings(changed) => self.settings(changed.as_ref()).await,
            Operation::Pod(happening) => self.happen(*happening).await,
            Operation::DeletePod { force } => self.delete_pod(*force).await,
            Operation::EditPod(edit) => match self.pod().await {
                Some(pod) => self.edit_child::<Pod>(&pod.name_any(), *edit).await,
                None => Came::Nothing,
            },
            Operation::DeleteJob(propagation) => match self.job().await {
                Some(job) => came(self.world.jobs().delete(&job, &propagation.params()).await.map(drop)),
                None => Came::Nothing,
            },
            Operation::EditJob(edit) => match self.job().await {
                Some(job) => self.edit_child::<k8s_openapi::api::batch::v1::Job>(&job, *edit).await,
                None => Came::Nothing,
            },
            Operation::DeleteClaim => {
                let claims = self.api::<PersistentVolumeClaim>();
                came(claims.delete(&claim_name(), &DeleteParams::default()).await.map(drop))
            }
            Operation::EditClaim(edit) => self.edit_child::<PersistentVolumeClaim>(&claim_name(), *edit).await,
            Operation::Occupy { job } => self.occupy(*job).await,
            Operation::Quota(there) => self.quota(*there).await,
            Operation::Keys(there) => self.keys(*there).await,
            Operation::Restart => {
                self.world.kill_operator().await;
                self.start().await;
                Came::Taken
            }
        }
    }

    /// Makes the session, in the place of one that is there.
    pub async fn create(&self, spec: Value, labels: Value, annotations: Value) -> Came {
        let object = json!({"apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession",
            "metadata": {"name": NAME, "labels": labels, "annotations": annotations}, "spec": spec});
        // A spec of the wrong shape does not pass for one of ours: it is sent as it is. A dry run leaves what is there if it is refused.
        let path = format!(
            "/apis/vteam.ambient-code/v1alpha1/namespaces/{}/agenticsessions",
            self.world.namespace
        );
        let post = |query: &str| {
            let request = Request::post(format!("{path}?fieldValidation=Strict{query}"))
                .header("content-type", "application/json");
            request.body(serde_json::to_vec(&object).unwrap()).unwrap()
        };
        if self.session().await.is_some() {
            let elsewhere = json!({"metadata": {"name": "poem-that-is-tried"}});
            let mut tried = object.clone();
            tried["metadata"]["name"] = elsewhere["metadata"]["name"].clone();
            let request = Request::post(format!("{path}?fieldValidation=Strict&dryRun=All"))
                .header("content-type", "application/json");
            let request = request.body(serde_json::to_vec(&tried).unwrap()).unwrap();
            if self.world.client.request::<Value>(request).await.is_err() {
                return Came::Refused;
            }
            self.delete(Propagation::Background).await;
            self.gone().await;
        }
        came(self.world.client.request::<Value>(post("")).await.map(drop))
    }

    /// Waits until the session is gone, without what a test holds it with.
    pub async fn gone(&self) {
        self.patch(json!({"metadata": {"finalizers": null}})).await;
        until("the session to go", async || {
            self.session().await.is_none().then_some(())
        })
        .await;
    }

    async fn edit(&self, mutation: &Mutation) -> Came {
        let Some(session) = self.session().await else {
            return Came::Nothing;
        };
        let mut object = serde_json::to_value(&session).unwrap();
        let before = object["spec"].clone();
        schema::mutate(&self.vocabulary.session, mutation, &mut object["spec"]);
        schema::tidy(&mut object["spec"]);
        if before == object["spec"] {
            return Came::Nothing;
        }
        object["apiVersion"] = json!("vteam.ambient-code/v1alpha1");
        object["kind"] = json!("AgenticSession");
        object["metadata"]["managedFields"] = json!(null);
        object["metadata"]["resourceVersion"] = json!(null);
        let path = format!(
            "/apis/vteam.ambient-code/v1alpha1/namespaces/{}/agenticsessions/{NAME}",
            self.world.namespace
        );
        object["metadata"]["resourceVersion"] = json!(session.resource_version());
        let request = Request::put(format!("{path}?fieldValidation=Strict")).header("content-type", "application/json");
        let request = request.body(serde_json::to_vec(&object).unwrap()).unwrap();
        let came = match self.world.client.request::<AgenticSession>(request).await {
            // The operator was faster.
            Err(kube::Error::Api(status)) if status.is_conflict() => return Came::Nothing,
            other => came(other.map(drop)),
        };
        if came == Came::Taken {
            assert!(super::operation::may_change(&mutation.path), "{mutation:?} was taken");
        }
        came
    }

    pub async fn patch(&self, patch: Value) -> Came {
        let sessions = self.world.sessions();
        came(
            sessions
                .patch(NAME, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map(drop),
        )
    }

    async fn mark(&self, mark: Mark) -> Came {
        let Some(session) = self.session().await else {
            return Came::Nothing;
        };
        self.patch(match mark {
            Mark::Label => json!({"metadata": {"labels": {"team": "poets"}}}),
            Mark::Annotation => json!({"metadata": {"annotations": {"note": "read me", label::SESSION_UID: "another"}}}),
            Mark::Finalizer => json!({"metadata": {"finalizers": ["test.example/hold"]}}),
            Mark::Owner => json!({"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "ServiceAccount", "name": CLASS, "uid": session.uid()}]}}),
            Mark::Status => json!({"status": {"phase": "Completed", "attempt": 99}}),
        })
        .await
    }

    pub async fn delete(&self, propagation: Propagation) -> Came {
        came(
            self.world
                .sessions()
                .delete(NAME, &propagation.params())
                .await
                .map(drop),
        )
    }

    async fn namesake(&self, name: &str) -> Came {
        let session = crate::world::session(name, json!({"prompt": "write another"}));
        if self
            .world
            .sessions()
            .create(&PostParams::default(), &session)
            .await
            .is_err()
        {
            return Came::Refused;
        }
        until("the other session to begin", async || {
            let status = self.world.status(name).await;
            (status.phase != Phase::Pending || status.reason.is_some()).then_some(())
        })
        .await;
        let _ = self.world.sessions().delete(name, &DeleteParams::default()).await;
        Came::Taken
    }

    /// The settings that allow all, changed so; or none.
    pub async fn settings(&self, changed: Option<&Mutation>) -> Came {
        let settings = self.api::<crds::ProjectSettings>();
        let Some(changed) = changed else {
            return came(
                settings
                    .delete(crds::project_settings::NAME, &DeleteParams::default())
                    .await
                    .map(drop),
            );
        };
        let mut spec = values::settings();
        schema::mutate(&self.vocabulary.settings, changed, &mut spec);
        schema::tidy(&mut spec);
        self.put_settings(spec).await
    }

    pub async fn put_settings(&self, spec: Value) -> Came {
        let name = crds::project_settings::NAME;
        let object = json!({"apiVersion": "vteam.ambient-code/v1alpha1", "kind": "ProjectSettings", "metadata": {"name": name}, "spec": spec});
        let path = format!(
            "/apis/vteam.ambient-code/v1alpha1/namespaces/{}/projectsettings",
            self.world.namespace
        );
        let there = self
            .api::<crds::ProjectSettings>()
            .get_metadata_opt(name)
            .await
            .unwrap();
        let mut object = object;
        let request = match there {
            Some(there) => {
                object["metadata"]["resourceVersion"] = json!(there.resource_version());
                Request::put(format!("{path}/{name}?fieldValidation=Strict"))
            }
            None => Request::post(format!("{path}?fieldValidation=Strict")),
        };
        let request = request.header("content-type", "application/json");
        let request = request.body(serde_json::to_vec(&object).unwrap()).unwrap();
        came(self.world.client.request::<Value>(request).await.map(drop))
    }

    async fn happen(&self, happening: Happening) -> Came {
        let Some(pod) = self.pod().await else {
            return Came::Nothing;
        };
        let attempt = pod
            .labels()
            .get(label::ATTEMPT)
            .and_then(|n| n.parse().ok())
            .unwrap_or(1);
        let running = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
        let end = async |outcome| {
            if !running {
                self.world.start(&pod).await;
            }
            self.world.end(&pod, 1, Some(&report(outcome, attempt))).await;
        };
        match happening {
            Happening::Starts | Happening::FindsNoImage | Happening::FindsNoNode if running => return Came::Nothing,
            Happening::Starts => self.world.start(&pod).await,
            Happening::Succeeds => end(Outcome::Succeeded).await,
            Happening::Fails => end(Outcome::AgentError).await,
            Happening::Stops => end(Outcome::StoppedByUser).await,
            Happening::LosesModel => end(Outcome::ModelUnavailable).await,
            Happening::Crashes => {
                self.world.start(&pod).await;
                self.world.end(&pod, 1, None).await;
            }
            Happening::IsEvicted => {
                let why = json!([{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}]);
                self.world
                    .set_pod_status(&pod, json!({"phase": "Failed", "reason": "Evicted", "conditions": why}))
                    .await;
            }
            Happening::FindsNoImage => {
                self.world.bind(&pod).await;
                let waits = json!([{"name": "agent", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}]);
                self.world
                    .set_pod_status(&pod, json!({"initContainerStatuses": waits}))
                    .await;
            }
            Happening::FindsNoNode => {
                let why = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}]);
                self.world.set_pod_status(&pod, json!({"conditions": why})).await;
            }
        }
        Came::Taken
    }

    async fn delete_pod(&self, force: bool) -> Came {
        let Some(pod) = self.pod().await else {
            return Came::Nothing;
        };
        if force {
            // Somebody who takes finalizers and all.
            let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
            let _ = self
                .world
                .pods()
                .patch(&pod.name_any(), &PatchParams::default(), &patch)
                .await;
        }
        let params = if force {
            DeleteParams::default().grace_period(0)
        } else {
            DeleteParams::default()
        };
        came(self.world.pods().delete(&pod.name_any(), &params).await.map(drop))
    }

    async fn edit_child<K>(&self, name: &str, edit: Edit) -> Came
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api = self.api::<K>();
        let Some(there) = api.get_metadata_opt(name).await.unwrap() else {
            return Came::Nothing;
        };
        let ours = |value: Value| json!({"vteam.ambient-code/resolved": value, "vteam.ambient-code/limits": value});
        let patch = match edit {
            Edit::Foreign => json!({"metadata": {"labels": {"team": "poets"}, "annotations": {"note": "read me"}}}),
            Edit::Nonsense => json!({"metadata": {"annotations": ours(json!("{not json"))}}),
            Edit::Bare => json!({"metadata": {"annotations": ours(Value::Null)}}),
            Edit::Orphan => json!({"metadata": {"ownerReferences": null}}),
            Edit::Finalizer => {
                let mut finalizers = there.finalizers().to_vec();
                finalizers.push("test.example/hold".to_owned());
                json!({"metadata": {"finalizers": finalizers, "resourceVersion": there.resource_version()}})
            }
            Edit::Suspend(suspend) => json!({"spec": {"suspend": suspend}}),
            Edit::Deadline => json!({"spec": {"activeDeadlineSeconds": 1}}),
        };
        came(
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map(drop),
        )
    }

    async fn occupy(&self, job: bool) -> Came {
        let here = PostParams::default();
        if job {
            let next = self.session().await.and_then(|s| s.status?.attempt).unwrap_or(0) + 1;
            let name = if next == 1 {
                format!("{NAME}-job")
            } else {
                format!("{NAME}-job-{next}")
            };
            let pod = json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]});
            let object = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": {"occupies": "yes"}},
                "spec": {"suspend": true, "template": {"spec": pod}}});
            let object = serde_json::from_value(object).unwrap();
            return came(self.world.jobs().create(&here, &object).await.map(drop));
        }
        let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim_name(), "labels": {"occupies": "yes"}},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}});
        let claim = serde_json::from_value(claim).unwrap();
        came(
            self.api::<PersistentVolumeClaim>()
                .create(&here, &claim)
                .await
                .map(drop),
        )
    }

    pub async fn quota(&self, there: bool) -> Came {
        let api = self.api::<ResourceQuota>();
        if !there {
            return came(api.delete("none", &DeleteParams::default()).await.map(drop));
        }
        let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
            "spec": {"hard": {"pods": "0", "persistentvolumeclaims": "0"}}});
        let quota: ResourceQuota = serde_json::from_value(quota).unwrap();
        came(api.create(&PostParams::default(), &quota).await.map(drop))
    }

    async fn keys(&self, there: bool) -> Came {
        let api = self.api::<Secret>();
        if !there {
            return came(api.delete("git-keys", &DeleteParams::default()).await.map(drop));
        }
        let keys = json!({"metadata": {"name": "git-keys"}, "stringData": {"GITHUB_TOKEN": "ghp-fake"}});
        let keys: Secret = serde_json::from_value(keys).unwrap();
        came(api.create(&PostParams::default(), &keys).await.map(drop))
    }

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
            () = tokio::time::sleep(Duration::from_secs(55)) => {
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
        for object in self.api::<K>().list(&ListParams::default()).await.unwrap().items {
            let meta = object.meta();
            let finalizers = meta.finalizers.clone().unwrap_or_default();
            if finalizers.iter().any(|f| f.starts_with("test.example/")) {
                let others: Vec<_> = finalizers
                    .into_iter()
                    .filter(|f| !f.starts_with("test.example/"))
                    .collect();
                let patch = json!({"metadata": {"finalizers": others, "resourceVersion": meta.resource_version}});
                let name = meta.name.clone().unwrap_or_default();
                let _ = self
                    .api::<K>()
                    .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
                    .await;
            }
        }
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

impl Propagation {
    fn params(self) -> DeleteParams {
        DeleteParams {
            propagation_policy: Some(match self {
                Self::Background => PropagationPolicy::Background,
                Self::Foreground => PropagationPolicy::Foreground,
            }),
            ..DeleteParams::default()
        }
    }
}

fn claim_name() -> String {
    format!("ambient-workspace-{NAME}")
}

/// Whether the API server took it. What was not there, or was there already, is nothing.
fn came(result: kube::Result<()>) -> Came {
    match result {
        Ok(()) => Came::Taken,
        Err(kube::Error::Api(status))
            if status.is_not_found() || status.is_already_exists() || status.is_conflict() =>
        {
            Came::Nothing
        }
        Err(kube::Error::Api(_)) => Came::Refused,
        Err(error) => panic!("the API server does not answer: {error}"),
    }
}
