//! No record is lost or doubled, whatever dies between the agent and the gateway's log.
//!
//! A scripted agent writes numbered lines; runner and gateway, both real processes, are killed and the network between
//! them is cut at random. At the end the gateway's log is compared with the runner's spool byte for byte, and the spool with
//! what the agent wrote. `NO_RECORD_LOST=<records>,<kills>[,<seed>]` makes it long: `cargo xtask no-record-lost`. Records and
//! kills are then those of several sessions, each with a gateway of its own, some of them at a time: a runner reads its whole
//! spool when it starts, so that in one long session it would be killed before it writes anything.

mod network;
mod truth;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures::StreamExt as _;
use protocol::Report;
use protocol::report::Delivery;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::{cluster::Cluster, opened, process::Process};
use network::Network;
use truth::Truth;

/// Records of a session, more or less.
const RECORDS: u64 = 50_000;
/// Sessions at a time.
const AT_A_TIME: usize = 3;

/// How much is done at least.
#[derive(Clone, Copy, Debug)]
struct Extent {
    records: u64,
    kills: u32,
    seed: u64,
}

impl Extent {
    /// Lines at once: so many that records and kills are reached at about the same time.
    fn burst(self) -> u64 {
        (self.records / u64::from(self.kills.max(1)) / 12).clamp(20, 250)
    }

    /// Short, unless the environment asks for more.
    fn wanted() -> Self {
        let short = Self {
            records: 20_000,
            kills: 24,
            seed: 20_260_102,
        };
        let Ok(text) = std::env::var("NO_RECORD_LOST") else {
            return short;
        };
        let mut numbers = text
            .split(',')
            .map(|number| number.trim().parse::<u64>().expect("numbers"));
        Self {
            records: numbers.next().unwrap_or(short.records),
            kills: numbers.next().map_or(short.kills, |kills| kills as u32),
            seed: numbers.next().unwrap_or(short.seed),
        }
    }

    /// The same in sessions of a bearable length.
    fn sessions(self) -> Vec<Self> {
        let count = self.records.div_ceil(RECORDS).max(1);
        let session = |seed| Self {
            records: self.records.div_ceil(count),
            kills: u64::from(self.kills).div_ceil(count) as u32,
            seed,
        };
        (0..count).map(|at| session(self.seed + at)).collect()
    }
}

/// Writes numbered lines in bursts until there is a file `enough`, then ends as the CLI does.
const AGENT: &str = r#"#!/bin/sh
dir=DIR
echo start >> "$dir/starts"
process=$(wc -l < "$dir/starts")
echo '{"type":"system","subtype":"init","session_id":"00000000-0000-4000-8000-000000000001","claude_code_version":"0"}'
echo '{"type":"system","subtype":"session_state_changed","state":"running"}'
n=0
while [ ! -e "$dir/enough" ]; do
    awk -v p="$process" -v n="$n" 'BEGIN { srand(p * 7919 + n); for (i = n; i < n + BURST; i++) {
        pad = substr("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", 1, int(rand() * 80));
        printf "{\"type\":\"scripted\",\"p\":%d,  \"n\":%d,\"pad\":\"ä💡%s\"}\n", p, i, pad } }'
    n=$((n + BURST))
    sleep 0.02
done
echo "$process $n" > "$dir/last"
echo '{"type":"result","subtype":"success","is_error":false,"result":"done","num_turns":1,"session_id":"00000000-0000-4000-8000-000000000001"}'
echo '{"type":"system","subtype":"session_state_changed","state":"idle"}'
cat > /dev/null
"#;

struct World {
    cluster: Cluster,
    dir: tempfile::TempDir,
    network: Network,
    uid: String,
    runner: Option<Child>,
    gateway: Option<Process>,
}

impl World {
    async fn new(burst: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["state", "work", "gateway"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let agent = dir.path().join("agent.sh");
        std::fs::write(
            &agent,
            AGENT
                .replace("DIR", dir.path().to_str().unwrap())
                .replace("BURST", &burst.to_string()),
        )
        .unwrap();
        std::fs::set_permissions(&agent, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::write(dir.path().join("token"), "t1").unwrap();
        let state = dir.path().join("state").canonicalize().unwrap();
        let uid = Uuid::new_v5(&Uuid::NAMESPACE_URL, state.as_os_str().as_encoded_bytes()).to_string();
        let cluster = Cluster::start().await;
        cluster.running("s", &uid, "p1");
        cluster.runner("t1", Some("p1"));
        let mut world = Self {
            network: Network::start().await,
            cluster,
            uid,
            runner: None,
            gateway: None,
            dir,
        };
        world.start_gateway().await;
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn start_gateway(&mut self) {
        let process = Process::start(&self.cluster, &self.path("gateway")).await;
        self.network.lead_to(process.address);
        self.gateway = Some(process);
    }

    fn start_runner(&mut self, binary: &Path) {
        let url = format!("ws://{}/api/projects/team-a/sessions/s/ws", self.network.address);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("runner.log"))
            .unwrap();
        let runner = Command::new(binary)
            .args(["--local", "--name", "s", "--prompt", "count", "--timeout", "80000"])
            .arg("--workspace")
            .arg(self.path("work"))
            .arg("--state")
            .arg(self.path("state"))
            .arg("--cli")
            .arg(self.path("agent.sh"))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.dir.path())
            .env("POD_UID", "p1")
            .env("WEBSOCKET_URL", url)
            .env("GATEWAY_TOKEN_FILE", self.path("token"))
            .env("ANTHROPIC_API_KEY", "sk-ant-fake-key-of-the-tests")
            .env("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        self.runner = Some(runner);
    }

    /// Bytes of the spool's segments, without reading them.
    fn spooled(&self) -> u64 {
        let segments = std::fs::read_dir(self.path("state/spool"))
            .into_iter()
            .flatten()
            .flatten();
        segments
            .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "spool"))
            .filter_map(|entry| Some(entry.metadata().ok()?.len()))
            .sum()
    }

