//! The platform's body of a create → an `AgenticSession`. What cannot be honoured is refused by name, never dropped in silence.

use std::collections::BTreeMap;

use crds::{
    AgenticSession, AgenticSessionSpec,
    session::{GroupName, LlmSettings, UserContext},
};
use kube::core::ObjectMeta;
use protocol::names::RESERVED;
use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::ApiError;
use crate::auth::kubernetes::Identity;

/// Longest value of the fields of `userContext`, characters.
const MAX_USER: usize = 256;
/// Bytes of all groups together.
const MAX_GROUPS_BYTES: usize = 1024;
/// Groups at most.
const MAX_GROUPS: usize = 16;
/// Fields of the platform's bodies that we have not.
const PLATFORM: [&str; 9] = [
    "activeWorkflow",
    "botAccount",
    "parent_session_id",
    "parentSessionId",
    "project",
    "runnerType",
    "sdkOptions",
    "stopOnRunFinished",
    "workspacePath",
];

/// A session to create: the fields of an `AgenticSession`'s spec, with labels and annotations beside them.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "a form for the API's document; bodies are read field by field")]
pub(super) struct NewSession {
    #[serde(flatten)]
    spec: AgenticSessionSpec,
    /// Labels of the session.
    labels: Option<BTreeMap<String, String>>,
    /// Annotations of the session.
    annotations: Option<BTreeMap<String, String>>,
}

/// The session that `body` asks for, without a name.
pub fn session(body: &[u8], caller: &Identity) -> Result<AgenticSession, ApiError> {
    let mut fields = object(body)?;
    fields.retain(|_, value| !value.is_null() && value != "");
    let labels = texts(&mut fields, "labels")?;
    let annotations = texts(&mut fields, "annotations")?;
    let mut spec = spec(fields)?;
    spec.user_context = Some(user(caller));
    Ok(AgenticSession {
        metadata: ObjectMeta {
            labels,
            annotations,
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    })
}

/// The fields of a body.
pub(super) fn object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let body: Value = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
    match body {
        Value::Object(fields) => Ok(fields),
        _ => Err(ApiError::bad_request(
            "the body must be a JSON object such as {\"prompt\": \"…\"}",
        )),
    }
}

/// The spec of these fields, of which each is known and has the right type.
pub(super) fn spec(mut fields: Map<String, Value>) -> Result<AgenticSessionSpec, ApiError> {
    // Who somebody is, the cluster says, not the request.
    fields.remove("userContext");
    leave_out_defaults(&mut fields);
    let given = Value::Object(fields);
    let mut spec: AgenticSessionSpec = serde_path_to_error::deserialize(&given).map_err(|error| {
        let path = error.path().to_string();
        ApiError::bad_request(format!("{path} has the wrong type: {}", error.into_inner()))
    })?;
    let kept = serde_json::to_value(&spec).map_err(|error| ApiError::bad_request(error.to_string()))?;
    if let Some(path) = unknown("", &given, &kept) {
        return Err(ApiError::bad_request(refusal(&path)));
    }
    spec.llm_settings = spec.llm_settings.filter(|settings| *settings != LlmSettings::default());
    Ok(spec)
}

/// The platform's own client sends these two in every request, whatever its user wants, and the platform does nothing with
/// them; here they would act, and the model API refuses a temperature from a model that thinks.
fn leave_out_defaults(fields: &mut Map<String, Value>) {
    if let Some(Value::Object(settings)) = fields.get_mut("llmSettings")
        && settings.get("temperature").and_then(Value::as_f64) == Some(0.7)
        && settings.get("maxTokens").and_then(Value::as_u64) == Some(4000)
    {
        settings.retain(|name, _| name != "temperature" && name != "maxTokens");
    }
}

/// Who asks, within the bounds of the resource.
pub(super) fn user(caller: &Identity) -> UserContext {
    let mut room = MAX_GROUPS_BYTES;
    let fits = |group: &&String| {
        let fits = group.chars().count() <= MAX_USER && !group.contains(char::is_control) && group.len() <= room;
        room -= if fits { group.len() } else { 0 };
        fits
    };
    UserContext {
        user_id: Some(caller.user.chars().take(MAX_USER).collect()),
        groups: caller
            .groups
            .iter()
            .filter(fits)
            .take(MAX_GROUPS)
            .cloned()
            .map(GroupName)
            .collect(),
        ..UserContext::default()
    }
}

