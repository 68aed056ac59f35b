//! What the API server refuses, with a message that says what to do.

use rstest::rstest;
use serde_json::{Value, json};

use crate::{plane::try_apply, world::World};

fn manifest(namespace: &str, name: &str, spec: &Value) -> String {
    json!({
        "apiVersion": "vteam.ambient-code/v1alpha1",
        "kind": "AgenticSession",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    })
    .to_string()
}

async fn applied(manifest: String) -> Result<(), String> {
    tokio::task::spawn_blocking(move || try_apply(&manifest)).await.unwrap()
}

/// One namespace for the whole table.
async fn namespace() -> &'static str {
    static WORLD: tokio::sync::OnceCell<World> = tokio::sync::OnceCell::const_new();
    &WORLD.get_or_init(|| World::without_operator("rules")).await.namespace
}

#[rstest]
#[case::unknown_field(json!({"prompt": "p", "promt": "p"}), "unknown field \"spec.promt\"")]
#[case::both_prompts(json!({"prompt": "p", "initialPrompt": "p"}), "give the task in exactly one of spec.prompt and spec.initialPrompt")]
#[case::no_prompt(json!({}), "give the task in exactly one of spec.prompt and spec.initialPrompt")]
#[case::empty_prompt(json!({"prompt": ""}), "spec.prompt")]
#[case::prompt_of_too_many_bytes(json!({"prompt": "é".repeat(50_001)}), "spec.prompt must have at most 100000 bytes")]
#[case::initial_prompt_of_too_many_bytes(json!({"initialPrompt": "é".repeat(50_001)}), "spec.initialPrompt must have at most 100000 bytes")]
#[case::nul_in_the_prompt(json!({"prompt": "a\u{0}b"}), "spec.prompt must not contain the NUL character")]
#[case::no_time(json!({"prompt": "p", "timeout": 0}), "spec.timeout must be 1 to 604800 seconds")]
#[case::negative_time(json!({"prompt": "p", "timeout": -1}), "spec.timeout must be 1 to 604800 seconds")]
#[case::more_than_a_week(json!({"prompt": "p", "timeout": 604_801}), "spec.timeout must be 1 to 604800 seconds")]
#[case::name_of_a_variable(json!({"prompt": "p", "environmentVariables": {"1ST": "x"}}), "names in spec.environmentVariables must be letters, digits and underscores")]
#[case::nul_in_a_variable(json!({"prompt": "p", "environmentVariables": {"X": "\u{0}"}}), "not contain the NUL character")]
#[case::variables_of_too_many_bytes(json!({"prompt": "p", "environmentVariables": (0..9).map(|n| (format!("V{n}"), json!("é".repeat(8_000)))).collect::<serde_json::Map<_, _>>()}), "spec.environmentVariables must have at most 131072 bytes together")]
#[case::no_size(json!({"prompt": "p", "workspace": {"size": "0"}}), "spec.workspace.size must be a positive quantity")]
#[case::negative_size(json!({"prompt": "p", "workspace": {"size": "-1Gi"}}), "spec.workspace.size must be a positive quantity")]
#[case::not_a_size(json!({"prompt": "p", "workspace": {"size": "big"}}), "spec.workspace.size")]
#[case::negative_memory(json!({"prompt": "p", "resources": {"limits": {"memory": "-1"}}}), "memory must be a quantity that is not negative")]
#[case::a_limit_that_is_none(json!({"prompt": "p", "resources": {"limits": {"memory": "0"}}}), "limits.memory must be more than 0, which would be no limit")]
#[case::a_number_that_is_no_limit(json!({"prompt": "p", "resources": {"limits": {"cpu": 0}}}), "limits.cpu must be more than 0")]
#[case::no_disk(json!({"prompt": "p", "resources": {"limits": {"ephemeral-storage": "0m"}}}), "limits.ephemeral-storage must be more than 0")]
#[case::idle_below_0(json!({"prompt": "p", "inactivityTimeout": -1}), "spec.inactivityTimeout must be 0 (never) to 604800 seconds")]
#[case::more_than_a_year(json!({"prompt": "p", "ttlSecondsAfterFinished": 31_536_001}), "spec.ttlSecondsAfterFinished must be 0 to 31536000 seconds")]
#[case::no_turns(json!({"prompt": "p", "limits": {"maxTurns": 0}}), "spec.limits.maxTurns")]
#[case::cost_of_nothing(json!({"prompt": "p", "limits": {"maxCostUSD": "0.00"}}), "limits.maxCostUSD must be an amount in US dollars above 0")]
#[case::cost_with_a_comma(json!({"prompt": "p", "limits": {"maxCostUSD": "1,5"}}), "limits.maxCostUSD must be an amount in US dollars above 0")]
#[case::no_tokens(json!({"prompt": "p", "limits": {"maxTokens": 0}}), "spec.limits.maxTokens")]
#[case::too_hot(json!({"prompt": "p", "llmSettings": {"temperature": 1.5}}), "spec.llmSettings.temperature")]
#[case::control_character_in_the_system_prompt(json!({"prompt": "p", "appendSystemPrompt": "a\u{1}b"}), "spec.appendSystemPrompt")]
#[case::system_prompt_of_too_many_bytes(json!({"prompt": "p", "appendSystemPrompt": "é".repeat(8_193)}), "spec.appendSystemPrompt must have at most 16384 bytes")]
#[case::a_flag_of_the_product(json!({"prompt": "p", "additionalArgs": ["--settings", "{}"]}), "flags that the product sets itself")]
#[case::a_flag_of_the_product_with_its_value(json!({"prompt": "p", "additionalArgs": ["--permission-mode=plan"]}), "flags that the product sets itself")]
#[case::a_flag_of_the_product_with_a_value_of_two_lines(json!({"prompt": "p", "additionalArgs": ["--settings={\n}"]}), "flags that the product sets itself")]
#[case::a_folder_of_plugins(json!({"prompt": "p", "additionalArgs": ["--plugin-dir=/workspace/p"]}), "flags that the product sets itself")]
#[case::a_short_flag_with_a_value_of_two_lines(json!({"prompt": "p", "additionalArgs": ["-d\napi"]}), "long flags only")]
#[case::a_short_flag(json!({"prompt": "p", "additionalArgs": ["-c"]}), "long flags only")]
#[case::the_end_of_flags(json!({"prompt": "p", "additionalArgs": ["--"]}), "long flags only")]
#[case::too_many_arguments(json!({"prompt": "p", "additionalArgs": ["x".repeat(2048), "x".repeat(2048), "x".repeat(2048), "x"]}), "at most 6144 bytes together")]
#[case::no_such_mode(json!({"prompt": "p", "tools": {"permissionMode": "yolo"}}), "spec.tools.permissionMode")]
#[case::a_tool_like_a_flag(json!({"prompt": "p", "tools": {"allowed": ["--x"]}}), "spec.tools.allowed[0]")]
#[case::a_server_of_two_kinds(json!({"prompt": "p", "tools": {"mcpServers": {"a": {"http": {"url": "https://a.example"}, "stdio": {"command": "c"}}}}}), "exactly one of http and stdio")]
#[case::a_server_without_tls(json!({"prompt": "p", "tools": {"mcpServers": {"a": {"http": {"url": "http://a.example/"}}}}}), "must begin with https://")]
#[case::a_server_with_a_password(json!({"prompt": "p", "tools": {"mcpServers": {"a": {"http": {"url": "https://u:p@a.example/"}}}}}), "hold no user or password")]
#[case::name_of_a_server(json!({"prompt": "p", "tools": {"mcpServers": {"../x": {"stdio": {"command": "c"}}}}}), "names in spec.tools.mcpServers")]
#[case::header_of_two_lines(json!({"prompt": "p", "tools": {"mcpServers": {"a": {"http": {"url": "https://a.example/", "headers": {"X": "1\r\nY: 2"}}}}}}), "printable ASCII")]
#[case::servers_of_too_many_bytes(json!({"prompt": "p", "tools": {"mcpServers": {"a": {"stdio": {"command": "c", "args": vec!["x".repeat(2048); 4]}}}}}), "at most 8192 bytes together")]
#[case::nine_repositories(json!({"prompt": "p", "repos": vec![json!({"url": "https://a.example/r"}); 9]}), "spec.repos")]
#[case::a_local_repository(json!({"prompt": "p", "repos": [{"url": "file:///etc"}]}), "must begin with https://, ssh:// or git@")]
#[case::a_helper_of_git(json!({"prompt": "p", "repos": [{"url": "ext::sh -c x"}]}), "must begin with https://, ssh:// or git@")]
#[case::a_repository_with_a_token(json!({"prompt": "p", "repos": [{"url": "https://x:ghp_fake@github.example/a"}]}), "hold no user or password for https")]
#[case::a_repository_twice(json!({"prompt": "p", "repos": [{"url": "https://a.example/r", "input": {"url": "https://a.example/r"}}]}), "exactly one of url and input")]
#[case::no_repository(json!({"prompt": "p", "repos": [{"branch": "main"}]}), "exactly one of url and input")]
#[case::a_branch_like_a_flag(json!({"prompt": "p", "repos": [{"url": "https://a.example/r", "branch": "-u"}]}), "must be a name that git takes")]
#[case::a_branch_of_the_platform_like_a_path(json!({"prompt": "p", "repos": [{"input": {"url": "https://a.example/r", "branch": "a/../b"}}]}), "input.branch of a repository must be a name that git takes")]
#[case::a_folder_outside(json!({"prompt": "p", "repos": [{"url": "https://a.example/r", "name": "../x"}]}), "spec.repos[0].name")]
#[case::one_folder_for_two(json!({"prompt": "p", "repos": [{"url": "https://a.example/r", "name": "x"}, {"url": "https://a.example/s", "name": "x"}]}), "names in spec.repos must differ")]
#[case::the_third_of_two(json!({"prompt": "p", "repos": [{"url": "https://a.example/r"}], "mainRepoIndex": 1}), "spec.mainRepoIndex must be the position of an entry")]
#[case::a_secret_twice(json!({"prompt": "p", "runnerSecrets": ["a", "a"]}), "must not name a Secret twice")]
#[case::size_of_a_claim_that_exists(json!({"prompt": "p", "workspace": {"existingClaim": "c", "size": "1Gi"}}), "leave out size, storageClassName and retention")]
#[case::a_claim_of_an_ephemeral_workspace(json!({"prompt": "p", "workspace": {"existingClaim": "c", "ephemeral": true}}), "leave out existingClaim, storageClassName and retention")]
#[case::an_ephemeral_workspace_to_keep(json!({"prompt": "p", "workspace": {"retention": "Retain", "ephemeral": true}}), "leave out existingClaim, storageClassName and retention")]
#[case::blank_in_an_image(json!({"prompt": "p", "pod": {"image": "a b"}}), "spec.pod.image")]
#[case::no_such_effect(json!({"prompt": "p", "pod": {"tolerations": [{"key": "a", "effect": "Never"}]}}), "spec.pod.tolerations[0].effect")]
#[case::a_label_of_no_form(json!({"prompt": "p", "pod": {"nodeSelector": {"a b": "c"}}}), "pod.nodeSelector must have labels of Kubernetes' form")]
#[case::more_processors_than_the_limit(json!({"prompt": "p", "resources": {"requests": {"cpu": "1001m"}, "limits": {"cpu": 1}}}), "requests.cpu must not be above limits.cpu")]
#[case::more_memory_than_the_limit(json!({"prompt": "p", "resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "1G"}}}), "requests.memory must not be above limits.memory")]
#[case::more_disk_than_the_limit(json!({"prompt": "p", "resources": {"requests": {"ephemeral-storage": 1025}, "limits": {"ephemeral-storage": "1Ki"}}}), "requests.ephemeral-storage must not be above limits.ephemeral-storage")]
#[case::a_class_that_no_storage_has(json!({"prompt": "p", "workspace": {"storageClassName": "Fast"}}), "spec.workspace.storageClassName")]
#[case::a_claim_that_nobody_can_make(json!({"prompt": "p", "workspace": {"existingClaim": "a..b"}}), "spec.workspace.existingClaim")]
#[case::a_priority_that_nobody_can_make(json!({"prompt": "p", "pod": {"priorityClassName": "a..b"}}), "spec.pod.priorityClassName")]
#[case::a_runtime_that_nobody_can_make(json!({"prompt": "p", "pod": {"runtimeClassName": "a.-b"}}), "spec.pod.runtimeClassName")]
#[case::an_account_that_nobody_can_make(json!({"prompt": "p", "pod": {"serviceAccountName": "a-.b"}}), "spec.pod.serviceAccountName")]
#[case::a_secret_that_nobody_can_make(json!({"prompt": "p", "runnerSecrets": ["a..b"]}), "spec.runnerSecrets[0]")]
#[case::a_domain_that_is_none(json!({"prompt": "p", "pod": {"nodeSelector": {"a..b/c": "d"}}}), "pod.nodeSelector must have labels of Kubernetes' form")]
#[case::every_taint_by_accident(json!({"prompt": "p", "pod": {"tolerations": [{"value": "yes"}]}}), "a toleration without key takes every taint")]
#[case::any_value_and_one(json!({"prompt": "p", "pod": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}}), "leave out the value, or the operator")]
#[case::seconds_of_what_sends_nobody_off(json!({"prompt": "p", "pod": {"tolerations": [{"key": "a", "tolerationSeconds": 5}]}}), "must stand beside effect NoExecute")]
#[case::a_taint_of_no_form(json!({"prompt": "p", "pod": {"tolerations": [{"key": "a/b/c", "operator": "Exists"}]}}), "spec.pod.tolerations[0].key")]
#[case::a_value_of_no_form(json!({"prompt": "p", "pod": {"tolerations": [{"key": "a", "value": "b-"}]}}), "spec.pod.tolerations[0].value")]
#[case::eleven_attempts(json!({"prompt": "p", "retry": {"maxAttempts": 11}}), "spec.retry.maxAttempts")]
#[case::blank_in_the_model(json!({"prompt": "p", "llmSettings": {"model": "a b"}}), "spec.llmSettings.model")]
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_session_is_refused(#[case] spec: Value, #[case] says: &str) {
    let refused = applied(manifest(namespace().await, "bad", &spec)).await.unwrap_err();
    assert!(refused.contains(says), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_too_long_is_refused() {
    let spec = json!({"prompt": "p"});
    let refused = applied(manifest(namespace().await, &"n".repeat(53), &spec))
        .await
        .unwrap_err();
    assert!(
        refused.contains("at most 52 characters") && refused.contains("choose a shorter name"),
        "{refused}"
    );
    applied(manifest(namespace().await, &"n".repeat(52), &spec))
        .await
        .unwrap();
}

#[rstest]
#[case::prompt("prompt", json!("another"))]
#[case::main_repository("mainRepoIndex", json!(1))]
#[case::interactive("interactive", json!(false))]
#[case::tools("tools", json!({"allowed": ["Write"]}))]
#[case::system_prompt("appendSystemPrompt", json!("Be long."))]
#[case::additional_args("additionalArgs", json!(["--effort", "low"]))]
#[case::repos("repos", json!([{"url": "https://git.example/b"}]))]
#[case::push("autoPushOnComplete", json!(false))]
#[case::secrets("runnerSecrets", json!(["t"]))]
#[case::pod("pod", json!({"image": "i:2"}))]
#[case::retry("retry", json!({"maxAttempts": 2}))]
#[case::llm_settings("llmSettings", json!({"model": "m-2"}))]
#[case::environment("environmentVariables", json!({"A": "2"}))]
#[case::workspace("workspace", json!({"size": "2Gi"}))]
#[case::resources("resources", json!({"limits": {"memory": "2Gi"}}))]
#[case::user("userContext", json!({"userId": "u-2"}))]
#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_cannot_be_changed_added_or_taken_away(#[case] field: &str, #[case] other: Value) {
    let full = json!({
        "prompt": "p", "interactive": true, "tools": {"allowed": ["Read"]}, "appendSystemPrompt": "Be brief.", "additionalArgs": ["--effort", "high"],
        "repos": [{"url": "https://git.example/a"}, {"url": "https://git.example/b"}], "mainRepoIndex": 0, "autoPushOnComplete": true, "runnerSecrets": ["s"], "pod": {"image": "i:1"},
        "retry": {"maxAttempts": 1}, "llmSettings": {"model": "m-1"}, "environmentVariables": {"A": "1"},
        "workspace": {"size": "1Gi"}, "resources": {"limits": {"memory": "1Gi"}}, "userContext": {"userId": "u-1"},
    });
    let name = format!("fixed-{}", field.to_lowercase());
    applied(manifest(namespace().await, &name, &full)).await.unwrap();
    let mut changed = full.clone();
    changed[field] = other;
    let mut without = full.clone();
    without.as_object_mut().unwrap().remove(field);
    for spec in [changed, without] {
        let refused = applied(manifest(namespace().await, &name, &spec)).await.unwrap_err();
        let expected = format!("spec.{field} cannot be changed: create another session");
        assert!(
            refused.contains(&expected) || (field == "prompt" && refused.contains("exactly one of")),
            "{refused}"
        );
    }

    if field != "prompt" {
        let mut spec = json!({"prompt": "p"});
        applied(manifest(namespace().await, &format!("{name}-added"), &spec))
            .await
            .unwrap();
        spec[field] = full[field].clone();
        let refused = applied(manifest(namespace().await, &format!("{name}-added"), &spec))
            .await
            .unwrap_err();
        assert!(
            refused.contains(&format!("spec.{field} cannot be changed")),
            "{refused}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_name_of_the_prompt_cannot_be_changed_either() {
    let namespace = namespace().await;
    let by = |field: &str, text: &str| manifest(namespace, "initial", &json!({field: text}));
    applied(by("initialPrompt", "p")).await.unwrap();
    for other in [by("initialPrompt", "another"), by("prompt", "p")] {
        let refused = applied(other).await.unwrap_err();
        assert!(
            refused.contains("cannot be changed: create another session"),
            "{refused}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_session_leaves_out_is_left_out_for_the_settings_of_its_namespace() {
    let world = World::without_operator("no-defaults").await;
    let bare = world.create("bare", json!({"prompt": "p"})).await;
    assert_eq!(serde_json::to_value(&bare.spec).unwrap(), json!({"prompt": "p"}));
    assert_eq!(serde_json::to_value(&bare.status).unwrap(), json!({"phase": "Pending"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_change_can_be_changed_and_good_sessions_are_taken() {
    let full = json!({"initialPrompt": "p", "displayName": "A", "suspend": true, "timeout": 604_800, "workspace": {"size": "500Mi", "storageClassName": "fast"},
        "resources": {"requests": {"cpu": 1, "memory": "1Gi", "ephemeral-storage": "1Gi"}, "limits": {"cpu": "1000m", "memory": 1_073_741_824, "ephemeral-storage": "1024Mi"}}});
    applied(manifest(namespace().await, "good", &full)).await.unwrap();
    let mut changed = full.clone();
    changed["displayName"] = json!("B");
    changed["suspend"] = json!(false);
    changed["timeout"] = json!(1);
    changed["inactivityTimeout"] = json!(0);
    changed["limits"] = json!({"maxTurns": 5, "maxCostUSD": "0.000000001", "maxTokens": 1_000_000_000_000_u64});
    changed["ttlSecondsAfterFinished"] = json!(0);
    applied(manifest(namespace().await, "good", &changed)).await.unwrap();
}

fn settings(namespace: &str, name: &str, spec: &Value) -> String {
    json!({
        "apiVersion": "vteam.ambient-code/v1alpha1",
        "kind": "ProjectSettings",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    })
    .to_string()
}

#[rstest]
#[case::another_name("mine", json!({}), "must be named projectsettings")]
#[case::a_price_that_is_none("projectsettings", json!({"prices": {"m": {"input": "cheap", "output": "1"}}}), "a price must be US dollars per million tokens")]
#[case::a_prefix_without_a_host("projectsettings", json!({"mcpCredentials": [{"name": "a", "secretKeyRef": {"name": "s", "key": "k"}, "urlPrefix": "https://a.example"}]}), "reach at least to the / behind the host")]
#[case::a_credential_twice("projectsettings", json!({"mcpCredentials": [{"name": "a", "secretKeyRef": {"name": "s", "key": "k"}, "urlPrefix": "https://a.example/"}, {"name": "a", "secretKeyRef": {"name": "s", "key": "k"}, "urlPrefix": "https://b.example/"}]}), "Duplicate value")]
#[case::no_ceiling("projectsettings", json!({"ceilings": {"workspaceSize": "0"}}), "spec.ceilings.workspaceSize must be a positive quantity")]
#[case::a_ceiling_that_is_none("projectsettings", json!({"ceilings": {"resources": {"ephemeral-storage": "0"}}}), "ceilings.resources.ephemeral-storage must be more than 0")]
#[case::a_default_request_above_the_limit("projectsettings", json!({"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "1"}}}), "requests.cpu must not be above limits.cpu")]
#[case::a_class_that_nobody_can_make("projectsettings", json!({"workspace": {"storageClassName": "a..b"}}), "spec.workspace.storageClassName")]
#[case::a_host_that_is_none("projectsettings", json!({"allowedPrivateHosts": ["a/b"]}), "spec.allowedPrivateHosts[0]")]
#[tokio::test(flavor = "multi_thread")]
async fn bad_settings_are_refused(#[case] name: &str, #[case] spec: Value, #[case] says: &str) {
    let refused = applied(settings(namespace().await, name, &spec)).await.unwrap_err();
    assert!(refused.contains(says), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_every_field_and_one_of_the_platform_are_taken() {
    let every = json!({
        "prompt": "p", "displayName": "d", "interactive": true, "timeout": 60, "inactivityTimeout": 60, "suspend": true,
        "llmSettings": {"model": "m", "fallbackModel": "n", "maxTokens": 4000, "temperature": 0.7},
        "limits": {"maxTurns": 9, "maxCostUSD": "2.50", "maxTokens": 5_000_000_000_u64},
        "tools": {"allowed": ["Bash(git *)"], "disallowed": ["WebFetch"], "permissionMode": "acceptEdits", "mcpServers": {
            "tracker": {"http": {"url": "https://mcp.example/v1?x=1", "headers": {"X-Team": "a b"}, "credential": "tracker"}},
            "files": {"stdio": {"command": "npx", "args": ["-y", "@x/files", ""], "env": {"ROOT": "/workspace"}}}}},
        "appendSystemPrompt": "Be brief.\n\tAlways.", "additionalArgs": ["--effort", "high", "--add-dir=/tmp"],
        "repos": [
            {"url": "https://github.example/a/b.git", "branch": "feature/x_1.2", "name": "b", "autoPush": true, "output": {"branch": "out"}},
            {"url": "git@github.example:a/c.git"}, {"url": "ssh://git@github.example:22/a/d.git"},
        ],
        "mainRepoIndex": 1, "autoPushOnComplete": true, "environmentVariables": {"A": "1"}, "runnerSecrets": ["s.1"],
        "workspace": {"size": "1Gi", "storageClassName": "c.1-a", "retention": "Retain"},
        "resources": {"requests": {"memory": "1Gi"}, "limits": {"cpu": "1"}},
        "pod": {"image": "registry.example:5000/a/b@sha256:abc", "imagePullSecrets": ["s"], "nodeSelector": {"kubernetes.io/arch": "amd64"},
            "tolerations": [{"key": "gpu.example/a_b", "operator": "Exists", "value": "", "effect": "NoExecute", "tolerationSeconds": 5}, {"operator": "Exists"}, {"key": "a", "value": "b_1"}], "priorityClassName": "p",
            "runtimeClassName": "gvisor", "serviceAccountName": "s", "readOnlyRootFilesystem": false},
        "retry": {"maxAttempts": 10}, "ttlSecondsAfterFinished": 60,
        "userContext": {"userId": "u", "displayName": "U", "groups": ["g:1"]},
    });
    applied(manifest(namespace().await, "every", &every)).await.unwrap();
    let platform = json!({
        "prompt": "p", "displayName": "d", "interactive": false, "timeout": 300, "autoPushOnComplete": true, "mainRepoIndex": 0,
        "llmSettings": {"model": "claude-3-7-sonnet-latest", "temperature": 0.7, "maxTokens": 4000},
        "repos": [{"input": {"url": "https://github.example/a/b", "branch": "main"}, "output": {"url": "https://github.example/me/b", "branch": "work"}}],
        "userContext": {"userId": "u", "displayName": "U", "groups": []}, "environmentVariables": {"A": "1"},
    });
    applied(manifest(namespace().await, "platform", &platform))
        .await
        .unwrap();
    applied(manifest(
        namespace().await,
        "platform-bare",
        &json!({"prompt": "p", "mainRepoIndex": 0}),
    ))
    .await
    .unwrap();
}
