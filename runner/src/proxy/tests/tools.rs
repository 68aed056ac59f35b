//! MCP servers through the proxy, without a CLI.

use std::collections::BTreeMap;

use ::tests::mcp::McpServer as Mock;
use protocol::spec::{McpCredential, McpServer};

use super::*;
use crate::{address::Allowed, proxy::mcp::Around};

struct Tools {
    mock: Mock,
    proxy: Proxy,
    folder: tempfile::TempDir,
}

impl Tools {
    async fn new(path: &str) -> Self {
        let mock = Mock::start("Bearer fake-credential-1").await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("far"), "Bearer fake-credential-1").unwrap();
        let base = format!("https://localhost:{}/team", mock.address.port());
        let server = McpServer::Http {
            url: format!("{base}/{path}"),
            headers: BTreeMap::new(),
            credential: Some(McpCredential {
                name: "far".into(),
                header: "Authorization".into(),
                url_prefix: base,
            }),
        };
        let vault = crate::redact::Vault::default();
        let around = Around {
            allowed: Allowed::new(&["127.0.0.1".to_owned(), "::1".to_owned()]),
            authorities: Some(mock.ca.clone().into_bytes()),
            credentials: folder.path().to_owned(),
            vault: vault.clone(),
        };
        let config = ProxyConfig {
            upstream: Upstream {
                base_url: "http://127.0.0.1:1".into(),
                credential: Credential::ApiKey(KEY.into()),
                vertex: None,
                authorities: None,
            },
            token: TOKEN.into(),
            prices: Prices::default(),
            mcp: Servers::new(&[("far".to_owned(), server)].into(), &around).unwrap(),
        };
        let proxy = Proxy::start(config, mpsc::channel(1).0).await.unwrap();
        Self { mock, proxy, folder }
    }

    fn client() -> reqwest::Client {
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]);
        client.build().unwrap()
    }

    fn ask(&self, name: &str, token: &str) -> reqwest::RequestBuilder {
        let call = serde_json::json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": { "arguments": { "text": "hi" } } });
        Self::client()
            .post(format!("http://{}/mcp/{name}", self.proxy.addr()))
            .header("x-api-key", token)
            .timeout(DEADLINE)
            .body(call.to_string())
    }
}

#[tokio::test]
async fn an_answer_comes_piece_by_piece_as_the_server_sends_it() {
    let tools = Tools::new("mcp").await;
    tools.mock.go_on(false);
    let mut answer = tools.ask("far", TOKEN).send().await.unwrap();
    assert_eq!(answer.headers()["mcp-session-id"], ::tests::mcp::SESSION);
    assert_eq!(answer.chunk().await.unwrap().unwrap(), ": first\n\n");
    tools.mock.go_on(true);
    let rest = answer.text().await.unwrap();
    assert!(rest.contains("hi, says Bearer [redacted]"), "{rest}");
}

#[tokio::test]
async fn a_credential_that_was_changed_counts_at_the_next_request_and_a_refusal_says_nothing_of_the_model() {
    let tools = Tools::new("mcp").await;
    tools.mock.rotate("Bearer fake-credential-2");
    let refused = tools.ask("far", TOKEN).send().await.unwrap();
    assert_eq!(refused.status(), 401);
    // The CLI would begin to look for a credential of its own.
    assert!(!refused.headers().contains_key("www-authenticate"));
    std::fs::write(tools.folder.path().join("far"), "Bearer fake-credential-2").unwrap();
    assert_eq!(tools.ask("far", TOKEN).send().await.unwrap().status(), 200);
    assert!(!tools.proxy.witness().credential_refused);
}

#[rstest]
#[case::another_token("far", "wrong", 401)]
#[case::unknown("near", TOKEN, 404)]
#[case::another_path("far/../../v1/messages", TOKEN, 404)]
#[case::below("far/admin", TOKEN, 404)]
#[tokio::test]
async fn only_the_servers_of_the_session_are_reached(#[case] name: &str, #[case] token: &str, #[case] status: u16) {
    let tools = Tools::new("mcp").await;
    // By hand: a client would tidy the path up.
    let address = tools.proxy.addr();
    let text = format!(
        "POST /mcp/{name} HTTP/1.1\r\nhost: {address}\r\nx-api-key: {token}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    );
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, text.as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer)
        .await
        .unwrap();
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    assert!(tools.mock.asked().is_empty());
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let tools = Tools::new("elsewhere").await;
    let answer = tools.ask("far", TOKEN).send().await.unwrap();
    assert_eq!(answer.status(), 502);
    assert_eq!(tools.mock.asked().len(), 1);
}

/// The CLI asks each server for its news with a request that has no body, and that a server may let wait.
#[tokio::test]
async fn requests_that_wait_for_an_answer_and_have_no_body_take_no_room_from_others() {
    const WAITING: usize = 8;
    let tools = Tools::new("silent").await;
    let url = format!("http://{}/mcp/far", tools.proxy.addr());
    let _waiting: Vec<_> = (0..WAITING)
        .map(|_| {
            let asked = Tools::client().get(&url).header("x-api-key", TOKEN).send();
            tokio::spawn(asked)
        })
        .collect();
    let all = async {
        while tools.mock.asked().len() < WAITING {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, all)
        .await
        .expect("all of them are asked");
    let call = Tools::client().post(format!("http://{}/v1/messages", tools.proxy.addr()));
    let call = call.header("x-api-key", TOKEN).timeout(DEADLINE).body("{}");
    assert_eq!(call.send().await.unwrap().status(), 502, "the model API is asked");
}

#[tokio::test]
async fn an_answer_that_never_ends_ends_with_the_session() {
    let tools = Tools::new("mcp").await;
    tools.mock.go_on(false);
    let mut answer = tools.ask("far", TOKEN).send().await.unwrap();
    answer.chunk().await.unwrap();
    tools.proxy.cut();
    let ended = tokio::time::timeout(DEADLINE, answer.chunk()).await.expect("it ends");
    assert!(!matches!(ended, Ok(Some(_))));
}