fn texts(fields: &mut Map<String, Value>, name: &str) -> Result<Option<BTreeMap<String, String>>, ApiError> {
    let wrong = |error| ApiError::bad_request(format!("{name} must map names to strings: {error}"));
    let texts: Option<BTreeMap<String, String>> = fields
        .remove(name)
        .map(serde_json::from_value)
        .transpose()
        .map_err(wrong)?;
    match texts.iter().flatten().find(|(key, _)| key.starts_with(RESERVED)) {
        Some((key, _)) => Err(ApiError::bad_request(format!(
            "{name} {key:?} is the product's own, like all below {RESERVED}: leave it out"
        ))),
        None => Ok(texts),
    }
}

/// Why a field is refused, in words that leave no doubt whether there is such a field.
fn refusal(path: &str) -> String {
    let top = path.split(['.', '[']).next().unwrap_or(path);
    match top {
        "mcpServers" if path == top => {
            "mcpServers is not a field of a session here: give it as tools.mcpServers".to_owned()
        }
        "resourceOverrides" if path == top => {
            "resourceOverrides is not a field of a session here: give resources, workspace and pod instead".to_owned()
        }
        _ if PLATFORM.contains(&path) => {
            format!("{path} is a field of the Ambient platform that sessions here do not have: leave it out")
        }
        _ if path == top => {
            let fields = schemars::schema_for!(NewSession);
            let fields = fields.get("properties").and_then(Value::as_object);
            let names: Vec<_> = fields.into_iter().flat_map(Map::keys).map(String::as_str).collect();
            format!(
                "unknown field {path:?}: there is no such field; the fields are {}",
                names.join(", ")
            )
        }
        _ => format!(
            "unknown field {path:?}: {top} has no such field; `kubectl explain agenticsession.spec.{top}` lists them"
        ),
    }
}

fn unknown(path: &str, given: &Value, kept: &Value) -> Option<String> {
    match (given, kept) {
        (Value::Object(given), kept) => given.iter().find_map(|(name, value)| {
            let path = if path.is_empty() {
                name.clone()
            } else {
                format!("{path}.{name}")
            };
            match kept.get(name) {
                Some(kept) => unknown(&path, value, kept),
                None if changes_nothing(&path, value) => None,
                None => Some(path),
            }
        }),
        (Value::Array(given), Value::Array(kept)) => (given.iter().zip(kept).enumerate())
            .find_map(|(number, (given, kept))| unknown(&format!("{path}[{number}]"), given, kept)),
        _ => None,
    }
}

