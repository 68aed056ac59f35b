//! What the session's author may choose of the CLI, checked.

use protocol::spec::Tools;

/// The author's choices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Somebody is there to send messages and to answer questions.
    pub interactive: bool,
    /// Model; the CLI's default when absent.
    pub model: Option<String>,
    /// Model when that one is overloaded.
    pub fallback_model: Option<String>,
    /// Most tokens of one model response.
    pub max_tokens: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// What the agent may use.
    pub tools: Tools,
    /// Appended to the CLI's system prompt.
    pub append_system_prompt: Option<String>,
    /// Further arguments.
    pub additional_args: Vec<String>,
}

/// Choices that cannot work.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The runner sets it.
    #[error("failed to use additionalArgs: {0} is set by the runner; {1}")]
    Owned(String, &'static str),
    /// The API takes a temperature only without thinking.
    #[error(
        "failed to use temperature together with additionalArgs {0}: the model API takes a temperature only without thinking; remove one of them"
    )]
    Thinking(String),
    /// The API would refuse it.
    #[error("failed to use temperature {0}: it must be from 0 to 1")]
    Temperature(String),
    /// A server's name goes into an address.
    #[error("failed to use the MCP server {0:?}: its name may have letters, digits, - and _, at most 64")]
    ServerName(String),
}

/// Flags that only the runner sets, and what the author can use instead.
const OWNED: [(&[&str], &str); 8] = [
    (
        &[
            "-p",
            "--print",
            "--input-format",
            "--output-format",
            "--verbose",
            "--include-partial-messages",
            "--replay-user-messages",
            "--await-initialize",
            "--no-session-persistence",
            "-h",
            "--help",
            "-v",
            "--version",
            "--json-schema",
            "--bare",
            "-d",
            "--debug",
            "--debug-file",
            "--ide",
            "--bg",
            "--background",
            "--tmux",
            "--restricted",
            "--include-hook-events",
            "--rewind-files",
            "--sdk-url",
            "--remote",
            "--remote-control",
            "--rc",
            "--teleport",
            "--cloud",
            "--chrome",
            "--init",
            "--init-only",
            "--maintenance",
            "--debug-to-stderr",
            "--mcp-debug",
            "-w",
            "--worktree",
        ],
        "it decides how runner and CLI speak to each other",
    ),
    (
        &[
            "--session-id",
            "-r",
            "--resume",
            "-c",
            "--continue",
            "--fork-session",
            "--from-pr",
            "--resume-session-at",
        ],
        "it decides which conversation goes on",
    ),
    (&["--model", "--fallback-model"], "use llmSettings"),
    (&["--max-turns", "--max-budget-usd"], "use limits"),
    (
        &[
            "--allowedTools",
            "--allowed-tools",
            "--disallowedTools",
            "--disallowed-tools",
            "--permission-mode",
            "--permission-prompt-tool",
            "--permission-prompts",
            "--dangerously-skip-permissions",
            "--allow-dangerously-skip-permissions",
        ],
        "use tools",
    ),
    (&["--mcp-config", "--strict-mcp-config"], "use tools.mcpServers"),
    (
        &["--append-system-prompt", "--append-system-prompt-file"],
        "use appendSystemPrompt",
    ),
    (
        &[
            "--settings",
            "--setting-sources",
            "--managed-settings",
            "--plugin-dir",
            "--plugin-url",
        ],
        "settings could run commands and reach the model past the proxy",
    ),
];

/// Flags with which thinking is asked for.
const THINKING: [&str; 3] = ["--effort", "--thinking", "--max-thinking-tokens"];

impl Options {
    /// Whether they can work.
    pub fn check(&self) -> Result<(), OptionsError> {
        for arg in &self.additional_args {
            let name = arg.split_once('=').map_or(arg.as_str(), |(name, _)| name);
            if let Some((_, instead)) = OWNED
                .iter()
                .find(|(names, _)| names.iter().any(|owned| is(name, owned)))
            {
                return Err(OptionsError::Owned(name.to_owned(), instead));
            }
            if self.temperature.is_some() && THINKING.contains(&name) {
                return Err(OptionsError::Thinking(name.to_owned()));
            }
        }
        if let Some(temperature) = self.temperature
            && !(0.0..=1.0).contains(&temperature)
        {
            return Err(OptionsError::Temperature(temperature.to_string()));
        }
        let plain = |name: &str| {
            (1..=64).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        match self.tools.mcp_servers.keys().find(|name| !plain(name)) {
            Some(name) => Err(OptionsError::ServerName(name.clone())),
            None => Ok(()),
        }
    }
}

/// Whether the CLI takes `name` for the flag `owned`; a short flag may have its value, or further flags, right behind it.
fn is(name: &str, owned: &str) -> bool {
    let short = owned.len() == 2;
    name == owned || short && name.starts_with(owned) && !name.starts_with("--")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn with(args: &[&str]) -> Options {
        Options {
            additional_args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Options::default()
        }
    }

    #[rstest]
    #[case(&["--resume", "x"])]
    #[case(&["--resume=x"])]
    #[case(&["-rx"])]
    #[case(&["--add-dir", "/x", "--output-format=text"])]
    #[case(&["--dangerously-skip-permissions"])]
    #[case(&["--settings={}"])]
    fn flags_of_the_runner_are_refused(#[case] args: &[&str]) {
        assert!(matches!(with(args).check(), Err(OptionsError::Owned(..))));
    }

    #[rstest]
    #[case(&["--add-dir", "/workspace/other"])]
    #[case(&["--effort", "low"])]
    #[case(&["--agents", "{}"])]
    fn other_flags_are_passed_on(#[case] args: &[&str]) {
        assert_eq!(with(args).check(), Ok(()));
    }

    #[test]
    fn a_temperature_needs_thinking_to_be_off() {
        let options = Options {
            temperature: Some(0.5),
            ..with(&["--effort=high"])
        };
        assert_eq!(options.check(), Err(OptionsError::Thinking("--effort".into())));
        let options = Options {
            temperature: Some(1.5),
            ..with(&[])
        };
        assert!(matches!(options.check(), Err(OptionsError::Temperature(_))));
    }

    #[test]
    fn the_name_of_a_server_can_stand_in_an_address() {
        let mut options = with(&[]);
        let server = protocol::spec::McpServer::Stdio {
            command: "x".into(),
            args: vec![],
            env: std::collections::BTreeMap::new(),
        };
        options.tools.mcp_servers = [("../v1/messages".to_owned(), server)].into();
        assert!(matches!(options.check(), Err(OptionsError::ServerName(_))));
    }

    #[test]
    fn flags_that_the_runner_owns_are_refused_before_there_is_a_pod_by_the_definition() {
        let definition = include_str!("../../../crds/agenticsessions.yaml");
        let names = definition
            .split("(?s)^--(")
            .nth(1)
            .and_then(|rest| rest.split(')').next());
        let refused: std::collections::BTreeSet<_> = names.unwrap().split('|').collect();
        let owned = OWNED.iter().flat_map(|(names, _)| names.iter());
        let owned: std::collections::BTreeSet<_> = owned.filter_map(|name| name.strip_prefix("--")).collect();
        assert_eq!(refused, owned);
    }
}
