//! Command line and environment of the CLI. Pure.

use std::net::SocketAddr;

use secrecy::{ExposeSecret as _, SecretString};
use uuid::Uuid;

use crate::agent::Spawn;

/// How often the CLI itself tries a model call again; what is left fails the attempt, which the operator tries again.
const MODEL_RETRIES: &str = "4";

/// The conversation that the CLI works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conversation {
    /// A new one of this id.
    New(Uuid),
    /// An earlier one.
    Resumed {
        /// Its id.
        id: Uuid,
        /// Whether the CLI shall go on with a turn that was cut.
        interrupted: bool,
    },
}

impl Conversation {
    /// Id of the conversation.
    pub fn id(self) -> Uuid {
        match self {
            Self::New(id) | Self::Resumed { id, .. } => id,
        }
    }
}

/// What the CLI is started with.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// Path of the CLI, as the agent sees it.
    pub cli: &'a str,
    /// The agent's working folder.
    pub workspace: &'a str,
    /// The agent's home.
    pub home: &'a str,
    /// The CLI's config folder.
    pub config_dir: &'a str,
    /// Model; the CLI's default when absent.
    pub model: Option<&'a str>,
    /// Whether pieces of messages are wanted while they are written.
    pub deltas: bool,
    /// The conversation.
    pub conversation: Conversation,
    /// Where the proxy listens.
    pub proxy: SocketAddr,
    /// What the proxy wants to see.
    pub token: &'a SecretString,
}

/// The process to start.
pub fn spawn(start: &Start<'_>) -> Spawn {
    Spawn {
        argv: argv(start),
        env: env(start),
        // The user's own image knows best where its tools are.
        env_default: pairs(&[
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("LANG", "C.UTF-8"),
        ]),
        cwd: start.workspace.to_owned(),
    }
}

fn argv(start: &Start<'_>) -> Vec<String> {
    let mut argv: Vec<String> = [
        start.cli,
        "-p",
        "--input-format",
        "stream-json",
        "--output-format",
        "stream-json",
        "--verbose",
        "--replay-user-messages",
        "--strict-mcp-config",
        // Settings in a workspace could name hooks and servers; the session's author names them in the resource.
        "--setting-sources",
        "",
        "--settings",
        r#"{"skipWebFetchPreflight":true}"#,
        // The container is the boundary.
        "--permission-mode",
        "bypassPermissions",
    ]
    .map(str::to_owned)
    .to_vec();
    if start.deltas {
        argv.push("--include-partial-messages".to_owned());
    }
    let flag = match start.conversation {
        Conversation::New(_) => "--session-id",
        Conversation::Resumed { .. } => "--resume",
    };
    argv.extend([flag.to_owned(), start.conversation.id().to_string()]);
    if let Some(model) = start.model {
        argv.extend(["--model".to_owned(), model.to_owned()]);
    }
    argv
}

fn env(start: &Start<'_>) -> Vec<(String, String)> {
    let proxy = format!("http://{}", start.proxy);
    let mut env = pairs(&[
        ("HOME", start.home),
        ("CLAUDE_CONFIG_DIR", start.config_dir),
        ("ANTHROPIC_BASE_URL", &proxy),
        ("ANTHROPIC_API_KEY", start.token.expose_secret()),
        // Without it the CLI calls api.anthropic.com beside the base URL, and shows it the key.
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
        ("CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS", "1"),
        ("CLAUDE_CODE_STARTUP_FAILURE_RESULTS", "1"),
        ("CLAUDE_CODE_STREAM_EVENT_HOLD_MS", "50"),
        ("CLAUDE_CODE_MAX_RETRIES", MODEL_RETRIES),
        // The container is the sandbox; without it bypassPermissions is refused to root.
        ("IS_SANDBOX", "1"),
        ("NO_PROXY", "127.0.0.1"),
        ("no_proxy", "127.0.0.1"),
    ]);
    if matches!(start.conversation, Conversation::Resumed { interrupted: true, .. }) {
        env.extend(pairs(&[("CLAUDE_CODE_RESUME_INTERRUPTED_TURN", "1")]));
    }
    env
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(conversation: Conversation, token: &SecretString) -> Start<'_> {
        Start {
            cli: "/opt/claude",
            workspace: "/workspace",
            home: "/home/agent",
            config_dir: "/home/agent/.claude",
            model: Some("claude-haiku-5-5"),
            deltas: true,
            conversation,
            proxy: SocketAddr::from(([127, 0, 0, 1], 4711)),
            token,
        }
    }

    fn spawned(conversation: Conversation) -> Spawn {
        spawn(&start(conversation, &SecretString::from("run-token")))
    }

    #[test]
    fn the_agent_reaches_the_model_through_the_proxy_and_asks_nobody() {
        let spawn = spawned(Conversation::New(Uuid::nil()));
        let line = spawn.argv.join(" ");
        assert!(
            line.contains("--session-id 00000000-0000-0000-0000-000000000000"),
            "{line}"
        );
        assert!(
            !line.contains("--permission-prompt-tool") && !line.contains("--resume"),
            "{line}"
        );
        assert!(!line.contains("run-token"), "{line}");
        let var = |name: &str| {
            spawn
                .env
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(var("ANTHROPIC_BASE_URL"), Some("http://127.0.0.1:4711"));
        assert_eq!(var("ANTHROPIC_API_KEY"), Some("run-token"));
        assert_eq!(var("CLAUDE_CODE_RESUME_INTERRUPTED_TURN"), None);
    }

    #[test]
    fn only_a_cut_turn_is_gone_on_with() {
        for interrupted in [true, false] {
            let spawn = spawned(Conversation::Resumed {
                id: Uuid::nil(),
                interrupted,
            });
            let set = spawn
                .env
                .iter()
                .any(|(name, _)| name == "CLAUDE_CODE_RESUME_INTERRUPTED_TURN");
            assert_eq!(set, interrupted);
            assert!(spawn.argv.contains(&"--resume".to_owned()));
        }
    }
}
