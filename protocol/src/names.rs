//! Names that more than one part must spell the same way: labels, annotations, environment variables, paths.

/// What the names of our own labels and annotations begin with: what they say is the product's word, not a client's.
pub const RESERVED: &str = "vteam.ambient-code/";

/// Labels on Jobs, pods and claims.
pub mod label {
    /// Name of the session.
    pub const SESSION: &str = "vteam.ambient-code/session";
    /// UID of the session: what authority over an object rests on; names can be used again.
    pub const SESSION_UID: &str = "vteam.ambient-code/session-uid";
    /// Number of the attempt, counted through the session from 1.
    pub const ATTEMPT: &str = "vteam.ambient-code/attempt";
    /// On a session: the API of another system by which it was created, [`super::api`].
    pub const API: &str = "vteam.ambient-code/api";
    /// On a session that stays for the tasks of a workspace: which, as a hash.
    pub const WORKSPACE: &str = "vteam.ambient-code/task-workspace";
    /// Kueue's label for the queue that admits a Job; on a session it is passed to its Jobs.
    pub const KUEUE_QUEUE: &str = "kueue.x-k8s.io/queue-name";
    /// Kueue's label for the priority of a Job among those that wait; passed on like [`KUEUE_QUEUE`].
    pub const KUEUE_PRIORITY: &str = "kueue.x-k8s.io/priority-class";
    /// Kubernetes' own label for what part of an application an object is.
    pub const COMPONENT: &str = "app.kubernetes.io/component";
    /// Kubernetes' own label for the tool that manages an object; our watches select on it.
    pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
    /// Value of [`MANAGED_BY`] on everything the operator makes.
    pub const MANAGER: &str = "agentic-operator";
    /// Kubernetes' own label for an application's name.
    pub const NAME: &str = "app.kubernetes.io/name";
    /// Value of [`NAME`] on everything the operator makes for a session.
    pub const APPLICATION: &str = "agentic-session";
}

/// Values of [`label::API`].
pub mod api {
    /// The task API.
    pub const TASKS: &str = "tasks";
    /// The claude-code API.
    pub const CLAUDE_CODE: &str = "claude-code";
}

/// Values of [`label::COMPONENT`] on Jobs and pods.
pub mod component {
    /// Drives the agent.
    pub const ATTEMPT: &str = "attempt";
    /// Delivers what an ended run left on the claim.
    pub const DRAIN: &str = "drain";
}

/// Annotations.
pub mod annotation {
    /// On an `AgenticSession`: a new value asks for the next run. The platform's own name.
    pub const START_REQUESTED_AT: &str = "ambient-code.io/start-requested-at";
    /// On a session of the task API: id of the task that created it.
    pub const TASK_ID: &str = "vteam.ambient-code/task-id";
    /// On a session of the task API: whose tasks it takes; the name of an API key, or empty.
    pub const TASK_OWNER: &str = "vteam.ambient-code/task-owner";
    /// On a session of the task API: the workspace that its task named.
    pub const TASK_WORKSPACE: &str = "vteam.ambient-code/task-workspace";
    /// On a session of the task API: what its task asked for, as one JSON object.
    pub const TASK_ASKED: &str = "vteam.ambient-code/task-asked";
    /// On a session of the claude-code API: id of the request.
    pub const REQUEST_ID: &str = "vteam.ambient-code/request-id";
    /// On a Job: what was resolved for this attempt, one JSON object.
    pub const RESOLVED: &str = "vteam.ambient-code/resolved";
    /// On a pod: limits that may change while it runs, one JSON object, read through a downward-API file.
    pub const LIMITS: &str = "vteam.ambient-code/limits";
    /// On the CRD: SHA-256 of the schema, so that an operator can tell whether its own schema is installed.
    pub const SCHEMA: &str = "vteam.ambient-code/schema";
}

/// On a session's pods: a deleted pod stays, with its report, until the operator has read it.
pub const REPORT_FINALIZER: &str = "vteam.ambient-code/report";

/// Containers of a session's pod.
pub mod container {
    /// Native sidecar: the CLI and its tools; holds no secret.
    pub const AGENT: &str = "agent";
    /// Main container: secrets, spool, proxy.
    pub const RUNNER: &str = "runner";
    /// Init container of a user's own image: copies runner and CLI.
    pub const TOOLS: &str = "tools";
}

/// The two Secrets that the runner container takes its credentials from, both optional.
pub const RUNNER_SECRETS: [&str; 2] = ["ambient-runner-secrets", "ambient-non-vertex-integrations"];
/// `ConfigMap` with `LANGFUSE_ENABLED` and `LANGFUSE_HOST`, optional.
pub const LANGFUSE_CONFIG: &str = "langfuse-config";
/// Secret with `LANGFUSE_PUBLIC_KEY` and `LANGFUSE_SECRET_KEY`, optional.
pub const LANGFUSE_KEYS: &str = "langfuse-keys";
/// Audience of the token with which a runner speaks to the gateway.
pub const GATEWAY_AUDIENCE: &str = "agentic-gateway";

