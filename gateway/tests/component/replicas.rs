//! Several gateways on one PostgreSQL: whoever is asked, whoever dies.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use gateway::store::{EventLog as _, PageSize, commands::CommandLog as _, postgres::PostgresLog};
use protocol::{
    Kind,
    frame::{GatewayFrame, close},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
};
use xtask::postgres::Postgres;

use crate::support::{
    cluster::Cluster,
    postgres::{database, say},
    process::Process,
    record, records,
    runner::{Runner, hello},
    soon,
    sse::{Events, http},
};

const SESSION: &str = "/api/projects/team-a/agentic-sessions/s";

/// One session at work, whose events a caller may read and tell it what to do.
pub async fn cluster() -> Cluster {
    let cluster = Cluster::start().await;
    cluster.interactive(
        "s",
        "u",
        &json!({"phase": "Running", "podUID": "p1", "attempt": 1, "run": 1}),
    );
    cluster.runner("t1", Some("p1"));
    cluster.caller("token", "ann");
    cluster.allow("ann", &["get", "update"], "team-a");
    cluster
}

async fn two(cluster: &Cluster, folder: &Path) -> (Process, Process) {
    let database = database();
    // At once: one of them makes the tables, the other waits.
    tokio::join!(
        Process::start_on(cluster, folder, &database),
        Process::start_on(cluster, folder, &database)
    )
}

async fn message(address: SocketAddr, id: &str) -> reqwest::Result<u16> {
    let request = http()
        .post(format!("http://{address}{SESSION}/messages"))
        .bearer_auth("token")
        .timeout(Duration::from_secs(10))
        .json(&json!({"id": id, "text": "hello"}));
    Ok(request.send().await?.status().as_u16())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_at_one_gateway_sees_and_reaches_a_runner_at_another() {
    /// By looking at the log now and then this many would take longer than anything here may.
    const ROUNDS: u64 = 20;
    let cluster = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = two(&cluster, folder.path()).await;
    let (mut runner, _) = Runner::admitted(there.address, &hello("s", "u", "p1"), "t1").await;
    let mut client = Events::at(here.address, "s", "token", None).await.unwrap();
    client.wait("phase").await;
    let rounds = async {
        for seq in 1..=ROUNDS {
            assert_eq!(runner.deliver(&records(seq, seq)).await, seq);
            assert_eq!(client.wait("cli").await.data, records(seq, seq)[0]);
            assert_eq!(message(here.address, &format!("m{seq}")).await.unwrap(), 202);
            let GatewayFrame::UserMessage(command) = runner.frame().await else {
                panic!()
            };
            assert_eq!(command.id, format!("m{seq}"));
        }
    };
    Box::pin(soon("all rounds", rounds)).await;
    runner
        .text(r#"{"delta":{"type":"text","text":"a piece"}}"#.to_owned())
        .await;
    assert!(client.wait("delta").await.data.contains("a piece"));

    // A runner that comes to the other one is the writer there, and its older connection is closed.
    let (mut again, welcome) = Runner::admitted(here.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(welcome.acked_seq, ROUNDS);
    assert_eq!(runner.closed().await, close::SUPERSEDED);
    for _ in 0..ROUNDS {
        assert!(
            matches!(again.frame().await, GatewayFrame::UserMessage(_)),
            "what has no answer is sent again"
        );
    }
    again.deliver(&records(ROUNDS + 1, ROUNDS + 1)).await;
    assert_eq!(client.wait("cli").await.seq(), Some(ROUNDS + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_read_and_written_through_whichever_gateway_is_asked() {
    let cluster = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = two(&cluster, folder.path()).await;
    let url = |process: &Process| format!("http://{}{SESSION}/workspace/a", process.address);
    let none = http().get(url(&here)).bearer_auth("token").send().await.unwrap();
    assert_eq!(none.status(), 409, "no gateway has its runner");
    let runner = crate::workspace::runner_at(there.address, &[], crate::workspace::Leaves::Never).await;
    let bytes: Vec<u8> = (0..700_000_u32).map(|n| (n % 251) as u8).collect();
    for process in [&here, &there] {
        let put = http().put(url(process)).bearer_auth("token").body(bytes.clone());
        assert_eq!(soon("the answer", put.send()).await.unwrap().status(), 200);
        let get = http().get(url(process)).bearer_auth("token").send();
        assert_eq!(soon("the answer", get).await.unwrap().bytes().await.unwrap(), bytes);
        let refused = http().get(url(process)).bearer_auth("wrong").send().await.unwrap();
        assert_eq!(refused.status(), 401);
    }
    drop((here, there));
    assert_eq!(soon("the runner's end", runner).await.unwrap()["a"], bytes);
}

/// A pod that has by now the address of a gateway: it gives every question to a real one, and that one's answer back.
async fn impostor(real: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, heard) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let all = heard.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut gateway = tokio::net::TcpStream::connect(real).await.unwrap();
            let all = all.clone();
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.split();
                let (mut from_gateway, mut to_gateway) = gateway.split();
                let listen = async {
                    let mut buffer = [0; 4096];
                    while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
                        all.lock().unwrap().extend_from_slice(&buffer[..count]);
                        to_gateway.write_all(&buffer[..count]).await.unwrap();
                    }
                };
                tokio::join!(listen, tokio::io::copy(&mut from_gateway, &mut to_client))
                    .1
                    .ok();
            });
        }
    });
    (address, heard)
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_the_address_of_a_gateway_that_is_gone_is_shown_no_token() {
    let cluster = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    let database = database();
    let here = Process::start_on(&cluster, folder.path(), &database).await;
    let there = Process::start_on(&cluster, folder.path(), &database).await;
    let _runner = crate::workspace::runner_at(
        there.address,
        &[("a", b"secret".to_vec())],
        crate::workspace::Leaves::Never,
    )
    .await;
    let ask = || {
        http()
            .get(format!("http://{}{SESSION}/workspace/a", here.address))
            .bearer_auth("token")
            .send()
    };
    assert_eq!(ask().await.unwrap().text().await.unwrap(), "secret");
    let (address, heard) = impostor(there.address).await;
    say(&database, &format!("UPDATE sessions SET gateway = '{address}'"));
    assert_eq!(
        soon("the answer", ask()).await.unwrap().status(),
        409,
        "as without a runner"
    );
    let heard = String::from_utf8_lossy(&heard.lock().unwrap()).to_lowercase();
    assert!(heard.starts_with("get /peer/"), "it was asked who it is: {heard}");
    assert!(!heard.contains("authorization") && !heard.contains("token"), "{heard}");
}

