//! A namespace in which operations are carried out, and what must hold after each.

mod children;
mod rest;
mod traffic;

use std::sync::Arc;

use crds::{AgenticSession, Phase};
use http::Request;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, PropagationPolicy},
};
use protocol::names::label;
use serde_json::{Value, json};

pub use self::traffic::Traffic;
use super::{
    operation::{Mark, Operation, Propagation, Vocabulary},
    schema::{self, Mutation},
    values::{self, CLAIM, CLASS},
};
use crate::{
    plane::operator_config,
    wire,
    world::{Kubelet, World, until},
};

/// Every session of a scene.
pub const NAME: &str = "poem";

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
        // Nobody asks there, and a port that was free may be taken when an operator is started again.
        world.metrics.set_port(0);
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
            // What is empty here and absent there is the same.
            Ok(same) if same.metadata.generation == session.metadata.generation => return Came::Nothing,
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
