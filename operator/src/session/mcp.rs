//! MCP servers, and the admin's credentials for them.

use std::collections::BTreeMap;

use crds::{
    AgenticSessionSpec, ProjectSettingsSpec,
    session::{EnvironmentValue, HttpServer, StdioServer},
};
use protocol::spec::{McpCredential, McpServer};

use super::validate::Invalid;

/// Header of a credential when the admin names none.
const DEFAULT_HEADER: &str = "Authorization";

/// Where the value of an MCP credential is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct McpSecret {
    /// Name of the credential, and of its file in the runner container.
    pub credential: String,
    /// The Secret.
    pub secret: String,
    /// Key in it.
    pub key: String,
}

/// The servers of a session, and where the values of the credentials are that they use.
pub fn servers(
    spec: &AgenticSessionSpec,
    settings: &ProjectSettingsSpec,
) -> Result<(BTreeMap<String, McpServer>, Vec<McpSecret>), Invalid> {
    let mut servers = BTreeMap::new();
    let mut secrets: Vec<McpSecret> = Vec::new();
    let asked = spec.tools.iter().flat_map(|tools| &tools.mcp_servers);
    for (name, server) in asked {
        if let Some(StdioServer { command, args, env }) = server.stdio.clone() {
            let args = args.into_iter().map(|argument| argument.0).collect();
            let env = plain(env);
            servers.insert(name.clone(), McpServer::Stdio { command, args, env });
        } else if let Some(HttpServer {
            url,
            headers,
            credential,
        }) = server.http.clone()
        {
            let credential = match credential {
                Some(credential) => {
                    let (credential, secret) = credential_for(name, &credential, &url, settings)?;
                    if !secrets.contains(&secret) {
                        secrets.push(secret);
                    }
                    Some(credential)
                }
                None => None,
            };
            let headers = plain(headers);
            servers.insert(
                name.clone(),
                McpServer::Http {
                    url,
                    headers,
                    credential,
                },
            );
        }
    }
    Ok((servers, secrets))
}

fn plain(values: BTreeMap<String, EnvironmentValue>) -> BTreeMap<String, String> {
    values.into_iter().map(|(name, value)| (name, value.0)).collect()
}

fn credential_for(
    server: &str,
    name: &str,
    url: &str,
    settings: &ProjectSettingsSpec,
) -> Result<(McpCredential, McpSecret), Invalid> {
    let Some(found) = settings
        .mcp_credentials
        .iter()
        .find(|credential| credential.name == name)
    else {
        let names: Vec<_> = settings
            .mcp_credentials
            .iter()
            .map(|credential| &*credential.name)
            .collect();
        return Err(Invalid::NotAllowed {
            field: "spec.tools.mcpServers.*.http.credential",
            asked: name.to_owned(),
            list: "mcpCredentials",
            allowed: if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            },
        });
    };
    if !is_under(url, &found.url_prefix) {
        return Err(Invalid::NotUnderPrefix {
            server: server.to_owned(),
            credential: name.to_owned(),
            url: url.to_owned(),
            prefix: found.url_prefix.clone(),
        });
    }
    let credential = McpCredential {
        name: name.to_owned(),
        header: found.header.clone().unwrap_or_else(|| DEFAULT_HEADER.to_owned()),
        url_prefix: found.url_prefix.clone(),
    };
    let secret = McpSecret {
        credential: name.to_owned(),
        secret: found.secret_key_ref.name.0.clone(),
        key: found.secret_key_ref.key.clone(),
    };
    Ok((credential, secret))
}

/// A client resolves `..`, also when it is written in another way: such an address would leave the prefix.
fn is_under(url: &str, prefix: &str) -> bool {
    let path = url
        .split(['?', '#'])
        .next()
        .unwrap_or(url)
        .to_ascii_lowercase()
        .replace("%2e", ".");
    url.starts_with(prefix) && !path.split('/').any(|part| part == "..") && !path.contains("%2f")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::is_under;

    #[rstest]
    #[case("https://mcp.example/a/", "https://mcp.example/a/", true)]
    #[case("https://mcp.example/a/b?x=..", "https://mcp.example/a/", true)]
    #[case("https://mcp.example/a", "https://mcp.example/a/", false)]
    #[case("https://mcp.example/a/../b", "https://mcp.example/a/", false)]
    #[case("https://mcp.example/a/%2E./b", "https://mcp.example/a/", false)]
    #[case("https://mcp.example/a/..%2fb", "https://mcp.example/a/", false)]
    #[case("https://mcp.example.org/a/", "https://mcp.example/", false)]
    fn an_address_is_under_its_prefix_or_not(#[case] url: &str, #[case] prefix: &str, #[case] expected: bool) {
        assert_eq!(is_under(url, prefix), expected);
    }
}
