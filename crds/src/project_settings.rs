//! `ProjectSettings`: what the admin of a namespace decides for its sessions.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::session::{
    Amounts, Limits, LlmSettings, ObjectName, PodOptions, Resources, Retry, Toleration, WorkspaceDefaults, bound,
};

/// The one name that a namespace's settings may have.
pub const NAME: &str = "projectsettings";

/// What the admin of a namespace decides for its sessions: how many run at once, what they may ask for, and what they get when they
/// ask for nothing. Changes act on attempts that begin after them.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, kube(cel))]
#[kube(
    group = "vteam.ambient-code",
    version = "v1alpha1",
    kind = "ProjectSettings",
    plural = "projectsettings",
    shortname = "ps",
    namespaced,
    derive = "Default",
    derive = "PartialEq",
    doc = "What the admin of a namespace decides for its sessions.",
    printcolumn(name = "Concurrent", type_ = "integer", json_path = ".spec.maxConcurrentSessions"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.llmSettings.model"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name == 'projectsettings'")
        .message("the settings of a namespace must be named projectsettings: there is one of them")
        .reason(Reason::FieldValueInvalid)
)]
#[serde(rename_all = "camelCase")]
pub struct ProjectSettingsSpec {
    /// Most sessions of the namespace that run at once; no bound when absent. Further ones are `Pending` with reason `Queued`, the
    /// oldest first. Sessions that Kueue admits count, but do not wait for a place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 0, max = 100_000))]
    pub max_concurrent_sessions: Option<u32>,

    /// Seconds that a session's pod may take to start before what hinders it is final; 3600 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1, max = 604_800))]
    pub start_timeout: Option<u32>,

    /// Prices by model that replace or add to the product's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    #[x_kube(
        validation = Rule::new("self.all(m, m.matches('^[A-Za-z0-9][A-Za-z0-9._@/-]{0,63}$'))")
            .message("names in spec.prices must be models' names of at most 64 letters, digits and ._@/-")
    )]
    pub prices: BTreeMap<String, ModelPrice>,

    /// Credentials that sessions may use for MCP servers without seeing them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub mcp_credentials: Vec<McpCredential>,

    /// What sessions may ask for at most. What a session leaves out is the default, lowered to the ceiling; without a default it is
    /// the ceiling itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceilings: Option<Ceilings>,

    /// Secrets that sessions may name in `runnerSecrets`, beside the two built-in ones. Whoever may create sessions can use their values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_secrets: Vec<ObjectName>,

    /// Claims that sessions may name in `workspace.existingClaim`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_claims: Vec<ObjectName>,

    /// Service accounts that sessions may name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_service_accounts: Vec<ObjectName>,

    /// Secrets that sessions may pull images with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_image_pull_secrets: Vec<ObjectName>,

    /// Priority classes that sessions may name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_priority_classes: Vec<ObjectName>,

    /// Runtime classes that sessions may name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_runtime_classes: Vec<ObjectName>,

    /// Taints that sessions may take. An entry with operator `Exists` allows all values, one without effect all effects.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_tolerations: Vec<Toleration>,

    /// Beginnings of image names that sessions may use. A beginning ends where a part of the name ends; with a tag it allows that tag only.
    /// Example: `["registry.example.com/team/"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed_images: Vec<ImagePrefix>,

    /// Hosts or networks that addresses in sessions (MCP servers, repositories) may lead to although they are private.
    /// Example: `["git.corp.example", "*.corp.example", "10.1.0.0/16"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub allowed_private_hosts: Vec<PrivateHost>,

    /// `timeout` of sessions that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1, max = 604_800))]
    pub timeout: Option<u32>,

    /// `inactivityTimeout` of sessions that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 0, max = 604_800))]
    pub inactivity_timeout: Option<u32>,

    /// `llmSettings` of sessions, each member where a session names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub llm_settings: Option<LlmSettings>,

    /// `limits` of sessions, each member where a session names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,

    /// `workspace` of sessions, each member where a session names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<WorkspaceDefaults>,

    /// `resources` of sessions, each amount where a session names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// `pod` of sessions, each member where a session names none. What stands here need not be in the lists of what is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOptions>,

    /// `runnerSecrets` of sessions that name none. What stands here need not be in `allowedSecrets`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    pub runner_secrets: Option<Vec<ObjectName>>,

    /// `retry` of sessions that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,

    /// `ttlSecondsAfterFinished` of sessions that name none, those that have ended already among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<u32>,
}

