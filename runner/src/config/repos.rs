//! What is cloned and pushed.

use std::path::Path;

use protocol::names::{env, path};
use protocol::spec::AgenticSpec;
use secrecy::SecretString;

use super::{ConfigError, Lookup};
use crate::address::Allowed;
use crate::redact::Vault;
use crate::workspace::git::{Credentials, Identity, Repos};

/// The repositories, from what the operator resolved.
pub(super) fn repos(
    spec: &AgenticSpec,
    data: &Path,
    uid: &str,
    vault: &Vault,
    var: Lookup<'_>,
) -> Result<Repos, ConfigError> {
    let list = match var(env::REPOS_JSON) {
        None => Vec::new(),
        Some(text) => serde_json::from_str(&text).map_err(|_| ConfigError::Invalid {
            name: env::REPOS_JSON,
            value: text,
            expected: "a list of repositories",
        })?,
    };
    let required = |name: &'static str| var(name).ok_or(ConfigError::Missing(name));
    let (namespace, name) = (
        required(env::AGENTIC_SESSION_NAMESPACE)?,
        required(env::AGENTIC_SESSION_NAME)?,
    );
    let workspace = if spec.shared_workspace {
        path::SHARED_WORKSPACE.to_owned()
    } else {
        path::workspace_dir(uid)
    };
    let variable = |name: &str| std::env::var(name).ok().map(SecretString::from);
    Ok(Repos {
        list,
        folder: data.join(path::git_dir(uid)),
        workspace: data.join(workspace),
        allowed: Allowed::new(&spec.allowed_private_hosts),
        credentials: Credentials::new(path::SECRETS.into(), path::PRIVATE.into(), variable).telling(vault.clone()),
        author: Identity::of(spec.user.as_ref()),
        branch: format!("sessions/{name}-{}", uid.chars().take(8).collect::<String>()),
        session: format!("{namespace}/{name}"),
        progress: None,
    })
}
