//! What the operator tells the runner beside the variables with names of their own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{NanoUsd, price::Price};

/// Content of `AGENTIC_SPEC_JSON`: resolved, so that the runner knows no defaults of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AgenticSpec {
    /// Run that the attempt belongs to, from 1.
    pub run: u32,
    /// Running time that earlier attempts of the run used, seconds; the runner's clock starts at its own start.
    pub used_seconds: u64,
    /// Who the session is for; goes to traces and is the author of commits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
    /// Model that the CLI falls back to when its own is overloaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback_model: Option<String>,
    /// What the agent may use.
    pub tools: Tools,
    /// Appended to the CLI's system prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append_system_prompt: Option<String>,
    /// Further arguments of the CLI; none of those that the runner owns.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub additional_args: Vec<String>,
    /// Which of the repositories is the agent's working folder.
    pub main_repo_index: usize,
    /// The workspace is that of the claim, [`crate::names::path::SHARED_WORKSPACE`], and not the session's own.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shared_workspace: bool,
    /// Prices by model that replace or add to those of [`crate::price`].
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub prices: BTreeMap<String, Price>,
    /// Hosts or networks (`10.0.0.0/8`, `git.corp.example`, `*.corp.example`) that an author-given URL may reach although
    /// their addresses are private.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed_private_hosts: Vec<String>,
}

/// See [`AgenticSpec::user`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// Who.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_id: String,
    /// Their name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub display_name: String,
    /// Groups that they belong to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
}

/// See [`AgenticSpec::tools`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Tools {
    /// Rules of tools that run without being asked for, in the CLI's form (`Bash(git *)`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed: Vec<String>,
    /// Rules of tools that never run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disallowed: Vec<String>,
    /// What happens to tools of neither list.
    pub permission_mode: PermissionMode,
    /// MCP servers by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub mcp_servers: BTreeMap<String, McpServer>,
}

/// The CLI's permission modes. In a one-shot, what a mode would ask for is denied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PermissionMode {
    /// Nothing is asked: the container is the boundary.
    #[default]
    BypassPermissions,
    /// Edits in the workspace run; the rest is asked for.
    AcceptEdits,
    /// What is not read-only is asked for.
    Default,
    /// Nothing is changed: the agent reads and plans.
    Plan,
    /// What is not allowed by a rule is denied without being asked for.
    DontAsk,
}

impl PermissionMode {
    /// The mode as the CLI's `--permission-mode` takes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BypassPermissions => "bypassPermissions",
            Self::AcceptEdits => "acceptEdits",
            Self::Default => "default",
            Self::Plan => "plan",
            Self::DontAsk => "dontAsk",
        }
    }
}

/// An MCP server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum McpServer {
    /// Reached through the proxy, which adds the credential.
    Http {
        /// `https` address.
        url: String,
        /// Headers, visible to nobody but the server; no secrets belong here.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        headers: BTreeMap<String, String>,
        /// The admin's credential for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        credential: Option<McpCredential>,
    },
    /// A process beside the CLI, in the agent container.
    Stdio {
        /// Program.
        command: String,
        /// Its arguments.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        args: Vec<String>,
        /// Its environment, visible to the agent.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        env: BTreeMap<String, String>,
    },
}

/// A credential for an MCP server. Its value is in the file [`crate::names::path::mcp_credential`], read per request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct McpCredential {
    /// Its name.
    pub name: String,
    /// Header that carries it, such as `Authorization`; the file holds the whole value of the header.
    pub header: String,
    /// The credential is sent only to addresses that begin so.
    pub url_prefix: String,
}

/// A repository: an element of `REPOS_JSON`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Repo {
    /// Where it is cloned from: `https://`, `ssh://` or `git@`.
    pub url: String,
    /// Branch to clone; the repository's own default when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Its folder in the workspace; unique in the session.
    pub name: String,
    /// Where it is pushed to; `url` and the session's own branch when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<RepoOutput>,
    /// Whether it is pushed at a normal end.
    pub push: bool,
}

/// See [`Repo::output`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RepoOutput {
    /// Repository; the one that was cloned when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Branch; `sessions/<name>-<first 8 of the uid>` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

/// Content of the limits annotation and of its downward-API file: what may change while a pod runs, resolved.
///
/// The annotation is on the pod from its creation; without the file (`--local`) the command line says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LiveLimits {
    /// Running time over all attempts of the run, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// How long an interactive session may be idle, seconds; 0: for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inactivity_timeout: Option<u64>,
    /// Rounds of the session; absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_turns: Option<u32>,
    /// Cost of the session; absent: no limit.
    #[serde(rename = "maxCostUSD", skip_serializing_if = "Option::is_none")]
    pub max_cost_usd: Option<NanoUsd>,
    /// Tokens of the session, all kinds together; absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
}
