//! Two operators at once: without election, with a leader that stood still, with one that died. No attempt is made twice.
//!
//! The long form is `TWO_OPERATORS=200 cargo test -p operator --test component two:: -- --nocapture`: so many sessions, and a leader
//! that stands still for a minute.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, ResourceExt as _, api::ListParams};
use protocol::{Outcome, names::label};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    plane::{jobs_created, plane},
    world::{PATIENCE, World, report, until},
};

/// A leader that stands still loses its lease after 15 s.
const STANDS_STILL: Duration = Duration::from_secs(25);

fn sessions() -> (usize, Duration) {
    let asked = std::env::var("TWO_OPERATORS").ok().and_then(|n| n.parse().ok());
    match asked {
        Some(n) => (n, Duration::from_mins(1)),
        None => (12, STANDS_STILL),
    }
}

fn name(n: usize) -> String {
    format!("poem-{n}")
}

async fn create(world: &World, numbers: std::ops::Range<usize>) {
    stream::iter(numbers)
        .for_each_concurrent(8, async |n| {
            world.create(&name(n), json!({"prompt": "write a poem"})).await;
        })
        .await;
}

/// Starts what waits and ends what runs, until the sessions have ended.
async fn complete(world: &World, numbers: std::ops::Range<usize>) {
    let deadline = Instant::now() + PATIENCE * 3;
    loop {
        for pod in world.pods().list(&ListParams::default()).await.unwrap().items {
            let attempt = pod
                .labels()
                .get(label::ATTEMPT)
                .and_then(|n| n.parse().ok())
                .unwrap_or(1);
            match pod.status.as_ref().and_then(|status| status.phase.as_deref()) {
                Some("Pending") => world.start(&pod).await,
                Some("Running") => world.end(&pod, 1, Some(&report(Outcome::Succeeded, attempt))).await,
                _ => {}
            }
        }
        let found = world.sessions().list(&ListParams::default()).await.unwrap().items;
        let status = |n: usize| {
            let session = found.iter().find(|session| session.name_any() == name(n));
            session.and_then(|session| session.status.clone()).unwrap_or_default()
        };
        let left = numbers.clone().map(|n| (n, status(n)));
        let left: Vec<_> = left
            .filter(|(_, status)| status.phase != crds::Phase::Completed)
            .collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "sessions that do not complete: {left:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Each session had its one Job, made once.
fn made_once(world: &World, sessions: usize) {
    let mut expected: Vec<_> = (0..sessions).map(|n| format!("{}-job", name(n))).collect();
    expected.sort();
    assert_eq!(jobs_created(&world.namespace), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_operators_that_both_work_make_no_attempt_twice() {
    let (sessions, _) = sessions();
    let world = World::without_operator("two-leaders").await;
    let stop = CancellationToken::new();
    let operators: Vec<_> = ["first", "second"]
        .map(|lease| {
            let mut settings = world.settings();
            // Each is the leader by a lease of its own.
            lease.clone_into(&mut settings.lease.name);
            settings.metrics_address.set_port(0);
            settings
        })
        .into();
    let running = operators.into_iter().map(|settings| {
        // The account of the operator may have no lease but the one.
        tokio::spawn(operator::run(world.client.clone(), settings, stop.clone()))
    });
    let running: Vec<_> = running.collect();
    create(&world, 0..sessions).await;
    complete(&world, 0..sessions).await;
    made_once(&world, sessions);
    println!("two operators, {sessions} sessions, 0 doubled");
    stop.cancel();
    for operator in running {
        operator.await.unwrap().unwrap();
    }
}

/// The binary, as a process.
struct Process(Child);

impl Process {
    fn start(world: &World, identity: &str) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_agentic-operator"))
            .arg("run")
            .env("KUBECONFIG", plane().kubeconfig())
            .env("RUNNER_IMAGE", "registry.test/runner:7")
            .env("WATCH_NAMESPACE", &world.namespace)
            .env("POD_NAMESPACE", &world.namespace)
            .env("POD_NAME", identity)
            .env("METRICS_ADDRESS", "127.0.0.1:0")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args([signal, &self.0.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn led_by(world: &World, identity: &str) {
    let leases: Api<Lease> = Api::namespaced(world.client.clone(), &world.namespace);
    until("another leader", async || {
        let lease = leases.get_opt("agentic-operator").await.unwrap()?;
        (lease.spec?.holder_identity.as_deref() == Some(identity)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stood_still_makes_nothing_twice_and_one_that_died_is_followed() {
    let (sessions, stands_still) = sessions();
    let world = World::without_operator("leader-stands-still").await;
    let first = Process::start(&world, "first");
    led_by(&world, "first").await;
    let second = Process::start(&world, "second");
    create(&world, 0..sessions / 3).await;
    world.pod(&name(0), 1).await;
    first.signal("-STOP");
    let stopped = Instant::now();
    create(&world, sessions / 3..sessions * 2 / 3).await;
    led_by(&world, "second").await;
    println!("a leader that stands still is followed after {:?}", stopped.elapsed());
    // Not a wait for something: for so long it stands still.
    tokio::time::sleep(stands_still.saturating_sub(stopped.elapsed())).await;
    first.signal("-CONT");
    complete(&world, 0..sessions * 2 / 3).await;

    // The one that stood still has ended, or waits.
    let third = Process::start(&world, "third");
    drop(first);
    second.signal("-KILL");
    let killed = Instant::now();
    led_by(&world, "third").await;
    println!("a leader that died is followed after {:?}", killed.elapsed());
    create(&world, sessions * 2 / 3..sessions).await;
    complete(&world, 0..sessions).await;
    made_once(&world, sessions);
    println!("{sessions} sessions, 0 doubled");
    drop((second, third));
}
