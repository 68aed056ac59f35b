//! MCP servers that are reached by http: each at one address of the author's, with the admin's credential, which the agent
//! never sees.

mod pass;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use protocol::{
    names::path,
    spec::{McpCredential, McpServer},
};
use reqwest::{Certificate, Client, Url};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    answer::{self, Body},
    client,
};
use crate::{
    address::{AddressError, Allowed},
    redact::Vault,
    secrets,
};

/// What the agent may say to a server: all else could speak in our name, or of another host.
const FROM_THE_AGENT: [&str; 5] = [
    "accept",
    "content-type",
    "last-event-id",
    "mcp-protocol-version",
    "mcp-session-id",
];

/// Why a server cannot be used as the session names it.
#[derive(Debug, thiserror::Error)]
pub enum McpError {
    /// Its address is none.
    #[error(
        "the URL of the MCP server {name:?} must be https, with a host and without a password, such as https://mcp.example/mcp"
    )]
    Url {
        /// The server.
        name: String,
    },
    /// The credential is for other addresses.
    #[error(
        "the URL of the MCP server {name:?} is not under {prefix:?}, for which the administrator gave the credential {credential:?}"
    )]
    Prefix {
        /// The server.
        name: String,
        /// What the URL must begin with.
        prefix: String,
        /// The credential.
        credential: String,
    },
    /// A header cannot be sent.
    #[error("the MCP server {name:?} has a header {header:?} that cannot be sent")]
    Header {
        /// The server.
        name: String,
        /// The header.
        header: String,
    },
}

/// The servers of a session, by name.
#[derive(Default)]
pub struct Servers(BTreeMap<String, Arc<Server>>);

/// What the servers have in common.
#[derive(Clone, Default)]
pub struct Around {
    /// Private addresses that may be reached.
    pub allowed: Allowed,
    /// Certificates of authorities beside the public ones, PEM.
    pub authorities: Option<Vec<u8>>,
    /// Folder with the values of the admin's credentials.
    pub credentials: PathBuf,
    /// Told of each value before it is used.
    pub vault: Vault,
}

impl Around {
    /// Where a pod has the credentials.
    pub fn in_pod(allowed: Allowed, authorities: Option<Vec<u8>>, vault: Vault) -> Self {
        Self {
            allowed,
            authorities,
            credentials: path::MCP_CREDENTIALS.into(),
            vault,
        }
    }
}

/// One server.
pub struct Server {
    name: String,
    url: Url,
    headers: HeaderMap,
    /// Header, and file with its value.
    credential: Option<(HeaderName, PathBuf)>,
    around: Around,
    /// Made with the first call: from then on the addresses are pinned.
    client: Mutex<Option<Client>>,
}

impl Servers {
    /// Those that are reached by http.
    pub fn new(servers: &BTreeMap<String, McpServer>, around: &Around) -> Result<Self, McpError> {
        let mut known = BTreeMap::new();
        for (name, server) in servers {
            if let McpServer::Http {
                url,
                headers,
                credential,
            } = server
            {
                let server = Server::new(name, url, headers, credential.as_ref(), around)?;
                known.insert(name.clone(), Arc::new(server));
            }
        }
        Ok(Self(known))
    }

    /// The server of this name.
    pub fn get(&self, name: &str) -> Option<Arc<Server>> {
        self.0.get(name).map(Arc::clone)
    }
}

impl Server {
    fn new(
        name: &str,
        url: &str,
        headers: &BTreeMap<String, String>,
        credential: Option<&McpCredential>,
        around: &Around,
    ) -> Result<Self, McpError> {
        let named = || name.to_owned();
        let url = Url::parse(url).map_err(|_| McpError::Url { name: named() })?;
        let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        if url.scheme() != "https" || !url.has_host() || !plain {
            return Err(McpError::Url { name: named() });
        }
        if let Some(McpCredential {
            name: credential,
            url_prefix,
            ..
        }) = credential
            && !is_under(&url, url_prefix)
        {
            return Err(McpError::Prefix {
                name: named(),
                prefix: url_prefix.clone(),
                credential: credential.clone(),
            });
        }
        let bad = |header: &str| McpError::Header {
            name: named(),
            header: header.to_owned(),
        };
        let mut sent = HeaderMap::new();
        for (header, value) in headers {
            let (Ok(key), Ok(value)) = (HeaderName::try_from(header), HeaderValue::try_from(value)) else {
                return Err(bad(header));
            };
            if matches!(
                key,
                header::HOST | header::CONTENT_LENGTH | header::TRANSFER_ENCODING | header::CONNECTION
            ) {
                return Err(bad(header));
            }
            sent.insert(key, value);
        }
        let credential = credential
            .map(|credential| {
                let header = HeaderName::try_from(&credential.header).map_err(|_| bad(&credential.header))?;
                Ok((header, around.credentials.join(&credential.name)))
            })
            .transpose()?;
        Ok(Self {
            name: named(),
            url,
            headers: sent,
            credential,
            around: around.clone(),
            client: Mutex::default(),
        })
    }