/// Environment variables of the runner.
pub mod env {
    /// The task.
    pub const PROMPT: &str = "PROMPT";
    /// Name of the session.
    pub const SESSION_ID: &str = "SESSION_ID";
    /// The gateway's WebSocket for this session. Without it there is no uplink.
    pub const WEBSOCKET_URL: &str = "WEBSOCKET_URL";
    /// File with the projected token for the gateway; read again for each connection.
    pub const GATEWAY_TOKEN_FILE: &str = "GATEWAY_TOKEN_FILE";
    /// API key of the model API.
    pub const ANTHROPIC_API_KEY: &str = "ANTHROPIC_API_KEY";
    /// Bearer token of the model API, instead of a key.
    pub const ANTHROPIC_AUTH_TOKEN: &str = "ANTHROPIC_AUTH_TOKEN";
    /// Where the model API is; the public one when absent.
    pub const ANTHROPIC_BASE_URL: &str = "ANTHROPIC_BASE_URL";
    /// `true` or `1`: send traces.
    pub const LANGFUSE_ENABLED: &str = "LANGFUSE_ENABLED";
    /// Base URL of Langfuse.
    pub const LANGFUSE_HOST: &str = "LANGFUSE_HOST";
    /// Langfuse public key.
    pub const LANGFUSE_PUBLIC_KEY: &str = "LANGFUSE_PUBLIC_KEY";
    /// Langfuse secret key.
    pub const LANGFUSE_SECRET_KEY: &str = "LANGFUSE_SECRET_KEY";
    /// `true` or `1`: traces carry usage, models and tool names, and no text.
    pub const LANGFUSE_MASK_MESSAGES: &str = "LANGFUSE_MASK_MESSAGES";
    /// Name of the session.
    pub const AGENTIC_SESSION_NAME: &str = "AGENTIC_SESSION_NAME";
    /// Namespace of the session.
    pub const AGENTIC_SESSION_NAMESPACE: &str = "AGENTIC_SESSION_NAMESPACE";
    /// UID of the session.
    pub const AGENTIC_SESSION_UID: &str = "AGENTIC_SESSION_UID";
    /// UID of the runner's own pod.
    pub const POD_UID: &str = "POD_UID";
    /// Number of the attempt.
    pub const ATTEMPT: &str = "ATTEMPT";
    /// Model of the session; the CLI's default when absent.
    pub const LLM_MODEL: &str = "LLM_MODEL";
    /// `true`: the session stays for further messages.
    pub const INTERACTIVE: &str = "INTERACTIVE";
    /// Sampling temperature; only without thinking.
    pub const LLM_TEMPERATURE: &str = "LLM_TEMPERATURE";
    /// Most tokens of one model response.
    pub const LLM_MAX_TOKENS: &str = "LLM_MAX_TOKENS";
    /// The repositories: a list of [`crate::spec::Repo`] as JSON.
    pub const REPOS_JSON: &str = "REPOS_JSON";
    /// Token for GitHub hosts.
    pub const GITHUB_TOKEN: &str = "GITHUB_TOKEN";
    /// Token for GitLab hosts.
    pub const GITLAB_TOKEN: &str = "GITLAB_TOKEN";
    /// Hosts that the GitHub token is for, with ports where they are not the usual ones; `github.com` when absent.
    pub const GITHUB_HOST: &str = "GITHUB_HOST";
    /// Hosts that the GitLab token is for, with ports where they are not the usual ones; `gitlab.com` when absent.
    pub const GITLAB_HOST: &str = "GITLAB_HOST";
    /// `true` or `1`: the model API is Vertex AI.
    pub const VERTEX_ENABLED: &str = "VERTEX_ENABLED";
    /// Google Cloud project of Vertex AI.
    pub const VERTEX_PROJECT_ID: &str = "VERTEX_PROJECT_ID";
    /// Region of Vertex AI.
    pub const VERTEX_REGION: &str = "VERTEX_REGION";
    /// An access token for Vertex AI, instead of a service account's key.
    pub const VERTEX_USER_TOKEN: &str = "VERTEX_USER_TOKEN";
    /// Key of a Google account for Vertex AI: the JSON itself, or the name of the Secrets' entry that has it.
    pub const GOOGLE_APPLICATION_CREDENTIALS: &str = "GOOGLE_APPLICATION_CREDENTIALS";
    /// The CLI's own name for [`VERTEX_ENABLED`].
    pub const CLAUDE_CODE_USE_VERTEX: &str = "CLAUDE_CODE_USE_VERTEX";
    /// The CLI's own name for [`VERTEX_PROJECT_ID`].
    pub const ANTHROPIC_VERTEX_PROJECT_ID: &str = "ANTHROPIC_VERTEX_PROJECT_ID";
    /// The CLI's own name for [`VERTEX_REGION`].
    pub const CLOUD_ML_REGION: &str = "CLOUD_ML_REGION";
    /// Where Vertex AI, or a gateway to it, is, with its version (`https://gateway/v1`); Google's own when absent.
    pub const ANTHROPIC_VERTEX_BASE_URL: &str = "ANTHROPIC_VERTEX_BASE_URL";
    /// Running time over all attempts of the run, seconds.
    pub const TIMEOUT: &str = "TIMEOUT";
    /// Where the agent's workspace is, as the agent sees it.
    pub const WORKSPACE_PATH: &str = "WORKSPACE_PATH";
    /// All that has no variable of its own: [`crate::spec::AgenticSpec`] as JSON.
    pub const AGENTIC_SPEC_JSON: &str = "AGENTIC_SPEC_JSON";
    /// `json`: stdout for machines. Anything else: a transcript for people.
    pub const LOG_FORMAT: &str = "LOG_FORMAT";
}

