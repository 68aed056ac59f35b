//! What the user asks for, made safe: after this nobody looks at the raw session.

use std::collections::BTreeMap;

use crds::AgenticSession;
use k8s_openapi::{
    api::core::v1::ResourceRequirements,
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{ObjectMeta, OwnerReference},
    },
};
use kube::{Resource as _, ResourceExt as _};
use protocol::spec::{LiveLimits, User};

/// Running time when `spec.timeout` is absent, seconds.
pub const DEFAULT_TIMEOUT: u64 = 3_600;
/// Seconds that a pod may take to start, when the admin names none.
pub const DEFAULT_START_TIMEOUT: u64 = 3_600;
/// Attempts of a run that count, when none are named.
pub const DEFAULT_MAX_ATTEMPTS: u32 = 3;
/// Most that `spec.timeout` may be, seconds: a week.
pub const MAX_TIMEOUT: u64 = 604_800;
/// Size of the volume when `spec.workspace.size` is absent.
pub const DEFAULT_WORKSPACE_SIZE: &str = "5Gi";
/// Most characters of a name: the names of Job and pod are made from it and must fit a label.
pub const MAX_NAME: usize = 52;

/// A session that can be run: all that children are built from.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Namespace of session and children.
    pub namespace: String,
    /// Name of the session.
    pub name: String,
    /// UID of the session.
    pub uid: String,
    /// Makes the session the owner of what is made for it.
    pub owner: OwnerReference,
    /// The task.
    pub prompt: String,
    /// Running time, seconds.
    pub timeout: u64,
    /// The model, if one is named.
    pub model: Option<String>,
    /// The agent's environment.
    pub environment: BTreeMap<String, String>,
    /// Size of the volume.
    pub workspace_size: Quantity,
    /// Class of the volume; the cluster's default when absent.
    pub storage_class: Option<String>,
    /// Resources of the agent.
    pub resources: ResourceRequirements,
    /// Who the session is for.
    pub user: Option<User>,
    /// What may change while the agent runs, running time included.
    pub limits: LiveLimits,
    /// Seconds that the pod may take to start.
    pub start_timeout: u64,
    /// Attempts of a run that count.
    pub max_attempts: u32,
    /// Seconds after which an ended session is deleted; never when absent.
    pub ttl: Option<u64>,
    /// Generation of the session that this was read from.
    pub generation: Option<i64>,
}

