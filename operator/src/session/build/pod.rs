//! The pod of an attempt: `agent`, which holds no secret, beside `runner`, which holds them all.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, Container, EnvVar, LocalObjectReference, PodSecurityContext, PodSpec, ResourceRequirements,
        SeccompProfile, SecurityContext,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use protocol::names::{GRACE_PERIOD_SECONDS, container, path};

use super::{Request, environment, environment::variable, volumes};
use crate::{
    session::{plan::Attempt, validate::Claim},
    settings::{PodSettings, RunAs},
};

/// Where the init container of a user's own image sees the folder that it fills.
const FILLED: &str = "/copy";

/// The pod of an attempt.
pub(super) fn spec(request: &Request, attempt: Attempt, settings: &PodSettings) -> PodSpec {
    let copy = request.pod.image.as_ref().map(|_| copy(settings));
    let pod = &request.pod;
    let pull_secrets = pod
        .image_pull_secrets
        .iter()
        .map(|secret| LocalObjectReference { name: secret.0.clone() });
    let pull_secrets: Vec<_> = pull_secrets.collect();
    let selector: BTreeMap<_, _> = pod
        .node_selector
        .iter()
        .map(|(k, v)| (k.clone(), v.0.clone()))
        .collect();
    let tolerations: Vec<_> = pod.tolerations.iter().map(Into::into).collect();
    PodSpec {
        init_containers: Some(copy.into_iter().chain([agent(request, settings)]).collect()),
        containers: vec![runner(request, attempt, settings)],
        volumes: Some(volumes::volumes(request, settings)),
        restart_policy: Some("Never".to_owned()),
        service_account_name: pod.service_account_name.clone(),
        // Nothing in the pod speaks to the API server.
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(GRACE_PERIOD_SECONDS),
        security_context: Some(pod_security(settings.run_as_user)),
        image_pull_secrets: (!pull_secrets.is_empty()).then_some(pull_secrets),
        node_selector: (!selector.is_empty()).then_some(selector),
        tolerations: (!tolerations.is_empty()).then_some(tolerations),
        priority_class_name: pod.priority_class_name.clone(),
        runtime_class_name: pod.runtime_class_name.clone(),
        ..PodSpec::default()
    }
}

/// A native sidecar (`restartPolicy: Always`): killed for memory, it is started again in place while the runner goes on.
fn agent(request: &Request, settings: &PodSettings) -> Container {
    let environment: Vec<EnvVar> = request
        .environment
        .iter()
        .map(|(name, value)| variable(name, value))
        .collect();
    let own_image = request.pod.image.clone();
    Container {
        name: container::AGENT.to_owned(),
        image: Some(own_image.unwrap_or_else(|| settings.runner_image.clone())),
        image_pull_policy: Some(settings.image_pull_policy.as_str().to_owned()),
        // Not looked for in PATH, which is the author's.
        command: Some(vec![path::RUNNER.to_owned()]),
        args: Some(vec!["agent".to_owned()]),
        working_dir: Some("/".to_owned()),
        restart_policy: Some("Always".to_owned()),
        env: (!environment.is_empty()).then_some(environment),
        resources: Some(request.resources.clone()),
        security_context: Some(SecurityContext {
            read_only_root_filesystem: Some(request.pod.read_only_root_filesystem.unwrap_or(true)),
            ..restricted()
        }),
        volume_mounts: Some(volumes::of_agent(request)),
        ..Container::default()
    }
}

/// Brings runner and CLI to a user's own image.
fn copy(settings: &PodSettings) -> Container {
    Container {
        name: container::TOOLS.to_owned(),
        image: Some(settings.runner_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.as_str().to_owned()),
        command: Some(vec!["cp".to_owned()]),
        args: Some(vec![
            "-R".to_owned(),
            format!("{}/.", path::TOOLS),
            format!("{FILLED}/"),
        ]),
        resources: Some(ResourceRequirements {
            requests: Some(amounts([("cpu", "50m"), ("memory", "64Mi")])),
            // The page cache of what it writes counts.
            limits: Some(amounts([("memory", "512Mi")])),
            ..ResourceRequirements::default()
        }),
        security_context: Some(restricted()),
        volume_mounts: Some(volumes::of_copy(FILLED)),
        ..Container::default()
    }
}