/// Who serves now.
type Addresses = Arc<Mutex<[SocketAddr; 2]>>;

fn any(addresses: &Addresses, random: &mut StdRng) -> SocketAddr {
    addresses.lock().unwrap()[random.random_range(0..2)]
}

/// Kills; `REPLICA_KILLS=50` for the long run.
fn kills() -> u32 {
    std::env::var("REPLICA_KILLS").map_or(4, |kills| kills.parse().unwrap())
}

/// `REPLICA_SEED` repeats a run, as far as chance goes.
fn seed() -> u64 {
    std::env::var("REPLICA_SEED").map_or(20_260_102, |seed| seed.parse().unwrap())
}

/// What a runner has on its disk.
#[derive(Default)]
struct Spool {
    records: Vec<String>,
    /// Record of each command that was carried out.
    done: BTreeMap<String, u64>,
    /// Commands that came.
    came: usize,
}

impl Spool {
    fn write(&mut self) {
        let seq = self.records.len() as u64 + 1;
        self.records.push(record(seq, Kind::Cli, &format!("record {seq}")));
    }

    fn carry_out(&mut self, id: &str) -> u64 {
        self.came += 1;
        let seq = self.records.len() as u64 + 1;
        if let Some(done) = self.done.get(id) {
            return *done;
        }
        let body = json!({"command": id, "uuid": "00000000-0000-5000-8000-000000000001", "text": "hello"});
        self.records.push(
            json!({"seq": seq, "attempt": 1, "turn": 2, "ts": "2026-01-02T03:04:05Z", "kind": "user", "body": body})
                .to_string(),
        );
        self.done.insert(id.to_owned(), seq);
        seq
    }
}

