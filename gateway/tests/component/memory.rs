//! What a client can make the gateway hold in memory. The chart gives it 512 MiB.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use protocol::{Kind, frame::GatewayFrame};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
};

use crate::{
    support::{
        cluster::Cluster,
        process::Process,
        record, records,
        runner::{Runner, hello},
        soon,
        sse::{Events, http},
    },
    tasks::{answered, ask, running, user},
    workspace::answer,
};

/// Most memory that the process ever had, MiB.
fn peak(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().split(' ').next().unwrap().parse::<u64>().unwrap() / 1024
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Answered once whatever was sent before it on other connections had its chance.
fn health(address: SocketAddr) {
    let mut stream = connect(address);
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

const UPGRADE: &str = "GET /api/projects/team-a/sessions/s/ws HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// As much of a frame of 70 MiB as is taken.
fn long_frame(stream: &mut TcpStream) {
    let mut header = vec![0x81, 0x80 | 127];
    header.extend((70_u64 << 20).to_be_bytes());
    header.extend([0; 4]);
    let part = vec![b'a'; 1 << 20];
    let _ = stream.write_all(&header);
    for _ in 0..69 {
        if stream.write_all(&part).is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_of_somebody_without_a_token_is_not_kept() {
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(&cluster, folder.path()).await;
    let (address, before) = (process.address, peak(&process));
    let senders = (0..12).map(|_| {
        std::thread::spawn(move || {
            let mut stream = connect(address);
            write!(stream, "{UPGRADE}\r\n").unwrap();
            let _ = stream.read(&mut [0; 1024]);
            long_frame(&mut stream);
        })
    });
    for sender in senders.collect::<Vec<_>>() {
        sender.join().unwrap();
    }
    health(address);
    let after = peak(&process);
    eprintln!("12 refused senders of 70 MiB: peak {before} -> {after} MiB");
    assert!(after < before + 24, "{before} -> {after} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_somebody_without_a_token_are_not_read() {
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(&cluster, folder.path()).await;
    let (address, before) = (process.address, peak(&process));
    let body = vec![b' '; (4 << 20) - 10];
    let mut held = Vec::new();
    for _ in 0..50 {
        let mut stream = connect(address);
        let length = 4 << 20;
        write!(
            stream,
            "POST /api/projects/a/agentic-sessions HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
        )
        .unwrap();
        let _ = stream.write_all(&body);
        held.push(stream);
    }
    health(address);
    let after = peak(&process);
    eprintln!("50 refused bodies of 4 MiB: peak {before} -> {after} MiB");
    assert!(after < before + 24, "{before} -> {after} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn long_records_of_many_sessions_wait_for_their_turn_and_readers_take_them_in_pieces() {
    const SESSIONS: usize = 4;
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(&cluster, folder.path()).await;
    let before = peak(&process);
    let text = "x".repeat(62 << 20);
    let deliveries = (0..SESSIONS).map(|n| {
        let (session, uid, pod, token) = (format!("s{n}"), format!("u{n}"), format!("p{n}"), format!("t{n}"));
        cluster.running(&session, &uid, &pod);
        cluster.runner(&token, Some(&pod));
        let (address, text) = (process.address, text.clone());
        tokio::spawn(async move {
            let (mut runner, _) = Runner::admitted(address, &hello(&session, &uid, &pod), &token).await;
            assert_eq!(runner.deliver(&[record(1, Kind::Cli, &text)]).await, 1);
        })
    });
    for delivery in deliveries.collect::<Vec<_>>() {
        Box::pin(tokio::time::timeout(Duration::from_mins(2), delivery))
            .await
            .unwrap()
            .unwrap();
    }
    let stored = peak(&process);

    cluster.caller("token", "ann");
    cluster.allow("ann", &["get"], "team-a");
    let mut readers = Vec::new();
    for n in 0..24 {
        let mut stream = connect(process.address);
        let session = n % SESSIONS;
        write!(stream, "GET /api/projects/team-a/agentic-sessions/s{session}/events HTTP/1.1\r\nhost: a\r\nauthorization: Bearer token\r\n\r\n").unwrap();
        readers.push(stream);
    }
    // One reads all of it, the others nothing.
    let mut reader = readers.pop().unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let (mut read, mut buffer) = (0, vec![0; 1 << 20]);
        while read < 62 << 20 {
            let count = reader.read(&mut buffer).unwrap();
            assert!(count > 0, "the stream ended after {read} bytes");
            read += count;
        }
    });
    Box::pin(tokio::time::timeout(Duration::from_mins(2), read))
        .await
        .expect("the long record arrives")
        .unwrap();
    let after = peak(&process);
    eprintln!("{SESSIONS} records of 62 MiB at once: peak {before} -> {stored} MiB, with 24 readers {after} MiB");
    assert!(after < 256, "{before} -> {stored} -> {after} MiB");
}

/// `GATEWAY_IDLE_SOCKETS=10000` for the long run.
fn idle_sockets() -> u64 {
    std::env::var("GATEWAY_IDLE_SOCKETS").map_or(1_500, |count| count.parse().unwrap())
}

/// `GATEWAY_STALLED_READERS=10000` for the long run.
fn stalled_readers() -> u64 {
    std::env::var("GATEWAY_STALLED_READERS").map_or(400, |count| count.parse().unwrap())
}

fn allow_sockets(count: u64) {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit
        .maximum
        .or(Some(count + 500))
        .map(|most| most.min(count + 500).max(limit.current.unwrap_or(0)));
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

/// Asks for something, reads the first byte of the answer and no more.
async fn stalled(address: SocketAddr, path: &str) -> tokio::net::TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let request = format!(
        "GET /api/projects/team-a/agentic-sessions/{path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer token\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let _ = stream.read_u8().await;
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_do_not_read_hold_little_and_keep_nobody_from_reading() {
    const SESSIONS: usize = 6;
    const RECORDS: u64 = 4_000;
    let count = stalled_readers();
    allow_sockets(count);
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(&cluster, folder.path()).await;
    for (token, name) in [("token", "ann"), ("other", "bob")] {
        cluster.caller(token, name);
        cluster.allow(name, &["get", "list"], "team-a");
    }
    let text = "x".repeat(400);
    for n in 0..SESSIONS {
        let (session, uid, pod, token) = (format!("s{n}"), format!("u{n}"), format!("p{n}"), format!("t{n}"));
        cluster.running(&session, &uid, &pod);
        cluster.runner(&token, Some(&pod));
        let (mut runner, _) = Runner::admitted(process.address, &hello(&session, &uid, &pod), &token).await;
        for first in (1..=RECORDS).step_by(1000) {
            let sent: Vec<_> = (first..first + 1000).map(|seq| record(seq, Kind::Cli, &text)).collect();
            assert_eq!(runner.deliver(&sent).await, first + 999);
        }
        // It gives out its files, to whoever takes them.
        tokio::spawn(async move {
            let files = BTreeMap::from([("file".to_owned(), vec![b'x'; 4 << 20])]);
            while let Ok(frame) = runner.next().await {
                if let GatewayFrame::FileRequest(request) = frame {
                    answer(&mut runner, &files, request).await;
                }
            }
        });
    }
    let before = peak(&process);
    let mut readers = Vec::new();
    for n in 0..count {
        let session = n as usize % SESSIONS;
        let what = match n % 4 {
            // As many downloads as a session may have at once.
            0 if n < 4 * 30 * SESSIONS as u64 => "workspace/file",
            1 => "transcript",
            2 => "messages?limit=1000",
            _ => "events",
        };
        readers.push(stalled(process.address, &format!("s{session}/{what}")).await);
    }
    // Whoever reads gets all of it, a stalled reader's own next stream too.
    for token in ["token", "other"] {
        let mut events = Events::at(process.address, "s0", token, None).await.unwrap();
        let mut last = 0;
        while last < RECORDS {
            last = events.wait("cli").await.seq().unwrap();
        }
        let url = format!(
            "http://{}/api/projects/team-a/agentic-sessions/s1/workspace/file",
            process.address
        );
        let file = http().get(url).bearer_auth(token).send().await.unwrap().bytes();
        assert_eq!(soon("the file", file).await.unwrap().len(), 4 << 20);
    }
    let mut other = Runner::admitted(process.address, &hello("s0", "u0", "p0"), "t0")
        .await
        .0;
    assert_eq!(other.deliver(&records(RECORDS + 1, RECORDS + 2)).await, RECORDS + 2);
    let after = peak(&process);
    eprintln!("{count} readers that do not read: peak {before} -> {after} MiB");
    assert!(after < before + 80 + count / 20, "{before} -> {after} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_say_little_or_nothing_cost_little_and_are_closed() {
    let count = idle_sockets();
    allow_sockets(count);
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(&cluster, folder.path()).await;
    let before = peak(&process);
    let mut sockets = Vec::new();
    for number in 0..count {
        let mut stream = tokio::net::TcpStream::connect(process.address).await.unwrap();
        if number % 2 == 0 {
            // Half of them as far as headers can go without an end.
            let mut headers = b"GET /health HTTP/1.1\r\nhost: a\r\nx-slow: ".to_vec();
            headers.resize(12 << 10, b'x');
            tokio::io::AsyncWriteExt::write_all(&mut stream, &headers)
                .await
                .unwrap();
        }
        sockets.push(stream);
    }
    let closed = async {
        for stream in &mut sockets {
            let mut answer = Vec::new();
            let _ = tokio::io::AsyncReadExt::read_to_end(stream, &mut answer).await;
        }
    };
    Box::pin(tokio::time::timeout(Duration::from_mins(1), closed))
        .await
        .expect("all sockets are closed");
    let address = process.address;
    tokio::task::spawn_blocking(move || health(address)).await.unwrap();
    let after = peak(&process);
    eprintln!("{count} sockets: peak {before} -> {after} MiB, all closed by the gateway");
    assert!(after < before + 8 + count / 25, "{before} -> {after} MiB");
}

/// One line of the CLI with as many small values as fit, which any process of an agent could write.
fn many_values() -> String {
    let values = "{\"\":0},".repeat(999_999) + "{}";
    let line = format!(r#"{{"type":"assistant","message":{{"id":"x","model":"m","content":[{values}]}}}}"#);
    format!(r#"{{"seq":2,"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05Z","kind":"cli","body":{line}}}"#)
}

#[rstest]
#[case("/api/v1/tasks", json!({"prompt": "p", "task_id": "t"}))]
#[case("/claude-code", json!({"prompt": "p", "verbose": true, "stream": false}))]
#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_many_values_takes_little_more_than_its_length(#[case] path: &str, #[case] asked: Value) {
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        "--compat-api=tasks,claude-code",
        "--compat-namespace=team-a",
        "--auth-enabled=false",
    ];
    let process = Process::start_with(&[], &cluster, folder.path(), &arguments.map(str::to_owned)).await;
    let (address, path) = (process.address, path.to_owned());
    let answer = tokio::spawn(async move { ask(address, "POST", &path, Some(&asked)).await });
    let name = soon("the session", async {
        loop {
            if let Some((name, _)) = cluster.sessions("team-a").into_iter().next() {
                return name;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    cluster.runner("t1", Some("p1"));
    cluster.set_status("team-a", &name, &running());
    let hello = hello(&name, &format!("uid-of-{name}"), "p1");
    let (mut runner, _) = Runner::admitted(address, &hello, "t1").await;
    let before = peak(&process);
    assert_eq!(runner.deliver(&[user(1, 1, "prompt"), many_values()]).await, 2);
    let [answered, ended] = answered(3, 1, "42");
    runner.send(&[answered, ended]).await;
    if answer.await.unwrap().1["task_id"] == "t" {
        soon("the task's end", async {
            while ask(address, "GET", "/api/v1/tasks/t", None).await.1["result"] != "42" {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    let after = peak(&process);
    eprintln!("a line of 1,000,000 values: peak {before} -> {after} MiB");
    assert!(after < before + 100, "{before} -> {after} MiB");
}
