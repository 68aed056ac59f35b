//! A runner as in a pod, with a repository, a gateway and a trace, killed behind each of its writes, syncs, renames and
//! sends: whoever comes next brings the session to the same end.
//!
//! The points are those that a run passes which nobody kills. `RUNNER_EVERY_KILL=1` takes all of them, without it a few
//! are chosen by a seed that is printed; the next attempt of every other one is killed, too.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Stdio;

use futures::StreamExt as _;
use protocol::report::Delivery;
use protocol::spec::Repo;
use protocol::{Kind, Outcome};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use runner::config::{Config, Gateway};
use runner::control::{Reply, Request, client};
use runner::kill_point::{LOG, VARIABLE};
use runner::langfuse::LangfuseConfig;
use runner::status::Phase;
use runner::workspace::git::Repos;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tests::model::Logged;
use tests::traces::{FAKE_PUBLIC_KEY, FAKE_SECRET_KEY, TraceCollector};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::Duration;

use crate::commands::{Asking, Shared, ask, gateway, message};
use crate::common::{Ended, Session, bash, ended_within, script, text};
use crate::git::Scene;
use crate::pod::{agent_container, config_at};

/// How many points are taken when not all are, beside those that are always taken.
const FEW: usize = 4;
/// Where something outlives the runner that the next one must know of: a bundle in the workspace, a branch that is pushed.
const ALWAYS: [&str; 2] = ["bundled:1", "pushed:1"];
/// Variable in which a process of its own finds what it is to drive.
const DRIVEN: &str = "RUNNER_TEST_ATTEMPT";
/// How long an attempt may take on a machine with much else to do.
const PATIENCE: Duration = Duration::from_mins(4);
const BRANCH: &str = "sessions/hello-6fa459ea";

/// What an attempt in a process of its own needs to know.
#[derive(Clone, Serialize, Deserialize)]
struct Driven {
    state: PathBuf,
    workspace: PathBuf,
    model: String,
    gateway: String,
    langfuse: String,
    /// The folder with the credentials of repositories, one for what is private, and the address; none: no repository.
    repository: Option<(PathBuf, PathBuf, String)>,
    prompt: String,
    interactive: bool,
    attempt: u32,
}

impl Driven {
    fn config(&self) -> Config {
        let base = config_at(self.state.clone(), &self.workspace, self.model.clone(), &self.prompt);
        let mut config = Config {
            attempt: Some(self.attempt),
            pod_uid: format!("pod-{}", self.attempt),
            gateway: Some(Gateway {
                url: self.gateway.clone(),
                token_file: None,
            }),
            langfuse: Some(LangfuseConfig {
                host: self.langfuse.clone(),
                public_key: FAKE_PUBLIC_KEY.into(),
                secret_key: FAKE_SECRET_KEY.into(),
                session_uid: base.uid.clone(),
                session_name: base.name.clone(),
                namespace: base.namespace.clone(),
                run: 1,
                user: None,
                mask: false,
                tags: Vec::new(),
            }),
            ..base
        };
        config.options.interactive = self.interactive;
        config.limits.timeout = Some(PATIENCE.as_secs());
        if let Some((secrets, private, url)) = &self.repository {
            let repo = Repo {
                url: url.clone(),
                name: "one".into(),
                push: true,
                ..Repo::default()
            };
            config.repos = Repos {
                list: vec![repo],
                folder: self.state.join("git"),
                workspace: self.workspace.clone(),
                ..crate::git::repos(secrets.clone(), private.clone())
            };
            std::fs::create_dir_all(&config.repos.folder).unwrap();
            config.agent.workspace = self.workspace.join("one").display().to_string();
        }
        config
    }
}

/// Not a test of its own: what the others start, and kill.
#[tokio::test]
#[ignore = "started by the tests that kill it"]
async fn an_attempt() {
    let driven: Driven = serde_json::from_str(&std::env::var(DRIVEN).unwrap()).unwrap();
    let (told, stop) = watch::channel(false);
    let mut asked = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
    tokio::spawn(async move {
        asked.recv().await;
        told.send_replace(true);
        std::future::pending::<()>().await;
    });
    let outcome = Box::pin(runner::drive::drive(driven.config(), stop)).await;
    assert!(
        matches!(outcome, Outcome::Succeeded | Outcome::EndedByRequest | Outcome::Stopped),
        "{outcome:?}"
    );
}

