//! What the user asks for, made safe: after this nobody looks at the raw session.

use std::collections::BTreeMap;

use crds::{
    AgenticSession, AgenticSessionSpec, ProjectSettingsSpec,
    session::{LlmSettings, PodOptions, Retention, ToolRule},
};
use k8s_openapi::{
    api::core::v1::ResourceRequirements,
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{ObjectMeta, OwnerReference},
    },
};
use kube::{Resource as _, ResourceExt as _};
use protocol::{
    names::{RUNNER_SECRETS, label},
    spec::{AgenticSpec, LiveLimits, Repo, Tools, User},
};

use super::{allow, mcp, mcp::McpSecret, repos, resolve};

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
    /// Whether it stays for further messages.
    pub interactive: bool,
    /// Running time, seconds.
    pub timeout: u64,
    /// What may change while an attempt runs, `timeout` among it.
    pub limits: LiveLimits,
    /// What of that the session names itself.
    pub asked: LiveLimits,
    /// The model and how it works.
    pub llm: LlmSettings,
    /// The agent's environment.
    pub environment: BTreeMap<String, String>,
    /// What the runner is told beside; run and used time are the attempt's.
    pub spec: AgenticSpec,
    /// The repositories.
    pub repos: Vec<Repo>,
    /// Secrets of the runner.
    pub secrets: Vec<RunnerSecret>,
    /// Where the values of the MCP credentials are that the session uses.
    pub mcp_secrets: Vec<McpSecret>,
    /// The volume.
    pub claim: Claim,
    /// Resources of the agent.
    pub resources: ResourceRequirements,
    /// Image and placement.
    pub pod: PodOptions,
    /// How long a pod may take to start, seconds.
    pub start_timeout: u64,
    /// Attempts of a run that count, before its failure is final.
    pub max_attempts: u32,
    /// How long after its end the session is deleted, seconds.
    pub ttl: Option<u64>,
    /// Kueue's queue that admits its Jobs.
    pub queue: Option<String>,
    /// Kueue's priority class among those that wait for the queue.
    pub queue_priority: Option<String>,
    /// Generation of the session that this was read from.
    pub generation: Option<i64>,
}

/// The volume of a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Claim {
    /// A claim of the session's own.
    Own {
        /// Its size.
        size: Quantity,
        /// Its class; the cluster's default when absent.
        storage_class: Option<String>,
        /// What becomes of it with the session.
        retention: Retention,
    },
    /// One that exists.
    Existing(String),
    /// None: the workspace is the pod's, and may use so much of the node's disk.
    Ephemeral {
        /// How much.
        size: Quantity,
    },
}

/// A Secret of the runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerSecret {
    /// Its name.
    pub name: String,
    /// Whether the session runs without it.
    pub optional: bool,
}

/// A session that cannot be run as it is written, or not here.
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
    /// The settings of the namespace cannot be read as this operator's schema has them.
    #[error("the ProjectSettings projectsettings of this namespace cannot be read: {0}; its admin must correct them")]
    Settings(String),
    /// In no list of what is allowed.
    #[error(
        "{field}: {asked} is not allowed in this namespace. Allowed by spec.{list} of its ProjectSettings: {allowed}. \
         Ask the admin to add it, or create another session"
    )]
    NotAllowed {
        /// Which field.
        field: &'static str,
        /// What it says.
        asked: String,
        /// The list.
        list: &'static str,
        /// What is in it.
        allowed: String,
    },
    /// Above what is allowed.
    #[error(
        "spec.{field}: {asked} is above the ceiling of this namespace, which is {ceiling}. Ask the admin to raise it in \
         spec.ceilings of the ProjectSettings, or ask for less"
    )]
    TooMuch {
        /// Which field.
        field: String,
        /// What it says.
        asked: String,
        /// What it may say.
        ceiling: String,
    },
    /// An MCP server's address is not under the prefix of its credential.
    #[error(
        "spec.tools.mcpServers.{server}: the credential {credential} is for addresses under {prefix} without .. in their path, \
         which {url} is not: ask the admin for another entry of spec.mcpCredentials, or create another session"
    )]
    NotUnderPrefix {
        /// The server.
        server: String,
        /// Its credential.
        credential: String,
        /// The address.
        url: String,
        /// What it should begin with.
        prefix: String,
    },
}

impl Invalid {
    /// Whether the admin can heal it: the session waits. Else it has failed, since its author cannot change it.
    pub fn heals(&self) -> bool {
        match self {
            Self::Settings(_) | Self::NotAllowed { .. } | Self::TooMuch { .. } | Self::NotUnderPrefix { .. } => true,
            Self::NoIdentity(_) | Self::LongName | Self::NotOnePrompt | Self::Timeout | Self::Nul(_) => false,
        }
    }
}

/// Makes a session safe to build from, with the namespace's and the built-in values where it names none.
pub fn validate(session: &AgenticSession, settings: &ProjectSettingsSpec) -> Result<Request, Invalid> {
    let request = formed(session, settings)?;
    allow::check(&session.spec, settings)?;
    allow::queue_priority(request.queue_priority.as_deref(), settings)?;
    let (servers, secrets) = mcp::servers(&session.spec, settings)?;
    Ok(Request {
        mcp_secrets: secrets,
        spec: AgenticSpec {
            tools: Tools {
                mcp_servers: servers,
                ..request.spec.tools
            },
            ..request.spec
        },
        ..request
    })
}

