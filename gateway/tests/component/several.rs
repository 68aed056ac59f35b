//! Several gateways on one PostgreSQL that is away, that becomes an older one, and what they count together.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use gateway::store::{EventLog as _, PageSize, postgres::PostgresLog};
use protocol::{
    Kind,
    frame::{GatewayFrame, Hello, Welcome, close},
};
use serde_json::{Value, json};
use xtask::postgres::Postgres;

use crate::{
    replicas::cluster,
    support::{
        cluster::Cluster,
        postgres::{database, server},
        process::Process,
        record, records,
        runner::{Runner, hello},
        soon,
        sse::{Events, http},
    },
};

/// Comes again until it is welcome, as a runner does. How often it was closed as one that another took the place of.
async fn comes(address: SocketAddr, hello: &Hello, refused: &mut usize) -> (Runner, Welcome) {
    let coming = async {
        loop {
            if let Ok(mut runner) = Runner::try_open(address, "s", Some("t1")).await {
                runner.hello(hello).await;
                match runner.next().await {
                    Ok(GatewayFrame::Welcome(welcome)) => return (runner, welcome),
                    Err(Some(close::SUPERSEDED)) => *refused += 1,
                    _ => {}
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    Box::pin(soon("a welcome", coming)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_put_back_under_running_gateways_gets_again_what_it_has_not_and_nothing_that_differs() {
    let cluster = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    let database = database();
    let (here, there) = tokio::join!(
        Process::start_on(&cluster, folder.path(), &database),
        Process::start_on(&cluster, folder.path(), &database)
    );
    let greeting = hello("s", "u", "p1");
    let (mut runner, _) = Runner::admitted(there.address, &greeting, "t1").await;
    runner.deliver(&records(1, 10)).await;
    let copy = server().copy(&database).unwrap();
    // More admissions than the copy knows of, at both.
    let mut refused = 0;
    for address in [there.address, there.address, here.address, there.address] {
        (runner, _) = comes(address, &greeting, &mut refused).await;
    }
    assert_eq!(runner.deliver(&records(11, 20)).await, 20);
    assert_eq!(send(here.address, "m1").await, 202);
    assert!(matches!(runner.frame().await, GatewayFrame::UserMessage(command) if command.id == "m1"));

    server().put_back(&copy, &database).unwrap();
    // One that has not noticed, and writes nothing, is no writer of the older log.
    assert_eq!(
        soon("the end of the connection", runner.closed()).await,
        close::SUPERSEDED
    );
    let mut client = soon("a client that has had more", async {
        loop {
            if let Ok(client) = Events::at(here.address, "s", "token", Some("u/15")).await {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    client.wait("phase").await;
    refused = 0;
    let (mut runner, welcome) = comes(there.address, &greeting, &mut refused).await;
    assert_eq!(welcome.acked_seq, 10, "it hears what the older log has");
    runner.send(&[record(9, Kind::Cli, "other")]).await;
    assert!(matches!(runner.frame().await, GatewayFrame::Conflict(conflict) if conflict.seq == 9));
    assert!(matches!(runner.frame().await, GatewayFrame::Ack(ack) if ack.seq == 10));
    assert_eq!(refused, 0);
    assert_eq!(runner.deliver(&records(11, 20)).await, 20);
    for seq in 16..=20 {
        assert_eq!(client.wait("cli").await.seq(), Some(seq));
    }
    // A message that was taken by the newer log and has no answer is not known: its sender sends it again, under its id.
    assert_eq!(send(here.address, "m1").await, 202);
    assert!(matches!(runner.frame().await, GatewayFrame::UserMessage(command) if command.id == "m1"));
    // At the other, which knows as little of the older log.
    let (mut runner, welcome) = comes(here.address, &greeting, &mut refused).await;
    assert_eq!((welcome.acked_seq, refused), (20, 0));
    assert!(matches!(runner.frame().await, GatewayFrame::UserMessage(command) if command.id == "m1"));
    assert_eq!(runner.deliver(&records(21, 21)).await, 21);

    let log = PostgresLog::open(&database.as_str().into(), None).await.unwrap();
    let page = PageSize {
        records: 100,
        bytes: 1 << 20,
    };
    let stored = log.read("u", 0, page).await.unwrap();
    let stored: Vec<_> = stored.iter().map(|record| record.whole().unwrap().to_vec()).collect();
    let expected: Vec<_> = records(1, 21).into_iter().map(String::into_bytes).collect();
    assert!(stored == expected);
    let said = [&here, &there].map(|process| process.log.lock().unwrap().contains("a copy was put back"));
    assert!(said.contains(&true), "the log of the gateways says so");
}

async fn send(address: SocketAddr, id: &str) -> u16 {
    let request = http()
        .post(format!(
            "http://{address}/api/projects/team-a/agentic-sessions/s/messages"
        ))
        .bearer_auth("token")
        .json(&json!({"id": id, "text": "hello"}));
    soon("the answer", request.send()).await.unwrap().status().as_u16()
}

async fn health(port: u16, path: &str) -> Option<u16> {
    let answer = http().get(format!("http://127.0.0.1:{port}{path}")).send().await.ok()?;
    Some(answer.status().as_u16())
}

async fn becomes(port: u16, live: u16, health_: u16) {
    let becoming = async {
        while (health(port, "/live").await, health(port, "/health").await) != (Some(live), Some(health_)) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon(&format!("/live {live}, /health {health_}"), becoming).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_lives_while_its_database_is_away_and_is_ready_when_it_is_back() {
    let own = tokio::task::spawn_blocking(Postgres::start).await.unwrap().unwrap();
    let database = own.database().unwrap();
    let cluster = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    own.kill().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let arguments = [
        format!("--listen=127.0.0.1:{port}"),
        format!("--database-url={database}"),
    ];
    let starting = Process::start_with(&[], &cluster, folder.path(), &arguments);
    let mut starting = std::pin::pin!(starting);
    tokio::select! {
        _ = &mut starting => panic!("there is no database"),
        () = becomes(port, 200, 503) => {}
    }
    own.resume().unwrap();
    let _process = soon("the gateway", starting).await;
    becomes(port, 200, 200).await;
    own.kill().unwrap();
    becomes(port, 200, 503).await;
    own.resume().unwrap();
    becomes(port, 200, 200).await;
}

/// Two gateways with the task API on one database.
async fn two_for_tasks(cluster: &Cluster, most: usize) -> [Process; 2] {
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        format!("--database-url={}", database()),
        "--compat-api=tasks".to_owned(),
        "--compat-namespace=team-a".to_owned(),
        "--auth-enabled=false".to_owned(),
        "--rate-limit-enabled=false".to_owned(),
        format!("--session-max-concurrent={most}"),
    ];
    let (first, second) = tokio::join!(
        Process::start_with(&[], cluster, folder.path(), &arguments),
        Process::start_with(&[], cluster, folder.path(), &arguments)
    );
    [first, second]
}

/// Submits so many tasks at once, by turns, while creates take a second; how often each status was answered.
async fn at_once(
    cluster: &Cluster,
    processes: &[Process; 2],
    tasks: impl Iterator<Item = Value>,
) -> BTreeMap<u16, usize> {
    tokio::spawn({
        let cluster = cluster.clone();
        async move {
            cluster.creates_are_held(1).await;
            // Time for the other gateway to do the same, if it does not wait.
            tokio::time::sleep(Duration::from_secs(1)).await;
            cluster.release_creates();
        }
    });
    let requests = tasks.enumerate().map(|(n, task)| {
        let url = format!("http://{}/api/v1/tasks", processes[n % 2].address);
        async move { http().post(url).json(&task).send().await.unwrap().status().as_u16() }
    });
    let mut codes = BTreeMap::new();
    for code in soon("all answers", futures::future::join_all(requests)).await {
        *codes.entry(code).or_default() += 1;
    }
    codes
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_gateways_are_asked_at_once_there_are_no_more_sessions_than_allowed() {
    let cluster = Cluster::start().await;
    let processes = two_for_tasks(&cluster, 5).await;
    cluster.hold_creates("team-a");
    let tasks = (0..20).map(|n| json!({"task_id": format!("t{n}"), "prompt": "p"}));
    let codes = at_once(&cluster, &processes, tasks).await;
    assert_eq!(codes, BTreeMap::from([(200, 5), (503, 15)]));
    assert_eq!(cluster.sessions("team-a").len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_gateways_are_asked_at_once_a_workspace_has_one_session() {
    let cluster = Cluster::start().await;
    let processes = two_for_tasks(&cluster, 10).await;
    let tasks = (0..10).map(
        |n| json!({"task_id": format!("t{n}"), "prompt": "p", "workspace": "/w", "session": {"reuse_existing": true}}),
    );
    cluster.hold_creates("team-a");
    let codes = at_once(&cluster, &processes, tasks).await;
    assert_eq!(codes, BTreeMap::from([(200, 1), (409, 9)]));
    assert_eq!(cluster.sessions("team-a").len(), 1);
}