/// Whether a field that we do not have has the value that describes what we do: the platform's clients send their defaults.
fn changes_nothing(path: &str, value: &Value) -> bool {
    let empty = match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    // A session that is not interactive stops when its run is finished, told so or not.
    empty || (path == "stopOnRunFinished" && value.is_boolean())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn caller() -> Identity {
        Identity {
            user: "system:serviceaccount:team-a:client".to_owned(),
            ..Identity::default()
        }
    }

    fn spec(body: &Value) -> Result<Value, ApiError> {
        session(body.to_string().as_bytes(), &caller()).map(|session| serde_json::to_value(session.spec).unwrap())
    }

    #[test]
    fn the_bodies_that_clients_of_the_platform_send_become_sessions() {
        let body = json!({
            "prompt": "Say 7f3a", "displayName": "Test", "interactive": false, "timeout": 300,
            "llmSettings": {"model": "claude-sonnet-5-5", "temperature": 0.7, "maxTokens": 4000},
            "repos": [], "autoPushOnComplete": false, "workspacePath": "", "mainRepoIndex": 0, "botAccount": null,
            "environmentVariables": {"CI": "true"}, "labels": {"team": "a"}, "annotations": {"why": "test"},
            "userContext": {"userId": "somebody-else", "groups": ["admins"]},
        });
        let session = session(body.to_string().as_bytes(), &caller()).unwrap();
        assert_eq!(
            serde_json::to_value(&session.spec).unwrap(),
            json!({
                "prompt": "Say 7f3a", "displayName": "Test", "interactive": false, "timeout": 300,
                "mainRepoIndex": 0, "autoPushOnComplete": false,
                "llmSettings": {"model": "claude-sonnet-5-5"},
                "environmentVariables": {"CI": "true"},
                "userContext": {"userId": "system:serviceaccount:team-a:client"},
            })
        );
        assert_eq!(session.metadata.labels.unwrap()["team"], "a");
        assert_eq!(session.metadata.annotations.unwrap()["why"], "test");
    }

    #[rstest]
    #[case(json!({"prompt": "p", "promt": true}), r#"unknown field \"promt\": there is no such field; the fields are"#)]
    #[case(json!({"prompt": "p", "nothingWeKnow": 1}), "initialPrompt, interactive, labels")]
    #[case(json!({"prompt": "p", "llmSettings": {"modle": 0.2}}), r#"unknown field \"llmSettings.modle\""#)]
    #[case(json!({"prompt": "p", "workspace": {"sizee": "1Gi"}}), "workspace.sizee")]
    #[case(json!({"prompt": "p", "repos": [{"url": "https://example.com/a.git", "bransh": "x"}]}), "repos[0].bransh")]
    #[case(json!({"prompt": "p", "parent_session_id": "other"}), "parent_session_id is a field of the Ambient platform")]
    #[case(json!({"prompt": "p", "mcpServers": {"custom": {"a": 1}}}), "tools.mcpServers")]
    #[case(json!({"prompt": "p", "resourceOverrides": {"priorityClass": "high"}}), "resources, workspace and pod")]
    #[case(json!({"prompt": "p", "timeout": "soon"}), "timeout has the wrong type")]
    #[case(json!({"prompt": "p", "llmSettings": {"maxTokens": "many"}}), "llmSettings.maxTokens has the wrong type")]
    #[case(json!({"prompt": "p", "labels": {"n": 1}}), "labels")]
    #[case(json!({"prompt": "p", "labels": {"vteam.ambient-code/api": "tasks"}}), "product's own")]
    #[case(json!({"prompt": "p", "annotations": {"vteam.ambient-code/task-id": "t"}}), "product's own")]
    #[case(json!(["p"]), "JSON object")]
    fn what_cannot_be_honoured_is_refused_by_name(#[case] body: Value, #[case] named: &str) {
        let error = format!("{:?}", spec(&body).unwrap_err());
        assert!(error.contains(named), "{error}");
    }

    #[test]
    fn the_settings_of_the_platforms_own_client_are_left_out_and_others_kept() {
        let settings =
            |settings: Value| spec(&json!({"prompt": "p", "llmSettings": settings})).unwrap()["llmSettings"].clone();
        assert_eq!(settings(json!({"temperature": 0.7, "maxTokens": 4000})), Value::Null);
        let asked = json!({"temperature": 0.5, "maxTokens": 4000});
        assert_eq!(settings(asked.clone()), asked);
    }

    #[test]
    fn the_groups_of_a_caller_are_kept_as_far_as_there_is_room() {
        let caller = Identity {
            user: "ann".to_owned(),
            groups: std::iter::once("bad\ngroup".to_owned())
                .chain((0..40).map(|n| format!("{n:0>100}")))
                .collect(),
            ..Identity::default()
        };
        let groups = user(&caller).groups;
        assert_eq!(groups.len(), 10, "1024 bytes");
        assert!(groups[0].0.ends_with('0'));
    }

    #[test]
    fn a_caller_with_a_long_name_can_create_sessions() {
        let caller = Identity {
            user: "ü".repeat(300),
            ..Identity::default()
        };
        let user = session(br#"{"prompt": "p"}"#, &caller)
            .unwrap()
            .spec
            .user_context
            .unwrap()
            .user_id
            .unwrap();
        assert_eq!(user.chars().count(), MAX_USER);
    }
}
