//! What an agent may use.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::EnvironmentValue;

/// What the agent may use.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.allowed) ? self.allowed.map(t, bytes(t).size()).sum() : 0) + (has(self.disallowed) ? self.disallowed.map(t, bytes(t).size()).sum() : 0) <= 6144")
        .message("spec.tools.allowed and disallowed must have at most 6144 bytes together: write shorter rules")
)]
pub struct Tools {
    /// Rules of tools that run without being asked for, in the CLI's form. Example: `["Bash(git *)", "Read"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub allowed: Vec<ToolRule>,
    /// Rules of tools that never run, whatever else is said. Example: `["WebFetch"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub disallowed: Vec<ToolRule>,
    /// What happens to tools of neither list; `bypassPermissions` when absent: nothing is asked, the container is the boundary. A
    /// session that is not interactive has nobody to ask: what another mode would ask for is denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permission_mode: Option<PermissionMode>,
    /// MCP servers by name, 8,192 bytes together.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8))]
    #[x_kube(
        validation = Rule::new("self.all(n, n.matches('^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$'))")
            .message("names in spec.tools.mcpServers must be letters, digits, - and _, at most 32 characters"),
        validation = Rule::new("self.map(n, (has(self[n].http) ? self[n].http.url.size() + (has(self[n].http.headers) ? self[n].http.headers.map(h, h.size() + bytes(self[n].http.headers[h]).size()).sum() : 0) : 0) + (has(self[n].stdio) ? bytes(self[n].stdio.command).size() + (has(self[n].stdio.args) ? self[n].stdio.args.map(a, bytes(a).size()).sum() : 0) + (has(self[n].stdio.env) ? self[n].stdio.env.map(e, e.size() + bytes(self[n].stdio.env[e]).size()).sum() : 0) : 0)).sum() <= 8192")
            .message("spec.tools.mcpServers must have at most 8192 bytes together")
    )]
    pub mcp_servers: BTreeMap<String, McpServer>,
}

/// A rule of the CLI's lists of tools.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ToolRule(
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[^\x00-\x1f-][^\x00-\x1f]*$"))] pub String,
);

/// An argument of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Argument(#[schemars(length(max = 2048), regex(pattern = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f]*$"))] pub String);

/// What happens to tools that no rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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

impl From<PermissionMode> for protocol::spec::PermissionMode {
    fn from(mode: PermissionMode) -> Self {
        match mode {
            PermissionMode::BypassPermissions => Self::BypassPermissions,
            PermissionMode::AcceptEdits => Self::AcceptEdits,
            PermissionMode::Default => Self::Default,
            PermissionMode::Plan => Self::Plan,
            PermissionMode::DontAsk => Self::DontAsk,
        }
    }
}

/// An MCP server: exactly one of `http` and `stdio`.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.http) != has(self.stdio)").message("give an MCP server in exactly one of http and stdio")
)]
pub struct McpServer {
    /// A server that is reached over the network, through the runner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpServer>,
    /// A program beside the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdio: Option<StdioServer>,
}

/// An MCP server that is reached over the network.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpServer {
    /// Its address, which must be `https`. Example: `https://mcp.example.com/v1`
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^https://[^/@?#]+([/?][!#-;=?-\\\\[\\\\]_a-z~]*)?$')")
            .message("url of an MCP server must begin with https:// and hold no user or password: name an entry of the ProjectSettings' mcpCredentials in credential")
    )]
    pub url: String,
    /// Headers of each request. They can be read in the session: no secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    #[x_kube(
        validation = Rule::new("self.all(h, h.matches('^[A-Za-z0-9-]{1,64}$') && self[h].matches('^[\\\\t -~]*$') && self[h].size() <= 1024)")
            .message("headers of an MCP server must have names of letters, digits and -, and values of at most 1024 printable ASCII characters")
    )]
    pub headers: BTreeMap<String, EnvironmentValue>,
    /// Name of an entry of `mcpCredentials` in the namespace's `ProjectSettings`; the address must be under its prefix. None when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub credential: Option<String>,
}

/// An MCP server that runs beside the agent and is visible to it.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StdioServer {
    /// Program, as it is found in the agent's container. Example: `npx`
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[^\x00-\x1f]*$"))]
    pub command: String,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub args: Vec<Argument>,
    /// Its environment. The agent can read it: no secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    #[x_kube(
        validation = Rule::new("self.all(e, e.matches('^[A-Za-z_][A-Za-z0-9_]{0,127}$') && self[e].matches('^[^\\\\x00-\\\\x08\\\\x0b\\\\x0c\\\\x0e-\\\\x1f]*$') && self[e].size() <= 4096)")
            .message("env of an MCP server must have names of letters, digits and underscores, and values of at most 4096 characters without control characters")
    )]
    pub env: BTreeMap<String, EnvironmentValue>,
}
