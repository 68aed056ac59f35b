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
};
use protocol::names::{REPORT_FINALIZER, label};
use serde_json::json;
use tokio::time::Instant;

use crate::network;

/// How often pods are looked at while they end.
const POLL: Duration = Duration::from_millis(500);

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
        let running: Vec<_> = list(&pods, &ours, "the operator's pods")
            .await?
            .into_iter()
            .filter(|p| !is_over(p))
            .collect();
        if running.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let pods = running.iter().map(Pod::name_any).collect::<Vec<_>>().join(", ");
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
    for job in list(&api::<Job>(client, scope), &ours, "Jobs of sessions").await? {
        if is_finished(&job) || job.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let namespace = job.namespace().unwrap_or_default();
        let name = job.name_any();
        let this_one = DeleteParams {
            preconditions: Some(Preconditions {
                uid: job.uid(),
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

/// Frees each pod of a session when it has ended, and whatever is left at the deadline.
async fn free_pods(client: &Client, args: &Args, deadline: Instant) -> Result<(), Error> {
    loop {
        let late = Instant::now() >= deadline;
        let mut waiting = 0_usize;
        // Not by a label, which somebody may have taken off: the finalizer is what holds a pod.
        let pods = list(&api::<Pod>(client, args.scope()), &ListParams::default(), "pods").await?;
        for pod in pods.into_iter().filter(|pod| finalizers_without_ours(pod).is_some()) {
            let over = is_over(&pod);
            if !over && late {
                let (namespace, pod) = (pod.namespace().unwrap_or_default(), pod.name_any());
                tracing::warn!(namespace, pod, "still not ended; its node may be lost");
            }
            let free = (over || late) && free(client, &pod).await?;
            waiting += usize::from(!free);
        }
        if waiting == 0 {
            return Ok(());
        }
        tracing::info!(waiting, "pods of sessions are ending");
        tokio::time::sleep(POLL).await;
    }
}

/// Takes our finalizer off. `false`: the pod has changed meanwhile, look again.
async fn free(client: &Client, pod: &Pod) -> Result<bool, Error> {
    let Some(finalizers) = finalizers_without_ours(pod) else {
        return Ok(true);
    };
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    // With its version, so that a finalizer that somebody adds at this moment is not lost.
    let patch = json!({"metadata": {
        "uid": pod.uid(), "resourceVersion": pod.resource_version(), "finalizers": finalizers,
    }});
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    match pods.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(true),
        Err(error) if is_not_found(&error) => Ok(true),
        Err(error) if is_conflict(&error) => Ok(false),
        Err(source) => Err(Error::Free {
            pod: format!("{namespace}/{name}"),
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

/// Objects a page. A session's pod may have some hundred KiB.
const PAGE: u32 = 100;

async fn list<K>(api: &Api<K>, parameters: &ListParams, what: &'static str) -> Result<Vec<K>, Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let mut parameters = parameters.clone().limit(PAGE);
    let mut items = Vec::new();
    loop {
        let page = api
            .list(&parameters)
            .await
            .map_err(|source| Error::List { what, source })?;
        items.extend(page.items);
        parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if parameters.continue_token.is_none() {
            return Ok(items);
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
fn finalizers_without_ours(pod: &Pod) -> Option<Vec<String>> {
    let (ours, others): (Vec<_>, Vec<_>) = pod
        .finalizers()
        .iter()
        .cloned()
        .partition(|finalizer| finalizer == REPORT_FINALIZER);
    (!ours.is_empty()).then_some(others)
}

fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