/// Paths inside the containers of a session's pod.
pub mod path {
    /// The agent's working folder, in the agent container.
    pub const WORKSPACE: &str = "/workspace";
    /// The agent's home, in the agent container; pod-local.
    pub const AGENT_HOME: &str = "/home/agent";
    /// The CLI's config folder, in the agent container; pod-local.
    pub const CLAUDE_CONFIG: &str = "/home/agent/.claude";
    /// The CLI's transcripts, in the agent container; on the claim.
    pub const CLAUDE_PROJECTS: &str = "/home/agent/.claude/projects";
    /// Folder shared by the two containers; holds the shim's socket and nothing else.
    pub const SHIM_DIR: &str = "/run/agentic";
    /// The socket on which the shim in the agent container listens.
    pub const SHIM_SOCKET: &str = "/run/agentic/agent.sock";
    /// The whole claim, in the runner container.
    pub const DATA: &str = "/data";
    /// The runner's private folder; pod-local.
    pub const PRIVATE: &str = "/run/runner";
    /// Downward-API file with the pod annotation [`super::annotation::LIMITS`].
    pub const LIMITS: &str = "/etc/agentic/limits";
    /// The projected gateway token.
    pub const GATEWAY_TOKEN: &str = "/var/run/secrets/agentic/token";
    /// Files of the runner's Secrets, one folder a Secret, in the runner container; read again per use.
    pub const SECRETS: &str = "/etc/agentic/secrets";
    /// Values of the admin's MCP credentials, one file each, in the runner container; read again per use.
    pub const MCP_CREDENTIALS: &str = "/etc/agentic/mcp";
    /// The socket of `runner send|interrupt|status`, in the runner container.
    pub const CONTROL_SOCKET: &str = "/run/runner/control.sock";
    /// Where runner and CLI are, in the product's image and in the agent container of a user's own image, where an init
    /// container copies them to.
    pub const TOOLS: &str = "/opt/agentic";
    /// The runner. Not looked for in `PATH`, which the session's author can set.
    pub const RUNNER: &str = "/opt/agentic/runner";
    /// The CLI, as the agent sees it.
    pub const CLI: &str = "/opt/agentic/claude";
    /// Where the kubelet reads the termination report.
    pub const TERMINATION_LOG: &str = "/dev/termination-log";

    /// File with the value of an MCP credential, see [`crate::spec::McpCredential`].
    pub fn mcp_credential(name: &str) -> String {
        format!("{MCP_CREDENTIALS}/{name}")
    }

    /// Folder of a session on its claim, relative to the claim's root.
    pub fn session_dir(uid: &str) -> String {
        format!("sessions/{uid}")
    }

    /// The agent's workspace on the claim, relative to the claim's root.
    pub fn workspace_dir(uid: &str) -> String {
        format!("sessions/{uid}/workspace")
    }

    /// The workspace of a claim that sessions share (`workspace.existingClaim`), relative to the claim's root.
    pub const SHARED_WORKSPACE: &str = "workspace";

    /// The CLI's transcripts on the claim, relative to the claim's root.
    pub fn transcripts_dir(uid: &str) -> String {
        format!("sessions/{uid}/transcripts")
    }

    /// The runner's own repositories, relative to the claim's root. Never mounted in the agent container.
    pub fn git_dir(uid: &str) -> String {
        format!("sessions/{uid}/git")
    }

    /// Spool, state, lease and lock on the claim, relative to the claim's root. Never mounted in the agent container.
    pub fn state_dir(uid: &str) -> String {
        format!("sessions/{uid}/state")
    }
}

/// User and group of both containers.
pub const USER_ID: i64 = 10001;
/// How long a pod may take to end, seconds.
pub const GRACE_PERIOD_SECONDS: i64 = 60;
