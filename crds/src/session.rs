//! `AgenticSession`: a task for a coding agent.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::ResourceRequirements,
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{Condition, Time},
    },
};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Phase;

/// A task for a coding agent: what it is told, how long it may work, and what became of it.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, kube(cel))]
#[kube(
    group = "vteam.ambient-code",
    version = "v1alpha1",
    kind = "AgenticSession",
    plural = "agenticsessions",
    shortname = "as",
    namespaced,
    status = "AgenticSessionStatus",
    derive = "Default",
    derive = "PartialEq",
    doc = "A task for a coding agent: what it is told, how long it may work, and what became of it.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.llmSettings.model"),
    printcolumn(name = "Turns", type_ = "integer", json_path = ".status.turns"),
    printcolumn(name = "Cost", type_ = "string", json_path = ".status.costUSD"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Pod", type_ = "string", json_path = ".status.podName", priority = 1),
    printcolumn(name = "Trace", type_ = "string", json_path = ".status.traceId", priority = 1),
    validation = Rule::new("self.metadata.name.size() <= 52")
        .message("metadata.name must have at most 52 characters, so that the names of the session's Job and pod fit: choose a shorter name")
        .reason(Reason::FieldValueInvalid)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.prompt) != has(self.initialPrompt)")
        .message("give the task in exactly one of spec.prompt and spec.initialPrompt"),
    validation = Rule::new("has(self.prompt) == has(oldSelf.prompt) && (!has(self.prompt) || self.prompt == oldSelf.prompt)")
        .message("spec.prompt cannot be changed: create another session"),
    validation = Rule::new("has(self.initialPrompt) == has(oldSelf.initialPrompt) && (!has(self.initialPrompt) || self.initialPrompt == oldSelf.initialPrompt)")
        .message("spec.initialPrompt cannot be changed: create another session"),
    validation = Rule::new("has(self.timeout) == has(oldSelf.timeout) && (!has(self.timeout) || self.timeout == oldSelf.timeout)")
        .message("spec.timeout cannot be changed: create another session"),
    validation = Rule::new("has(self.llmSettings) == has(oldSelf.llmSettings) && (!has(self.llmSettings) || self.llmSettings == oldSelf.llmSettings)")
        .message("spec.llmSettings cannot be changed: create another session"),
    validation = Rule::new("has(self.environmentVariables) == has(oldSelf.environmentVariables) && (!has(self.environmentVariables) || self.environmentVariables == oldSelf.environmentVariables)")
        .message("spec.environmentVariables cannot be changed: create another session"),
    validation = Rule::new("has(self.workspace) == has(oldSelf.workspace) && (!has(self.workspace) || self.workspace == oldSelf.workspace)")
        .message("spec.workspace cannot be changed: create another session"),
    validation = Rule::new("has(self.resources) == has(oldSelf.resources) && (!has(self.resources) || self.resources == oldSelf.resources)")
        .message("spec.resources cannot be changed: create another session"),
    validation = Rule::new("has(self.userContext) == has(oldSelf.userContext) && (!has(self.userContext) || self.userContext == oldSelf.userContext)")
        .message("spec.userContext cannot be changed: create another session")
)]
pub struct AgenticSessionSpec {
    /// The task, given to the agent once. At most 100,000 bytes. Exactly one of `prompt` and `initialPrompt` is given.
    /// Example: `Write a haiku about etcd into haiku.txt.`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 100_000))]
    #[x_kube(
        validation = Rule::new("bytes(self).size() <= 100000").message("spec.prompt must have at most 100000 bytes: put long material into the workspace"),
        validation = Rule::new("!self.contains('\\u0000')").message("spec.prompt must not contain the NUL character")
    )]
    pub prompt: Option<String>,

    /// The task under the name that newer clients of the platform use; the same as `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 100_000))]
    #[x_kube(
        validation = Rule::new("bytes(self).size() <= 100000").message("spec.initialPrompt must have at most 100000 bytes: put long material into the workspace"),
        validation = Rule::new("!self.contains('\\u0000')").message("spec.initialPrompt must not contain the NUL character")
    )]
    pub initial_prompt: Option<String>,

    /// A name for people. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub display_name: Option<String>,

    /// Running time in seconds over all attempts, 1 to 604800 (a week); 3600 when absent. Waiting for a node or an image and being
    /// stopped do not count. At the bound the agent is stopped, its work is kept, and the session is `Failed` with reason `Timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    #[x_kube(
        validation = Rule::new("self >= 1 && self <= 604800").message("spec.timeout must be 1 to 604800 seconds; leave it out for one hour")
    )]
    pub timeout: Option<u32>,

    /// `true`: stop the agent gracefully and keep workspace and conversation; the session is `Stopped`. `false` again: go on.
    /// On a new session: do not start yet. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,

    /// Which model works, and how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub llm_settings: Option<LlmSettings>,

    /// Environment variables of the agent and its tools. They are visible to the agent: no secrets. Names that the product sets
    /// keep the product's value. Example: `{"CI": "true"}`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    #[x_kube(
        validation = Rule::new("self.all(name, name.matches('^[A-Za-z_][A-Za-z0-9_]*$') && name.size() <= 128)")
            .message("names in spec.environmentVariables must be letters, digits and underscores, at most 128 characters, and not begin with a digit"),
        validation = Rule::new("self.all(name, !self[name].contains('\\u0000') && self[name].size() <= 8192)")
            .message("values in spec.environmentVariables must have at most 8192 characters and not contain the NUL character")
    )]
    pub environment_variables: Option<BTreeMap<String, EnvironmentValue>>,

    /// The volume on which workspace, conversation and event spool are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Workspace>,

    /// CPU, memory and ephemeral storage of the agent's container; 500m and 1Gi requested, 4Gi memory at most when absent.
    /// Example: `{"requests": {"cpu": "1"}, "limits": {"memory": "8Gi"}}`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// Who the session is for. Set by the gateway from the caller's identity; goes to traces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_context: Option<UserContext>,
}

