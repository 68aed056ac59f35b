//! `agentic-operator uninstall`: what the chart's pre-delete hook runs.
//!
//! Without it, a pod that is deleted after the operator has gone would stay for ever: nobody takes the report finalizer off.
//! The operator is stopped first, or it would make the next attempts of the sessions that are stopped here.

#[cfg(test)]
mod tests;

use std::time::Duration;

use k8s_openapi::api::{
    apps::v1::Deployment, batch::v1::Job, coordination::v1::Lease, core::v1::Pod, networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions},
    core::{ObjectMeta, PartialObjectMeta},
};
use protocol::names::{REPORT_FINALIZER, label};
use serde_json::json;
use tokio::time::Instant;

use crate::{context::PAGE, network};

/// How often pods are looked at while they end: at first, and at last.
const POLL: Duration = Duration::from_millis(500);
const LONGEST_POLL: Duration = Duration::from_secs(5);

/// What to uninstall.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Namespace of the operator.
    #[arg(long, env = "POD_NAMESPACE")]
    pub namespace: String,
    /// Name of the operator's Deployment and Lease.
    #[arg(long, env = "OPERATOR_DEPLOYMENT", default_value = "agentic-operator")]
    pub deployment: String,
    /// Label selector of the operator's own pods.
    #[arg(
        long,
        env = "OPERATOR_SELECTOR",
        default_value = "app.kubernetes.io/name=agentic-operator"
    )]
    pub selector: String,
    /// The one namespace with sessions; all namespaces when absent.
    #[arg(long, env = "WATCH_NAMESPACE")]
    pub watch_namespace: Option<String>,
    /// Seconds to wait for pods to end. Then their finalizer is taken off all the same: nobody else will.
    #[arg(long = "timeout", env = "UNINSTALL_TIMEOUT", default_value_t = 180)]
    pub timeout_seconds: u64,
}

impl Args {
    /// `None` stands for all namespaces.
    fn scope(&self) -> Option<&str> {
        self.watch_namespace.as_deref().filter(|name| !name.is_empty())
    }
}

