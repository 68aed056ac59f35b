//! `runner agent` as the agent container runs it.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::common::{eventually, signal};
use rstest::rstest;
use runner::agent::{Agent, FromShim, Place, Spawn, ToShim};
use rustix::process::Signal;
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

struct Container {
    dir: tempfile::TempDir,
    shim: Child,
}

impl Container {
    fn start() -> Self {
        Self::started_with(|socket| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
            command.args(["agent", "--socket"]).arg(socket);
            command
        })
    }

    /// Not as root, whoever runs the test.
    fn of_a_user() -> Self {
        Self::started_with(|socket| {
            let folder = socket.parent().unwrap();
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
            command.args(["agent", "--socket"]).arg(socket);
            if rustix::process::getuid().is_root() {
                command.uid(65_534).gid(65_534);
            }
            command
        })
    }

    /// As the first process of a PID namespace of its own.
    fn isolated() -> Self {
        Self::started_with(|socket| {
            let mut command = Command::new("unshare");
            if !rustix::process::getuid().is_root() {
                command.arg("--map-root-user");
            }
            command.args([
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                env!("CARGO_BIN_EXE_runner"),
                "agent",
            ]);
            command.arg("--socket").arg(socket);
            command
        })
    }

    fn started_with(command: impl FnOnce(&Path) -> Command) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shim = command(&dir.path().join("agent.sock"))
            .env("FROM_IMAGE", "image")
            .env("OURS", "image")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { dir, shim }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("agent.sock")
    }

    async fn connect(&self) -> Agent {
        Agent::open(&Place::Container(self.socket())).await.unwrap()
    }
}

fn shell(command: &str) -> ToShim {
    ToShim::Spawn(Spawn {
        argv: ["bash", "-c", command].map(str::to_owned).to_vec(),
        env: vec![("OURS".into(), "ours".into())],
        env_default: vec![
            ("FROM_IMAGE".into(), "default".into()),
            ("ABSENT".into(), "default".into()),
        ],
        cwd: "/".into(),
    })
}

