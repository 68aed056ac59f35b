//! Flags and environment of the task API and the claude-code API, with the names that their users know.

use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum, builder::BoolishValueParser};

use super::Settings;
use crate::sessions::is_namespace;

/// An API of another system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Served {
    /// `/api/v1/tasks` and what belongs to it.
    Tasks,
    /// `/claude-code`.
    ClaudeCode,
}

/// What is wrong with them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No namespace.
    #[error(
        "failed to switch on the task API or the claude-code API: say with --compat-namespace (GATEWAY_COMPAT_NAMESPACE) in which namespace their sessions run"
    )]
    Namespace,
    /// A key of the model where it is of no use.
    #[error(
        "CLAUDE_API_KEY or CLAUDE_BASE_URL is set for the gateway, which calls no model: put the key as ANTHROPIC_API_KEY into the Secret ambient-runner-secrets of the namespace {0:?}, and CLAUDE_BASE_URL as ANTHROPIC_BASE_URL"
    )]
    ModelKey(String),
    /// Authentication without a key.
    #[error("API_API_KEY must have at least 16 characters: make one with `openssl rand -hex 32`")]
    ShortKey,
}

/// The task API and the claude-code API.
#[derive(Debug, Args)]
#[command(next_help_heading = "Task API and claude-code API")]
pub struct Options {
    /// The APIs of other systems to serve; none when absent.
    #[arg(long = "compat-api", env = "GATEWAY_COMPAT_APIS", value_delimiter = ',', value_enum)]
    compat_apis: Vec<Served>,
    /// Namespace of the sessions of callers whose key names none.
    #[arg(long, env = "GATEWAY_COMPAT_NAMESPACE", default_value = "")]
    compat_namespace: String,
    /// `false`: whoever can connect may use these two APIs.
    #[arg(long, env = "API_AUTH_ENABLED", default_value_t = true, action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    auth_enabled: bool,
    /// Host names by which whoever need not show a key may reach these two APIs, beside addresses, `localhost` and the names of
    /// Services, such as `tasks.example.com`.
    #[arg(long = "allow-host", env = "GATEWAY_ALLOW_HOSTS", value_delimiter = ',')]
    allow_hosts: Vec<String>,
    /// A key for the namespace of these two APIs, beside those of `--api-keys`.
    #[arg(long, env = "API_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// `false`: no limit of requests for callers whose key has none.
    #[arg(long, env = "API_RATE_LIMIT_ENABLED", default_value_t = true, action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    rate_limit_enabled: bool,
    /// Requests a minute of `API_API_KEY`, and of all callers without a key together.
    #[arg(long, env = "API_RATE_LIMIT_PER_MINUTE", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rate_limit_per_minute: u32,
    /// Model of requests that name none; that of the namespace's settings, or the CLI's own, when absent.
    #[arg(long, env = "CLAUDE_DEFAULT_MODEL")]
    default_model: Option<String>,
    /// Rounds of a task that names no `max_turns`.
    #[arg(long, env = "CLAUDE_MAX_TURNS", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_turns: u32,
    /// Sessions of tasks that may be active at once in a namespace.
    #[arg(long, env = "SESSION_MAX_CONCURRENT", default_value_t = 10)]
    session_max_concurrent: usize,
    /// Seconds without a task after which a workspace's session is stopped; 0: never.
    #[arg(long, env = "SESSION_IDLE_TIMEOUT_SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u32).range(..=604_800))]
    session_idle_timeout_seconds: u32,
    /// Seconds that a workspace's session may run in all, idle or not.
    #[arg(long, env = "SESSION_MAX_SECONDS", default_value_t = 604_800, value_parser = clap::value_parser!(u32).range(1..=604_800))]
    session_max_seconds: u32,
    /// How often ended sessions of tasks are looked for, seconds.
    #[arg(long, env = "SESSION_CLEANUP_INTERVAL_SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    session_cleanup_interval_seconds: u64,
    /// How long sessions of tasks are kept after their end, and with them the tasks and their events, seconds.
    #[arg(long, env = "SESSION_RETENTION_SECONDS", default_value_t = 86_400)]
    session_retention_seconds: u64,
    /// Requests of the claude-code API that may be under way at once in a namespace: each is a pod.
    #[arg(long, env = "CLAUDE_CODE_MAX_CONCURRENT", default_value_t = 20)]
    claude_code_max_concurrent: usize,
    /// Seconds that a request of the claude-code API may work.
    #[arg(long, env = "CLAUDE_CODE_TIMEOUT_SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=604_800))]
    claude_code_timeout_seconds: u32,
    /// Seconds that the session of such a request stays after its end.
    #[arg(long, env = "CLAUDE_CODE_KEEP_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(..=31_536_000))]
    claude_code_keep_seconds: u32,
    /// `false`: the workspace of such a session is a claim, where a cluster's nodes have no disk to spare.
    #[arg(long, env = "CLAUDE_CODE_EPHEMERAL", default_value_t = true, action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    claude_code_ephemeral: bool,
    /// Refused: the model's key does not belong to the gateway.
    #[arg(long, env = "CLAUDE_API_KEY", hide = true, hide_env_values = true)]
    claude_api_key: Option<String>,
    /// Refused: nor does its address.
    #[arg(long, env = "CLAUDE_BASE_URL", hide = true, hide_env_values = true)]
    claude_base_url: Option<String>,
}

impl Options {
    /// The key for the namespace of these two APIs.
    pub fn key(&self) -> Option<&str> {
        self.api_key.as_deref().filter(|key| !key.is_empty())
    }

    /// What they ask for.
    pub fn settings(&self) -> Result<Settings, Error> {
        let on = |api| self.compat_apis.contains(&api);
        let (tasks, claude_code) = (on(Served::Tasks), on(Served::ClaudeCode));
        if !tasks && !claude_code {
            return Ok(Settings::default());
        }
        if !is_namespace(&self.compat_namespace) {
            return Err(Error::Namespace);
        }
        let of_the_model = [&self.claude_api_key, &self.claude_base_url];
        if of_the_model.into_iter().flatten().any(|value| !value.is_empty()) {
            return Err(Error::ModelKey(self.compat_namespace.clone()));
        }
        if self.key().is_some_and(|key| key.len() < 16) {
            return Err(Error::ShortKey);
        }
        Ok(Settings {
            tasks,
            claude_code,
            namespace: self.compat_namespace.clone(),
            open: !self.auth_enabled,
            hosts: self.allow_hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
            rate: self.rate_limit_enabled.then_some(self.rate_limit_per_minute),
            model: self.default_model.clone().filter(|model| !model.is_empty()),
            max_turns: self.max_turns,
            max_concurrent: self.session_max_concurrent,
            idle_seconds: self.session_idle_timeout_seconds,
            session_seconds: self.session_max_seconds,
            cleanup_every: Duration::from_secs(self.session_cleanup_interval_seconds),
            keep_ended: Duration::from_secs(self.session_retention_seconds),
            request_max: self.claude_code_max_concurrent,
            request_seconds: self.claude_code_timeout_seconds,
            request_keep_seconds: self.claude_code_keep_seconds,
            request_ephemeral: self.claude_code_ephemeral,
        })
    }
}
