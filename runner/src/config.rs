//! The environment (in a pod) or the command line (`--local`), checked, in one place.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use protocol::NanoUsd;
use protocol::names::{env, path};
use protocol::price::Prices;
use protocol::spec::{AgenticSpec, LiveLimits, User};
use secrecy::SecretString;
use tokio::time::Duration;
use uuid::Uuid;

use crate::address::Allowed;
use crate::agent::Place;
use crate::cli::options::{Options, OptionsError};
use crate::langfuse::{self, LangfuseConfig};
use crate::last_word::LastWord;
use crate::proxy::mcp::Around;
use crate::proxy::{Credential, Upstream, Vertex};
use crate::redact::{Held, Vault};
use crate::secrets::Secrets;
use crate::transcript::Format;
use crate::workspace::git::{Credentials, Identity, Repos};

/// Where the model API is when nothing else is said.
const PUBLIC_API: &str = "https://api.anthropic.com";
/// Running time when nothing else is said.
const DEFAULT_TIMEOUT: u64 = 3_600;
/// The control socket in the state folder, without Kubernetes.
pub const CONTROL: &str = "control.sock";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Something must be set.
    #[error("{0} is not set; the operator sets it, and without Kubernetes `runner --local --prompt …` is meant")]
    Missing(&'static str),
    /// Something cannot be read.
    #[error("failed to read {name}={value:?}: {expected}")]
    Invalid {
        /// The variable or flag.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A choice of the author's cannot work.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A path cannot be made.
    #[error("failed to prepare {0}")]
    Path(PathBuf, #[source] std::io::Error),
}

/// What to drive, and with what.
pub struct Config {
    /// Name of the session.
    pub name: String,
    /// Namespace of the session.
    pub namespace: String,
    /// UID of the session.
    pub uid: String,
    /// UID of the pod; empty outside Kubernetes.
    pub pod_uid: String,
    /// Number of the attempt; absent: one more than the last that left records.
    pub attempt: Option<u32>,
    /// Run that the attempt belongs to.
    pub run: u32,
    /// Running time that earlier attempts of the run used.
    pub used: Duration,
    /// The task; an interactive session may have none.
    pub prompt: String,
    /// What the author chose of the CLI.
    pub options: Options,
    /// Prices of models.
    pub prices: Prices,
    /// Limits, as long as no file says others.
    pub limits: LiveLimits,
    /// The model API; absent when there is no credential.
    pub upstream: Option<Upstream>,
    /// What MCP servers are reached with.
    pub mcp: Around,
    /// The gateway.
    pub gateway: Option<Gateway>,
    /// Langfuse.
    pub langfuse: Option<LangfuseConfig>,
    /// Where the CLI runs.
    pub agent: AgentConfig,
    /// What the runner keeps.
    pub folders: Folders,
    /// What stdout is for.
    pub format: Format,
    /// Values that nobody may see.
    pub secrets: Vec<Held>,
    /// Told of those that are read later.
    pub vault: Vault,
    /// What is cloned and pushed.
    pub repos: Repos,
    /// Told what to say if the runtime comes to nothing any more.
    pub last_word: Arc<LastWord>,
}

/// The gateway.
#[derive(Clone, Debug)]
pub struct Gateway {
    /// Its WebSocket for this session.
    pub url: String,
    /// File with the token, read again for each connection.
    pub token_file: Option<PathBuf>,
}

/// Where the CLI runs and what it sees.
pub struct AgentConfig {
    /// Container or child process.
    pub place: Place,
    /// Path of the CLI.
    pub cli: String,
    /// Working folder: the workspace, or the main repository in it.
    pub workspace: String,
    /// The workspace.
    pub mount: String,
    /// Home.
    pub home: String,
    /// The CLI's config folder.
    pub config_dir: String,
}

/// Folders and files of the runner.
pub struct Folders {
    /// Spool, lock and lease.
    pub state: PathBuf,
    /// The CLI's transcripts.
    pub transcripts: PathBuf,
    /// The termination report.
    pub report: PathBuf,
    /// Limits that may change while we run.
    pub limits: Option<PathBuf>,
    /// Socket of `runner send`, `interrupt`, `status` and the like.
    pub control: PathBuf,
}

/// Without Kubernetes.
#[derive(Args, Debug)]
pub struct LocalArgs {
    /// Drive the CLI here, without Kubernetes. Keys are taken from the environment.
    #[arg(long)]
    pub local: bool,
    /// The task.
    #[arg(long, requires = "local")]
    pub prompt: Option<String>,
    /// Working folder of the agent; the current one when absent.
    #[arg(long, requires = "local")]
    pub workspace: Option<PathBuf>,
    /// Folder for records and conversation; started again with the same one, the runner goes on where it was.
    #[arg(long, requires = "local")]
    pub state: Option<PathBuf>,
    /// Path of the Claude Code CLI.
    #[arg(long, requires = "local", default_value = "claude")]
    pub cli: PathBuf,
    /// Model.
    #[arg(long, requires = "local")]
    pub model: Option<String>,
    /// Running time, seconds.
    #[arg(long, requires = "local", default_value_t = DEFAULT_TIMEOUT)]
    pub timeout: u64,
    /// Stay for messages, given with `runner send`, until the session is ended.
    #[arg(long, requires = "local")]
    pub interactive: bool,
    /// How long an interactive session may be idle, seconds; 0: for ever.
    #[arg(long, requires = "local")]
    pub inactivity_timeout: Option<u64>,
    /// Most rounds that the session may have.
    #[arg(long, requires = "local")]
    pub max_turns: Option<u32>,
    /// Most US dollars that the session may cost, such as 2.50.
    #[arg(long, requires = "local", value_name = "USD")]
    pub max_cost_usd: Option<NanoUsd>,
    /// Most tokens that the session may use, all kinds together.
    #[arg(long, requires = "local")]
    pub max_tokens: Option<u64>,
    /// File with limits that may change while the session runs: one JSON object with `timeout`, `inactivityTimeout`,
    /// `maxTurns`, `maxCostUSD`, `maxTokens`; it replaces the limits of the command line.
    #[arg(long, requires = "local")]
    pub limits: Option<PathBuf>,
    /// Run; a higher one than before goes on after the end of the last.
    #[arg(long, requires = "local", default_value_t = 1)]
    pub run: u32,
    /// Name of the session.
    #[arg(long, requires = "local", default_value = "local")]
    pub name: String,
}

/// Looks a variable up; an empty one counts as absent.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Config {
    /// From the environment that the operator made.
    pub fn from_env(var: Lookup<'_>) -> Result<Self, ConfigError> {
        let required = |name: &'static str| var(name).ok_or(ConfigError::Missing(name));
        let uid = required(env::AGENTIC_SESSION_UID)?;
        let spec = spec(var)?;
        let interactive = flag(var(env::INTERACTIVE).as_deref());
        let data = PathBuf::from(path::DATA);
        let vault = Vault::default();
        let repos = repos(&spec, &data, &uid, &vault, var)?;
        let main = repos.list.get(spec.main_repo_index).map(|repo| repo.name.clone());
        let mount = var(env::WORKSPACE_PATH).unwrap_or_else(|| path::WORKSPACE.to_owned());
        let session = Session {
            name: required(env::AGENTIC_SESSION_NAME)?,
            namespace: required(env::AGENTIC_SESSION_NAMESPACE)?,
            uid: uid.clone(),
            pod_uid: required(env::POD_UID)?,
            attempt: Some(number(env::ATTEMPT, &required(env::ATTEMPT)?)?),
            run: spec.run,
            used: Duration::from_secs(spec.used_seconds),
            user: spec.user.clone(),
            prompt: if interactive {
                var(env::PROMPT).unwrap_or_default()
            } else {
                required(env::PROMPT)?
            },
            limits: LiveLimits {
                timeout: Some(var(env::TIMEOUT).map_or(Ok(DEFAULT_TIMEOUT), |text| number(env::TIMEOUT, &text))?),
                ..LiveLimits::default()
            },
            prices: Prices::new(spec.prices.clone()),
            options: options(spec, interactive, var(env::LLM_MODEL), var)?,
        };
        let agent = AgentConfig {
            place: Place::Container(path::SHIM_SOCKET.into()),
            cli: path::CLI.to_owned(),
            workspace: main.map_or_else(|| mount.clone(), |main| format!("{mount}/{main}")),
            mount,
            home: path::AGENT_HOME.to_owned(),
            config_dir: path::CLAUDE_CONFIG.to_owned(),
        };
        let folders = Folders {
            state: data.join(path::state_dir(&uid)),
            transcripts: data.join(path::transcripts_dir(&uid)),
            report: path::TERMINATION_LOG.into(),
            limits: Some(path::LIMITS.into()),
            control: path::CONTROL_SOCKET.into(),
        };
        let secrets = Path::new(path::SECRETS);
        let upstream = upstream(secrets, &vault, var)?;
        let authorities = upstream.as_ref().and_then(|upstream| upstream.authorities.clone());
        Ok(Self {
            mcp: Around::in_pod(repos.allowed.clone(), authorities, vault.clone()),
            repos,
            upstream,
            vault,
            ..session.with(agent, folders, var)
        })
    }

    /// Folder whose files the gateway may ask for.
    pub fn files(&self) -> Option<PathBuf> {
        let workspace = &self.repos.workspace;
        (!workspace.as_os_str().is_empty()).then(|| workspace.clone())
    }

    /// From the command line.
    pub fn local(args: LocalArgs, var: Lookup<'_>) -> Result<Self, ConfigError> {
        let state = match args.state {
            Some(state) => state,
            None => default_state(var).ok_or(ConfigError::Missing("HOME"))?,
        };
        let made = |path: PathBuf| {
            std::fs::create_dir_all(&path)
                .and_then(|()| path.canonicalize())
                .map_err(|error| ConfigError::Path(path, error))
        };
        let state = made(state)?;
        let workspace = made(args.workspace.unwrap_or_else(|| ".".into()))?;
        let config_dir = made(state.join("claude"))?;
        let spec = spec(var)?;
        let session = Session {
            name: args.name,
            namespace: "local".to_owned(),
            uid: Uuid::new_v5(&Uuid::NAMESPACE_URL, state.as_os_str().as_encoded_bytes()).to_string(),
            // A gateway wants to know it also here.
            pod_uid: var(env::POD_UID).unwrap_or_default(),
            attempt: None,
            run: args.run,
            used: Duration::ZERO,
            user: None,
            prompt: match args.prompt {
                None if args.interactive => String::new(),
                prompt => prompt.ok_or(ConfigError::Missing("--prompt"))?,
            },
            limits: LiveLimits {
                timeout: Some(args.timeout),
                inactivity_timeout: args.inactivity_timeout,
                max_turns: args.max_turns,
                max_cost_usd: args.max_cost_usd,
                max_tokens: args.max_tokens,
            },
            prices: Prices::new(spec.prices.clone()),
            options: options(spec, args.interactive, args.model, var)?,
        };
        let agent = AgentConfig {
            place: Place::Child,
            cli: args.cli.display().to_string(),
            workspace: workspace.display().to_string(),
            mount: workspace.display().to_string(),
            home: var("HOME").unwrap_or_else(|| workspace.display().to_string()),
            config_dir: config_dir.display().to_string(),
        };
        let folders = Folders {
            transcripts: config_dir.join("projects"),
            report: state.join("report.json"),
            control: state.join(CONTROL),
            state,
            limits: args.limits,
        };
        Ok(Self {
            upstream: upstream(Path::new(""), &Vault::default(), var)?,
            ..session.with(agent, folders, var)
        })
    }
}

/// What is said of the session in different ways.
struct Session {
    name: String,
    namespace: String,
    uid: String,
    pod_uid: String,
    attempt: Option<u32>,
    run: u32,
    used: Duration,
    user: Option<User>,
    prompt: String,
    prices: Prices,
    limits: LiveLimits,
    options: Options,
}

impl Session {
    fn with(self, agent: AgentConfig, folders: Folders, var: Lookup<'_>) -> Config {
        Config {
            upstream: None,
            mcp: Around::default(),
            gateway: gateway(var),
            langfuse: langfuse(&self, var),
            format: match var(env::LOG_FORMAT).as_deref() {
                Some("json") => Format::Json,
                _ => Format::Text,
            },
            secrets: secrets(var),
            vault: Vault::default(),
            name: self.name,
            namespace: self.namespace,
            uid: self.uid,
            pod_uid: self.pod_uid,
            attempt: self.attempt,
            run: self.run,
            used: self.used,
            prompt: self.prompt,
            prices: self.prices,
            limits: self.limits,
            options: self.options,
            agent,
            folders,
            repos: Repos::default(),
            last_word: Arc::default(),
        }
    }
}

/// The CLI's choices from all their places.
fn options(
    spec: AgenticSpec,
    interactive: bool,
    model: Option<String>,
    var: Lookup<'_>,
) -> Result<Options, ConfigError> {
    let options = Options {
        interactive,
        model,
        fallback_model: spec.fallback_model,
        max_tokens: var(env::LLM_MAX_TOKENS)
            .map(|text| number(env::LLM_MAX_TOKENS, &text))
            .transpose()?,
        temperature: var(env::LLM_TEMPERATURE)
            .map(|text| {
                text.parse().map_err(|_| ConfigError::Invalid {
                    name: env::LLM_TEMPERATURE,
                    value: text,
                    expected: "a number from 0 to 1",
                })
            })
            .transpose()?,
        tools: spec.tools,
        append_system_prompt: spec.append_system_prompt,
        additional_args: spec.additional_args,
    };
    options.check()?;
    Ok(options)
}

fn spec(var: Lookup<'_>) -> Result<AgenticSpec, ConfigError> {
    match var(env::AGENTIC_SPEC_JSON) {
        None => Ok(AgenticSpec {
            run: 1,
            ..AgenticSpec::default()
        }),
        Some(text) => serde_json::from_str(&text).map_err(|_| ConfigError::Invalid {
            name: env::AGENTIC_SPEC_JSON,
            value: text,
            expected: "an object with `run`",
        }),
    }
}

fn flag(value: Option<&str>) -> bool {
    matches!(value, Some("true" | "1"))
}

/// The repositories, from what the operator resolved.
fn repos(spec: &AgenticSpec, data: &Path, uid: &str, vault: &Vault, var: Lookup<'_>) -> Result<Repos, ConfigError> {
    let list = match var(env::REPOS_JSON) {
        None => Vec::new(),
        Some(text) => serde_json::from_str(&text).map_err(|_| ConfigError::Invalid {
            name: env::REPOS_JSON,
            value: text,
            expected: "a list of repositories",
        })?,
    };
    let required = |name: &'static str| var(name).ok_or(ConfigError::Missing(name));
    let (namespace, name) = (
        required(env::AGENTIC_SESSION_NAMESPACE)?,
        required(env::AGENTIC_SESSION_NAME)?,
    );
    let workspace = if spec.shared_workspace {
        path::SHARED_WORKSPACE.to_owned()
    } else {
        path::workspace_dir(uid)
    };
    let variable = |name: &str| std::env::var(name).ok().map(SecretString::from);
    Ok(Repos {
        list,
        folder: data.join(path::git_dir(uid)),
        workspace: data.join(workspace),
        allowed: Allowed::new(&spec.allowed_private_hosts),
        credentials: Credentials::new(path::SECRETS.into(), path::PRIVATE.into(), variable).telling(vault.clone()),
        author: Identity::of(spec.user.as_ref()),
        branch: format!("sessions/{name}-{}", uid.chars().take(8).collect::<String>()),
        session: format!("{namespace}/{name}"),
        progress: var(env::LOG_FORMAT).as_deref() != Some("json"),
    })
}

fn number<T: std::str::FromStr>(name: &'static str, value: &str) -> Result<T, ConfigError> {
    value.parse().map_err(|_| ConfigError::Invalid {
        name,
        value: value.to_owned(),
        expected: "a whole number",
    })
}

/// The model API, from files below `files` and variables; `None`: there is no credential for it.
fn upstream(files: &Path, vault: &Vault, var: Lookup<'_>) -> Result<Option<Upstream>, ConfigError> {
    const OF_THE_MODEL: [&str; 4] = [
        env::ANTHROPIC_API_KEY,
        env::ANTHROPIC_AUTH_TOKEN,
        env::VERTEX_USER_TOKEN,
        env::GOOGLE_APPLICATION_CREDENTIALS,
    ];
    let variables: HashMap<&str, SecretString> = OF_THE_MODEL
        .into_iter()
        .filter_map(|name| Some((name, var(name)?.into())))
        .collect();
    let secrets = Secrets::new(files.to_owned(), move |name| variables.get(name).cloned()).telling(vault.clone());
    let authorities = secrets.authorities();
    let vertex = vertex(var)?;
    let (credential, base_url) = match &vertex {
        None => (
            Credential::anthropic(&secrets),
            var(env::ANTHROPIC_BASE_URL).unwrap_or_else(|| PUBLIC_API.to_owned()),
        ),
        Some(vertex) => (
            Credential::google(&secrets),
            var(env::ANTHROPIC_VERTEX_BASE_URL).unwrap_or_else(|| vertex.base_url()),
        ),
    };
    Ok(credential.map(|credential| Upstream {
        base_url: base_url.trim_end_matches('/').to_owned(),
        credential,
        vertex,
        authorities,
    }))
}

/// Project and region of Vertex AI, by our names or the CLI's; `None`: it is not Vertex AI.
fn vertex(var: Lookup<'_>) -> Result<Option<Vertex>, ConfigError> {
    let on = |name: &str| var(name).is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true"));
    if !on(env::VERTEX_ENABLED) && !on(env::CLAUDE_CODE_USE_VERTEX) {
        return Ok(None);
    }
    let vertex = Vertex {
        project: var(env::VERTEX_PROJECT_ID)
            .or_else(|| var(env::ANTHROPIC_VERTEX_PROJECT_ID))
            .unwrap_or_default(),
        region: var(env::VERTEX_REGION)
            .or_else(|| var(env::CLOUD_ML_REGION))
            .unwrap_or_else(|| "global".to_owned()),
    };
    if vertex.is_plain() {
        return Ok(Some(vertex));
    }
    Err(ConfigError::Invalid {
        name: "VERTEX_PROJECT_ID and VERTEX_REGION",
        value: format!("{} and {}", vertex.project, vertex.region),
        expected: "the id of a Google Cloud project, and a region such as europe-west1",
    })
}

fn gateway(var: Lookup<'_>) -> Option<Gateway> {
    Some(Gateway {
        url: var(env::WEBSOCKET_URL)?,
        token_file: var(env::GATEWAY_TOKEN_FILE).map(PathBuf::from),
    })
}

fn langfuse(session: &Session, var: Lookup<'_>) -> Option<LangfuseConfig> {
    let access = langfuse::Access::from_env(var)
        .inspect_err(|error| tracing::warn!(%error, "no traces"))
        .ok()??;
    Some(LangfuseConfig {
        host: access.host,
        public_key: access.public_key,
        secret_key: access.secret_key,
        session_uid: session.uid.clone(),
        session_name: session.name.clone(),
        namespace: session.namespace.clone(),
        run: session.run,
        user: session.user.clone(),
        mask: access.mask,
        tags: Vec::new(),
    })
}

/// Variables whose values are credentials.
const SECRETS: [&str; 7] = [
    env::ANTHROPIC_API_KEY,
    env::ANTHROPIC_AUTH_TOKEN,
    env::LANGFUSE_SECRET_KEY,
    env::GITHUB_TOKEN,
    env::GITLAB_TOKEN,
    env::VERTEX_USER_TOKEN,
    env::GOOGLE_APPLICATION_CREDENTIALS,
];

/// Variables of a pod whose values are no secrets, the agent's task and names among them: what is not named here came from
/// a Secret, or from nobody knows where.
const PUBLIC: [&str; 30] = [
    env::PROMPT,
    env::SESSION_ID,
    env::WEBSOCKET_URL,
    env::GATEWAY_TOKEN_FILE,
    env::ANTHROPIC_BASE_URL,
    env::LANGFUSE_ENABLED,
    env::LANGFUSE_HOST,
    env::LANGFUSE_PUBLIC_KEY,
    env::AGENTIC_SESSION_NAME,
    env::AGENTIC_SESSION_NAMESPACE,
    env::AGENTIC_SESSION_UID,
    env::POD_UID,
    env::ATTEMPT,
    env::LLM_MODEL,
    env::LLM_TEMPERATURE,
    env::LLM_MAX_TOKENS,
    env::INTERACTIVE,
    env::REPOS_JSON,
    env::TIMEOUT,
    env::WORKSPACE_PATH,
    env::AGENTIC_SPEC_JSON,
    env::GITHUB_HOST,
    env::GITLAB_HOST,
    env::LOG_FORMAT,
    "PATH",
    "HOME",
    "HOSTNAME",
    "LANG",
    "PWD",
    "RUST_LOG",
];

/// What a pod's runner holds and nobody may see.
pub fn held_in_pod(variables: impl Iterator<Item = (String, String)>) -> Vec<Held> {
    variables
        .filter(|(name, value)| {
            !value.is_empty() && !PUBLIC.contains(&name.as_str()) && !name.starts_with("KUBERNETES_")
        })
        .map(|(name, value)| Held {
            name,
            value: value.into(),
        })
        .collect()
}

fn secrets(var: Lookup<'_>) -> Vec<Held> {
    let held = |name: &&str| {
        Some(Held {
            name: (*name).to_owned(),
            value: var(name)?.into(),
        })
    };
    SECRETS.iter().filter_map(held).collect()
}

/// A fresh folder, so that a second try is a second session.
fn default_state(var: Lookup<'_>) -> Option<PathBuf> {
    let base = var("XDG_STATE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(var("HOME")?).join(".local/state")))?;
    Some(base.join("agentic-operator").join(Uuid::new_v4().to_string()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use secrecy::ExposeSecret as _;

    use super::*;

    fn pod() -> HashMap<&'static str, &'static str> {
        HashMap::from([
            (env::AGENTIC_SESSION_UID, "6fa459ea-ee8a-3ca4-894e-db77e160355e"),
            (env::AGENTIC_SESSION_NAME, "hello"),
            (env::AGENTIC_SESSION_NAMESPACE, "team"),
            (env::POD_UID, "pod-1"),
            (env::ATTEMPT, "3"),
            (env::PROMPT, "do it"),
            (env::AGENTIC_SPEC_JSON, r#"{"run":2,"usedSeconds":40}"#),
            (env::TIMEOUT, "90"),
        ])
    }

    fn config(vars: &HashMap<&'static str, &'static str>) -> Result<Config, ConfigError> {
        Config::from_env(&|name| {
            vars.get(name)
                .filter(|value| !value.is_empty())
                .map(|value| (*value).to_owned())
        })
    }

    #[test]
    fn a_pod_is_read_from_its_environment() {
        let config = config(&pod()).unwrap();
        assert_eq!((config.attempt, config.run, config.used.as_secs()), (Some(3), 2, 40));
        assert_eq!(config.limits.timeout, Some(90));
        assert_eq!(
            config.folders.state.to_str(),
            Some("/data/sessions/6fa459ea-ee8a-3ca4-894e-db77e160355e/state")
        );
        assert!(config.upstream.is_none() && config.gateway.is_none() && config.langfuse.is_none());
    }

    #[test]
    fn a_key_comes_before_a_token_and_an_empty_one_is_none() {
        let mut vars = pod();
        vars.insert(env::ANTHROPIC_API_KEY, "");
        vars.insert(env::ANTHROPIC_AUTH_TOKEN, "fake-token");
        vars.insert(env::ANTHROPIC_BASE_URL, "http://model.example/");
        let upstream = config(&vars).unwrap().upstream.unwrap();
        assert_eq!(upstream.base_url, "http://model.example");
        let Credential::Secrets(secrets) = upstream.credential else {
            panic!("what the Secrets hold")
        };
        assert!(secrets.value(env::ANTHROPIC_API_KEY).is_none());
        let token = secrets.value(env::ANTHROPIC_AUTH_TOKEN).unwrap();
        assert_eq!(token.expose_secret(), "fake-token");
    }

    #[rstest::rstest]
    #[case::ours([("VERTEX_ENABLED", "true"), ("VERTEX_PROJECT_ID", "p"), ("VERTEX_REGION", "us-east5")])]
    #[case::the_clis([("CLAUDE_CODE_USE_VERTEX", "1"), ("ANTHROPIC_VERTEX_PROJECT_ID", "p"), ("CLOUD_ML_REGION", "us-east5")])]
    fn vertex_is_known_by_either_name(#[case] names: [(&'static str, &'static str); 3]) {
        let mut vars = pod();
        vars.extend(names);
        assert!(config(&vars).unwrap().upstream.is_none(), "there is no token yet");
        vars.insert(env::VERTEX_USER_TOKEN, "fake-token");
        let upstream = config(&vars).unwrap().upstream.unwrap();
        assert_eq!(upstream.base_url, "https://us-east5-aiplatform.googleapis.com/v1");
        assert_eq!(upstream.vertex.unwrap().project, "p");
        vars.insert(names[1].0, "");
        assert!(config(&vars).is_err(), "a project is needed");
    }

    #[test]
    fn what_comes_from_a_secret_is_held_and_what_the_operator_sets_is_not() {
        let vars = [
            ("PROMPT", "say it"),
            ("KUBERNETES_PORT", "tcp://10.0.0.1"),
            ("OUR_KEY", "v"),
            ("EMPTY", ""),
        ];
        let held = held_in_pod(
            vars.into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        assert_eq!(
            held.iter().map(|held| held.name.as_str()).collect::<Vec<_>>(),
            ["OUR_KEY"]
        );
    }

    #[test]
    fn what_is_missing_or_unreadable_is_named() {
        let mut vars = pod();
        vars.remove(env::POD_UID);
        assert!(config(&vars).err().unwrap().to_string().contains("POD_UID is not set"));
        let mut vars = pod();
        vars.insert(env::ATTEMPT, "first");
        assert!(config(&vars).err().unwrap().to_string().contains("ATTEMPT=\"first\""));
    }
}
