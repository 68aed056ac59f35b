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
#[case::no_size(json!({"prompt": "p", "workspace": {"size": "0"}}), "spec.workspace.size must be a positive quantity")]
#[case::negative_size(json!({"prompt": "p", "workspace": {"size": "-1Gi"}}), "spec.workspace.size must be a positive quantity")]
#[case::not_a_size(json!({"prompt": "p", "workspace": {"size": "big"}}), "spec.workspace.size")]
#[case::negative_memory(json!({"prompt": "p", "resources": {"limits": {"memory": "-1"}}}), "memory must be a quantity that is not negative")]
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
#[case::timeout("timeout", json!(61))]
#[case::llm_settings("llmSettings", json!({"model": "m-2"}))]
#[case::environment("environmentVariables", json!({"A": "2"}))]
#[case::workspace("workspace", json!({"size": "2Gi"}))]
#[case::resources("resources", json!({"limits": {"memory": "2Gi"}}))]
#[case::user("userContext", json!({"userId": "u-2"}))]
#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_cannot_be_changed_added_or_taken_away(#[case] field: &str, #[case] other: Value) {
    let full = json!({
        "prompt": "p", "timeout": 60, "llmSettings": {"model": "m-1"}, "environmentVariables": {"A": "1"},
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
async fn suspend_and_display_name_can_be_changed_and_good_sessions_are_taken() {
    let full = json!({"initialPrompt": "p", "displayName": "A", "suspend": true, "timeout": 604_800, "workspace": {"size": "500Mi", "storageClassName": "fast"},
        "resources": {"requests": {"cpu": 1, "memory": "1Gi", "ephemeral-storage": "1Gi"}}});
    applied(manifest(namespace().await, "good", &full)).await.unwrap();
    let mut changed = full.clone();
    changed["displayName"] = json!("B");
    changed["suspend"] = json!(false);
    applied(manifest(namespace().await, "good", &changed)).await.unwrap();
}
