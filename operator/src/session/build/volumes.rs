//! Volumes of a session's pod, and where its containers see them.

use k8s_openapi::{
    api::core::v1::{
        DownwardAPIVolumeFile, DownwardAPIVolumeSource, EmptyDirVolumeSource, KeyToPath, ObjectFieldSelector,
        PersistentVolumeClaimVolumeSource, ProjectedVolumeSource, SecretProjection, SecretVolumeSource,
        ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use protocol::names::{GATEWAY_AUDIENCE, annotation, path};

use super::{Request, own_claim_name};
use crate::{session::validate::Claim, settings::PodSettings};

const CLAIM: &str = "workspace";
const SHIM: &str = "shim";
const HOME: &str = "home";
const CONFIG: &str = "config";
const TMP: &str = "tmp";
const PRIVATE: &str = "private";
const LIMITS: &str = "limits";
const TOKEN: &str = "gateway-token";
const MCP: &str = "mcp-credentials";
const TOOLS: &str = "tools";
/// The kubelet renews a projected token when a fifth of its time is left.
const TOKEN_SECONDS: i64 = 3_600;

/// What the agent container sees. Nothing of it holds a secret.
pub fn of_agent(request: &Request) -> Vec<VolumeMount> {
    let workspace = match &request.claim {
        Claim::Own { .. } | Claim::Ephemeral { .. } => path::workspace_dir(&request.uid),
        Claim::Existing(_) => path::SHARED_WORKSPACE.to_owned(),
    };
    let mut mounts = vec![
        mount(SHIM, path::SHIM_DIR),
        folder_of_claim(path::WORKSPACE, workspace),
        mount(HOME, path::AGENT_HOME),
        // A volume of its own: the runtime would make the folder between two mounts, for root.
        mount(CONFIG, path::CLAUDE_CONFIG),
        folder_of_claim(path::CLAUDE_PROJECTS, path::transcripts_dir(&request.uid)),
        mount(TMP, "/tmp"),
    ];
    if request.pod.image.is_some() {
        mounts.push(read_only(TOOLS, path::TOOLS));
    }
    mounts
}

/// What the runner container sees.
pub fn of_runner(request: &Request, settings: &PodSettings) -> Vec<VolumeMount> {
    let mut mounts = vec![
        mount(SHIM, path::SHIM_DIR),
        mount(CLAIM, path::DATA),
        mount(PRIVATE, path::PRIVATE),
        read_only(LIMITS, parent(path::LIMITS)),
    ];
    if settings.gateway().is_some() {
        mounts.push(read_only(TOKEN, parent(path::GATEWAY_TOKEN)));
    }
    for (at, secret) in request.secrets.iter().enumerate() {
        mounts.push(read_only(
            &secret_volume(at),
            &format!("{}/{}", path::SECRETS, secret.name),
        ));
    }
    if !request.mcp_secrets.is_empty() {
        mounts.push(read_only(MCP, path::MCP_CREDENTIALS));
    }
    mounts
}

/// Where the init container that copies runner and CLI puts them.
pub fn of_copy(at: &str) -> Vec<VolumeMount> {
    vec![mount(TOOLS, at)]
}

/// The volumes.
pub fn volumes(request: &Request, settings: &PodSettings) -> Vec<Volume> {
    let mut volumes = vec![
        data(request),
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
    let tools = request.pod.image.as_ref().map(|_| TOOLS);
    let folders = [HOME, CONFIG, TMP, PRIVATE].into_iter().chain(tools);
    volumes.extend(folders.map(|name| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    }));
    volumes.push(limits());
    volumes.extend(settings.gateway().map(|_| token()));
    volumes.extend(request.secrets.iter().enumerate().map(|(at, secret)| Volume {
        name: secret_volume(at),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.name.clone()),
            // One that must exist is asked for as environment too, where the kubelet says more clearly that it does not.
            optional: Some(true),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }));
    if !request.mcp_secrets.is_empty() {
        volumes.push(mcp_credentials(request));
    }
    volumes
}

/// Workspace, conversation and spool.
fn data(request: &Request) -> Volume {
    let claimed = |claim_name| Volume {
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name,
            ..PersistentVolumeClaimVolumeSource::default()
        }),
        ..Volume::default()
    };
    let volume = match &request.claim {
        Claim::Own { .. } => claimed(own_claim_name(&request.name)),
        Claim::Existing(name) => claimed(name.clone()),
        Claim::Ephemeral { size } => Volume {
            empty_dir: Some(EmptyDirVolumeSource {
                size_limit: Some(size.clone()),
                ..EmptyDirVolumeSource::default()
            }),
            ..Volume::default()
        },
    };
    Volume {
        name: CLAIM.to_owned(),
        ..volume
    }
}

/// The annotation on the pod as a file that follows its changes.
fn limits() -> Volume {
    Volume {
        name: LIMITS.to_owned(),
        downward_api: Some(DownwardAPIVolumeSource {
            items: Some(vec![DownwardAPIVolumeFile {
                path: file_name(path::LIMITS).to_owned(),
                field_ref: Some(ObjectFieldSelector {
                    field_path: format!("metadata.annotations['{}']", annotation::LIMITS),
                    ..ObjectFieldSelector::default()
                }),
                ..DownwardAPIVolumeFile::default()
            }]),
            ..DownwardAPIVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// Good for the gateway only, and only as long as the pod lives.
fn token() -> Volume {
    projected(
        TOKEN,
        vec![VolumeProjection {
            service_account_token: Some(ServiceAccountTokenProjection {
                audience: Some(GATEWAY_AUDIENCE.to_owned()),
                expiration_seconds: Some(TOKEN_SECONDS),
                path: file_name(path::GATEWAY_TOKEN).to_owned(),
                ..ServiceAccountTokenProjection::default()
            }),
            ..VolumeProjection::default()
        }],
    )
}

/// A file for each credential that the session uses, and nothing else of their Secrets.
fn mcp_credentials(request: &Request) -> Volume {
    let file = |found: &crate::session::mcp::McpSecret| VolumeProjection {
        secret: Some(SecretProjection {
            name: found.secret.clone(),
            items: Some(vec![KeyToPath {
                key: found.key.clone(),
                path: found.credential.clone(),
                ..KeyToPath::default()
            }]),
            optional: Some(false),
        }),
        ..VolumeProjection::default()
    };
    projected(MCP, request.mcp_secrets.iter().map(file).collect())
}

fn projected(name: &str, sources: Vec<VolumeProjection>) -> Volume {
    Volume {
        name: name.to_owned(),
        projected: Some(ProjectedVolumeSource {
            sources: Some(sources),
            ..ProjectedVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// Names of Secrets may be longer than those of volumes.
fn secret_volume(at: usize) -> String {
    format!("secret-{at}")
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

fn parent(file: &str) -> &str {
    file.rsplit_once('/').map_or("/", |(folder, _)| folder)
}

fn file_name(file: &str) -> &str {
    file.rsplit_once('/').map_or(file, |(_, name)| name)
}
