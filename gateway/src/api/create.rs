//! The platform's body of a create → an `AgenticSession`. What cannot be honoured is refused by name, never dropped in silence.

use std::collections::BTreeMap;

use crds::{
    AgenticSession, AgenticSessionSpec,
    session::{LlmSettings, UserContext},
};
use kube::core::ObjectMeta;
use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::ApiError;
use crate::auth::kubernetes::Identity;

/// Longest value of the fields of `userContext`, characters.
const MAX_USER: usize = 256;

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
    let body: Value = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
    let Value::Object(mut fields) = body else {
        return Err(ApiError::bad_request(
            "the body must be a JSON object such as {\"prompt\": \"…\"}",
        ));
    };
    fields.retain(|_, value| !value.is_null() && value != "");
    // Who somebody is, the cluster says, not the request.
    fields.remove("userContext");
    let labels = texts(&mut fields, "labels")?;
    let annotations = texts(&mut fields, "annotations")?;
    let mut spec: AgenticSessionSpec = serde_json::from_value(Value::Object(fields.clone()))
        .map_err(|error| ApiError::bad_request(format!("a field has the wrong type: {error}")))?;
    refuse_unknown(&fields, &spec)?;
    spec.llm_settings = spec.llm_settings.filter(|settings| *settings != LlmSettings::default());
    spec.user_context = Some(UserContext {
        user_id: Some(caller.user.chars().take(MAX_USER).collect()),
        ..UserContext::default()
    });
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

fn texts(fields: &mut Map<String, Value>, name: &str) -> Result<Option<BTreeMap<String, String>>, ApiError> {
    let wrong = |error| ApiError::bad_request(format!("{name} must map names to strings: {error}"));
    fields
        .remove(name)
        .map(serde_json::from_value)
        .transpose()
        .map_err(wrong)
}

/// Refuses what did not make it into the spec, unless it asks for nothing.
fn refuse_unknown(fields: &Map<String, Value>, spec: &AgenticSessionSpec) -> Result<(), ApiError> {
    let kept = serde_json::to_value(spec).map_err(|error| ApiError::bad_request(error.to_string()))?;
    match unknown("", &Value::Object(fields.clone()), &kept) {
        Some(path) => Err(ApiError::bad_request(format!(
            "{path} cannot be honoured by this version: leave it out, or give it the value that changes nothing"
        ))),
        None => Ok(()),
    }
}

fn unknown(path: &str, given: &Value, kept: &Value) -> Option<String> {
    let Value::Object(given) = given else { return None };
    given.iter().find_map(|(name, value)| {
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
    })
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
    empty
        || match path {
            "interactive" | "autoPushOnComplete" => value == false,
            // A session that is not interactive stops when its run is finished, told so or not.
            "stopOnRunFinished" => value.is_boolean(),
            "mainRepoIndex" | "inactivityTimeout" => value == 0,
            "llmSettings.temperature" => value == 0.7,
            "llmSettings.maxTokens" => value == 4000,
            _ => false,
        }
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
                "prompt": "Say 7f3a", "displayName": "Test", "timeout": 300,
                "llmSettings": {"model": "claude-sonnet-5-5"},
                "environmentVariables": {"CI": "true"},
                "userContext": {"userId": "system:serviceaccount:team-a:client"},
            })
        );
        assert_eq!(session.metadata.labels.unwrap()["team"], "a");
        assert_eq!(session.metadata.annotations.unwrap()["why"], "test");
    }

    #[rstest]
    #[case(json!({"prompt": "p", "nothingWeKnow": true}), "nothingWeKnow")]
    #[case(json!({"prompt": "p", "nothingWeKnow": 1}), "nothingWeKnow")]
    #[case(json!({"prompt": "p", "llmSettings": {"nothingWeKnow": 0.2}}), "llmSettings.nothingWeKnow")]
    #[case(json!({"prompt": "p", "workspace": {"sizee": "1Gi"}}), "workspace.sizee")]
    #[case(json!({"prompt": "p", "parent_session_id": "other"}), "parent_session_id")]
    #[case(json!({"prompt": "p", "resourceOverrides": {"priorityClass": "high"}}), "resourceOverrides")]
    #[case(json!({"prompt": "p", "timeout": "soon"}), "wrong type")]
    #[case(json!({"prompt": "p", "labels": {"n": 1}}), "labels")]
    #[case(json!(["p"]), "JSON object")]
    fn what_cannot_be_honoured_is_refused_by_name(#[case] body: Value, #[case] named: &str) {
        let error = format!("{:?}", spec(&body).unwrap_err());
        assert!(error.contains(named), "{error}");
    }

    #[rstest]
    #[case("interactive", json!(false), json!(true))]
    #[case("autoPushOnComplete", json!(false), json!(true))]
    #[case("mainRepoIndex", json!(0), json!(1))]
    #[case("repos", json!([]), json!([{"url": "https://example.com/a.git"}]))]
    #[case("mcpServers", json!({}), json!({"a": {}}))]
    fn a_field_that_we_do_not_have_yet_is_accepted_with_its_default_alone(
        #[case] name: &str,
        #[case] default: Value,
        #[case] other: Value,
    ) {
        assert_eq!(spec(&json!({"prompt": "p", name: default})).unwrap()["prompt"], "p");
        let given = other.clone();
        match spec(&json!({"prompt": "p", name: other})) {
            Ok(spec) => assert_eq!(spec[name], given, "a field that is accepted is kept"),
            Err(error) => assert!(format!("{error:?}").contains(name)),
        }
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