/// A session that cannot be run as it is written. The CRD's rules refuse these; one may be left over from an older schema.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The object came from the API server without name, namespace or UID.
    #[error("the session has no {0}")]
    NoIdentity(&'static str),
    /// See [`MAX_NAME`].
    #[error("metadata.name must have at most {MAX_NAME} characters: create the session under a shorter name")]
    LongName,
    /// Both prompts or none.
    #[error("give the task in exactly one of spec.prompt and spec.initialPrompt: create another session")]
    NotOnePrompt,
    /// Out of bounds.
    #[error("spec.timeout must be 1 to {MAX_TIMEOUT} seconds: create another session")]
    Timeout,
    /// A character that no environment variable can hold.
    #[error("{0} must not contain the NUL character: create another session")]
    Nul(&'static str),
}

/// Makes a session safe to build from, with the built-in values where it names none.
pub fn validate(session: &AgenticSession) -> Result<Request, Invalid> {
    let spec = &session.spec;
    let name = session.name_any();
    if name.len() > MAX_NAME {
        return Err(Invalid::LongName);
    }
    let prompt = match (&spec.prompt, &spec.initial_prompt) {
        (Some(prompt), None) | (None, Some(prompt)) => prompt.clone(),
        (Some(_), Some(_)) | (None, None) => return Err(Invalid::NotOnePrompt),
    };
    let timeout = spec.timeout.map_or(DEFAULT_TIMEOUT, u64::from);
    if !(1..=MAX_TIMEOUT).contains(&timeout) {
        return Err(Invalid::Timeout);
    }
    let model = spec.llm_settings.as_ref().and_then(|settings| settings.model.clone());
    let environment: BTreeMap<_, _> = spec
        .environment_variables
        .iter()
        .flatten()
        .map(|(name, value)| (name.clone(), value.0.clone()))
        .collect();
    let texts = [
        ("spec.prompt", Some(&prompt)),
        ("spec.llmSettings.model", model.as_ref()),
    ]
    .into_iter()
    .filter_map(|(field, text)| Some((field, text?)))
    .chain(environment.values().map(|value| ("spec.environmentVariables", value)));
    for (field, text) in texts {
        if text.contains('\0') {
            return Err(Invalid::Nul(field));
        }
    }
    let workspace = spec.workspace.clone().unwrap_or_default();
    Ok(Request {
        namespace: session.namespace().ok_or(Invalid::NoIdentity("namespace"))?,
        uid: session.uid().ok_or(Invalid::NoIdentity("UID"))?,
        owner: owner(&session.metadata).ok_or(Invalid::NoIdentity("name"))?,
        name,
        prompt,
        timeout,
        model,
        environment,
        workspace_size: workspace
            .size
            .unwrap_or_else(|| Quantity(DEFAULT_WORKSPACE_SIZE.to_owned())),
        storage_class: workspace.storage_class_name,
        resources: resources(spec.resources.as_ref()),
        user: spec.user_context.as_ref().map(|context| User {
            user_id: context.user_id.clone().unwrap_or_default(),
            display_name: context.display_name.clone().unwrap_or_default(),
        }),
        limits: LiveLimits {
            timeout: Some(timeout),
            ..LiveLimits::default()
        },
        start_timeout: DEFAULT_START_TIMEOUT,
        max_attempts: DEFAULT_MAX_ATTEMPTS,
        ttl: None,
        generation: session.metadata.generation,
    })
}

/// An owner reference to the version that is served.
fn owner(meta: &ObjectMeta) -> Option<OwnerReference> {
    Some(OwnerReference {
        api_version: AgenticSession::api_version(&()).into_owned(),
        kind: AgenticSession::kind(&()).into_owned(),
        name: meta.name.clone()?,
        uid: meta.uid.clone()?,
        controller: Some(true),
        // Foreground deletion of the session waits for them.
        block_owner_deletion: Some(true),
    })
}

/// What the session names, and the built-in amounts for what it does not.
///
/// A built-in request gives way to a lower limit, which the API server would refuse beside it.
fn resources(asked: Option<&crds::session::Resources>) -> ResourceRequirements {
    let mut resources = asked.map(ResourceRequirements::from).unwrap_or_default();
    let limits = resources.limits.get_or_insert_default();
    let requests = resources.requests.get_or_insert_default();
    // A limit below a request that the session names would be refused: then there is no built-in limit.
    if !requests.contains_key("memory") {
        limits
            .entry("memory".to_owned())
            .or_insert_with(|| Quantity("4Gi".to_owned()));
    }
    for (name, amount) in [("cpu", "500m"), ("memory", "1Gi")] {
        // With a limit and no request, Kubernetes takes the limit for the request.
        let limited = asked.and_then(|a| a.limits.as_ref()).is_some_and(|l| match name {
            "cpu" => l.cpu.is_some(),
            _ => l.memory.is_some(),
        });
        if !limited {
            requests
                .entry(name.to_owned())
                .or_insert_with(|| Quantity(amount.to_owned()));
        }
    }
    resources
}

#[cfg(test)]
pub(crate) mod tests {
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

    #[test]
    fn a_minimal_session_gets_the_built_in_values() {
        let request = validate(&session(json!({"initialPrompt": "hi"}))).unwrap();
        assert_eq!((request.timeout, &*request.workspace_size.0), (3_600, "5Gi"));
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
        let request = validate(&session(json!({"prompt": "hi", "resources": asked}))).unwrap();
        assert_eq!(serde_json::to_value(request.resources).unwrap(), expected);
    }

    #[rstest]
    #[case(json!({}), Invalid::NotOnePrompt)]
    #[case(json!({"prompt": "a", "initialPrompt": "b"}), Invalid::NotOnePrompt)]
    #[case(json!({"prompt": "a", "timeout": 0}), Invalid::Timeout)]
    #[case(json!({"prompt": "a\u{0}b"}), Invalid::Nul("spec.prompt"))]
    #[case(json!({"prompt": "a", "environmentVariables": {"X": "\u{0}"}}), Invalid::Nul("spec.environmentVariables"))]
    fn what_cannot_run_is_refused(#[case] spec: Value, #[case] expected: Invalid) {
        assert_eq!(validate(&session(spec)).unwrap_err(), expected);
    }
}
