//! What the admin of a namespace decides, and what volumes sessions have.

use std::sync::{Arc, Mutex};

use crds::{Phase, condition};
use http::StatusCode;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use protocol::{Outcome, names::annotation};
use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    faults::whole,
    life::environment,
    plane::operator_config,
    wire::{self, Fate, Wire, is_watch},
    world::{World, report, until},
};

#[rstest]
#[case::timeout("ceiling-time", json!({"timeout": 61}), json!({"ceilings": {"timeout": 60}}), json!({"ceilings": {"timeout": 61}}), "spec.timeout: 61 is above the ceiling of this namespace, which is 60")]
#[case::memory("ceiling-memory", json!({"resources": {"limits": {"memory": "2Gi"}}}), json!({"ceilings": {"resources": {"memory": "1500Mi"}}}), json!({}), "spec.resources.limits.memory: 2Gi is above the ceiling of this namespace, which is 1500Mi")]
#[case::image("no-image", json!({"pod": {"image": "r.example.org/a"}}), json!({"allowedImages": ["r.example"]}), json!({"allowedImages": ["r.example.org/"]}), "spec.pod.image: r.example.org/a is not allowed in this namespace. Allowed by spec.allowedImages of its ProjectSettings: r.example.")]
#[case::secret("no-secret", json!({"runnerSecrets": ["other"]}), json!({"allowedSecrets": ["mine"]}), json!({"allowedSecrets": ["other"]}), "spec.runnerSecrets: other is not allowed")]
#[case::credential("no-mcp", json!({"tools": {"mcpServers": {"m": {"http": {"url": "https://m.example/x", "credential": "c"}}}}}), json!({}), json!({"mcpCredentials": [{"name": "c", "secretKeyRef": {"name": "s", "key": "k"}, "urlPrefix": "https://m.example/"}]}), "Allowed by spec.mcpCredentials of its ProjectSettings: none")]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_allowed_waits_and_heals_when_the_settings_change(
    #[case] namespace: &str,
    #[case] mut spec: Value,
    #[case] before: Value,
    #[case] after: Value,
    #[case] says: &str,
) {
    let world = World::new(namespace).await;
    world.settings_of_the_namespace(before).await;
    // The settings come by a watch of their own: the operator must have seen them.
    world.create("probe", json!({"prompt": "p"})).await;
    world.phase("probe", Phase::Creating).await;
    spec["prompt"] = json!("p");
    world.create("asks", spec).await;
    let waits = world.status_when("asks", |s| s.reason.is_some()).await;
    assert_eq!(
        (waits.phase, waits.reason.as_deref()),
        (Phase::Pending, Some("ConfigError"))
    );
    assert!(waits.message.as_deref().unwrap().contains(says), "{:?}", waits.message);
    world.settings_of_the_namespace(after).await;
    world.phase("asks", Phase::Creating).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_session_leaves_out_is_the_namespaces_and_is_kept_with_the_attempt() {
    let world = World::new("defaults").await;
    world
        .settings_of_the_namespace(json!({
            "timeout": 500, "llmSettings": {"model": "claude-test-9", "maxTokens": 77}, "limits": {"maxTurns": 4},
            "retry": {"maxAttempts": 1}, "runnerSecrets": ["team-keys"], "resources": {"limits": {"memory": "3Gi"}},
            "prices": {"house-model": {"input": "0.125", "output": "1"}}, "startTimeout": 99,
        }))
        .await;
    world
        .create(
            "poem",
            json!({"prompt": "p", "llmSettings": {"maxTokens": 5}, "interactive": true}),
        )
        .await;
    let pod = world.pod("poem", 1).await;
    assert_eq!(environment(&pod, "LLM_MODEL"), "claude-test-9");
    assert_eq!(environment(&pod, "LLM_MAX_TOKENS"), "5");
    assert_eq!(
        (environment(&pod, "TIMEOUT"), environment(&pod, "INTERACTIVE")),
        ("500".into(), "true".into())
    );
    let spec: Value = serde_json::from_str(&environment(&pod, "AGENTIC_SPEC_JSON")).unwrap();
    assert_eq!(spec["prices"]["house-model"]["input"], 125);
    let secrets = serde_json::to_value(&pod.spec.as_ref().unwrap().containers[0].env_from).unwrap();
    assert_eq!(secrets[1]["secretRef"], json!({"name": "team-keys", "optional": false}));
    let job = world.jobs().get("poem-job").await.unwrap();
    let resolved: Value = serde_json::from_str(&job.annotations()[annotation::RESOLVED]).unwrap();
    assert_eq!(
        (
            &resolved["maxAttempts"],
            &resolved["startTimeout"],
            &resolved["limits"]["maxTurns"]
        ),
        (&json!(1), &json!(99), &json!(4))
    );

    world.start(&pod).await;
    world.phase("poem", Phase::Running).await;
    world.end(&pod, 3, Some(&report(Outcome::ModelUnavailable, 1))).await;
    let failed = world.phase("poem", Phase::Failed).await;
    assert!(failed.message.unwrap().contains("No attempt is left after 1"));
}

fn claims(world: &World) -> Api<PersistentVolumeClaim> {
    Api::namespaced(world.client.clone(), &world.namespace)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_claim_is_waited_for_shared_and_kept() {
    let world = World::new("existing-claim").await;
    world
        .settings_of_the_namespace(json!({"allowedClaims": ["team"]}))
        .await;
    world.create("probe", json!({"prompt": "p"})).await;
    world.phase("probe", Phase::Creating).await;
    world
        .create("poem", json!({"prompt": "p", "workspace": {"existingClaim": "team"}}))
        .await;
    let waits = world
        .status_when("poem", |s| s.reason.as_deref() == Some("ConfigError"))
        .await;
    assert!(
        waits
            .message
            .unwrap()
            .contains("spec.workspace.existingClaim does not exist")
    );
    let team: PersistentVolumeClaim = serde_json::from_value(json!({
        "metadata": {"name": "team"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }))
    .unwrap();
    claims(&world).create(&PostParams::default(), &team).await.unwrap();
    let pod = world.pod("poem", 1).await;
    let spec = serde_json::to_value(&pod.spec).unwrap();
    assert_eq!(spec["volumes"][0]["persistentVolumeClaim"]["claimName"], "team");
    let mounts = spec["initContainers"][0]["volumeMounts"].as_array().unwrap();
    let workspace = mounts.iter().find(|mount| mount["mountPath"] == "/workspace").unwrap();
    assert_eq!(workspace["subPath"], "workspace");
    assert!(
        claims(&world)
            .get_opt("ambient-workspace-poem")
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retained_claim_has_no_owner_is_found_again_and_is_not_a_namesakes() {
    let mut world = World::new("retained").await;
    let spec = json!({"prompt": "p", "workspace": {"retention": "Retain"}});
    world.create("poem", spec.clone()).await;
    let pod = world.pod("poem", 1).await;
    let claim = claims(&world).get("ambient-workspace-poem").await.unwrap();
    assert!(claim.owner_references().is_empty());
    // The next attempt takes it for its own, in another life of the operator too.
    world.kill_operator().await;
    world.start_operator().await;
    world.start(&pod).await;
    world.phase("poem", Phase::Running).await;
    world.delete_pod(&pod, Some(&report(Outcome::Stopped, 1))).await;
    world.pod("poem", 2).await;

    world.sessions().delete("poem", &DeleteParams::default()).await.unwrap();
    until("the session to go", async || {
        world.sessions().get_opt("poem").await.unwrap().is_none().then_some(())
    })
    .await;
    world.create("poem", spec).await;
    let conflict = world
        .status_when("poem", |s| s.reason.as_deref() == Some("NameConflict"))
        .await;
    let message = conflict.message.unwrap();
    assert!(
        message.contains("claim ambient-workspace-poem,") && message.contains("spec.workspace.existingClaim"),
        "{message}"
    );
}

/// The API server does not give the settings while this says why.
#[derive(Clone, Default)]
struct Withheld(Arc<Mutex<Option<Why>>>);

#[derive(Clone, Copy, Debug)]
enum Why {
    /// A right is missing.
    Forbidden,
    /// The kind is not installed.
    NoKind,
}

impl Wire for Withheld {
    fn fate(&self, request: &http::Request<kube::client::Body>) -> Fate {
        let why = *self.0.lock().unwrap();
        let (Some(why), true) = (why, request.uri().path().ends_with("/projectsettings")) else {
            return Fate::Pass;
        };
        let (code, said) = match why {
            Why::Forbidden => {
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "projectsettings is forbidden", "reason": "Forbidden", "code": 403});
                (StatusCode::FORBIDDEN, status.to_string())
            }
            Why::NoKind => (StatusCode::NOT_FOUND, "404 page not found\n".to_owned()),
        };
        let mut answer = http::Response::new(whole(said));
        *answer.status_mut() = code;
        Fate::Instead(answer)
    }
}

#[rstest]
#[case::from_its_start("no-settings-start", Why::Forbidden, true)]
#[case::from_then_on("no-settings-then", Why::Forbidden, false)]
#[case::and_the_kind_is_gone("no-settings-kind", Why::NoKind, false)]
#[tokio::test(flavor = "multi_thread")]
async fn while_the_settings_cannot_be_read_nothing_begins_and_what_runs_is_followed(
    #[case] namespace: &str,
    #[case] why: Why,
    #[case] from_its_start: bool,
) {
    let mut world = World::without_operator(namespace).await;
    world.settings_of_the_namespace(json!({"timeout": 77})).await;
    let withheld = Withheld::default();
    let client = async || wire::client(operator_config(namespace).await, withheld.clone());
    world.start_operator_with(client().await);
    world.create("works", json!({"prompt": "p"})).await;
    let works = world.pod("works", 1).await;
    world.start(&works).await;
    world.phase("works", Phase::Running).await;
    if from_its_start {
        world.kill_operator().await;
    }
    *withheld.0.lock().unwrap() = Some(why);
    if from_its_start {
        world.start_operator_with(client().await);
    }
    world.create("next", json!({"prompt": "p"})).await;
    let waits = world.status_when("next", |s| s.reason.is_some()).await;
    assert_eq!(
        (waits.phase, waits.reason.as_deref()),
        (Phase::Pending, Some("ConfigError"))
    );
    let refused = waits.conditions.iter().find(|c| c.type_ == condition::SPEC_ACCEPTED);
    let said = &refused.unwrap().message;
    assert!(said.contains("cannot read the ProjectSettings"), "{said}");
    world.end(&works, 3, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("works", Phase::Completed).await;
    *withheld.0.lock().unwrap() = None;
    let next = world.pod("next", 1).await;
    assert_eq!(environment(&next, "TIMEOUT"), "77");
    let begins = world.phase("next", Phase::Creating).await;
    assert!(begins.conditions.iter().all(|c| c.type_ != condition::SPEC_ACCEPTED));
}

/// The watch of settings tells nothing after its first list.
#[derive(Clone)]
struct DeafToSettings;

impl Wire for DeafToSettings {
    fn fate(&self, request: &http::Request<kube::client::Body>) -> Fate {
        if is_watch(request) && request.uri().path().ends_with("/projectsettings") {
            Fate::Silence
        } else {
            Fate::Pass
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_admin_decided_before_a_session_was_made_holds_for_it_however_far_behind_the_watch_is() {
    let mut world = World::without_operator("settings-first").await;
    let client = wire::client(operator_config("settings-first").await, DeafToSettings);
    world.start_operator_with(client);
    world.create("before", json!({"prompt": "p"})).await;
    world.pod("before", 1).await;
    world
        .settings_of_the_namespace(
            json!({"timeout": 77, "allowedPrivateHosts": ["git.internal"], "allowedSecrets": ["mine"]}),
        )
        .await;
    world.create("poem", json!({"prompt": "p"})).await;
    let pod = world.pod("poem", 1).await;
    assert_eq!(environment(&pod, "TIMEOUT"), "77");
    let spec: Value = serde_json::from_str(&environment(&pod, "AGENTIC_SPEC_JSON")).unwrap();
    assert_eq!(spec["allowedPrivateHosts"], json!(["git.internal"]));
    // What is forbidden by now is not begun either.
    world
        .settings_of_the_namespace(json!({"ceilings": {"timeout": 60}}))
        .await;
    world.create("ode", json!({"prompt": "p", "timeout": 61})).await;
    let waits = world.status_when("ode", |s| s.reason.is_some()).await;
    assert!(waits.message.unwrap().contains("above the ceiling"));
}
