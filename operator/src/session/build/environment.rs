//! Environment of the runner container.

use k8s_openapi::api::core::v1::{
    ConfigMapKeySelector, EnvFromSource, EnvVar, EnvVarSource, ObjectFieldSelector, SecretEnvSource,
};
use protocol::{
    names::{LANGFUSE_CONFIG, LANGFUSE_KEYS, env, path},
    spec::AgenticSpec,
};

use super::{Request, json};
use crate::{
    session::{plan::Attempt, validate::Claim},
    settings::PodSettings,
};

/// What is taken from the `ConfigMap` of Langfuse. Not all of it: whoever may write `ConfigMap`s could otherwise set where the
/// model's key is sent.
const OF_LANGFUSE: [&str; 4] = [
    env::LANGFUSE_ENABLED,
    env::LANGFUSE_HOST,
    env::LANGFUSE_PUBLIC_KEY,
    env::LANGFUSE_MASK_MESSAGES,
];

/// The variables with names of their own.
pub fn variables(request: &Request, attempt: Attempt, settings: &PodSettings) -> Vec<EnvVar> {
    let spec = AgenticSpec {
        run: attempt.run,
        used_seconds: attempt.used_seconds,
        shared_workspace: matches!(request.claim, Claim::Existing(_)),
        ..request.spec.clone()
    };
    let mut variables = vec![
        variable(env::PROMPT, &request.prompt),
        variable(env::SESSION_ID, &request.name),
        variable(env::AGENTIC_SESSION_NAME, &request.name),
        variable(env::AGENTIC_SESSION_NAMESPACE, &request.namespace),
        variable(env::AGENTIC_SESSION_UID, &request.uid),
        variable(env::ATTEMPT, &attempt.number.to_string()),
        variable(env::INTERACTIVE, if request.interactive { "true" } else { "false" }),
        variable(env::TIMEOUT, &request.timeout.to_string()),
        variable(env::WORKSPACE_PATH, path::WORKSPACE),
        variable(env::AGENTIC_SPEC_JSON, &json(&spec)),
        from(
            env::POD_UID,
            EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    field_path: "metadata.uid".to_owned(),
                    ..ObjectFieldSelector::default()
                }),
                ..EnvVarSource::default()
            },
        ),
    ];
    let llm = &request.llm;
    let optional = [
        (env::LLM_MODEL, llm.model.clone()),
        (env::LLM_TEMPERATURE, llm.temperature.map(|number| number.to_string())),
        (env::LLM_MAX_TOKENS, llm.max_tokens.map(|number| number.to_string())),
        (
            env::REPOS_JSON,
            (!request.repos.is_empty()).then(|| json(&request.repos)),
        ),
    ];
    variables.extend(
        optional
            .iter()
            .filter_map(|(name, value)| Some(variable(name, value.as_ref()?))),
    );
    variables.extend(OF_LANGFUSE.map(langfuse));
    if let Some(base) = settings.gateway() {
        let base = base.trim_end_matches('/');
        let url = format!("{base}/api/projects/{}/sessions/{}/ws", request.namespace, request.name);
        variables.push(variable(env::WEBSOCKET_URL, &url));
        variables.push(variable(env::GATEWAY_TOKEN_FILE, path::GATEWAY_TOKEN));
    }
    variables
}

/// The kubelet reads `$(NAME)` in values and halves `$$`: doubled, every `$` arrives as it was written.
pub fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: Some(value.replace('$', "$$")),
        ..EnvVar::default()
    }
}

fn from(name: &str, source: EnvVarSource) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value_from: Some(source),
        ..EnvVar::default()
    }
}

fn langfuse(name: &str) -> EnvVar {
    from(
        name,
        EnvVarSource {
            config_map_key_ref: Some(ConfigMapKeySelector {
                name: LANGFUSE_CONFIG.to_owned(),
                key: name.to_owned(),
                optional: Some(true),
            }),
            ..EnvVarSource::default()
        },
    )
}

/// Secrets, as a whole. Which credential a session needs, the runner says itself when it is missing.
pub fn credentials(request: &Request) -> Vec<EnvFromSource> {
    let secret = |name: &str, optional: bool| EnvFromSource {
        secret_ref: Some(SecretEnvSource {
            name: name.to_owned(),
            optional: Some(optional),
        }),
        ..EnvFromSource::default()
    };
    // Of two that set a name, the later counts: the first of the list has the last word.
    let mut sources = vec![secret(LANGFUSE_KEYS, true)];
    sources.extend(request.secrets.iter().rev().map(|s| secret(&s.name, s.optional)));
    sources
}