/// Value of an environment variable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct EnvironmentValue(#[schemars(length(max = 8192))] pub String);

/// Which model works, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LlmSettings {
    /// Name of the model as the model API knows it; the CLI's default when absent. Example: `claude-sonnet-5-5`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = "^[^\\x00-\\x20-][^\\x00-\\x20]*$"))]
    pub model: Option<String>,
}

/// The volume of a session: the claim `ambient-workspace-<name>`, deleted with the session.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workspace {
    /// Size of the volume; 5Gi when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new("!(type(self) == string) || (self.size() <= 32 && isQuantity(self) && quantity(self).isGreaterThan(quantity('0')))")
            .message("spec.workspace.size must be a positive quantity, such as 5Gi"),
        validation = Rule::new("!(type(self) == int) || self > 0").message("spec.workspace.size must be a positive quantity, such as 5Gi")
    )]
    pub size: Option<Quantity>,

    /// Storage class of the volume; the cluster's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
}

/// CPU, memory and ephemeral storage of the agent's container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler sets aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Amounts>,
    /// What the container may use at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Amounts>,
}

/// Amounts of the three resources that sessions may set.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Amounts {
    /// Processor time, in cores. Example: `500m`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))").message("cpu must be a quantity that is not negative, such as 500m"))]
    pub cpu: Option<Quantity>,
    /// Memory, in bytes. Example: `4Gi`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))").message("memory must be a quantity that is not negative, such as 4Gi"))]
    pub memory: Option<Quantity>,
    /// Disk space of the container outside the workspace, in bytes. Example: `2Gi`
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "ephemeral-storage")]
    #[x_kube(validation = Rule::new("type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))").message("ephemeral-storage must be a quantity that is not negative, such as 2Gi"))]
    pub ephemeral_storage: Option<Quantity>,
}

impl From<&Amounts> for BTreeMap<String, Quantity> {
    fn from(amounts: &Amounts) -> Self {
        let Amounts {
            cpu,
            memory,
            ephemeral_storage,
        } = amounts;
        [
            ("cpu", cpu),
            ("memory", memory),
            ("ephemeral-storage", ephemeral_storage),
        ]
        .into_iter()
        .filter_map(|(name, amount)| Some((name.to_owned(), amount.clone()?)))
        .collect()
    }
}

impl From<&Resources> for ResourceRequirements {
    fn from(resources: &Resources) -> Self {
        Self {
            requests: resources.requests.as_ref().map(Into::into),
            limits: resources.limits.as_ref().map(Into::into),
            ..Self::default()
        }
    }
}

/// Who a session is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UserContext {
    /// Who, as their identity provider names them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub user_id: Option<String>,
    /// Their name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub display_name: Option<String>,
}

/// What became of the session. Written by the operator alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgenticSessionStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the session is.
    #[serde(default)]
    pub phase: Phase,
    /// Why it is there, one word. Example: `Timeout`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why it is there, for people, naming the object concerned and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What is known in detail.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// When the current run began to work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the current run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Job of the current attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_name: Option<String>,
    /// Pod of the current attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// UID of the pod that may speak for the session now.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "podUID")]
    pub pod_uid: Option<String>,
    /// Number of the current run, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub run: Option<u32>,
    /// Number of the current attempt, from 1, counted through all runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub attempt: Option<u32>,
    /// Number of the run's first attempt; with `attempt` and `freeRetries` it says how many tries are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub first_attempt: Option<u32>,
    /// How many of the run's attempts were ended by the cluster (eviction, preemption, a lost node) and do not count as tries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub free_retries: Option<u32>,
    /// Seconds that the run's ended attempts worked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub running_seconds: Option<u64>,
    /// When the next attempt is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_time: Option<Time>,
    /// Value of the annotation `ambient-code.io/start-requested-at` that was last acted upon; another value asks for the next run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub handled_start_request: Option<String>,
    /// Id of the CLI's conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sdk_session_id: Option<String>,
    /// Model responses in the main conversation, over the whole session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub turns: Option<u64>,
    /// Tokens, over the whole session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
    /// Cost in US dollars, over the whole session, by the product's price table; absent for a model that it does not have.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "costUSD")]
    pub cost_usd: Option<String>,
    /// The agent's last answer, cut to what the termination report carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// Id of the session's trace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// Number of the last record in the session's event log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub last_seq: Option<u64>,
    /// Number of the last record that the gateway acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub acked_seq: Option<u64>,
}

/// Tokens by the API's four buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TokenUsage {
    /// Tokens read anew.
    #[schemars(with = "i64")]
    pub input_tokens: u64,
    /// Tokens written.
    #[schemars(with = "i64")]
    pub output_tokens: u64,
    /// Tokens read from the prompt cache.
    #[schemars(with = "i64")]
    pub cache_read_input_tokens: u64,
    /// Tokens written to the prompt cache.
    #[schemars(with = "i64")]
    pub cache_creation_input_tokens: u64,
}

impl From<protocol::Usage> for TokenUsage {
    fn from(usage: protocol::Usage) -> Self {
        let protocol::Usage {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        } = usage;
        Self {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::session_crd;

    #[test]
    fn kubectl_get_shows_what_people_ask_for() {
        let crd = session_crd();
        let columns: Vec<_> = crd.spec.versions[0]
            .additional_printer_columns
            .iter()
            .flatten()
            .map(|c| c.name.as_str())
            .collect();
        assert_eq!(
            columns,
            ["Phase", "Reason", "Model", "Turns", "Cost", "Age", "Pod", "Trace"]
        );
    }
}
