//! A runner as in a pod, with a repository, a gateway and a trace, killed behind each of its writes, syncs, renames and
//! sends: whoever comes next brings the session to the same end.
//!
//! The points are those that a run passes which nobody kills. `RUNNER_EVERY_KILL=1` takes all of them, without it a few
//! are chosen by a seed that is printed; the next attempt of every other one is killed, too.

mod conversation;
mod fence;
mod one_shot;
mod stopped;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Stdio;

use protocol::report::Delivery;
use protocol::spec::Repo;
use protocol::{Kind, Outcome};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use runner::config::{Config, Gateway};
use runner::kill_point::VARIABLE;
use runner::langfuse::LangfuseConfig;
use runner::workspace::git::Repos;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tests::traces::{FAKE_PUBLIC_KEY, FAKE_SECRET_KEY, TraceCollector};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::Duration;

use crate::commands::{Asking, Shared, gateway};
use crate::common::{Ended, Session, ended_within};
use crate::git::Scene;
use crate::pod::{agent_container, config_at};

/// How many points are taken when not all are, beside those that are always taken.
const FEW: usize = 4;
/// Variable in which a process of its own finds what it is to drive.
const DRIVEN: &str = "RUNNER_TEST_ATTEMPT";
/// How long an attempt may take on a machine with much else to do.
const PATIENCE: Duration = Duration::from_mins(4);

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

/// Drives an attempt, where this process is one that a test has started to kill it; false: it is the test itself.
async fn is_an_attempt() -> bool {
    let Ok(driven) = std::env::var(DRIVEN) else {
        return false;
    };
    let driven: Driven = serde_json::from_str(&driven).unwrap();
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
    true
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
        self.start_by(&[], attempt, variable)
    }

    /// The same below a program, which gets the runner as its last arguments.
    fn start_by(&self, program: &[&str], attempt: u32, variable: Option<(&str, &str)>) -> (Child, Child) {
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
        let this = std::env::current_exe().unwrap();
        let words: Vec<&str> = program.iter().copied().chain([this.to_str().unwrap()]).collect();
        let runner = Command::new(words[0])
            .args(&words[1..])
            .args(["--exact", one_shot::IN_A_PROCESS, "--nocapture"])
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
