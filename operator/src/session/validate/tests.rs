//! What a session of a few lines comes to, and which cannot be run.

use rstest::rstest;
use serde_json::{Value, json};

use super::*;

/// A session of a few lines, as it comes from the API server.
#[expect(clippy::needless_pass_by_value, reason = "reads better with json! in place")]
pub(crate) fn session(spec: Value) -> AgenticSession {
    serde_json::from_value(json!({
        "apiVersion": "vteam.ambient-code/v1alpha1",
        "kind": "AgenticSession",
        "metadata": {"name": "write-poem", "namespace": "poets", "uid": "6fa459ea-ee8a-3ca4-894e-db77e160355e", "generation": 1},
        "spec": spec,
    }))
    .unwrap()
}

pub(crate) fn checked(spec: Value) -> Result<Request, Invalid> {
    validate(&session(spec), &ProjectSettingsSpec::default())
}

#[test]
fn a_minimal_session_gets_the_built_in_values() {
    let request = checked(json!({"initialPrompt": "hi"})).unwrap();
    let limits = LiveLimits {
        timeout: Some(3_600),
        inactivity_timeout: Some(1_800),
        ..LiveLimits::default()
    };
    assert_eq!((request.timeout, request.limits), (3_600, limits));
    assert_eq!(
        (request.start_timeout, request.max_attempts, request.ttl),
        (3_600, 3, None)
    );
    let own = Claim::Own {
        size: Quantity("5Gi".into()),
        storage_class: None,
        retention: Retention::Delete,
    };
    assert_eq!(request.claim, own);
    assert_eq!(request.prompt, "hi");
    assert_eq!(request.owner.api_version, "vteam.ambient-code/v1alpha1");
    insta::assert_json_snapshot!(request.resources, @r#"
    {
      "limits": {
        "memory": "4Gi"
      },
      "requests": {
        "cpu": "500m",
        "memory": "1Gi"
      }
    }
    "#);
}

#[rstest]
#[case::a_lower_limit_lowers_the_request(json!({"limits": {"memory": "512Mi"}}), json!({"limits": {"memory": "512Mi"}, "requests": {"cpu": "500m"}}))]
#[case::a_request_above_the_built_in_limit_has_no_limit(json!({"requests": {"memory": "8Gi"}}), json!({"limits": {}, "requests": {"cpu": "500m", "memory": "8Gi"}}))]
#[case::a_limit_of_processors_is_the_request(json!({"limits": {"cpu": "0.1"}}), json!({"limits": {"cpu": "0.1", "memory": "4Gi"}, "requests": {"memory": "1Gi"}}))]
fn resources_that_are_named_are_kept(#[case] asked: Value, #[case] expected: Value) {
    let request = checked(json!({"prompt": "hi", "resources": asked})).unwrap();
    assert_eq!(serde_json::to_value(request.resources).unwrap(), expected);
}

#[test]
fn a_queue_has_a_name_and_the_priority_in_it_is_one_that_the_admin_allows() {
    let labelled = |labels: Value, settings: Value| {
        let mut session = session(json!({"prompt": "hi"}));
        session.metadata.labels = serde_json::from_value(labels).unwrap();
        let settings: ProjectSettingsSpec = serde_json::from_value(settings).unwrap();
        validate(&session, &settings).map(|request| (request.queue, request.queue_priority))
    };
    let named = json!({label::KUEUE_QUEUE: "night", label::KUEUE_PRIORITY: "urgent"});
    assert_eq!(
        labelled(named.clone(), json!({})).unwrap_err().to_string(),
        "label kueue.x-k8s.io/priority-class: urgent is not allowed in this namespace. Allowed by spec.allowedPriorityClasses \
         of its ProjectSettings: none. Ask the admin to add it, or create another session"
    );
    assert_eq!(
        labelled(named, json!({"allowedPriorityClasses": ["urgent"]})).unwrap(),
        (Some("night".into()), Some("urgent".into()))
    );
    let unnamed = json!({label::KUEUE_QUEUE: "", label::KUEUE_PRIORITY: "urgent"});
    assert_eq!(labelled(unnamed, json!({})).unwrap(), (None, None));
}

#[rstest]
#[case(json!({}), Invalid::NotOnePrompt)]
#[case(json!({"prompt": "a", "initialPrompt": "b"}), Invalid::NotOnePrompt)]
#[case(json!({"prompt": "a", "timeout": 0}), Invalid::Timeout)]
#[case(json!({"prompt": "a\u{0}b"}), Invalid::Nul("spec.prompt"))]
#[case(json!({"prompt": "a", "environmentVariables": {"X": "\u{0}"}}), Invalid::Nul("spec.environmentVariables"))]
fn what_cannot_run_is_refused(#[case] spec: Value, #[case] expected: Invalid) {
    assert_eq!(checked(spec).unwrap_err(), expected);
}

/// As long as the schema's bounds let everything be that goes into one variable, of what takes most bytes as JSON.
#[test]
fn what_the_runner_is_told_fits_a_variable() {
    let (quotes, wide) = (|n: usize| "\"".repeat(n), |n: usize| "\u{10ffff}".repeat(n));
    let credential = |n: usize| {
        let name = format!("{n:063}");
        json!({"name": name, "secretKeyRef": {"name": "s", "key": "k"}, "header": "h".repeat(64), "urlPrefix": format!("https://{}/", "m".repeat(503))})
    };
    let server = |n: usize| {
        let url = format!("https://{}/{}", "m".repeat(503), "x".repeat(256));
        json!({"http": {"url": url, "headers": (0..16).map(|h| (format!("h{h:02}"), quotes(13))).collect::<BTreeMap<_, _>>(), "credential": format!("{n:063}")}})
    };
    let price =
        json!({"input": "999999.999", "output": "999999.999", "cacheRead": "999999.999", "cacheWrite": "999999.999"});
    let settings: ProjectSettingsSpec = serde_json::from_value(json!({
        "mcpCredentials": (0..16).map(credential).collect::<Vec<_>>(),
        "prices": (0..32).map(|n| (format!("{n:064}"), price.clone())).collect::<BTreeMap<_, _>>(),
        "allowedPrivateHosts": vec!["h".repeat(128); 32],
    }))
    .unwrap();
    let request = validate(
        &session(json!({
            "prompt": "p",
            "llmSettings": {"fallbackModel": wide(256)},
            "tools": {
                "allowed": vec![quotes(96); 64],
                "permissionMode": "bypassPermissions",
                "mcpServers": (0..8).map(|n| (format!("{n:032}"), server(n))).collect::<BTreeMap<_, _>>(),
            },
            "appendSystemPrompt": quotes(16_384),
            "additionalArgs": vec![quotes(192); 32],
            "mainRepoIndex": 7,
            "userContext": {"userId": wide(256), "displayName": wide(256), "groups": vec![quotes(64); 16]},
        })),
        &settings,
    )
    .unwrap();
    let spec = AgenticSpec {
        run: u32::MAX,
        used_seconds: u64::MAX,
        ..request.spec
    };
    let bytes = serde_json::to_vec(&spec).unwrap().len();
    assert!((80_000..=100_000).contains(&bytes), "{bytes} bytes");
}
