//! What the CLI reaches through the proxy beside the public API: Vertex AI, MCP servers, gateways below a path.

use protocol::spec::{McpCredential, McpServer};
use protocol::{Kind, Outcome, Report};
use runner::address::Allowed;
use runner::proxy::mcp::Around;
use serde_json::{Value, json};
use tests::mcp::McpServer as Mock;
use tests::model::FAKE_KEY;

use crate::common::{Session, bash, ended, script, text};
use crate::pod::{agent_container, config, drive};

#[tokio::test]
async fn the_cli_works_on_vertex_without_a_google_credential_of_its_own() {
    let session = Session::new().await.with_key(None);
    let prompt = script("MARK", &[bash("env > seen"), text("Done.")]);
    let mut command = session.command(&prompt, &[]);
    command
        .env("VERTEX_ENABLED", "true")
        .env("VERTEX_PROJECT_ID", "our-project")
        .env("VERTEX_REGION", "us-east5")
        .env("VERTEX_USER_TOKEN", FAKE_KEY)
        .env("ANTHROPIC_VERTEX_BASE_URL", format!("{}/v1", session.model.url()));
    let ended = ended(command.spawn().unwrap()).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let requests = session.model.requests();
    let asked: Vec<_> = requests.iter().filter(|request| request.asks_for_message()).collect();
    assert_eq!(asked.len(), 2);
    let place = "/v1/projects/our-project/locations/us-east5/publishers/anthropic/models/";
    assert!(
        asked.iter().all(|request| request.path.starts_with(place)),
        "{}",
        asked[0].path
    );
    let metered: Vec<Value> = session.bodies(Kind::Usage);
    assert!(metered.iter().all(|usage| usage["costUSD"].is_string()), "{metered:?}");
    let seen = std::fs::read_to_string(session.workspace().join("seen")).unwrap();
    assert!(!seen.contains(FAKE_KEY));
}

/// A session with an MCP server that wants a credential; what the agent has to say of it is asked for.
async fn with_mcp(session: &Session, mock: &Mock, url: String, prefix: &str, allowed: &[&str]) -> Outcome {
    let call = json!({ "tools": [{ "name": "mcp__far__echo", "input": { "text": "hello" } }] });
    let mut config = config(session, &script("MARK", &[call, text("Done.")]));
    let server = McpServer::Http {
        url,
        headers: [("X-Team".to_owned(), "a".to_owned())].into(),
        credential: Some(McpCredential {
            name: "far".into(),
            header: "Authorization".into(),
            url_prefix: prefix.to_owned(),
        }),
    };
    config.options.tools.mcp_servers.insert("far".to_owned(), server);
    let credentials = session.state().join("mcp");
    std::fs::create_dir_all(&credentials).unwrap();
    std::fs::write(credentials.join("far"), "Bearer fake-mcp-credential\n").unwrap();
    let allowed: Vec<String> = allowed.iter().map(|&host| host.to_owned()).collect();
    config.mcp = Around {
        allowed: Allowed::new(&allowed),
        authorities: Some(mock.ca.clone().into_bytes()),
        credentials,
        vault: config.vault.clone(),
    };
    let mut container = agent_container(session);
    let outcome = drive(config).await;
    container.kill().await.unwrap();
    outcome
}

const CREDENTIAL: &str = "Bearer fake-mcp-credential";
const LOOPBACK: &[&str] = &["127.0.0.1", "::1"];

#[tokio::test]
async fn the_agent_uses_an_mcp_server_whose_credential_it_never_sees() {
    let (session, mock) = (Session::new().await, Mock::start(CREDENTIAL).await.unwrap());
    let prefix = format!("https://localhost:{}/team", mock.address.port());
    assert_eq!(
        with_mcp(&session, &mock, mock.url(), &prefix, LOOPBACK).await,
        Outcome::Succeeded
    );
    let asked = mock.asked();
    let call = asked
        .iter()
        .find(|asked| asked.body["method"] == "tools/call")
        .expect("the tool is called");
    assert_eq!(call.line, "POST /team/mcp");
    assert_eq!(
        (&call.headers["authorization"], &call.headers["x-team"]),
        (&CREDENTIAL.parse().unwrap(), &"a".parse().unwrap())
    );
    assert_eq!(call.headers["mcp-session-id"], tests::mcp::SESSION);
    assert!(
        !call.headers.contains_key("x-api-key"),
        "the run's token is for the proxy alone"
    );
    let lines = session.bodies(Kind::Cli);
    let said = lines
        .iter()
        .map(Value::to_string)
        .find(|line| line.contains("hello, says"))
        .expect("the tool answers");
    assert!(said.contains("hello, says Bearer [redacted]"), "{said}");
}

#[tokio::test]
async fn an_mcp_server_on_an_address_of_the_pods_own_is_not_reached() {
    let (session, mock) = (Session::new().await, Mock::start(CREDENTIAL).await.unwrap());
    let prefix = format!("https://localhost:{}/team", mock.address.port());
    // A name that is allowed does not make loopback a place to go.
    assert_eq!(
        with_mcp(&session, &mock, mock.url(), &prefix, &["localhost"]).await,
        Outcome::Succeeded
    );
    assert!(mock.asked().is_empty(), "{:?}", mock.asked());
}

#[tokio::test]
async fn a_credential_for_other_addresses_ends_the_session_before_the_first_call() {
    let (session, mock) = (Session::new().await, Mock::start(CREDENTIAL).await.unwrap());
    let outcome = with_mcp(&session, &mock, mock.url(), "https://mcp.example/", LOOPBACK).await;
    assert_eq!(outcome, Outcome::ConfigError);
    let report: Report = session.report();
    assert!(
        report.message.contains("not under \"https://mcp.example/\""),
        "{}",
        report.message
    );
    assert!(session.model.requests().is_empty() && mock.asked().is_empty());
}
