//! The plan's writes, in an order in which the process may die after each.

use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy},
};
use protocol::names::REPORT_FINALIZER;
use serde_json::json;

use super::{
    build,
    decide::{Attempt, Plan, Target},
    validate::Request,
};
use crate::settings::PodSettings;

/// A write that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused it or could not be reached.
    #[error("failed to {verb} {kind} {name}")]
    Write {
        /// What was tried.
        verb: &'static str,
        /// On what.
        kind: &'static str,
        /// Of which name.
        name: String,
        /// Why not.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server does not want it: quota, admission, or a value that it cannot take. Trying again at once does not help.
    #[error("failed to create {kind} {name}: the API server refuses it: {said}")]
    Refused {
        /// Of what.
        kind: &'static str,
        /// Which.
        name: String,
        /// The API server's own words.
        said: String,
    },
    /// The name was taken between observing and writing: to be observed again.
    #[error("failed to create {kind} {name}: it exists by now")]
    Exists {
        /// Of what.
        kind: &'static str,
        /// Which.
        name: String,
    },
}

/// Carries out all of a plan but its status.
pub async fn apply(
    client: &Client,
    namespace: &str,
    plan: &Plan,
    request: Option<&Request>,
    settings: &PodSettings,
) -> Result<(), Error> {
    // Taken apart without `..`, so that a new member cannot be forgotten. Status and wake are others' work.
    let Plan {
        create_claim,
        create_job,
        delete,
        release,
        status: _,
        wake: _,
    } = plan;
    if let Some(request) = request {
        if *create_claim {
            create(client, namespace, "claim", &build::claim(request)).await?;
        }
        if let Some(attempt) = create_job {
            begin(client, namespace, request, *attempt, settings).await?;
        }
    }
    for target in delete {
        match target {
            Target::Pod(name, uid) => remove::<Pod>(client, namespace, "pod", name, uid).await?,
            Target::Job(name, uid) => remove::<Job>(client, namespace, "Job", name, uid).await?,
        }
    }
    for (name, uid) in release {
        self::release(client, namespace, name, uid).await?;
    }
    Ok(())
}

async fn begin(
    client: &Client,
    namespace: &str,
    request: &Request,
    attempt: Attempt,
    settings: &PodSettings,
) -> Result<(), Error> {
    create(client, namespace, "Job", &build::job(request, attempt, settings)).await
}

/// `create`, not apply: an object of that name that is not ours must not be taken over.
async fn create<K>(client: &Client, namespace: &str, kind: &'static str, object: &K) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::Serialize
        + serde::de::DeserializeOwned,
{
    let name = object.meta().name.clone().unwrap_or_default();
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    match api.create(&PostParams::default(), object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_already_exists() => Err(Error::Exists { kind, name }),
        Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 422) => {
            let said = status.message;
            Err(Error::Refused { kind, name, said })
        }
        Err(source) => Err(Error::Write {
            verb: "create",
            kind,
            name,
            source: Box::new(source),
        }),
    }
}

/// Deletes what was seen and nothing else: the UID is a precondition. Gone or replaced is done.
async fn remove<K>(client: &Client, namespace: &str, kind: &'static str, name: &str, uid: &str) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let params = DeleteParams {
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            ..Preconditions::default()
        }),
        // A Job's own default leaves its pods behind.
        propagation_policy: Some(PropagationPolicy::Background),
        ..DeleteParams::default()
    };
    match api.delete(name, &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(source) => Err(Error::Write {
            verb: "delete",
            kind,
            name: name.to_owned(),
            source: Box::new(source),
        }),
    }
}

/// Takes our finalizer off a pod. Others' finalizers stay, whatever changes meanwhile.
pub async fn release(client: &Client, namespace: &str, name: &str, uid: &str) -> Result<(), Error> {
    let failed = |source| Error::Write {
        verb: "release the report of",
        kind: "pod",
        name: name.to_owned(),
        source: Box::new(source),
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let Some(pod) = pods.get_metadata_opt(name).await.map_err(failed)? else {
        return Ok(());
    };
    let finalizers = pod.metadata.finalizers.unwrap_or_default();
    if pod.metadata.uid.as_deref() != Some(uid) || !finalizers.iter().any(|f| f == REPORT_FINALIZER) {
        return Ok(());
    }
    let others: Vec<_> = finalizers.into_iter().filter(|f| f != REPORT_FINALIZER).collect();
    // The version makes it a write to exactly what was read; else the API server refuses with 409.
    let patch = json!({"metadata": {"resourceVersion": pod.metadata.resource_version, "finalizers": others}});
    match pods
        .patch_metadata(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(source) => Err(failed(source)),
    }
}

impl Error {
    /// Somebody was faster: observing again settles it.
    pub fn is_race(&self) -> bool {
        match self {
            Self::Exists { .. } => true,
            Self::Refused { .. } => false,
            Self::Write { source, .. } => {
                matches!(&**source, kube::Error::Api(status) if status.is_conflict())
            }
        }
    }
}
