use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use gateway::{Gateway, origin::Origins, server, store::memory::MemoryLog, tls::Certificate};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

use crate::support::{
    Served,
    cluster::Cluster,
    records,
    runner::{Runner, hello},
    soon,
    sse::http,
};

#[tokio::test]
async fn a_client_that_never_ends_its_headers_is_cut_off() {
    let served = Served::new().await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nx-slow: ")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // Reset or closed: either way it is over.
    let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
}

/// A new certificate for this machine, in the two files; the certificate itself.
fn certificate(folder: &Path) -> rcgen::CertifiedKey<rcgen::KeyPair> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.join("tls.crt"), made.cert.pem()).unwrap();
    std::fs::write(folder.join("tls.key"), made.signing_key.serialize_pem()).unwrap();
    made
}

async fn health_over_tls(address: SocketAddr, trusted: &rcgen::CertifiedKey<rcgen::KeyPair>) -> reqwest::Result<u16> {
    let root = reqwest::Certificate::from_pem(trusted.cert.pem().as_bytes()).unwrap();
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([root])
        .resolve("localhost", address)
        .build()
        .unwrap();
    let answer = client
        .get(format!("https://localhost:{}/health", address.port()))
        .send()
        .await?;
    Ok(answer.status().as_u16())
}

#[tokio::test]
async fn a_renewed_certificate_is_served_and_a_broken_one_is_not() {
    let served = Served::new().await;
    let folder = tempfile::tempdir().unwrap();
    let first = certificate(folder.path());
    let certificates = Certificate::load(&folder.path().join("tls.crt"), &folder.path().join("tls.key")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(server::serve_tls(
        listener,
        certificates.acceptor(),
        gateway::router(served.gateway.clone()),
        10,
        served.gateway.shutdown.clone(),
        served.gateway.tasks.clone(),
    ));
    assert_eq!(health_over_tls(address, &first).await.unwrap(), 200);

    let second = certificate(folder.path());
    certificates.reload().unwrap();
    assert_eq!(health_over_tls(address, &second).await.unwrap(), 200);
    assert!(health_over_tls(address, &first).await.is_err());

    // Half a pair, as between the two writes of a renewal.
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.path().join("tls.key"), other.signing_key.serialize_pem()).unwrap();
    assert!(certificates.reload().is_err());
    assert_eq!(health_over_tls(address, &second).await.unwrap(), 200);
}

async fn upgrade(address: SocketAddr, origin: Option<&str>) -> u16 {
    let mut request = http()
        .get(format!("http://{address}/api/projects/team-a/sessions/s/ws"))
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    if let Some(origin) = origin {
        request = request.header("origin", origin);
    }
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn only_pages_of_allowed_origins_open_websockets_and_read_answers() {
    let cluster = Cluster::start().await;
    let gateway = Gateway::new(
        cluster.client(),
        Arc::new(MemoryLog::default()),
        CancellationToken::new(),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let origins = Origins::new(["https://console.example.com".parse().unwrap()]);
    let router = gateway::router_for(gateway.clone(), &origins);
    tokio::spawn(server::serve(
        listener,
        router,
        50,
        gateway.shutdown.clone(),
        gateway.tasks.clone(),
    ));

    assert_eq!(upgrade(address, None).await, 101);
    assert_eq!(upgrade(address, Some("https://console.example.com")).await, 101);
    assert_eq!(
        upgrade(address, Some(&format!("http://{address}"))).await,
        101,
        "the gateway's own pages"
    );
    for other in [
        "https://evil.example.com",
        "https://console.example.com.evil.example",
        "null",
        "http://console.example.com",
    ] {
        assert_eq!(upgrade(address, Some(other)).await, 403, "{other}");
    }

    let asked = |origin: &str| {
        http()
            .request(
                http::Method::OPTIONS,
                format!("http://{address}/api/projects/team-a/agentic-sessions"),
            )
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .send()
    };
    let leave = asked("https://console.example.com").await.unwrap();
    assert_eq!(
        leave.headers()["access-control-allow-origin"],
        "https://console.example.com"
    );
    assert!(!leave.headers().contains_key("access-control-allow-credentials"));
    let none = asked("https://evil.example.com").await.unwrap();
    assert!(!none.headers().contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn health_says_when_the_api_server_is_away_and_stays_healthy() {
    for (down, expected) in [(false, "reachable"), (true, "unreachable")] {
        let served = Served::new().await;
        if down {
            served.cluster.break_down();
        }
        let answer = http().get(served.url("/health")).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let health: serde_json::Value = answer.json().await.unwrap();
        assert_eq!(
            (health["status"].as_str(), health["cluster"].as_str()),
            (Some("healthy"), Some(expected))
        );
    }
}

#[tokio::test]
async fn headers_without_end_are_refused() {
    let served = Served::new().await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let mut request = b"GET /health HTTP/1.1\r\nhost: a\r\nx-long: ".to_vec();
    request.resize(1 << 20, b'x');
    // The gateway may close while we still send.
    let _ = stream.write_all(&request).await;
    let mut answer = Vec::new();
    let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test]
async fn a_runner_takes_a_place_among_the_connections_as_long_as_it_is_connected() {
    let cluster = Cluster::start().await;
    cluster.running("s", "u", "p1");
    cluster.runner("t1", Some("p1"));
    let log = Arc::new(MemoryLog::default());
    let gateway = Gateway::new(cluster.client(), log, CancellationToken::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = gateway::router(gateway.clone());
    tokio::spawn(server::serve(
        listener,
        router,
        1,
        gateway.shutdown.clone(),
        gateway.tasks.clone(),
    ));

    let (mut runner, _) = Runner::admitted(address, &hello("s", "u", "p1"), "t1").await;
    let left = Arc::new(AtomicBool::new(false));
    let health = tokio::spawn({
        let left = left.clone();
        async move {
            let response = http().get(format!("http://{address}/health")).send().await.unwrap();
            assert!(left.load(Ordering::SeqCst), "answered while the only place was taken");
            response.status()
        }
    });
    for seq in 1..=50 {
        runner.deliver(&records(seq, seq)).await;
    }
    left.store(true, Ordering::SeqCst);
    drop(runner);
    assert_eq!(soon("the answer", health).await.unwrap(), 200);
}