/// A session with everything around it, which outlives its attempts.
struct World {
    session: Session,
    scene: Option<Scene>,
    collector: TraceCollector,
    gateway: Gateway,
    kept: Shared,
    prompt: String,
    interactive: bool,
}

/// What is needed to understand a failure: the order of things.
impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for record in self.session.records() {
            let body: String = record.body.get().chars().take(300).collect();
            eprintln!(
                "{} {} {} {:?} {body}",
                record.seq, record.attempt, record.turn, record.kind
            );
        }
        for entry in std::fs::read_dir(self.session.state().join("claude/projects"))
            .into_iter()
            .flatten()
            .flatten()
        {
            for file in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(file.path()).unwrap_or_default();
                for line in text.lines() {
                    eprintln!(
                        "{} {}",
                        file.path().display(),
                        line.chars().take(400).collect::<String>()
                    );
                }
            }
        }
    }
}

impl World {
    async fn one_shot() -> Self {
        let scene = Scene::new().await;
        scene.server.repository("one", &[("README.md", "hello\n")]).unwrap();
        // The CLI's transcript is behind its stdout by some milliseconds; a round of a real model takes longer.
        let round = || bash("echo more > new.txt; sleep 0.3");
        // Said twice: killed between the answer and the CLI's result, the CLI is told to go on.
        let prompt = script("MARK", &[round(), round(), text("Done."), text("Done.")]);
        Self::new(Some(scene), prompt, false).await
    }

    async fn interactive() -> Self {
        let prompt = script("MARK", &[bash("sleep 0.3"), text("One."), text("One."), text("One.")]);
        Self::new(None, prompt, true).await
    }

    async fn new(scene: Option<Scene>, prompt: String, interactive: bool) -> Self {
        let session = Session::new().await;
        let (gateway, kept) = gateway(Asking::default()).await;
        std::fs::create_dir_all(session.state()).unwrap();
        // The claim comes from another node, whose runner may, by a clock ten minutes behind, have been at work until a
        // moment ago.
        let renewed = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(10 * 60 + 44);
        let lease =
            json!({ "attempt": 0, "podUid": "pod-0", "kernel": "other", "renewedAt": renewed, "released": false });
        std::fs::write(session.state().join("lease"), lease.to_string()).unwrap();
        Self {
            session,
            scene,
            collector: TraceCollector::start().await.unwrap(),
            gateway,
            kept,
            prompt,
            interactive,
        }
    }

    /// Runs an attempt in a process of its own, and in its agent container.
    async fn attempt(&self, attempt: u32, variable: Option<(&str, &str)>) -> Ended {
        let (runner, _container) = self.start(attempt, variable);
        self.end(runner).await
    }

    async fn end(&self, runner: Child) -> Ended {
        let ended = ended_within(runner, PATIENCE).await;
        self.session.assert_nothing_left().await;
        ended
    }

    fn start(&self, attempt: u32, variable: Option<(&str, &str)>) -> (Child, Child) {
        let driven = Driven {
            state: self.session.state(),
            workspace: self.session.workspace(),
            model: self.session.model.url(),
            gateway: self.gateway.url.clone(),
            langfuse: self.collector.url(),
            repository: self
                .scene
                .as_ref()
                .map(|scene| (scene.secrets(), scene.private(), scene.server.url("one"))),
            prompt: self.prompt.clone(),
            interactive: self.interactive,
            attempt,
        };
        let container = agent_container(&self.session);
        let runner = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill::an_attempt", "--ignored", "--nocapture"])
            .env(DRIVEN, serde_json::to_string(&driven).unwrap())
            .env_remove(VARIABLE)
            .envs(variable)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        (runner, container)
    }

