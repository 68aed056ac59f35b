//! Command line and environment of the CLI. Pure.

use std::net::SocketAddr;

use protocol::spec::{McpServer, Tools};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use uuid::Uuid;

use super::options::Options;
use crate::agent::Spawn;
use crate::proxy::Vertex;

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
    /// What the session's author chose.
    pub options: &'a Options,
    /// Whether pieces of messages are wanted while they are written.
    pub deltas: bool,
    /// The conversation.
    pub conversation: Conversation,
    /// Where the proxy listens.
    pub proxy: SocketAddr,
    /// What the proxy wants to see.
    pub token: &'a SecretString,
    /// The model API is Vertex AI.
    pub vertex: Option<&'a Vertex>,
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
        // Without it the last answer of a sub-agent is never shown, and belongs to nobody in a trace.
        "--forward-subagent-text",
        "--strict-mcp-config",
        // Settings in a workspace could name hooks and servers; the session's author names them in the resource.
        "--setting-sources",
        "",
        "--settings",
        r#"{"skipWebFetchPreflight":true}"#,
        "--permission-mode",
        start.options.tools.permission_mode.as_str(),
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
    argv.extend(chosen(start));
    argv
}

/// What the session's author chose; `--flag=value`, because some flags take all words up to the next flag, and a value may
/// look like one.
fn chosen(start: &Start<'_>) -> Vec<String> {
    let Options {
        interactive,
        model,
        fallback_model,
        tools:
            Tools {
                allowed,
                disallowed,
                permission_mode: _,
                mcp_servers,
            },
        append_system_prompt,
        additional_args,
        // These go into the environment.
        max_tokens: _,
        temperature: _,
    } = start.options;
    let flag = |name: &str, value: &str| format!("{name}={value}");
    let mut argv = Vec::new();
    // Without it the CLI denies at once what it would ask for: right where nobody is there to answer.
    argv.extend(interactive.then(|| flag("--permission-prompt-tool", "stdio")));
    argv.extend(model.iter().map(|model| flag("--model", model)));
    argv.extend(fallback_model.iter().map(|model| flag("--fallback-model", model)));
    argv.extend(allowed.iter().map(|rule| flag("--allowedTools", rule)));
    argv.extend(disallowed.iter().map(|rule| flag("--disallowedTools", rule)));
    argv.extend(
        append_system_prompt
            .iter()
            .map(|text| flag("--append-system-prompt", text)),
    );
    if !mcp_servers.is_empty() {
        let servers = mcp_servers
            .iter()
            .map(|(name, server)| (name.clone(), mcp(start, name, server)));
        let servers: serde_json::Map<String, Value> = servers.collect();
        argv.push(flag("--mcp-config", &json!({ "mcpServers": servers }).to_string()));
    }
    argv.extend(additional_args.iter().cloned());
    argv
}

/// A server as the CLI's `--mcp-config` has it. One reached by http is the proxy's, which knows the address and the
/// credential.
fn mcp(start: &Start<'_>, name: &str, server: &McpServer) -> Value {
    match server {
        McpServer::Http { .. } => json!({
            "type": "http",
            "url": format!("http://{}/mcp/{name}", start.proxy),
            "headers": { "x-api-key": start.token.expose_secret() },
        }),
        McpServer::Stdio { command, args, env } => json!({
            "type": "stdio",
            "command": command,
            "args": args,
            "env": env,
        }),
    }
}

