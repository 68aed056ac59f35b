//! `AgenticSession`: a task for a coding agent.

mod limits;
mod pod;
mod repo;
mod resources;
mod status;
mod tools;
mod workspace;

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use self::resources::bound;
pub use self::{
    limits::{Limits, LlmSettings, Retry},
    pod::{PodOptions, TaintEffect, Toleration, TolerationOperator},
    repo::{MAX_REPOS, Repo, RepoInput, RepoOutput},
    resources::{Amounts, Resources},
    status::{AgenticSessionStatus, RepoStatus, TokenUsage},
    tools::{Argument, HttpServer, McpServer, PermissionMode, StdioServer, ToolRule, Tools},
    workspace::{Retention, Workspace, WorkspaceDefaults},
};

/// Fields of the spec that may be changed after creation; for every other the definition gets a rule that refuses it.
pub(crate) const MUTABLE: [&str; 6] = [
    "displayName",
    "suspend",
    "timeout",
    "inactivityTimeout",
    "limits",
    "ttlSecondsAfterFinished",
];

/// What Kubernetes takes as the name of most objects: labels of small letters, digits and `-`, with a dot between two.
pub(crate) const OBJECT_NAME: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";

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
    validation = Rule::new("!has(self.mainRepoIndex) || self.mainRepoIndex == 0 || (has(self.repos) && self.mainRepoIndex < self.repos.size())")
        .message("spec.mainRepoIndex must be the position of an entry of spec.repos, counted from 0")
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

    /// `false` or absent: the session ends with the agent's answer to its task. `true`: it stays for further messages until it is
    /// ended, stopped, idle for `inactivityTimeout`, or at one of its limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interactive: Option<bool>,

    /// Running time in seconds over all attempts of a run, 1 to 604800 (a week); 3600 when absent. Waiting for a place, a node or an
    /// image and being stopped do not count. At the bound the agent is stopped, its work is kept, and the session is `Failed` with
    /// reason `Timeout`. May be changed at any time; a running agent has the new value within seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    #[x_kube(
        validation = Rule::new("self >= 1 && self <= 604800").message("spec.timeout must be 1 to 604800 seconds; leave it out for one hour")
    )]
    pub timeout: Option<u32>,

    /// Of an interactive session: idle for so many seconds, it is `Stopped` with reason `Inactivity`; 1800 when absent, 0 for never. A
    /// question of the agent that nobody answers is idleness. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    #[x_kube(
        validation = Rule::new("self >= 0 && self <= 604800").message("spec.inactivityTimeout must be 0 (never) to 604800 seconds; leave it out for half an hour")
    )]
    pub inactivity_timeout: Option<u32>,

    /// `true`: stop the agent gracefully and keep workspace and conversation; the session is `Stopped`. `false` again: go on.
    /// On a new session: do not start yet. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,

    /// Which model works, and how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub llm_settings: Option<LlmSettings>,

    /// What the session may use up over all its runs. May be changed at any time; a session that ended at a limit goes on after the
    /// limit is raised and a start is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,

    /// What the agent may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Tools>,

    /// Text that is appended to the agent's system prompt. At most 16,384 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16_384), regex(pattern = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f]*$"))]
    #[x_kube(
        validation = Rule::new("bytes(self).size() <= 16384").message("spec.appendSystemPrompt must have at most 16384 bytes: put long material into the workspace")
    )]
    pub append_system_prompt: Option<String>,

    /// Further arguments of the Claude Code CLI, long flags and their values, 6,144 bytes together. Flags that the product sets itself
    /// are refused. Example: `["--effort", "high"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new("self.all(a, !a.matches('(?s)^(-[A-Za-z].*|--)$'))")
            .message("spec.additionalArgs takes long flags only: write --name instead of -n"),
        validation = Rule::new("self.all(a, !a.matches('(?s)^--(print|input-format|output-format|json-schema|verbose|include-partial-messages|include-hook-events|replay-user-messages|await-initialize|strict-mcp-config|mcp-config|setting-sources|settings|managed-settings|plugin-dir|plugin-url|permission-mode|permission-prompt-tool|permission-prompts|dangerously-skip-permissions|allow-dangerously-skip-permissions|restricted|bare|session-id|resume|resume-session-at|continue|fork-session|from-pr|no-session-persistence|rewind-files|model|fallback-model|allowedTools|allowed-tools|disallowedTools|disallowed-tools|append-system-prompt|append-system-prompt-file|max-turns|max-budget-usd|sdk-url|remote|remote-control|rc|teleport|cloud|ide|chrome|tmux|worktree|background|bg|init|init-only|maintenance|debug|debug-file|debug-to-stderr|mcp-debug|help|version)(=.*)?$'))")
            .message("spec.additionalArgs must not contain flags that the product sets itself: use the spec's own fields (llmSettings, limits, tools, appendSystemPrompt, interactive)"),
        validation = Rule::new("self.map(a, bytes(a).size()).sum() <= 6144")
            .message("spec.additionalArgs must have at most 6144 bytes together")
    )]
    pub additional_args: Vec<Argument>,

    /// Repositories that are cloned before the agent starts, and pushed when it is done if that is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(
        validation = Rule::new("self.all(r, !has(r.name) || self.filter(o, has(o.name) && o.name == r.name).size() == 1)")
            .message("names in spec.repos must differ: each is a folder of the workspace")
    )]
    pub repos: Vec<Repo>,

    /// Which entry of `repos` is the agent's working folder, counted from 0; the first when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 0, max = 7))]
    pub main_repo_index: Option<u32>,

    /// `true`: push all repositories when the agent is done, whatever their own `autoPush` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_push_on_complete: Option<bool>,

    /// Environment variables of the agent and its tools, 131,072 bytes together. They are visible to the agent: no secrets. Names that
    /// the product sets keep the product's value. Example: `{"CI": "true"}`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    #[x_kube(
        validation = Rule::new("self.all(name, name.matches('^[A-Za-z_][A-Za-z0-9_]*$') && name.size() <= 128)")
            .message("names in spec.environmentVariables must be letters, digits and underscores, at most 128 characters, and not begin with a digit"),
        validation = Rule::new("self.all(name, !self[name].contains('\\u0000') && self[name].size() <= 8192)")
            .message("values in spec.environmentVariables must have at most 8192 characters and not contain the NUL character"),
        validation = Rule::new("self.map(name, bytes(name).size() + bytes(self[name]).size()).sum() <= 131072")
            .message("spec.environmentVariables must have at most 131072 bytes together: put long material into the workspace")
    )]
    pub environment_variables: Option<BTreeMap<String, EnvironmentValue>>,

    /// Secrets of the namespace that the runner gets, as environment and as files; the agent sees none of them.
    /// `ambient-runner-secrets` and `ambient-non-vertex-integrations` when absent, both optional. Any other must exist and be among
    /// `allowedSecrets` of the namespace's `ProjectSettings`. Of two that set a variable the earlier in the list counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    #[x_kube(
        validation = Rule::new("self.all(s, self.filter(o, o == s).size() == 1)").message("spec.runnerSecrets must not name a Secret twice")
    )]
    pub runner_secrets: Option<Vec<ObjectName>>,

    /// The volume that holds workspace and conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Workspace>,

    /// CPU and memory of the agent's container. Without limits: 4Gi of memory; without requests: 500m and 1Gi, or the limit if lower.
    /// Example: `{"requests": {"cpu": "1"}, "limits": {"memory": "8Gi"}}`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// Image and placement of the session's pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOptions>,

    /// What follows failures that are not the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,

    /// Seconds after its end when the session is deleted, once its end is recorded and its events are delivered or given up; never when
    /// absent. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    #[x_kube(
        validation = Rule::new("self >= 0 && self <= 31536000").message("spec.ttlSecondsAfterFinished must be 0 to 31536000 seconds (a year); leave it out to keep the session")
    )]
    pub ttl_seconds_after_finished: Option<u32>,

    /// Who the session is for. Set by the gateway from the caller's identity; goes to traces and is the author of commits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_context: Option<UserContext>,
}

impl AgenticSessionSpec {
    /// The task, under whichever of its two names.
    pub fn task(&self) -> Option<&str> {
        self.prompt.as_deref().or(self.initial_prompt.as_deref())
    }
}

/// Value of an environment variable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct EnvironmentValue(#[schemars(length(max = 8192))] pub String);

/// Name of an object in the session's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ObjectName(#[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))] pub String);

/// Who a session is for.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UserContext {
    /// Who, as their identity provider names them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = r"^[^\x00-\x1f]*$"))]
    pub user_id: Option<String>,
    /// Their name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = r"^[^\x00-\x1f]*$"))]
    pub display_name: Option<String>,
    /// Groups that they belong to, 1,024 bytes together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.map(g, bytes(g).size()).sum() <= 1024").message("spec.userContext.groups must have at most 1024 bytes together")
    )]
    pub groups: Vec<GroupName>,
}

/// Name of a group of users.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct GroupName(#[schemars(length(max = 256), regex(pattern = r"^[^\x00-\x1f]*$"))] pub String);

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