    async fn wreck(&mut self, dice: &mut StdRng, binary: &Path) {
        match dice.random_range(0..3) {
            0 => {
                let mut runner = self.runner.take().unwrap();
                runner.kill().await.unwrap();
                self.start_runner(binary);
            }
            1 => {
                let mut gateway = self.gateway.take().unwrap();
                gateway.child.kill().await.unwrap();
                self.start_gateway().await;
            }
            _ => self.network.cut(),
        }
    }
}

/// The runner that belongs to this build. A test of one package does not build another's binary; one of all does.
fn runner_binary() -> PathBuf {
    let gateway = Path::new(env!("CARGO_BIN_EXE_agentic-gateway"));
    let runner = gateway.with_file_name("runner");
    let all = std::env::var_os("CI").is_some();
    if !all || !runner.is_file() {
        let release = gateway.parent().is_some_and(|folder| folder.ends_with("release"));
        let status = std::process::Command::new(env!("CARGO"))
            .args(["build", "--package", "runner", "--bin", "runner"])
            .args(release.then_some("--release"))
            .status()
            .unwrap();
        assert!(status.success(), "the runner is built");
    }
    runner
}

/// More than a record takes in the spool on average here, so that its size tells that there are enough.
const RECORD_BYTES: u64 = 250;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_record_is_lost_or_doubled_whatever_dies() {
    let extent = Extent::wanted();
    let binary = runner_binary();
    let begun = Instant::now();
    let sessions = extent.sessions();
    let count = sessions.len();
    let compared: Vec<(Truth, u32)> = futures::stream::iter(sessions)
        .map(|extent| session(extent, &binary))
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await;
    let records: u64 = compared.iter().map(|(truth, _)| truth.records).sum();
    let kills: u32 = compared.iter().map(|(_, kills)| kills).sum();
    let attempts: usize = compared.iter().map(|(truth, _)| truth.attempts()).sum();
    assert!(records >= extent.records && kills >= extent.kills);
    eprintln!(
        "seed {}: {records} records of {attempts} attempts in {count} sessions, {kills} kills and cuts, none lost or doubled, in {:?}",
        extent.seed,
        begun.elapsed()
    );
}

/// A session with so many records through so many kills; gives what was compared, and how often something died.
async fn session(extent: Extent, binary: &Path) -> (Truth, u32) {
    let begun = Instant::now();
    let mut dice = StdRng::seed_from_u64(extent.seed);
    let mut world = World::new(extent.burst()).await;
    world.start_runner(binary);
    let mut kills = 0;
    while kills < extent.kills || world.spooled() < extent.records * RECORD_BYTES {
        sleep(Duration::from_millis(dice.random_range(20..600))).await;
        world.wreck(&mut dice, binary).await;
        kills += 1;
        // A runner may only be over by our doing.
        let ended = world.runner.as_mut().unwrap().try_wait().unwrap();
        assert!(
            ended.is_none(),
            "the runner ended by itself: {ended:?}, see {}",
            world.path("runner.log").display()
        );
    }
    std::fs::write(world.path("enough"), "").unwrap();
    let deadline = Duration::from_secs(60 + extent.records / 5_000);
    let ended = tokio::time::timeout(deadline, world.runner.as_mut().unwrap().wait()).await;
    let log = std::fs::read_to_string(world.path("runner.log")).unwrap();
    let tail = &log[log.floor_char_boundary(log.len().saturating_sub(3_000))..];
    let ended = ended.unwrap_or_else(|_| panic!("the runner ends: {tail}")).unwrap();
    assert!(ended.success(), "{ended:?}: {tail}");
    let report = Report::from_message(&std::fs::read_to_string(world.path("state/report.json")).unwrap()).unwrap();
    assert_eq!(
        (report.events, report.acked_seq),
        (Delivery::Delivered, report.last_seq),
        "{tail}"
    );
    drop(world.gateway.take());
    let log = opened(&world.path("gateway/events.db")).await;
    let truth = truth::compare(&world.path("state/spool"), log, &world.uid, report.last_seq).await;
    truth.check(&world.path("last"));
    assert!(truth.records >= extent.records, "{} records", truth.records);
    eprintln!(
        "a session of seed {}: {} records of {} attempts, {kills} kills and cuts, none lost or doubled, in {:?}",
        extent.seed,
        truth.records,
        truth.attempts(),
        begun.elapsed()
    );
    (truth, kills)
}
