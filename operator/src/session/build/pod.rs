//! The pod of an attempt: `agent`, which holds no secret, beside `runner`, which holds them all.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapEnvSource, Container, DownwardAPIVolumeFile, DownwardAPIVolumeSource,
        EmptyDirVolumeSource, EnvFromSource, EnvVar, EnvVarSource, ObjectFieldSelector,
        PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, ProjectedVolumeSource, ResourceRequirements,
        SeccompProfile, SecretEnvSource, SecurityContext, ServiceAccountTokenProjection, Volume, VolumeMount,
        VolumeProjection,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use protocol::{
    names::{
        GATEWAY_AUDIENCE, GRACE_PERIOD_SECONDS, LANGFUSE_CONFIG, LANGFUSE_KEYS, RUNNER_SECRETS, annotation, container,
        env, path,
    },
    spec::AgenticSpec,
};

use super::{Request, claim_name, job::json};
use crate::{
    session::decide::Attempt,
    settings::{PodSettings, RunAs},
};

/// The program of both containers, found by the image's `PATH`.
const RUNNER: &str = "runner";
const CLAIM: &str = "workspace";
const SHIM: &str = "shim";
const HOME: &str = "home";
const CONFIG: &str = "config";
const TMP: &str = "tmp";
const PRIVATE: &str = "private";
const LIMITS: &str = "limits";
const TOKEN: &str = "gateway-token";
/// The kubelet renews a projected token when a fifth of its time is left.
const TOKEN_SECONDS: i64 = 3_600;

/// The pod of an attempt.
pub(super) fn spec(request: &Request, attempt: Attempt, settings: &PodSettings) -> PodSpec {
    PodSpec {
        init_containers: Some(vec![agent(request, settings)]),
        containers: vec![runner(request, attempt, settings)],
        volumes: Some(volumes(request, settings)),
        restart_policy: Some("Never".to_owned()),
        // Nothing in the pod speaks to the API server.
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(GRACE_PERIOD_SECONDS),
        security_context: Some(pod_security(settings.run_as_user)),
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
    Container {
        name: container::AGENT.to_owned(),
        image: Some(settings.runner_image.clone()),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        command: Some(vec![RUNNER.to_owned()]),
        args: Some(vec!["agent".to_owned()]),
        restart_policy: Some("Always".to_owned()),
        env: (!environment.is_empty()).then_some(environment),
        resources: Some(request.resources.clone()),
        security_context: Some(restricted()),
        volume_mounts: Some(vec![
            mount(SHIM, path::SHIM_DIR),
            folder_of_claim(path::WORKSPACE, path::workspace_dir(&request.uid)),
            mount(HOME, path::AGENT_HOME),
            // A volume of its own: the runtime would make the folder between two mounts, for root.
            mount(CONFIG, path::CLAUDE_CONFIG),
            folder_of_claim(path::CLAUDE_PROJECTS, path::transcripts_dir(&request.uid)),
            mount(TMP, "/tmp"),
        ]),
        ..Container::default()
    }
}

fn runner(request: &Request, attempt: Attempt, settings: &PodSettings) -> Container {
    let mut mounts = vec![
        mount(SHIM, path::SHIM_DIR),
        mount(CLAIM, path::DATA),
        mount(PRIVATE, path::PRIVATE),
        read_only(LIMITS, parent(path::LIMITS)),
    ];
    if settings.gateway().is_some() {
        mounts.push(read_only(TOKEN, parent(path::GATEWAY_TOKEN)));
    }
    Container {
        name: container::RUNNER.to_owned(),
        image: Some(settings.runner_image.clone()),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        command: Some(vec![RUNNER.to_owned()]),
        env: Some(environment(request, attempt, settings)),
        env_from: Some(credentials()),
        resources: Some(ResourceRequirements {
            requests: Some(amounts([("cpu", "50m"), ("memory", "64Mi")])),
            limits: Some(amounts([("memory", "512Mi")])),
            ..ResourceRequirements::default()
        }),
        security_context: Some(restricted()),
        termination_message_path: Some(path::TERMINATION_LOG.to_owned()),
        termination_message_policy: Some("File".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

fn environment(request: &Request, attempt: Attempt, settings: &PodSettings) -> Vec<EnvVar> {
    let spec = AgenticSpec {
        run: attempt.run,
        used_seconds: attempt.used_seconds,
        user: request.user.clone(),
        ..AgenticSpec::default()
    };
    let mut variables = vec![
        variable(env::PROMPT, &request.prompt),
        variable(env::SESSION_ID, &request.name),
        variable(env::AGENTIC_SESSION_NAME, &request.name),
        variable(env::AGENTIC_SESSION_NAMESPACE, &request.namespace),
        variable(env::AGENTIC_SESSION_UID, &request.uid),
        variable(env::ATTEMPT, &attempt.number.to_string()),
        variable(env::TIMEOUT, &request.timeout.to_string()),
        variable(env::WORKSPACE_PATH, path::WORKSPACE),
        variable(env::AGENTIC_SPEC_JSON, &json(&spec)),
        EnvVar {
            name: env::POD_UID.to_owned(),
            value_from: Some(EnvVarSource {
                field_ref: Some(field("metadata.uid")),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        },
    ];
    variables.extend(request.model.as_ref().map(|model| variable(env::LLM_MODEL, model)));
    if let Some(base) = settings.gateway() {
        let base = base.trim_end_matches('/');
        let url = format!("{base}/api/projects/{}/sessions/{}/ws", request.namespace, request.name);
        variables.push(variable(env::WEBSOCKET_URL, &url));
        variables.push(variable(env::GATEWAY_TOKEN_FILE, path::GATEWAY_TOKEN));
    }
    variables
}

/// The kubelet reads `$(NAME)` in values and halves `$$`: doubled, every `$` arrives as it was written.
fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: Some(value.replace('$', "$$")),
        ..EnvVar::default()
    }
}

/// All optional: which of them a session needs, the runner says itself when one is missing.
fn credentials() -> Vec<EnvFromSource> {
    let secret = |name: &str| EnvFromSource {
        secret_ref: Some(SecretEnvSource {
            name: name.to_owned(),
            optional: Some(true),
        }),
        ..EnvFromSource::default()
    };
    let config = EnvFromSource {
        config_map_ref: Some(ConfigMapEnvSource {
            name: LANGFUSE_CONFIG.to_owned(),
            optional: Some(true),
        }),
        ..EnvFromSource::default()
    };
    // Of two that set a name, the later counts: the admin's own Secret has the last word.
    let mut sources = vec![config, secret(LANGFUSE_KEYS)];
    sources.extend(RUNNER_SECRETS.iter().rev().map(|name| secret(name)));
    sources
}

fn volumes(request: &Request, settings: &PodSettings) -> Vec<Volume> {
    let mut volumes = vec![
        Volume {
            name: CLAIM.to_owned(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(&request.name),
                ..PersistentVolumeClaimVolumeSource::default()
            }),
            ..Volume::default()
        },
        Volume {
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some("Memory".to_owned()),
                size_limit: Some(Quantity("1Mi".to_owned())),
                ..EmptyDirVolumeSource::default()
            }),
            name: SHIM.to_owned(),
            ..Volume::default()
        },
    ];
    volumes.extend([HOME, CONFIG, TMP, PRIVATE].map(|name| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    }));
    volumes.push(Volume {
        name: LIMITS.to_owned(),
        downward_api: Some(DownwardAPIVolumeSource {
            items: Some(vec![DownwardAPIVolumeFile {
                path: file_name(path::LIMITS).to_owned(),
                field_ref: Some(field(&format!("metadata.annotations['{}']", annotation::LIMITS))),
                ..DownwardAPIVolumeFile::default()
            }]),
            ..DownwardAPIVolumeSource::default()
        }),
        ..Volume::default()
    });
    volumes.extend(settings.gateway().map(|_| token()));
    volumes
}