/// What a process said, to its end.
async fn output(agent: &mut Agent) -> (String, runner::agent::Exit) {
    let mut out = Vec::new();
    let read = async {
        loop {
            match agent.next().await.unwrap() {
                FromShim::Stdout(bytes) => out.extend_from_slice(&bytes),
                FromShim::Exit(exit) => return exit,
                FromShim::Stderr(_) | FromShim::Killed => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let exit = timeout(crate::common::DEADLINE, read).await.expect("it ends");
    (String::from_utf8(out).unwrap(), exit)
}

#[tokio::test]
async fn streams_signals_and_the_end_are_carried() {
    let container = Container::start();
    let mut agent = container.connect().await;
    agent
        .send(&shell("cat; echo $OURS $FROM_IMAGE $ABSENT; exit 7"))
        .unwrap();
    let long = "x".repeat(300_000);
    agent.send(&ToShim::Stdin(long.clone().into())).unwrap();
    agent.send(&ToShim::CloseStdin).unwrap();
    let (out, exit) = output(&mut agent).await;
    assert_eq!(out, format!("{long}ours image default\n"));
    assert_eq!((exit.code, exit.signal), (Some(7), None));

    agent
        // Not SIGINT: bash forgets one in some hundreds of those that come to it alone while a command of its own ends (1 of 400; of
        // SIGTERM none). Not `wait`: a signal that comes just before it waits is heard of when it ends only.
        .send(&shell(
            "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done",
        ))
        .unwrap();
    assert!(matches!(agent.next().await.unwrap(), FromShim::Stdout(_)));
    agent.send(&ToShim::Signal(15)).unwrap();
    let (out, exit) = output(&mut agent).await;
    assert_eq!((out.as_str(), exit.code), ("term\n", Some(3)));
}

#[tokio::test]
async fn nothing_is_left_that_an_agent_could_connect_to_or_look_into() {
    let container = Container::of_a_user();
    let _agent = container.connect().await;
    eventually("the socket is gone", || !container.socket().exists()).await;
    let shim = container.shim.id().unwrap();
    // The files of a process that may not be traced belong to root, whoever it runs as.
    let process = std::fs::metadata(format!("/proc/{shim}")).unwrap();
    let environ = std::fs::metadata(format!("/proc/{shim}/environ")).unwrap();
    assert_ne!(process.uid(), 0, "it does not run as root here");
    assert_eq!(environ.uid(), 0);
    let net = std::fs::read_to_string("/proc/net/unix").unwrap();
    let listening = net
        .lines()
        .any(|line| line.contains(container.dir.path().to_str().unwrap()) && line.contains("00010000"));
    assert!(!listening, "no listener is left");
}

#[tokio::test]
async fn everything_is_killed_on_demand_also_what_hid_in_a_session_of_its_own() {
    for container in [Container::start(), Container::isolated()] {
        let mut agent = container.connect().await;
        let mark = format!("{}", container.dir.path().join("alive").display());
        let hide = format!(
            "setsid bash -c 'trap : TERM INT; (setsid bash -c \"echo > {mark}; sleep 301.5\") & sleep 301.5' & sleep 301.5"
        );
        agent.send(&shell(&hide)).unwrap();
        eventually("it runs", || Path::new(&mark).exists()).await;
        agent.send(&ToShim::KillAll).unwrap();
        let (_, exit) = output(&mut agent).await;
        assert_eq!(exit.signal, Some(9));
        assert!(matches!(
            timeout(crate::common::DEADLINE, agent.next()).await.unwrap().unwrap(),
            FromShim::Killed
        ));
        assert!(!running(&mark), "nothing is left");
        // The shim itself goes on.
        agent.send(&shell("echo again")).unwrap();
        assert_eq!(output(&mut agent).await.0, "again\n");
    }
}

/// Whether a process names `word` in its command line.
fn running(word: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines
        .into_iter()
        .any(|line| String::from_utf8_lossy(&line).contains(word))
}

#[tokio::test]
async fn told_to_stop_the_shim_ends_though_its_process_does_not() {
    let mut container = Container::start();
    let mut agent = container.connect().await;
    agent
        .send(&shell("echo ready; trap : TERM; sleep 300 & wait; sleep 300"))
        .unwrap();
    assert!(matches!(agent.next().await.unwrap(), FromShim::Stdout(_)));
    let begun = Instant::now();
    signal(&container.shim, Signal::TERM);
    let status = timeout(crate::common::DEADLINE, container.shim.wait())
        .await
        .unwrap()
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(status.success());
}

#[tokio::test]
async fn nobody_came_and_it_is_told_to_stop() {
    let mut container = Container::start();
    eventually("it listens", || container.socket().exists()).await;
    signal(&container.shim, Signal::TERM);
    assert!(
        timeout(crate::common::DEADLINE, container.shim.wait())
            .await
            .unwrap()
            .unwrap()
            .success()
    );
}

#[tokio::test]
async fn a_runner_that_is_gone_takes_everything_with_it() {
    let mut container = Container::start();
    let agent = container.connect().await;
    let mark = format!("{}", container.dir.path().join("alive").display());
    agent
        .send(&shell(&format!("bash -c 'echo > {mark}; sleep 300.5; : {mark}'")))
        .unwrap();
    eventually("it runs", || Path::new(&mark).exists()).await;
    drop(agent);
    timeout(crate::common::DEADLINE, container.shim.wait())
        .await
        .unwrap()
        .unwrap();
    assert!(!running(&mark));
}

#[tokio::test]
async fn a_container_ends_by_itself_soon_after_its_runner_but_not_before() {
    let mut container = Container::isolated();
    let agent = container.connect().await;
    let begun = Instant::now();
    drop(agent);
    timeout(crate::common::DEADLINE, container.shim.wait())
        .await
        .unwrap()
        .unwrap();
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(250), "{took:?}");
}

#[tokio::test]
async fn a_container_that_starts_again_is_another_one() {
    let first = Container::start();
    let boot = first.connect().await.hello().boot_id.clone();
    // A socket that a killed shim left behind does not keep the next one from listening.
    let second = Container::started_with(|socket| {
        drop(std::os::unix::net::UnixListener::bind(socket).unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
        command.args(["agent", "--socket"]).arg(socket);
        command
    });
    assert_ne!(second.connect().await.hello().boot_id, boot);
}

#[tokio::test]
async fn what_cannot_be_started_is_said() {
    let container = Container::start();
    let mut agent = container.connect().await;
    let spawn = Spawn {
        argv: vec!["/nowhere/claude".into()],
        env: vec![],
        env_default: vec![],
        cwd: "/".into(),
    };
    agent.send(&ToShim::Spawn(spawn)).unwrap();
    let FromShim::SpawnFailed(why) = agent.next().await.unwrap() else {
        panic!("a refusal")
    };
    assert!(why.contains("/nowhere/claude"), "{why}");
}

#[rstest]
#[case::a_file_is_there("file")]
#[case::it_cannot_be_made("file/folder")]
#[tokio::test]
async fn a_working_folder_that_there_cannot_be_is_named(#[case] folder: &str) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let cwd = dir.path().join(folder).display().to_string();
    let container = Container::start();
    let mut agent = container.connect().await;
    let spawn = Spawn {
        argv: vec!["true".into()],
        env: vec![],
        env_default: vec![],
        cwd: cwd.clone(),
    };
    agent.send(&ToShim::Spawn(spawn)).unwrap();
    let FromShim::SpawnFailed(why) = agent.next().await.unwrap() else {
        panic!("a refusal")
    };
    assert!(why.contains(&format!("folder {cwd}: ")), "{why}");
}