    /// Asks the server what the agent asks, and passes its answer on as it comes.
    pub async fn call(&self, method: &Method, from: &HeaderMap, body: Bytes, cut: CancellationToken) -> Response<Body> {
        if !matches!(*method, Method::GET | Method::POST | Method::DELETE) {
            return answer::error(StatusCode::METHOD_NOT_ALLOWED, "MCP knows GET, POST and DELETE");
        }
        let failed = |what: &str| {
            answer::error(
                StatusCode::BAD_GATEWAY,
                &format!("the MCP server {}: {what}", self.name),
            )
        };
        let client = match self.client().await {
            Ok(client) => client,
            Err(why) => return failed(&why),
        };
        let (headers, secret) = match self.headers(from) {
            Ok(headers) => headers,
            Err(why) => return failed(&why),
        };
        let request = client
            .request(method.clone(), self.url.clone())
            .headers(headers)
            .body(body);
        let Some(answered) = cut.run_until_cancelled(request.send()).await else {
            return answer::error(StatusCode::SERVICE_UNAVAILABLE, "the session is ending");
        };
        match answered {
            Err(error) => failed(if error.is_connect() {
                "it cannot be reached"
            } else {
                "it does not answer"
            }),
            Ok(response) if response.status().is_redirection() => {
                failed("it answers with a redirect, which is not followed: name the address that it leads to")
            }
            Ok(response) => pass::pass(response, secret, cut),
        }
    }

    /// A client that knows the server's addresses and no others.
    async fn client(&self) -> Result<Client, String> {
        let mut client = self.client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let (host, port) = (
            self.url.host_str().unwrap_or_default(),
            self.url.port_or_known_default().unwrap_or(443),
        );
        let addresses = self.around.allowed.resolve(host, port).await;
        let addresses = addresses.map_err(|error: AddressError| error.to_string())?;
        let mut builder = client::plain().no_proxy().resolve_to_addrs(host, &addresses);
        if let Some(pem) = &self.around.authorities {
            let certificates =
                Certificate::from_pem_bundle(pem).map_err(|_| "ca.crt of the Secrets has no certificates")?;
            builder = builder.tls_certs_merge(certificates);
        }
        let made = builder.build().map_err(|error| error.to_string())?;
        Ok(client.insert(made).clone())
    }

    /// The request's headers, and what of them the agent must not see.
    fn headers(&self, from: &HeaderMap) -> Result<(HeaderMap, Vec<u8>), String> {
        let mut headers = HeaderMap::new();
        for name in FROM_THE_AGENT.map(HeaderName::from_static) {
            if let Some(value) = from.get(&name) {
                headers.insert(name, value.clone());
            }
        }
        headers.extend(self.headers.clone());
        // What is taken out of the answer must be readable.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let Some((name, file)) = &self.credential else {
            return Ok((headers, Vec::new()));
        };
        let bytes = secrets::read(file).map_err(|_| "its credential cannot be read".to_owned())?;
        let bytes = bytes.trim_ascii();
        if let (Some(name), Ok(text)) = (
            file.file_name().and_then(|name| name.to_str()),
            std::str::from_utf8(bytes),
        ) {
            self.around.vault.learn(name, text);
        }
        let mut value =
            HeaderValue::from_bytes(bytes).map_err(|_| "its credential cannot stand in a header".to_owned())?;
        value.set_sensitive(true);
        headers.insert(name.clone(), value);
        // `Bearer token`: the token is what counts.
        let secret = bytes.rsplit(|b| *b == b' ').next().unwrap_or_default();
        Ok((headers, secret.to_vec()))
    }
}