fn env(start: &Start<'_>) -> Vec<(String, String)> {
    let mut env = pairs(&[
        ("HOME", start.home),
        ("CLAUDE_CONFIG_DIR", start.config_dir),
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
    env.extend(model_api(start));
    if let Some(tokens) = start.options.max_tokens {
        env.extend(pairs(&[("CLAUDE_CODE_MAX_OUTPUT_TOKENS", &tokens.to_string())]));
    }
    if let Some(temperature) = start.options.temperature {
        // The API takes a temperature only without thinking.
        let body = json!({ "temperature": temperature }).to_string();
        env.extend(pairs(&[
            ("CLAUDE_CODE_EXTRA_BODY", &body),
            ("CLAUDE_CODE_DISABLE_THINKING", "1"),
        ]));
    }
    if matches!(start.conversation, Conversation::Resumed { interrupted: true, .. }) {
        env.extend(pairs(&[("CLAUDE_CODE_RESUME_INTERRUPTED_TURN", "1")]));
    }
    env
}

/// Where the proxy is, and what it wants to see.
fn model_api(start: &Start<'_>) -> Vec<(String, String)> {
    let (proxy, token) = (format!("http://{}", start.proxy), start.token.expose_secret());
    let Some(Vertex { project, region }) = start.vertex else {
        return pairs(&[("ANTHROPIC_BASE_URL", &proxy), ("ANTHROPIC_API_KEY", token)]);
    };
    pairs(&[
        ("CLAUDE_CODE_USE_VERTEX", "1"),
        // The CLI has no Google credential, and needs none.
        ("CLAUDE_CODE_SKIP_VERTEX_AUTH", "1"),
        ("ANTHROPIC_VERTEX_BASE_URL", &format!("{proxy}/v1")),
        ("ANTHROPIC_VERTEX_PROJECT_ID", project),
        ("CLOUD_ML_REGION", region),
        ("ANTHROPIC_CUSTOM_HEADERS", &format!("x-api-key: {token}")),
    ])
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

    fn start<'a>(conversation: Conversation, token: &'a SecretString, options: &'a Options) -> Start<'a> {
        Start {
            cli: "/opt/claude",
            workspace: "/workspace",
            home: "/home/agent",
            config_dir: "/home/agent/.claude",
            options,
            deltas: true,
            conversation,
            proxy: SocketAddr::from(([127, 0, 0, 1], 4711)),
            token,
            vertex: None,
        }
    }

    fn spawned_with(conversation: Conversation, options: &Options) -> Spawn {
        spawn(&start(conversation, &SecretString::from("run-token"), options))
    }

    fn spawned(conversation: Conversation) -> Spawn {
        spawned_with(conversation, &Options::default())
    }

    #[test]
    fn all_that_the_author_chose_is_said_to_the_cli_as_one_word_each() {
        let options = Options {
            interactive: true,
            model: Some("claude-haiku-5-5".into()),
            fallback_model: Some("claude-sonnet-5-5".into()),
            max_tokens: Some(4_096),
            temperature: Some(0.25),
            tools: Tools {
                allowed: vec!["Bash(git *)".into(), "Read".into()],
                disallowed: vec!["WebFetch".into()],
                permission_mode: protocol::spec::PermissionMode::AcceptEdits,
                mcp_servers: [
                    (
                        "near".to_owned(),
                        McpServer::Stdio {
                            command: "npx".into(),
                            args: vec!["-y".into()],
                            env: [("A".to_owned(), "b".to_owned())].into(),
                        },
                    ),
                    (
                        "far".to_owned(),
                        McpServer::Http {
                            url: "https://mcp.example/".into(),
                            headers: [("X-Team".to_owned(), "a".to_owned())].into(),
                            credential: None,
                        },
                    ),
                ]
                .into(),
            },
            append_system_prompt: Some("--be brief".into()),
            additional_args: vec!["--effort".into(), "low".into()],
        };
        let spawn = spawned_with(Conversation::New(Uuid::nil()), &options);
        let from = spawn.argv.iter().position(|arg| arg == "--session-id").unwrap();
        insta::assert_snapshot!(spawn.argv[from..].join("\n"), @r#"
        --session-id
        00000000-0000-0000-0000-000000000000
        --permission-prompt-tool=stdio
        --model=claude-haiku-5-5
        --fallback-model=claude-sonnet-5-5
        --allowedTools=Bash(git *)
        --allowedTools=Read
        --disallowedTools=WebFetch
        --append-system-prompt=--be brief
        --mcp-config={"mcpServers":{"far":{"headers":{"x-api-key":"run-token"},"type":"http","url":"http://127.0.0.1:4711/mcp/far"},"near":{"args":["-y"],"command":"npx","env":{"A":"b"},"type":"stdio"}}}
        --effort
        low
        "#);
        assert!(spawn.argv.join(" ").contains("--permission-mode acceptEdits"));
        for (name, value) in [
            ("CLAUDE_CODE_MAX_OUTPUT_TOKENS", "4096"),
            ("CLAUDE_CODE_EXTRA_BODY", r#"{"temperature":0.25}"#),
            ("CLAUDE_CODE_DISABLE_THINKING", "1"),
        ] {
            assert!(spawn.env.contains(&(name.to_owned(), value.to_owned())), "{name}");
        }
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