    /// The same, while a client of the gateway says something and ends the session when it is answered.
    async fn conversation(&self, attempt: u32, says: &[&str], variable: Option<(&str, &str)>) -> Ended {
        let talking = async {
            for (at, text) in says.iter().enumerate() {
                let id = format!("c-{}", at + 1);
                let said = self.asked(&id);
                if !said {
                    ask(&self.kept, message(&id, text));
                }
                self.answered(&id).await;
            }
            if !self.asked("end") {
                ask(&self.kept, end());
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = self.attempt(attempt, variable) => ended,
            () = talking => unreachable!(),
            () = tokio::time::sleep(PATIENCE) => {
                let records: Vec<_> = self.kept.lock().unwrap().records.values().cloned().collect();
                panic!("attempt {attempt} of {variable:?} does not end: {}", records.join("\n"));
            }
        }
    }

    fn asked(&self, id: &str) -> bool {
        self.kept
            .lock()
            .unwrap()
            .commands
            .iter()
            .any(|command| crate::commands::id(command) == id)
    }

    /// A turn is over since the message was sent, and nothing waits.
    async fn answered(&self, id: &str) {
        let command = format!(r#""command":"{id}""#);
        let socket = self.session.state().join("control.sock");
        loop {
            let over = {
                let kept = self.kept.lock().unwrap();
                let last = |what: &str| kept.records.iter().rev().find(|(_, record)| record.contains(what));
                let sent = last(&command).map(|(seq, _)| *seq);
                sent.is_some() && last(r#""event":"turnEnded""#).map(|(seq, _)| *seq) > sent
            };
            if over
                && let Ok(Reply::Status(status)) = client::ask(&socket, &Request::Status).await
                && status.phase == Phase::Idle
                && status.queued == 0
            {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    fn assert_ended(&self, point: &str, wanted: Outcome) {
        let (session, report) = (&self.session, self.session.report());
        assert_eq!(report.outcome, wanted, "{point}: {}", report.message);
        assert_eq!(
            (report.events, report.traces),
            (Delivery::Delivered, Delivery::Delivered),
            "{point}"
        );
        let records = session.records();
        assert!(records.iter().map(|record| record.seq).eq(1..=records.len() as u64));
        let ends = records.iter().filter(|record| record.kind == Kind::End).count();
        let begun = session.events("attemptStarted").len();
        assert_eq!((ends, records.last().unwrap().kind), (begun, Kind::End), "{point}");
        let mut said = BTreeSet::new();
        for user in session.bodies(Kind::User) {
            assert!(
                said.insert(user["command"].to_string()),
                "{point}: {user} is written once"
            );
        }
        let kept = self.kept.lock().unwrap();
        assert!(kept.conflicts.is_empty(), "{point}: {:?}", kept.conflicts);
        let spooled = records.iter().map(|record| serde_json::to_string(record).unwrap());
        assert!(
            kept.records.values().cloned().eq(spooled),
            "{point}: the gateway has what the spool has"
        );
        let observations = self.collector.observations();
        let traces: BTreeSet<_> = observations.iter().map(|observation| &observation.trace).collect();
        assert_eq!(traces.len(), 1, "{point}");
    }

    fn assert_pushed(&self, point: &str) {
        let server = &self.scene.as_ref().unwrap().server;
        self.session.assert_prompt_once("MARK");
        let report = self.session.report();
        assert_eq!(report.result, "Done.", "{point}");
        let head = server.git("one", &["rev-parse", BRANCH]).unwrap();
        assert_eq!(
            (report.repos[0].pushed, &report.repos[0].commit),
            (true, &head),
            "{point}"
        );
        let changed = server.git(
            "one",
            &["log", "--format=", "--name-status", &format!("main..{BRANCH}")],
        );
        assert_eq!(changed.unwrap(), "A\tnew.txt", "{point}: in one commit");
        let left: Vec<_> = std::fs::read_dir(self.session.workspace())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["one"], "{point}: nothing of ours is left in the workspace");
    }
}

fn end() -> protocol::frame::GatewayFrame {
    protocol::frame::GatewayFrame::EndSession(protocol::frame::EndSession { id: "end".into() })
}

/// Where a run passes, in order, each once.
fn passed(log: &std::path::Path) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let log = std::fs::read_to_string(log).unwrap();
    log.lines()
        .filter(|line| seen.insert((*line).to_owned()))
        .map(str::to_owned)
        .collect()
}

/// Points to kill at, and where the next attempt is killed.
fn chosen(all: &[String]) -> Vec<(String, Option<String>)> {
    let seed = std::env::var("RUNNER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random::<u64>);
    let mut random = StdRng::seed_from_u64(seed);
    let points: Vec<&String> = if std::env::var_os("RUNNER_EVERY_KILL").is_some() {
        all.iter().collect()
    } else {
        all.choose_multiple(&mut random, FEW).collect()
    };
    let then = points.iter().enumerate().map(|(at, point)| {
        let next = (at % 2 == 1).then(|| all.choose(&mut random).cloned()).flatten();
        ((*point).clone(), next)
    });
    let chosen: Vec<_> = then.collect();
    eprintln!(
        "RUNNER_SEED={seed}: {} of {} points: {chosen:?}",
        chosen.len(),
        all.len()
    );
    chosen
}

#[tokio::test]
async fn with_a_repository_a_gateway_and_a_trace_a_one_shot_ends_the_same_wherever_its_runner_was_killed() {
    let world = World::one_shot().await;
    let log = world.session.state().join("passed");
    let whole = world.attempt(1, Some((LOG, log.to_str().unwrap()))).await;
    assert_eq!(whole.code, Some(0), "{}{}", whole.stdout, whole.stderr);
    let all = passed(&log);
    let places: BTreeSet<_> = all.iter().map(|point| point.split(':').next().unwrap()).collect();
    for place in [
        "fence",
        "lease-renamed",
        "segment",
        "durable",
        "hello",
        "records",
        "acked",
        "forward",
        "opened",
        "sent",
        "placed",
        "marked",
        "bundled",
        "taken",
        "pushing",
        "pushed",
        "push-known",
        "ended",
        "traced",
        "report",
        "released",
    ] {
        assert!(places.contains(place), "{place}: {places:?}");
    }
    world.assert_ended("nobody was killed", Outcome::Succeeded);
    world.assert_pushed("nobody was killed");
    let always = ALWAYS.map(|point| (point.to_owned(), None));
    futures::stream::iter(always.into_iter().chain(chosen(&all)))
        .for_each_concurrent(4, one_shot_killed_at)
        .await;
}

async fn one_shot_killed_at((point, then): (String, Option<String>)) {
    let world = World::one_shot().await;
    let name = format!("{point}, {then:?}");
    let mut attempt = 0;
    for at in [Some(point), then].into_iter().flatten() {
        attempt += 1;
        let killed = world.attempt(attempt, Some((VARIABLE, &at))).await;
        // Not every attempt passes everywhere.
        assert!(
            matches!(killed.code, None | Some(0)),
            "{name}: {}{}",
            killed.stdout,
            killed.stderr
        );
    }
    let over = world
        .session
        .bodies(Kind::Cli)
        .iter()
        .any(|line| line["type"] == "result");
    let asked = world.session.model.requests().len();
    let last = world.attempt(attempt + 1, None).await;
    assert_eq!(last.code, Some(0), "{name}: {}{}", last.stdout, last.stderr);
    world.assert_ended(&name, Outcome::Succeeded);
    world.assert_pushed(&name);
    if over {
        let now = world.session.model.requests().len();
        assert_eq!(now, asked, "{name}: nothing is asked of the model again");
    }
}

#[tokio::test]
async fn a_conversation_through_the_gateway_ends_the_same_wherever_its_runner_was_killed() {
    // Sent while the first turn runs.
    let says = ["FOLLOW"];
    let all = points_of_a_conversation(&says).await;
    assert!(all.iter().any(|point| point.starts_with("answered:")), "{all:?}");
    futures::stream::iter(chosen(&all))
        .for_each_concurrent(4, async |points| {
            let (world, name) = talked_through(&says, points).await;
            crate::resume::assert_said_once(&world.session, &name);
        })
        .await;
}

#[tokio::test]
async fn a_conversation_is_cleared_once_wherever_its_runner_was_killed() {
    let says = ["/clear", "AFTER"];
    let all = points_of_a_conversation(&says).await;
    futures::stream::iter(chosen(&all))
        .for_each_concurrent(4, async |points| {
            let (world, name) = talked_through(&says, points).await;
            let requests = world.session.model.requests();
            let asked: Vec<_> = requests.iter().filter(|request| request.asks_for_message()).collect();
            let counts = |request: &Logged| ["MARK", "AFTER"].map(|marker| request.user_messages_with(marker));
            for request in &asked {
                let [before, after] = counts(request);
                assert!(
                    before + after == 1,
                    "{name}: {before} {after} {:#?}",
                    request.messages()
                );
            }
            assert_eq!(counts(asked.last().unwrap()), [0, 1], "{name}");
        })
        .await;
}

async fn points_of_a_conversation(says: &[&str]) -> Vec<String> {
    let world = World::interactive().await;
    let log = world.session.state().join("passed");
    let whole = world.conversation(1, says, Some((LOG, log.to_str().unwrap()))).await;
    assert_eq!(whole.code, Some(0), "{}{}", whole.stdout, whole.stderr);
    world.assert_ended("nobody was killed", Outcome::EndedByRequest);
    passed(&log)
}

async fn talked_through(says: &[&str], (point, then): (String, Option<String>)) -> (World, String) {
    let world = World::interactive().await;
    let name = format!("{point}, {then:?}");
    let mut attempt = 0;
    for at in [Some(point), then].into_iter().flatten() {
        attempt += 1;
        let killed = world.conversation(attempt, says, Some((VARIABLE, &at))).await;
        assert!(
            matches!(killed.code, None | Some(0)),
            "{name}: {}{}",
            killed.stdout,
            killed.stderr
        );
    }
    let last = world.conversation(attempt + 1, says, None).await;
    assert_eq!(last.code, Some(0), "{name}: {}{}", last.stdout, last.stderr);
    world.assert_ended(&name, Outcome::EndedByRequest);
    (world, name)
}

#[tokio::test]
async fn told_to_stop_a_session_goes_on_the_same_wherever_its_runner_was_killed_meanwhile() {
    let world = World::stopped().await;
    let log = world.session.state().join("passed");
    let (runner, _container) = world.start(1, Some((LOG, log.to_str().unwrap())));
    let before = world.told_to_stop(&runner, &log).await;
    let whole = world.end(runner).await;
    assert_eq!(world.session.report().outcome, Outcome::Stopped, "{}", whole.stderr);
    let all: Vec<String> = passed(&log).split_off(before);
    assert!(all.iter().any(|point| point.starts_with("ended:")), "{all:?}");
    world.goes_on("nobody was killed", 2).await;
    futures::stream::iter(chosen(&all))
        .for_each_concurrent(4, async |(point, _)| {
            let world = World::stopped().await;
            let (runner, _container) = world.start(1, Some((VARIABLE, &point)));
            world.told_to_stop(&runner, &log).await;
            world.end(runner).await;
            world.goes_on(&point, 2).await;
        })
        .await;
}

impl World {
    async fn stopped() -> Self {
        // The interrupt itself counts as an answer for the mock.
        let steps = [
            bash("touch began; [ -e go ] || sleep 100"),
            text("On."),
            text("On."),
            text("On."),
        ];
        Self::new(None, script("MARK", &steps), false).await
    }

    /// Tells the runner to stop in mid-tool; says how many points it had passed by then.
    async fn told_to_stop(&self, runner: &Child, log: &std::path::Path) -> usize {
        let began = self.session.workspace().join("began");
        let deadline = tokio::time::Instant::now() + PATIENCE;
        // It may die before.
        while !began.exists() && alive(runner) {
            assert!(tokio::time::Instant::now() < deadline, "the tool runs");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let passed = if log.exists() { passed(log).len() } else { 0 };
        std::fs::write(self.session.workspace().join("go"), "").unwrap();
        if alive(runner) {
            crate::common::signal(runner, rustix::process::Signal::TERM);
        }
        passed
    }

    async fn goes_on(&self, point: &str, attempt: u32) {
        let last = self.attempt(attempt, None).await;
        assert_eq!(last.code, Some(0), "{point}: {}{}", last.stdout, last.stderr);
        self.assert_ended(point, Outcome::Succeeded);
        assert_eq!(self.session.report().result, "On.", "{point}");
        self.session.assert_prompt_once("MARK");
        let last = self.session.model.requests().pop().unwrap();
        assert!(last.user_messages_with(runner::drive::CONTINUE) <= 1, "{point}");
    }
}

fn alive(runner: &Child) -> bool {
    let stat = runner
        .id()
        .and_then(|id| std::fs::read_to_string(format!("/proc/{id}/stat")).ok());
    stat.is_some_and(|stat| !stat.contains(") Z "))
}
