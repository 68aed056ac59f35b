//! The model API.

use std::collections::HashMap;
use std::path::Path;

use protocol::names::env;
use secrecy::SecretString;

use super::{ConfigError, Lookup};
use crate::proxy::{Credential, Upstream, Vertex};
use crate::redact::Vault;
use crate::secrets::Secrets;

/// Where it is when nothing else is said.
const PUBLIC_API: &str = "https://api.anthropic.com";

/// The model API, from files below `files` and variables; `None`: there is no credential for it.
pub(super) fn upstream(files: &Path, vault: &Vault, var: Lookup<'_>) -> Result<Option<Upstream>, ConfigError> {
    const OF_THE_MODEL: [&str; 4] = [
        env::ANTHROPIC_API_KEY,
        env::ANTHROPIC_AUTH_TOKEN,
        env::VERTEX_USER_TOKEN,
        env::GOOGLE_APPLICATION_CREDENTIALS,
    ];
    let variables: HashMap<&str, SecretString> = OF_THE_MODEL
        .into_iter()
        .filter_map(|name| Some((name, var(name)?.into())))
        .collect();
    let secrets = Secrets::new(files.to_owned(), move |name| variables.get(name).cloned()).telling(vault.clone());
    let authorities = secrets.authorities();
    let vertex = vertex(var)?;
    let (credential, base_url) = match &vertex {
        None => (
            Credential::anthropic(&secrets),
            var(env::ANTHROPIC_BASE_URL).unwrap_or_else(|| PUBLIC_API.to_owned()),
        ),
        Some(vertex) => (
            Credential::google(&secrets),
            var(env::ANTHROPIC_VERTEX_BASE_URL).unwrap_or_else(|| vertex.base_url()),
        ),
    };
    Ok(credential.map(|credential| Upstream {
        base_url: base_url.trim_end_matches('/').to_owned(),
        credential,
        vertex,
        authorities,
    }))
}

/// Project and region of Vertex AI, by our names or the CLI's; `None`: it is not Vertex AI.
fn vertex(var: Lookup<'_>) -> Result<Option<Vertex>, ConfigError> {
    let on = |name: &str| var(name).is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true"));
    if !on(env::VERTEX_ENABLED) && !on(env::CLAUDE_CODE_USE_VERTEX) {
        return Ok(None);
    }
    let vertex = Vertex {
        project: var(env::VERTEX_PROJECT_ID)
            .or_else(|| var(env::ANTHROPIC_VERTEX_PROJECT_ID))
            .unwrap_or_default(),
        region: var(env::VERTEX_REGION)
            .or_else(|| var(env::CLOUD_ML_REGION))
            .unwrap_or_else(|| "global".to_owned()),
    };
    if vertex.is_plain() {
        return Ok(Some(vertex));
    }
    Err(ConfigError::Invalid {
        name: "VERTEX_PROJECT_ID and VERTEX_REGION",
        value: format!("{} and {}", vertex.project, vertex.region),
        expected: "the id of a Google Cloud project, and a region such as europe-west1",
    })
}
