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
use crate::project_settings::Unknown;

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
    /// The operator may not read the settings of namespaces.
    #[error(
        "the operator cannot read the ProjectSettings of this namespace: {0}. The session waits until the cluster's admin has mended that"
    )]
    NoSettings(String),
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

impl From<Unknown> for Invalid {
    fn from(settings: Unknown) -> Self {
        match settings {
            Unknown::Unreadable(why) => Self::Settings(why),
            Unknown::Withheld(why) => Self::NoSettings(why),
        }
    }
}

impl Invalid {
    /// Whether the admin can heal it: the session waits. Else it has failed, since its author cannot change it.
    pub fn heals(&self) -> bool {
        match self {
            Self::Settings(_)
            | Self::NoSettings(_)
            | Self::NotAllowed { .. }
            | Self::TooMuch { .. }
            | Self::NotUnderPrefix { .. } => true,
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
pub(crate) mod tests;
