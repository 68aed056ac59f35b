//! The environment (in a pod) or the command line (`--local`), checked, in one place.

mod held;
mod local;
mod model;
mod repos;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::names::{env, path};
use protocol::price::Prices;
use protocol::spec::{AgenticSpec, LiveLimits, User};
use tokio::time::Duration;

use crate::agent::Place;
use crate::cli::options::{Options, OptionsError};
use crate::langfuse::{self, LangfuseConfig};
use crate::last_word::LastWord;
use crate::outlet::Outlet;
use crate::proxy::Upstream;
use crate::proxy::mcp::Around;
use crate::redact::{Held, Vault};
use crate::transcript::Format;
use crate::watchdog::Pulse;
use crate::workspace::git::Repos;

pub use held::held_in_pod;
pub use local::LocalArgs;

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
    #[error("failed to read {name}={:?}: {expected}", value.chars().take(100).collect::<String>())]
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
    /// stdout, for all who write to it; absent: nobody does.
    pub stdout: Option<Arc<Outlet>>,
    /// Values that nobody may see.
    pub secrets: Vec<Held>,
    /// Told of those that are read later.
    pub vault: Vault,
    /// What is cloned and pushed.
    pub repos: Repos,
    /// Told what to say if the runtime comes to nothing any more.
    pub last_word: Arc<LastWord>,
    /// Told that the runner gets on while it does one thing for long.
    pub pulse: Pulse,
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
        let repos = repos::repos(&spec, &data, &uid, &vault, var)?;
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
        let upstream = model::upstream(secrets, &vault, var)?;
        let authorities = upstream.as_ref().and_then(|upstream| upstream.authorities.clone());
        let base = session.with(agent, folders, var);
        Ok(Self {
            mcp: Around::in_pod(repos.allowed.clone(), authorities, vault.clone()),
            repos: Repos {
                progress: base.stdout.clone().filter(|_| base.format == Format::Text),
                ..repos
            },
            upstream,
            vault,
            ..base
        })
    }

    /// Folder whose files the gateway may ask for.
    pub fn files(&self) -> Option<PathBuf> {
        let workspace = &self.repos.workspace;
        (!workspace.as_os_str().is_empty()).then(|| workspace.clone())
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
        let format = match var(env::LOG_FORMAT).as_deref() {
            Some("json") => Format::Json,
            _ => Format::Text,
        };
        Config {
            upstream: None,
            mcp: Around::default(),
            gateway: gateway(var),
            langfuse: langfuse(&self, var),
            stdout: format.open(),
            format,
            secrets: held::secrets(var),
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
            pulse: Pulse::default(),
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

fn number<T: std::str::FromStr>(name: &'static str, value: &str) -> Result<T, ConfigError> {
    value.parse().map_err(|_| ConfigError::Invalid {
        name,
        value: value.to_owned(),
        expected: "a whole number",
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

#[cfg(test)]
mod tests;
