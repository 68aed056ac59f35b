//! Which cluster the demo and the end-to-end tests use: `CLUSTER=local|current|kind`.

use std::{env, path::PathBuf};

use anyhow::{Context, Result, bail};

use crate::{
    cluster::{Cluster, Extent},
    command, images, progress, tools,
};

/// A cluster that is up and has the product's images.
pub(crate) struct Target {
    pub(crate) kubeconfig: PathBuf,
    /// The API server's log of writes, where it can be had.
    pub(crate) audit_log: Option<PathBuf>,
    pub(crate) registry: String,
    pub(crate) tag: String,
    /// The cluster if it is one of ours.
    pub(crate) local: Option<Cluster>,
}

/// Makes the cluster that `CLUSTER` asks for ready; `name` is that of a local one.
pub(crate) fn prepare(name: &str, extent: Extent) -> Result<Target> {
    match env::var("CLUSTER").as_deref() {
        Err(_) | Ok("" | "local") => local(name, extent),
        Ok("current") => current(),
        Ok("kind") => {
            bail!("CLUSTER=kind is not there yet: start kind yourself, load the images, and use CLUSTER=current")
        }
        Ok(other) => bail!("CLUSTER is {other:?}: use local, current or kind"),
    }
}

fn local(name: &str, extent: Extent) -> Result<Target> {
    let archives = images::ensure()?;
    let cluster = Cluster::named(name)?;
    cluster.up(extent)?;
    progress::step("loading the images into the cluster", || cluster.load(&archives))?;
    Ok(Target {
        kubeconfig: cluster.kubeconfig(),
        audit_log: Some(cluster.audit_log()),
        registry: images::REGISTRY.to_owned(),
        tag: images::TAG.to_owned(),
        local: Some(cluster),
    })
}

/// The cluster that the user's kubectl talks to. Its nodes pull images from the user's registry.
fn current() -> Result<Target> {
    tools::ensure(tools::Group::ControlPlane)?;
    let kubeconfig = env::var_os("KUBECONFIG")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".kube/config")))
        .filter(|file| file.is_file())
        .context("CLUSTER=current needs a kubeconfig: set KUBECONFIG to one file")?;
    let mut kubectl = std::process::Command::new(tools::path("kubectl")?);
    let context = command::output(
        kubectl
            .env("KUBECONFIG", &kubeconfig)
            .args(["config", "current-context"]),
    )?;
    let registry = env::var("IMAGE_REGISTRY").unwrap_or_else(|_| images::REGISTRY.to_owned());
    let tag = env::var("IMAGE_TAG").unwrap_or_else(|_| images::TAG.to_owned());
    progress::say(&format!(
        "using the current context {}; its nodes must have or find the images {registry}/agentic-*:{tag} \
         (set IMAGE_REGISTRY and IMAGE_TAG; the Dockerfiles build them)",
        context.trim()
    ));
    Ok(Target {
        kubeconfig,
        audit_log: env::var_os("AUDIT_LOG").map(PathBuf::from),
        registry,
        tag,
        local: None,
    })
}