/// What sessions may ask for at most.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ceilings {
    /// Of `timeout`, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1, max = 604_800))]
    pub timeout: Option<u32>,
    /// Of `limits`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Of `resources`, requests and limits alike. More than 0: to Kubernetes a limit of 0 is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = bound("ceilings.resources", "cpu"),
        validation = bound("ceilings.resources", "memory"),
        validation = bound("ceilings.resources", "ephemeral-storage")
    )]
    pub resources: Option<Amounts>,
    /// Of `workspace.size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new("type(self) == int ? self > 0 : self.size() <= 32 && isQuantity(self) && quantity(self).isGreaterThan(quantity('0'))")
            .message("spec.ceilings.workspaceSize must be a positive quantity, such as 50Gi")
    )]
    pub workspace_size: Option<Quantity>,
    /// Of `retry.maxAttempts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1, max = 10))]
    pub max_attempts: Option<u32>,
}

/// Prices of a model in US dollars per million tokens, as decimal strings. Example: `{"input": "3", "output": "15"}`
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelPrice {
    /// Tokens read anew.
    #[schemars(length(min = 1, max = 13))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9]{1,6}([.][0-9]{1,3})?$')").message("a price must be US dollars per million tokens as a string with at most three digits behind the point, such as \"0.125\""))]
    pub input: String,
    /// Tokens written.
    #[schemars(length(min = 1, max = 13))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9]{1,6}([.][0-9]{1,3})?$')").message("a price must be US dollars per million tokens as a string with at most three digits behind the point, such as \"0.125\""))]
    pub output: String,
    /// Tokens read from the prompt cache; as `input` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 13))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9]{1,6}([.][0-9]{1,3})?$')").message("a price must be US dollars per million tokens as a string with at most three digits behind the point, such as \"0.125\""))]
    pub cache_read: Option<String>,
    /// Tokens written to the prompt cache; 1.25 times `input` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 13))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9]{1,6}([.][0-9]{1,3})?$')").message("a price must be US dollars per million tokens as a string with at most three digits behind the point, such as \"0.125\""))]
    pub cache_write: Option<String>,
}

/// A credential for MCP servers.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct McpCredential {
    /// What sessions name it.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Where its value is.
    pub secret_key_ref: SecretKey,
    /// Header that carries it; `Authorization` when absent. The value is sent as it is: write `Bearer ` into the Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9-]+$"))]
    pub header: Option<String>,
    /// It is sent to addresses under this one only. Example: `https://mcp.example.com/`
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("self.matches('^https://[A-Za-z0-9.:-]+/[!#-;=?-\\\\[\\\\]_a-z~]*$')")
            .message("urlPrefix must begin with https:// and reach at least to the / behind the host")
    )]
    pub url_prefix: String,
}

/// A value in a Secret of the namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    pub name: ObjectName,
    /// Key in it.
    #[schemars(length(min = 1, max = 253), regex(pattern = "^[-._A-Za-z0-9]+$"))]
    pub key: String,
}

/// Beginning of an image's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ImagePrefix(
    #[schemars(length(min = 1, max = 512), regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._:/@-]*$"))] pub String,
);

/// A host, `*.` and a domain, or a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct PrivateHost(
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^(\*\.)?[A-Za-z0-9:][A-Za-z0-9.:-]*(/[0-9]{1,3})?$")
    )]
    pub String,
);
