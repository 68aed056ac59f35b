//! What happens to the children of a session, and to what it refers to.

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, ResourceQuota, Secret};
use kube::{
    Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use protocol::{Outcome, names::label};
use serde_json::{Value, json};

use super::{
    super::operation::{Edit, Happening},
    Came, NAME, Scene, came, claim_name,
};
use crate::world::report;

impl Scene {
    pub async fn happen(&self, happening: Happening) -> Came {
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

    pub async fn delete_pod(&self, force: bool) -> Came {
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

    pub async fn edit_child<K>(&self, name: &str, edit: Edit) -> Came
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

    pub async fn occupy(&self, job: bool) -> Came {
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

    pub async fn keys(&self, there: bool) -> Came {
        let api = self.api::<Secret>();
        if !there {
            return came(api.delete("git-keys", &DeleteParams::default()).await.map(drop));
        }
        let keys = json!({"metadata": {"name": "git-keys"}, "stringData": {"GITHUB_TOKEN": "ghp-fake"}});
        let keys: Secret = serde_json::from_value(keys).unwrap();
        came(api.create(&PostParams::default(), &keys).await.map(drop))
    }
}
