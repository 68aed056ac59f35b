//! What of a session's spec is remembered: what decisions rest on. The rest may be long, and children are made from a live read.

use std::collections::BTreeMap;

use crds::{
    AgenticSessionSpec,
    session::{HttpServer, McpServer, PodOptions, Tools},
};

/// In the place of texts that are not remembered.
const CUT: &str = "-";

/// The parts that decisions rest on. Taken apart without `..`, so that a new field cannot be kept, or lost, by mistake.
pub fn spec(whole: AgenticSessionSpec) -> AgenticSessionSpec {
    let AgenticSessionSpec {
        prompt,
        initial_prompt,
        display_name: _,
        interactive,
        timeout,
        inactivity_timeout,
        suspend,
        llm_settings,
        limits,
        tools,
        append_system_prompt: _,
        additional_args: _,
        // Written into status by the look that records a report of them, which reads live.
        repos: _,
        main_repo_index: _,
        auto_push_on_complete,
        environment_variables: _,
        runner_secrets,
        workspace,
        resources,
        pod,
        retry,
        ttl_seconds_after_finished,
        user_context: _,
    } = whole;
    AgenticSessionSpec {
        prompt: prompt.map(|_| CUT.to_owned()),
        initial_prompt: initial_prompt.map(|_| CUT.to_owned()),
        display_name: None,
        interactive,
        timeout,
        inactivity_timeout,
        suspend,
        llm_settings,
        limits,
        tools: tools.and_then(servers_with_credentials),
        append_system_prompt: None,
        additional_args: Vec::new(),
        repos: Vec::new(),
        main_repo_index: None,
        auto_push_on_complete,
        environment_variables: None,
        runner_secrets,
        workspace,
        resources,
        pod: pod.map(placement),
        retry,
        ttl_seconds_after_finished,
        user_context: None,
    }
}

/// The admin's word is needed for addresses that get a credential.
fn servers_with_credentials(tools: Tools) -> Option<Tools> {
    let servers: BTreeMap<_, _> = tools
        .mcp_servers
        .into_iter()
        .filter_map(|(name, server)| {
            let HttpServer { url, credential, .. } = server.http.filter(|http| http.credential.is_some())?;
            let http = HttpServer {
                url,
                credential,
                ..HttpServer::default()
            };
            let server = McpServer {
                http: Some(http),
                ..McpServer::default()
            };
            Some((name, server))
        })
        .collect();
    (!servers.is_empty()).then(|| Tools {
        mcp_servers: servers,
        ..Tools::default()
    })
}

/// What lists of the admin name. Nobody's word is needed for a node selector.
fn placement(pod: PodOptions) -> PodOptions {
    PodOptions {
        node_selector: BTreeMap::new(),
        ..pod
    }
}

#[cfg(test)]
mod tests {
    use crds::{AgenticSession, ProjectSettingsSpec};
    use serde_json::json;

    use super::*;
    use crate::session::validate::validate;

    fn fat() -> AgenticSessionSpec {
        let long = |n: usize| "x".repeat(n);
        let servers: BTreeMap<_, _> = (0..30)
            .map(|n| (format!("s{n}"), json!({"stdio": {"command": "c", "args": [long(2_000)], "env": {"A": long(2_000)}}})))
            .chain([(
                "tracker".to_owned(),
                json!({"http": {"url": "https://tracker.example/mcp", "headers": {"x": long(2_000)}, "credential": "tracker"}}),
            )])
            .collect();
        serde_json::from_value(json!({
            "prompt": long(100_000), "displayName": long(256), "timeout": 77, "suspend": true,
            "llmSettings": {"model": "m"}, "limits": {"maxTurns": 3}, "appendSystemPrompt": long(16_000),
            "tools": {"allowed": [long(512)], "mcpServers": servers}, "additionalArgs": [long(2_000)],
            "repos": [{"url": "https://git.example/a"}], "environmentVariables": {"A": long(8_192)},
            "runnerSecrets": ["own"], "workspace": {"size": "7Gi"}, "resources": {"limits": {"memory": "9Gi"}},
            "pod": {"image": "registry.example/x", "nodeSelector": {"a": "b"}, "priorityClassName": "high"},
            "retry": {"maxAttempts": 2}, "ttlSecondsAfterFinished": 5, "userContext": {"userId": "u"},
        }))
        .unwrap()
    }

    fn session(spec: AgenticSessionSpec) -> AgenticSession {
        let mut session = AgenticSession::new("poem", spec);
        (session.metadata.namespace, session.metadata.uid) = (Some("poets".into()), Some("u1".into()));
        session
    }

    #[test]
    fn what_is_kept_of_a_fat_spec_is_little() {
        let kept = serde_json::to_string(&spec(fat())).unwrap();
        assert!(
            serde_json::to_string(&fat()).unwrap().len() > 250_000 && kept.len() < 1_000,
            "{kept}"
        );
    }

    #[test]
    fn a_spec_that_was_cut_is_refused_and_allowed_as_the_whole_one_and_has_its_limits() {
        let settings: ProjectSettingsSpec = serde_json::from_value(json!({
            "allowedSecrets": ["own"], "allowedImages": ["registry.example/"], "allowedPriorityClasses": ["high"],
            "mcpCredentials": [{"name": "tracker", "urlPrefix": "https://tracker.example/", "secretKeyRef": {"name": "s", "key": "k"}}],
        }))
        .unwrap();
        let (whole, cut) = (session(fat()), session(spec(fat())));
        let (by_whole, by_cut) = (validate(&whole, &settings).unwrap(), validate(&cut, &settings).unwrap());
        assert_eq!(
            (
                by_whole.limits,
                by_whole.timeout,
                by_whole.start_timeout,
                by_whole.max_attempts,
                by_whole.ttl,
                by_whole.claim
            ),
            (
                by_cut.limits,
                by_cut.timeout,
                by_cut.start_timeout,
                by_cut.max_attempts,
                by_cut.ttl,
                by_cut.claim
            )
        );
        for hardened in [
            json!({}),
            json!({"allowedSecrets": ["own"]}),
            json!({"allowedSecrets": ["own"], "allowedImages": ["registry.example/"]}),
            json!({"allowedSecrets": ["own"], "allowedImages": ["registry.example/"], "allowedPriorityClasses": ["high"]}),
            json!({"ceilings": {"timeout": 5}}),
            json!({"ceilings": {"workspaceSize": "1Gi"}}),
            json!({"ceilings": {"resources": {"memory": "1Gi"}}}),
            json!({"ceilings": {"limits": {"maxTurns": 1}}}),
            json!({"ceilings": {"maxAttempts": 1}}),
        ] {
            let settings: ProjectSettingsSpec = serde_json::from_value(hardened.clone()).unwrap();
            let refusals = (
                validate(&whole, &settings).unwrap_err(),
                validate(&cut, &settings).unwrap_err(),
            );
            assert_eq!(refusals.0, refusals.1, "{hardened}");
        }
    }
}
