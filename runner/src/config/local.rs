//! Without Kubernetes.

use std::path::{Path, PathBuf};

use clap::Args;
use protocol::NanoUsd;
use protocol::names::env;
use protocol::price::Prices;
use protocol::spec::LiveLimits;
use tokio::time::Duration;
use uuid::Uuid;

use super::model::upstream;
use super::{AgentConfig, CONTROL, Config, ConfigError, DEFAULT_TIMEOUT, Folders, Lookup, Session, options, spec};
use crate::agent::Place;
use crate::redact::Vault;

/// Without Kubernetes.
#[derive(Args, Debug)]
pub struct LocalArgs {
    /// Drive the CLI here, without Kubernetes. Keys are taken from the environment.
    #[arg(long)]
    pub local: bool,
    /// The task.
    #[arg(long, requires = "local", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Working folder of the agent; the current one when absent.
    #[arg(long, requires = "local")]
    pub workspace: Option<PathBuf>,
    /// Folder for records and conversation; started again with the same one, the runner goes on where it was. A new one, which is
    /// named on stderr, when absent.
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

impl Config {
    /// From the command line.
    pub fn local(args: LocalArgs, var: Lookup<'_>) -> Result<Self, ConfigError> {
        let prompt = match args.prompt {
            None if args.interactive => String::new(),
            prompt => prompt.ok_or(ConfigError::Missing("--prompt"))?,
        };
        let state = if let Some(state) = args.state {
            state
        } else {
            let state = default_state(var).ok_or(ConfigError::Missing("HOME"))?;
            eprintln!("The session is kept in {}: name it with --state", state.display());
            state
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
            prompt,
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
            cli: program(args.cli).display().to_string(),
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

/// A path counts from here, and not from the workspace where it is started; a name alone is looked for in `PATH`.
fn program(cli: PathBuf) -> PathBuf {
    if cli.components().count() == 1 {
        return cli;
    }
    std::path::absolute(&cli).unwrap_or(cli)
}

/// A fresh folder, so that a second try is a second session.
fn default_state(var: Lookup<'_>) -> Option<PathBuf> {
    let base = var("XDG_STATE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(var("HOME")?).join(".local/state")))?;
    Some(base.join("agentic-operator").join(Uuid::new_v4().to_string()))
}