/// The same of a session whose run is over: what was begun when it was allowed is not judged by what is allowed today. It has no MCP
/// servers, and no agent is built from it.
pub fn ended(session: &AgenticSession, settings: &ProjectSettingsSpec) -> Result<Request, Invalid> {
    formed(session, settings)
}

fn formed(session: &AgenticSession, settings: &ProjectSettingsSpec) -> Result<Request, Invalid> {
    let spec = &session.spec;
    let name = session.name_any();
    if name.len() > MAX_NAME {
        return Err(Invalid::LongName);
    }
    let prompt = match (&spec.prompt, &spec.initial_prompt) {
        (Some(prompt), None) | (None, Some(prompt)) => prompt.clone(),
        (Some(_), Some(_)) | (None, None) => return Err(Invalid::NotOnePrompt),
    };
    if !spec
        .timeout
        .is_none_or(|seconds| (1..=MAX_TIMEOUT).contains(&seconds.into()))
    {
        return Err(Invalid::Timeout);
    }
    let llm = resolve::llm(spec, settings);
    let environment: BTreeMap<_, _> = spec
        .environment_variables
        .iter()
        .flatten()
        .map(|(name, value)| (name.clone(), value.0.clone()))
        .collect();
    no_nul(&prompt, &llm, &environment)?;
    // The label without a value names no queue: a Job that waited for it would wait for ever.
    let queue = session
        .labels()
        .get(label::KUEUE_QUEUE)
        .filter(|queue| !queue.is_empty());
    let queue_priority = queue.and_then(|_| session.labels().get(label::KUEUE_PRIORITY));
    let limits = resolve::limits(spec, settings);
    let ttl = spec.ttl_seconds_after_finished.or(settings.ttl_seconds_after_finished);
    Ok(Request {
        namespace: session.namespace().ok_or(Invalid::NoIdentity("namespace"))?,
        uid: session.uid().ok_or(Invalid::NoIdentity("UID"))?,
        owner: owner(&session.metadata).ok_or(Invalid::NoIdentity("name"))?,
        name,
        prompt,
        interactive: spec.interactive.unwrap_or_default(),
        timeout: limits.timeout.unwrap_or(DEFAULT_TIMEOUT),
        limits,
        asked: resolve::asked(spec),
        environment,
        spec: agentic_spec(spec, settings, &llm),
        llm,
        repos: repos::repos(spec),
        secrets: resolve::secrets(spec, settings)
            .into_iter()
            .map(RunnerSecret::from)
            .collect(),
        mcp_secrets: Vec::new(),
        claim: resolve::claim(spec, settings),
        resources: resolve::resources(spec, settings),
        pod: resolve::pod(spec, settings),
        start_timeout: settings.start_timeout.map_or(DEFAULT_START_TIMEOUT, u64::from),
        max_attempts: resolve::attempts(spec, settings),
        ttl: ttl.map(u64::from),
        queue: queue.cloned(),
        queue_priority: queue_priority.cloned(),
        generation: session.metadata.generation,
    })
}

impl From<String> for RunnerSecret {
    fn from(name: String) -> Self {
        Self {
            // A session runs without the built-in ones: what it needs may be in another.
            optional: RUNNER_SECRETS.contains(&&*name),
            name,
        }
    }
}

fn no_nul(prompt: &str, llm: &LlmSettings, environment: &BTreeMap<String, String>) -> Result<(), Invalid> {
    let texts = [
        ("spec.prompt", Some(prompt)),
        ("spec.llmSettings.model", llm.model.as_deref()),
    ];
    let values = environment
        .values()
        .map(|value| ("spec.environmentVariables", &**value));
    for (field, text) in texts
        .into_iter()
        .filter_map(|(field, text)| Some((field, text?)))
        .chain(values)
    {
        if text.contains('\0') {
            return Err(Invalid::Nul(field));
        }
    }
    Ok(())
}

fn agentic_spec(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec, llm: &LlmSettings) -> AgenticSpec {
    let tools = spec.tools.clone().unwrap_or_default();
    let rules = |rules: Vec<ToolRule>| rules.into_iter().map(|rule| rule.0).collect();
    AgenticSpec {
        user: spec.user_context.as_ref().map(|context| User {
            user_id: context.user_id.clone().unwrap_or_default(),
            display_name: context.display_name.clone().unwrap_or_default(),
            groups: context.groups.iter().map(|group| group.0.clone()).collect(),
        }),
        fallback_model: llm.fallback_model.clone(),
        tools: Tools {
            allowed: rules(tools.allowed),
            disallowed: rules(tools.disallowed),
            permission_mode: tools.permission_mode.unwrap_or_default().into(),
            mcp_servers: BTreeMap::new(),
        },
        append_system_prompt: spec.append_system_prompt.clone(),
        additional_args: spec.additional_args.iter().map(|argument| argument.0.clone()).collect(),
        main_repo_index: spec.main_repo_index.unwrap_or_default() as usize,
        prices: settings
            .prices
            .iter()
            .map(|(model, price)| (model.clone(), resolve::price(price)))
            .collect(),
        allowed_private_hosts: settings
            .allowed_private_hosts
            .iter()
            .map(|host| host.0.clone())
            .collect(),
        ..AgenticSpec::default()
    }
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
        let price = json!({"input": "999999.999", "output": "999999.999", "cacheRead": "999999.999", "cacheWrite": "999999.999"});
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
}