/// Writes until it is told to stop, and delivers until all is acknowledged, through whoever is there.
async fn drive(addresses: Addresses, mut random: StdRng, stop: watch::Receiver<bool>) -> Spool {
    let (mut spool, mut acked) = (Spool::default(), 0);
    loop {
        let Ok(mut runner) = Runner::try_open(any(&addresses, &mut random), "s", Some("t1")).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let greeting = json!({"hello": hello("s", "u", "p1")}).to_string();
        let _ = futures::SinkExt::send(&mut runner.socket, greeting.into()).await;
        let mut sent = match runner.next().await {
            Ok(GatewayFrame::Welcome(welcome)) => welcome.acked_seq as usize,
            _ => continue,
        };
        assert!(sent >= acked, "{acked} were acknowledged, {sent} are left");
        loop {
            let stopping = *stop.borrow();
            if stopping && acked == spool.records.len() {
                return spool;
            }
            if !stopping {
                spool.write();
            }
            if sent < spool.records.len() {
                let frame = format!(r#"{{"records":[{}]}}"#, spool.records[sent..].join(","));
                sent = spool.records.len();
                if futures::SinkExt::send(&mut runner.socket, frame.into()).await.is_err() {
                    break;
                }
            }
            match tokio::time::timeout(Duration::from_millis(5), runner.next()).await {
                Ok(Ok(GatewayFrame::Ack(ack))) => acked = ack.seq as usize,
                Ok(Ok(GatewayFrame::UserMessage(command))) => {
                    let seq = spool.carry_out(&command.id);
                    if seq as usize <= acked {
                        let answer = json!({"command_result": {"id": command.id, "seq": seq}}).to_string();
                        if futures::SinkExt::send(&mut runner.socket, answer.into()).await.is_err() {
                            break;
                        }
                    }
                }
                Ok(Ok(other)) => panic!("{other:?}"),
                Ok(Err(_)) => break,
                Err(_) => {}
            }
        }
    }
}

/// Follows the session through whoever is there until it has had so many records, once they are known.
async fn follow(addresses: Addresses, mut random: StdRng, last: watch::Receiver<Option<usize>>) -> Vec<String> {
    let mut had = Vec::new();
    loop {
        let cursor = (!had.is_empty()).then(|| format!("u/{}", had.len()));
        let Ok(mut events) = Events::at(any(&addresses, &mut random), "s", "token", cursor.as_deref()).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        loop {
            if last.borrow().is_some_and(|last| had.len() >= last) {
                return had;
            }
            match tokio::time::timeout(Duration::from_millis(200), events.next()).await {
                Ok(Some(event)) if event.id.is_some() => {
                    assert_eq!(event.seq(), Some(had.len() as u64 + 1));
                    had.push(event.data);
                }
                Ok(Some(event)) if event.name == "close" => break,
                Ok(Some(_)) | Err(_) => {}
                Ok(None) => break,
            }
        }
    }
}

/// Sends messages, each until it is taken.
async fn command(addresses: Addresses, mut random: StdRng, stop: watch::Receiver<bool>) -> usize {
    let mut sent = 0;
    while !*stop.borrow() {
        match message(any(&addresses, &mut random), &format!("m{sent}")).await {
            Ok(202) => sent += 1,
            Ok(429 | 500..) | Err(_) => {}
            Ok(other) => panic!("{other}"),
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    sent
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_gateway_dies_and_when_the_database_does_nothing_is_lost_doubled_or_done_twice() {
    let (kills, seed) = (kills(), seed());
    let server = tokio::task::spawn_blocking(Postgres::start).await.unwrap().unwrap();
    let database = server.database().unwrap();
    let cluster = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    let mut random = StdRng::seed_from_u64(seed);
    let mut processes = [
        Process::start_on(&cluster, folder.path(), &database).await,
        Process::start_on(&cluster, folder.path(), &database).await,
    ];
    let addresses: Addresses = Arc::new(Mutex::new([processes[0].address, processes[1].address]));
    let (stop, stopped) = watch::channel(false);
    let (last, known) = watch::channel(None);
    let mut other = || StdRng::seed_from_u64(random.random());
    let runner = tokio::spawn(drive(addresses.clone(), other(), stopped.clone()));
    let clients = [(); 2].map(|()| tokio::spawn(follow(addresses.clone(), other(), known.clone())));
    let commands = tokio::spawn(command(addresses.clone(), other(), stopped));
    for kill in 0..kills {
        let pause = Duration::from_millis(random.random_range(50..600));
        tokio::time::sleep(pause).await;
        if kill == kills / 2 {
            server.kill().unwrap();
            server.resume().unwrap();
            continue;
        }
        let victim = random.random_range(0..2);
        processes[victim].child.kill().await.unwrap();
        // The other one serves alone meanwhile.
        tokio::time::sleep(pause / 2).await;
        processes[victim] = Process::start_on(&cluster, folder.path(), &database).await;
        addresses.lock().unwrap()[victim] = processes[victim].address;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.send_replace(true);
    let sent = soon("the last message", commands).await.unwrap();
    let spool = soon("the delivery of all records", runner).await.unwrap();
    last.send_replace(Some(spool.records.len()));
    for client in clients {
        let had = soon("everything at a client", client).await.unwrap();
        assert!(
            had == spool.records,
            "a client had {} of {} records",
            had.len(),
            spool.records.len()
        );
    }
    let log = PostgresLog::open(&database.as_str().into(), None).await.unwrap();
    let (mut stored, page) = (
        Vec::new(),
        PageSize {
            records: 1000,
            bytes: 1 << 20,
        },
    );
    loop {
        let read = log.read("u", stored.len() as u64, page).await.unwrap();
        if read.is_empty() {
            break;
        }
        stored.extend(
            read.iter()
                .map(|record| String::from_utf8(record.whole().unwrap().to_vec()).unwrap()),
        );
    }
    assert!(
        stored == spool.records,
        "{} stored, {} written",
        stored.len(),
        spool.records.len()
    );
    assert_eq!(
        server.say(&database, "SELECT count(*) FROM conflicts").unwrap().trim(),
        "0"
    );
    // What was sent while nobody listened any more may have come to nobody.
    let done = spool.done.len();
    assert!(
        done <= sent + 1 && done > 0,
        "{sent} messages taken, {done} carried out"
    );
    let pending = log.pending("u", 0).await.map(|pending| pending.len()).unwrap();
    assert!(
        done + pending >= sent,
        "{sent} taken, {done} carried out, {pending} without an answer"
    );
    eprintln!(
        "seed {seed}: {kills} kills, the database's among them: {} records, {} clients, {sent} messages that came {} times: none lost, doubled or done twice",
        stored.len(),
        2,
        spool.came
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_a_file_is_moved_to_postgresql_by_one_command_with_all_that_is_in_it() {
    let cluster = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.db");
    let long = record(4, Kind::Cli, &"0123456789".repeat(1_000_000));
    {
        let mut process = Process::start(&cluster, folder.path()).await;
        let (mut runner, _) = Runner::admitted(process.address, &hello("s", "u", "p1"), "t1").await;
        runner
            .deliver(&[records(1, 3), vec![long.clone()], records(5, 2000)].concat())
            .await;
        runner.send(&[record(2, Kind::Cli, "other")]).await;
        assert!(matches!(runner.frame().await, GatewayFrame::Conflict(_)));
        assert!(matches!(runner.frame().await, GatewayFrame::Ack(_)));
        for id in ["m1", "m2"] {
            assert_eq!(message(process.address, id).await.unwrap(), 202);
            assert!(matches!(runner.frame().await, GatewayFrame::UserMessage(_)));
        }
        runner
            .text(r#"{"command_result":{"id":"m1","seq":9}}"#.to_owned())
            .await;
        runner.deliver(&records(2001, 2001)).await;
        process.terminate();
        soon("the end of the process", process.child.wait()).await.unwrap();
    }
    let database = database();
    let migrate = async || {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_agentic-gateway"));
        command
            .arg(format!("--data={}", file.display()))
            .args(["--log-format=json", "migrate"])
            .env("DATABASE_URL", &database);
        let output = soon("the move", command.output()).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let copy = folder.path().join("copy.db");
    std::fs::copy(&file, &copy).unwrap();
    let said = migrate().await;
    assert!(said.contains(r#""records":2001"#), "{said}");
    assert!(!file.exists());
    assert!(
        migrate().await.contains(r#""records":0"#),
        "a second time there is nothing to do"
    );
    std::fs::copy(&copy, &file).unwrap();
    assert!(migrate().await.contains(r#""known":1"#), "what is there stays");

    let process = Process::start_on(&cluster, folder.path(), &database).await;
    let moved = PostgresLog::open(&database.as_str().into(), None).await.unwrap();
    let state = moved.state("u").await.unwrap();
    assert_eq!((state.progress.acked, state.epoch), (2001, 1));
    assert_eq!(moved.kept().await.unwrap().sessions.len(), 1);
    let mut client = Events::at(process.address, "s", "token", None).await.unwrap();
    for seq in 1..=2001 {
        let event = client.wait("cli").await;
        let sent = if seq == 4 {
            long.clone()
        } else {
            records(seq, seq).remove(0)
        };
        assert!(event.data == sent, "{seq}");
    }
    let (mut runner, welcome) = Runner::admitted(process.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!((welcome.acked_seq, welcome.spool.as_deref()), (2001, Some("spool-1")));
    let GatewayFrame::UserMessage(command) = runner.frame().await else {
        panic!()
    };
    assert_eq!(command.id, "m2", "what was answered is not sent again");
    runner.send(&[record(2, Kind::Cli, "other")]).await;
    assert!(matches!(runner.frame().await, GatewayFrame::Conflict(_)));
}
