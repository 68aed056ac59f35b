//! The plan's writes, in an order in which the process may die after each.

#[cfg(test)]
mod tests;

use crds::AgenticSession;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy},
    core::Status,
};
use protocol::names::{REPORT_FINALIZER, annotation, label};
use serde_json::json;

use super::{
    build,
    plan::{Drain, Plan, Target, Tuned},
    validate::Request,
};
use crate::{settings::PodSettings, writes};

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

/// What the API server does not let be done, and nothing else waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// To do what, to which object.
    pub what: String,
    /// The API server's own words.
    pub said: String,
}

/// The first refusals of a plan.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// An attempt under way is not told of what changed.
    pub untold: Option<Refusal>,
    /// What should go stays.
    pub kept: Option<Refusal>,
}

/// Carries out all of a plan but its status.
pub async fn apply(
    client: &Client,
    session: &AgenticSession,
    plan: &Plan,
    request: Option<&Request>,
    settings: &PodSettings,
) -> Result<Refusals, Error> {
    let namespace = &*session.namespace().unwrap_or_default();
    // Taken apart without `..`, so that a new member cannot be forgotten. Status and wake are others' work.
    let Plan {
        create_claim,
        create_job,
        create_drain,
        tune,
        delete,
        delete_session,
        release,
        status: _,
        wake: _,
    } = plan;
    // What goes is justified by what is recorded, and what is refused below must not keep it: it may be what fills a quota.
    let Refusals { mut untold, mut kept } = Refusals::default();
    for tuned in tune {
        untold = untold.or(refusal(self::tune(client, namespace, tuned).await)?);
    }
    for target in delete {
        let removed = match target {
            Target::Pod(name, uid) => remove::<Pod>(client, namespace, "pod", name, uid).await,
            Target::Job(name, uid) => remove::<Job>(client, namespace, "Job", name, uid).await,
        };
        kept = kept.or(refusal(removed)?);
    }
    for (name, uid) in release {
        kept = kept.or(refusal(self::release(client, namespace, name, uid).await)?);
    }
    if let Some(request) = request {
        if *create_claim {
            // One that exists already is not made.
            if let Some(claim) = build::claim(request) {
                create(client, namespace, "claim", &claim).await?;
            }
        }
        if let Some(attempt) = create_job {
            create(client, namespace, "Job", &build::job(request, *attempt, settings)).await?;
        }
        if let Some(Drain { number, attempt }) = create_drain {
            let job = build::drain(request, *number, *attempt, settings);
            create(client, namespace, "Job", &job).await.map_err(not_ours)?;
        }
    }
    // One of which something stays says so.
    if *delete_session && kept.is_none() {
        kept = kept.or(refusal(expire(client, session).await)?);
    }
    Ok(Refusals { untold, kept })
}

fn refusal(result: Result<(), Error>) -> Result<Option<Refusal>, Error> {
    match result {
        Ok(()) => Ok(None),
        Err(error) => error.refusal().map(Some).ok_or(error),
    }
}

/// Tells an attempt under way of what changed. The UID in the body makes it a write to what was seen.
async fn tune(client: &Client, namespace: &str, tuned: &Tuned) -> Result<(), Error> {
    let jobs = || Api::<Job>::namespaced(client.clone(), namespace);
    let (what, kind, name, result) = match tuned {
        Tuned::Job(name, uid, resolved) => {
            let annotations = json!({annotation::RESOLVED: build::json(resolved)});
            let patch = json!({
                "metadata": {"uid": uid, "annotations": annotations},
                "spec": {"activeDeadlineSeconds": build::deadline(resolved)},
            });
            let result = jobs().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await;
            ("change the limits of", "Job", name, result.map(drop))
        }
        Tuned::Pod(name, uid, limits) => {
            let annotations = json!({annotation::LIMITS: build::json(limits)});
            let patch = json!({"metadata": {"uid": uid, "annotations": annotations}});
            let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
            let result = pods
                .patch_metadata(name, &PatchParams::default(), &Patch::Merge(&patch))
                .await;
            ("change the limits of", "pod", name, result.map(drop))
        }
        Tuned::Queue(name, uid, queue) => {
            let labels = json!({label::KUEUE_QUEUE: queue.name, label::KUEUE_PRIORITY: queue.priority});
            let patch = Patch::Merge(json!({"metadata": {"uid": uid, "labels": labels}}));
            let result = jobs().patch_metadata(name, &PatchParams::default(), &patch).await;
            ("change the queue of", "Job", name, result.map(drop))
        }
    };
    match result {
        Ok(()) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(source) => Err(Error::Write {
            verb: what,
            kind,
            name: name.clone(),
            source: Box::new(source),
        }),
    }
}

/// Deletes the session as it was seen: one that was asked to start meanwhile stays.
async fn expire(client: &Client, session: &AgenticSession) -> Result<(), Error> {
    let name = session.name_any();
    let sessions: Api<AgenticSession> = Api::namespaced(client.clone(), &session.namespace().unwrap_or_default());
    let params = DeleteParams {
        preconditions: Some(Preconditions {
            uid: session.uid(),
            resource_version: session.resource_version(),
        }),
        propagation_policy: Some(PropagationPolicy::Background),
        ..DeleteParams::default()
    };
    match sessions.delete(&name, &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(source) => Err(Error::Write {
            verb: "delete",
            kind: "session",
            name,
            source: Box::new(source),
        }),
    }
}

/// `create`, not apply: an object of that name that is not ours must not be taken over.
pub async fn create<K>(client: &Client, namespace: &str, kind: &'static str, object: &K) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + serde::Serialize,
{
    let name = object.meta().name.clone().unwrap_or_default();
    match writes::create(client, namespace, object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_already_exists() => Err(Error::Exists { kind, name }),
        Err(kube::Error::Api(status)) if is_refusal(&status) => {
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

/// The API server's own word, and that of a webhook which cannot be asked: the API server calls that an error of its own.
fn is_refusal(status: &Status) -> bool {
    let by_webhook = status.code == 500 && status.message.contains("failed calling webhook");
    matches!(status.code, 400 | 403 | 413 | 422) || by_webhook
}

/// A drain can wait: a name that is taken is looked at again later, and our own Job of a lost answer is found then too.
fn not_ours(error: Error) -> Error {
    match error {
        Error::Exists { kind, name } => Error::Refused {
            kind,
            name,
            said: "it exists already".to_owned(),
        },
        other => other,
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
    // The Job controller puts its own finalizer behind ours, which the template has. A test that fails changes nothing.
    let first = json!([
        {"op": "test", "path": "/metadata/uid", "value": uid},
        {"op": "test", "path": "/metadata/finalizers/0", "value": REPORT_FINALIZER},
        {"op": "remove", "path": "/metadata/finalizers/0"},
    ]);
    match writes::patch_json::<Pod>(client, namespace, name, &first).await {
        Ok(()) => return Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
        // Another pod, ours not the first, or none at all.
        Err(kube::Error::Api(status)) if matches!(status.code, 400 | 422) => {}
        Err(source) => return Err(failed(source)),
    }
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
    /// A change or a deletion that the API server does not want.
    pub fn refusal(&self) -> Option<Refusal> {
        let Self::Write {
            verb,
            kind,
            name,
            source,
        } = self
        else {
            return None;
        };
        match &**source {
            kube::Error::Api(status) if is_refusal(status) => Some(Refusal {
                what: format!("{verb} {kind} {name}"),
                said: status.message.clone(),
            }),
            _ => None,
        }
    }

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
