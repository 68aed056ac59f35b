//! Values that nobody may see.

use protocol::names::env;

use super::Lookup;
use crate::redact::Held;

/// Variables whose values are credentials.
const SECRETS: [&str; 7] = [
    env::ANTHROPIC_API_KEY,
    env::ANTHROPIC_AUTH_TOKEN,
    env::LANGFUSE_SECRET_KEY,
    env::GITHUB_TOKEN,
    env::GITLAB_TOKEN,
    env::VERTEX_USER_TOKEN,
    env::GOOGLE_APPLICATION_CREDENTIALS,
];

/// Variables of a pod whose values are no secrets, the agent's task and names among them: what is not named here came from
/// a Secret, or from nobody knows where.
const PUBLIC: [&str; 30] = [
    env::PROMPT,
    env::SESSION_ID,
    env::WEBSOCKET_URL,
    env::GATEWAY_TOKEN_FILE,
    env::ANTHROPIC_BASE_URL,
    env::LANGFUSE_ENABLED,
    env::LANGFUSE_HOST,
    env::LANGFUSE_PUBLIC_KEY,
    env::AGENTIC_SESSION_NAME,
    env::AGENTIC_SESSION_NAMESPACE,
    env::AGENTIC_SESSION_UID,
    env::POD_UID,
    env::ATTEMPT,
    env::LLM_MODEL,
    env::LLM_TEMPERATURE,
    env::LLM_MAX_TOKENS,
    env::INTERACTIVE,
    env::REPOS_JSON,
    env::TIMEOUT,
    env::WORKSPACE_PATH,
    env::AGENTIC_SPEC_JSON,
    env::GITHUB_HOST,
    env::GITLAB_HOST,
    env::LOG_FORMAT,
    "PATH",
    "HOME",
    "HOSTNAME",
    "LANG",
    "PWD",
    "RUST_LOG",
];

/// What a pod's runner holds and nobody may see.
pub fn held_in_pod(variables: impl Iterator<Item = (String, String)>) -> Vec<Held> {
    variables
        .filter(|(name, value)| {
            !value.is_empty() && !PUBLIC.contains(&name.as_str()) && !name.starts_with("KUBERNETES_")
        })
        .map(|(name, value)| Held {
            name,
            value: value.into(),
        })
        .collect()
}

/// What is held outside a pod.
pub(super) fn secrets(var: Lookup<'_>) -> Vec<Held> {
    let held = |name: &&str| {
        Some(Held {
            name: (*name).to_owned(),
            value: var(name)?.into(),
        })
    };
    SECRETS.iter().filter_map(held).collect()
}