/// Whether a URL is one that a credential was given for: the same host, and the path as far as the prefix names it.
fn is_under(url: &Url, prefix: &str) -> bool {
    let Ok(prefix) = Url::parse(prefix) else { return false };
    let parts = |url: &Url| {
        (
            url.scheme().to_owned(),
            url.host_str().map(str::to_owned),
            url.port_or_known_default(),
        )
    };
    let path = prefix.path();
    let below = url.path().strip_prefix(path).is_some_and(|rest| {
        // `/team` is not for `/teams`.
        path.ends_with('/') || rest.is_empty() || rest.starts_with('/')
    });
    // What a server may decode into other segments is not compared.
    let odd = url.path().contains('%') || url.path().contains('\\') || url.path().contains("//");
    parts(url) == parts(&prefix) && below && !odd
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("https://mcp.example/team/mcp", "https://mcp.example/team", true)]
    #[case("https://mcp.example/team/mcp", "https://mcp.example/team/", true)]
    #[case("https://mcp.example/team", "https://mcp.example/team", true)]
    #[case("https://mcp.example:443/x", "https://mcp.example/", true)]
    #[case("https://mcp.example/teams", "https://mcp.example/team", false)]
    #[case("https://mcp.example/team/../admin", "https://mcp.example/team", false)]
    #[case("https://mcp.example/team/%2e%2e/admin", "https://mcp.example/team", false)]
    #[case("https://mcp.example/team/..%2fadmin", "https://mcp.example/team", false)]
    #[case("https://mcp.example.evil.example/team", "https://mcp.example", false)]
    #[case("https://mcp.example:8443/team", "https://mcp.example/team", false)]
    #[case("https://other.example/team", "https://mcp.example/team", false)]
    fn a_credential_is_sent_only_where_it_was_given_for(#[case] url: &str, #[case] prefix: &str, #[case] sent: bool) {
        assert_eq!(is_under(&Url::parse(url).unwrap(), prefix), sent);
    }

    fn servers(url: &str, header: &str) -> Result<Servers, McpError> {
        let server = McpServer::Http {
            url: url.into(),
            headers: [(header.to_owned(), "1".to_owned())].into(),
            credential: None,
        };
        Servers::new(&[("s".to_owned(), server)].into(), &Around::default())
    }

    #[rstest]
    #[case("http://mcp.example/", "x-a", false)]
    #[case("https://user:pass@mcp.example/", "x-a", false)]
    #[case("https://", "x-a", false)]
    #[case("https://mcp.example/", "host", false)]
    #[case("https://mcp.example/", "a b", false)]
    #[case("https://mcp.example/", "x-a", true)]
    fn a_server_is_https_and_says_nothing_of_the_connection(
        #[case] url: &str,
        #[case] header: &str,
        #[case] good: bool,
    ) {
        assert_eq!(servers(url, header).is_ok(), good);
    }

    #[test]
    fn the_agents_headers_are_those_of_mcp_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cred"), "Bearer fake-secret-token\n").unwrap();
        let around = Around {
            credentials: folder.path().to_owned(),
            ..Around::default()
        };
        let server = McpServer::Http {
            url: "https://mcp.example/".into(),
            headers: [("X-Team".to_owned(), "a".to_owned())].into(),
            credential: Some(McpCredential {
                name: "cred".into(),
                header: "Authorization".into(),
                url_prefix: "https://mcp.example".into(),
            }),
        };
        let servers = Servers::new(&[("s".to_owned(), server)].into(), &around).unwrap();
        let mut from = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer run-token"),
            ("x-api-key", "run-token"),
            ("host", "evil.example"),
            ("cookie", "a=b"),
            ("x-team", "b"),
            ("x-forwarded-host", "evil.example"),
            ("connection", "mcp-session-id"),
            ("transfer-encoding", "chunked"),
            ("content-length", "7"),
            ("mcp-session-id", "session"),
            ("accept", "text/event-stream"),
        ] {
            from.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let (headers, secret) = servers.get("s").unwrap().headers(&from).unwrap();
        let mut sent: Vec<_> = headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        sent.sort();
        assert_eq!(
            sent,
            [
                "accept-encoding: identity",
                "accept: text/event-stream",
                "authorization: Bearer fake-secret-token",
                "mcp-session-id: session",
                "x-team: a"
            ]
        );
        assert_eq!(secret, b"fake-secret-token");
    }
}