/// A workspace on the node's disk is room that the pod takes there: it is asked for, and where the agent's disk is limited, so that the
/// limits of both are the pod's, it is added.
fn disk(request: &Request, resources: &mut ResourceRequirements) {
    let Claim::Ephemeral { size } = &request.claim else {
        return;
    };
    let name = "ephemeral-storage";
    let limits = request.resources.limits.as_ref();
    let is_limited = limits.is_some_and(|limits| limits.contains_key(name));
    let limits = is_limited.then(|| resources.limits.get_or_insert_default());
    for amounts in limits.into_iter().chain([resources.requests.get_or_insert_default()]) {
        amounts.insert(name.to_owned(), size.clone());
    }
}

fn runner(request: &Request, attempt: Attempt, settings: &PodSettings) -> Container {
    let mut resources = ResourceRequirements {
        requests: Some(amounts([("cpu", "50m"), ("memory", "64Mi")])),
        limits: Some(amounts([("memory", "512Mi")])),
        ..ResourceRequirements::default()
    };
    disk(request, &mut resources);
    Container {
        name: container::RUNNER.to_owned(),
        image: Some(settings.runner_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.as_str().to_owned()),
        command: Some(vec![path::RUNNER.to_owned()]),
        env: Some(environment::variables(request, attempt, settings)),
        env_from: Some(environment::credentials(request)),
        resources: Some(resources),
        security_context: Some(restricted()),
        termination_message_path: Some(path::TERMINATION_LOG.to_owned()),
        termination_message_policy: Some("File".to_owned()),
        volume_mounts: Some(volumes::of_runner(request, settings)),
        ..Container::default()
    }
}

fn pod_security(run_as: RunAs) -> PodSecurityContext {
    let id = match run_as {
        RunAs::User(id) => Some(id),
        RunAs::ClusterDecides => None,
    };
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: id,
        run_as_group: id,
        fs_group: id,
        // Else every start walks the whole workspace.
        fs_group_change_policy: id.map(|_| "OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".to_owned(),
            ..SeccompProfile::default()
        }),
        ..PodSecurityContext::default()
    }
}

/// What Pod Security `restricted` asks of a container, and a root that cannot be written.
fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".to_owned()]),
            ..Capabilities::default()
        }),
        read_only_root_filesystem: Some(true),
        ..SecurityContext::default()
    }
}

fn amounts<const N: usize>(amounts: [(&str, &str); N]) -> BTreeMap<String, Quantity> {
    amounts
        .into_iter()
        .map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::session::{
        build::job::tests::{SECOND, settings},
        validate::tests::checked,
    };

    #[rstest]
    #[case::on_a_claim(false, json!({}), None, None)]
    #[case::on_the_node(true, json!({}), Some("7Gi"), None)]
    #[case::beside_an_agent_with_a_limit(true, json!({"limits": {"ephemeral-storage": "2Gi"}}), Some("7Gi"), Some("7Gi"))]
    fn a_workspace_on_the_nodes_disk_is_asked_for_and_is_not_taken_from_the_agents_limit(
        #[case] ephemeral: bool,
        #[case] resources: serde_json::Value,
        #[case] request: Option<&str>,
        #[case] limit: Option<&str>,
    ) {
        let spec = json!({"prompt": "p", "workspace": {"ephemeral": ephemeral, "size": "7Gi"}, "resources": resources});
        let pod = spec_of(&checked(spec).unwrap());
        let resources = pod.containers[0].resources.clone().unwrap();
        let disk = |amounts: &Option<BTreeMap<String, Quantity>>| {
            let found = amounts.as_ref().and_then(|amounts| amounts.get("ephemeral-storage"));
            found.map(|amount| amount.0.clone())
        };
        assert_eq!(
            (disk(&resources.requests).as_deref(), disk(&resources.limits).as_deref()),
            (request, limit)
        );
    }

    fn spec_of(request: &Request) -> PodSpec {
        super::spec(request, SECOND, &settings())
    }
}