/// Good for the gateway only, and only as long as the pod lives.
fn token() -> Volume {
    Volume {
        name: TOKEN.to_owned(),
        projected: Some(ProjectedVolumeSource {
            sources: Some(vec![VolumeProjection {
                service_account_token: Some(ServiceAccountTokenProjection {
                    audience: Some(GATEWAY_AUDIENCE.to_owned()),
                    expiration_seconds: Some(TOKEN_SECONDS),
                    path: file_name(path::GATEWAY_TOKEN).to_owned(),
                    ..ServiceAccountTokenProjection::default()
                }),
                ..VolumeProjection::default()
            }]),
            ..ProjectedVolumeSource::default()
        }),
        ..Volume::default()
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

fn mount(volume: &str, at: &str) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: at.to_owned(),
        ..VolumeMount::default()
    }
}

fn read_only(volume: &str, at: &str) -> VolumeMount {
    VolumeMount {
        read_only: Some(true),
        ..mount(volume, at)
    }
}

fn folder_of_claim(at: &str, folder: String) -> VolumeMount {
    VolumeMount {
        sub_path: Some(folder),
        ..mount(CLAIM, at)
    }
}

fn field(path: &str) -> ObjectFieldSelector {
    ObjectFieldSelector {
        field_path: path.to_owned(),
        ..ObjectFieldSelector::default()
    }
}

fn parent(file: &str) -> &str {
    file.rsplit_once('/').map_or("/", |(folder, _)| folder)
}

fn file_name(file: &str) -> &str {
    file.rsplit_once('/').map_or(file, |(_, name)| name)
}
