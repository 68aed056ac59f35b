use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use gateway::{Gateway, server, store::memory::MemoryLog};
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