/// Why sessions could not be taken back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operator's Deployment could not be scaled.
    #[error("failed to scale Deployment {name} to 0; check the role of the uninstall hook")]
    Scale {
        /// Name of the Deployment.
        name: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// Objects could not be listed.
    #[error("failed to list {what}; check the role of the uninstall hook")]
    List {
        /// What was listed.
        what: &'static str,
        /// What the API server said.
        source: kube::Error,
    },
    /// An object could not be deleted.
    #[error("failed to delete {what}; delete it by hand and uninstall again")]
    Delete {
        /// Kind, namespace and name.
        what: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// A pod could not be freed.
    #[error("failed to take finalizer {REPORT_FINALIZER} off pod {pod}; take it off by hand and uninstall again")]
    Free {
        /// Namespace and name.
        pod: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// The operator did not end.
    #[error("failed to stop the operator: pods {pods} still run; delete them and uninstall again")]
    OperatorRuns {
        /// Names of the pods.
        pods: String,
    },
}

/// Stops the operator, deletes the unfinished Jobs of sessions, waits for their pods and frees all pods of sessions.
pub async fn run(client: Client, args: Args) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(args.timeout_seconds);
    stop_operator(&client, &args, deadline).await?;
    delete_unfinished_jobs(&client, args.scope()).await?;
    free_pods(&client, &args, deadline).await?;
    delete_policies(&client, args.scope()).await?;
    delete_lease(&client, &args).await
}

async fn stop_operator(client: &Client, args: &Args, deadline: Instant) -> Result<(), Error> {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), &args.namespace);
    let replicas = Patch::Merge(json!({"spec": {"replicas": 0}}));
    match deployments
        .patch_scale(&args.deployment, &PatchParams::default(), &replicas)
        .await
    {
        Err(error) if !is_not_found(&error) => {
            return Err(Error::Scale {
                name: args.deployment.clone(),
                source: error,
            });
        }
        _ => tracing::info!(deployment = args.deployment, "scaled to 0"),
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), &args.namespace);
    let ours = ListParams::default().labels(&args.selector);
    loop {
        let running = list(&pods, &ours, "the operator's pods", |pod| {
            (!is_over(&pod)).then(|| pod.name_any())
        });
        let running = running.await?;
        if running.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let pods = running.join(", ");
            return Err(Error::OperatorRuns { pods });
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn delete_unfinished_jobs(client: &Client, scope: Option<&str>) -> Result<(), Error> {
    // Others may call themselves managed by us; nobody else names a session by its UID.
    let ours = ListParams::default().labels(&format!(
        "{}={},{}",
        label::MANAGED_BY,
        label::MANAGER,
        label::SESSION_UID
    ));
    let jobs = api::<Job>(client, scope);
    let unfinished = list(&jobs, &ours, "Jobs of sessions", |job| {
        let live = !is_finished(&job) && job.metadata.deletion_timestamp.is_none();
        live.then(|| (job.namespace().unwrap_or_default(), job.name_any(), job.uid()))
    });
    for (namespace, name, uid) in unfinished.await? {
        let this_one = DeleteParams {
            preconditions: Some(Preconditions {
                uid,
                resource_version: None,
            }),
            ..DeleteParams::background()
        };
        match Api::<Job>::namespaced(client.clone(), &namespace)
            .delete(&name, &this_one)
            .await
        {
            Ok(_) => tracing::info!(namespace, job = name, "deleted"),
            // Gone, or replaced by somebody else's of the same name.
            Err(error) if is_not_found(&error) || is_conflict(&error) => {}
            Err(source) => {
                return Err(Error::Delete {
                    what: format!("Job {namespace}/{name}"),
                    source,
                });
            }
        }
    }
    Ok(())
}

/// A pod that our finalizer holds. Of sessions there may be many, and each pod of one is some hundred KiB: no more of it is kept.
struct Held {
    namespace: String,
    name: String,
    meta: ObjectMeta,
    over: bool,
}

impl Held {
    fn of(pod: &Pod) -> Option<Self> {
        finalizers_without_ours(&pod.metadata).map(|others| Self {
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            meta: ObjectMeta {
                uid: pod.uid(),
                resource_version: pod.resource_version(),
                finalizers: Some(others),
                ..ObjectMeta::default()
            },
            over: is_over(pod),
        })
    }
}

/// Frees each pod of a session when it has ended, and whatever is left at the deadline.
async fn free_pods(client: &Client, args: &Args, deadline: Instant) -> Result<(), Error> {
    let labelled = ListParams::default().labels(label::SESSION_UID);
    free_these(client, &api(client, args.scope()), &labelled, deadline).await?;
    // Somebody may have taken the label off: the finalizer is what holds a pod. All pods of a cluster are read once, and in part.
    let everything: Api<PartialObjectMeta<Pod>> = api(client, args.scope());
    let all = ListParams::default().limit(METADATA_PAGE);
    let held = list(&everything, &all, "pods", |pod| {
        finalizers_without_ours(&pod.metadata)?;
        Some((pod.namespace().unwrap_or_default(), pod.name_any()))
    });
    for (namespace, name) in held.await? {
        let this_one = ListParams::default().fields(&format!("metadata.name={name}"));
        let pods = Api::namespaced(client.clone(), &namespace);
        free_these(client, &pods, &this_one, deadline).await?;
    }
    Ok(())
}

async fn free_these(client: &Client, pods: &Api<Pod>, which: &ListParams, deadline: Instant) -> Result<(), Error> {
    let mut poll = POLL;
    loop {
        let late = Instant::now() >= deadline;
        let mut waiting = 0_usize;
        for pod in list(pods, which, "pods", |pod| Held::of(&pod)).await? {
            if !pod.over && late {
                tracing::warn!(
                    namespace = pod.namespace,
                    pod = pod.name,
                    "still not ended; its node may be lost"
                );
            }
            let free = (pod.over || late) && free(client, &pod).await?;
            waiting += usize::from(!free);
        }
        if waiting == 0 {
            return Ok(());
        }
        tracing::info!(waiting, "pods of sessions are ending");
        tokio::time::sleep(poll).await;
        poll = (poll * 2).min(LONGEST_POLL);
    }
}

/// Takes our finalizer off. `false`: the pod has changed meanwhile, look again.
async fn free(client: &Client, pod: &Held) -> Result<bool, Error> {
    // With its version, so that a finalizer that somebody adds at this moment is not lost.
    let patch = json!({"metadata": pod.meta});
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    match pods
        .patch_metadata(&pod.name, &PatchParams::default(), &Patch::Merge(patch))
        .await
    {
        Ok(_) => Ok(true),
        Err(error) if is_not_found(&error) => Ok(true),
        Err(error) if is_conflict(&error) => Ok(false),
        Err(source) => Err(Error::Free {
            pod: format!("{}/{}", pod.namespace, pod.name),
            source,
        }),
    }
}

/// The pods that they were for have ended.
async fn delete_policies(client: &Client, scope: Option<&str>) -> Result<(), Error> {
    let of_our_name = ListParams::default().fields(&format!("metadata.name={}", network::NAME));
    let policies = list(
        &api::<NetworkPolicy>(client, scope),
        &of_our_name,
        "NetworkPolicies of sessions",
        Some,
    )
    .await?;
    for policy in policies.iter().filter(|policy| network::is_ours(policy)) {
        let namespace = policy.namespace().unwrap_or_default();
        let policies: Api<NetworkPolicy> = Api::namespaced(client.clone(), &namespace);
        let as_seen = DeleteParams {
            preconditions: Some(Preconditions {
                uid: policy.uid(),
                resource_version: policy.resource_version(),
            }),
            ..DeleteParams::default()
        };
        match policies.delete(network::NAME, &as_seen).await {
            Err(error) if !is_not_found(&error) && !is_conflict(&error) => {
                return Err(Error::Delete {
                    what: format!("NetworkPolicy {namespace}/{}", network::NAME),
                    source: error,
                });
            }
            _ => tracing::info!(namespace, policy = network::NAME, "deleted"),
        }
    }
    Ok(())
}

async fn delete_lease(client: &Client, args: &Args) -> Result<(), Error> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), &args.namespace);
    match leases.delete(&args.deployment, &DeleteParams::default()).await {
        Err(error) if !is_not_found(&error) => Err(Error::Delete {
            what: format!("Lease {}/{}", args.namespace, args.deployment),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// `None` stands for all namespaces.
fn api<K>(client: &Client, scope: Option<&str>) -> Api<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    match scope {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Objects a page of which metadata alone is read.
const METADATA_PAGE: u32 = 500;

/// What `take` keeps of objects, page by page: their templates hold prompts, and all of them together would not fit the memory.
async fn list<K, T>(
    api: &Api<K>,
    parameters: &ListParams,
    what: &'static str,
    take: impl Fn(K) -> Option<T>,
) -> Result<Vec<T>, Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let mut parameters = parameters.clone();
    parameters.limit.get_or_insert(PAGE);
    let mut taken = Vec::new();
    loop {
        let page = api
            .list(&parameters)
            .await
            .map_err(|source| Error::List { what, source })?;
        taken.extend(page.items.into_iter().filter_map(&take));
        parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if parameters.continue_token.is_none() {
            return Ok(taken);
        }
    }
}

/// A pod that has ended, or was deleted before a node took it and so never starts.
fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    matches!(phase, Some("Succeeded" | "Failed")) || (pod.meta().deletion_timestamp.is_some() && node.is_none())
}

fn is_finished(job: &Job) -> bool {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|c| matches!(c.type_.as_str(), "Complete" | "Failed") && c.status == "True")
}

/// The finalizers that a pod keeps. `None`: ours is not among them.
fn finalizers_without_ours(pod: &ObjectMeta) -> Option<Vec<String>> {
    let finalizers = pod.finalizers.iter().flatten().cloned();
    let (ours, others): (Vec<_>, Vec<_>) = finalizers.partition(|finalizer| finalizer == REPORT_FINALIZER);
    (!ours.is_empty()).then_some(others)
}

fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
