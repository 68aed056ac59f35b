//! Runs a command and measures it and everything below it.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{peers::Started, table};
use crate::tools::Scratch;

/// Between two looks at the memory: often enough for a session of half a second.
const LOOK: Duration = Duration::from_millis(40);

/// What a run took.
pub(super) struct Sample {
    /// Until the result was on stdout.
    pub(super) result: Duration,
    /// Until the process was gone.
    pub(super) exit: Duration,
    /// CPU of the process and all below it.
    pub(super) cpu: Duration,
    /// Most memory (PSS) of all processes but the CLI and its tools, KiB.
    pub(super) own_pss: u64,
    pub(super) code: Option<i32>,
    pub(super) stderr: String,
    /// Files that the run left in its working folder.
    pub(super) left: BTreeMap<String, String>,
}

/// Runs what `command` makes for a fresh home.
pub(super) fn measure(command: impl FnOnce(&Path) -> Result<Started>, deadline: Duration) -> Result<Sample> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let home = Scratch::new(&format!("bench-{}-home-{number}", std::process::id()))?;
    let Started { command, stdin } = command(home.path())?;
    let times = home.path().join("times");
    let mut shell = timed(&command, &times);
    shell
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let begun = Instant::now();
    let mut child = shell.spawn().context("failed to start bash")?;
    let mut input = child.stdin.take();
    if let (Some(pipe), Some(line)) = (&mut input, stdin) {
        pipe.write_all(line.as_bytes())?;
    }
    let stdout = child.stdout.take().context("no stdout")?;
    let mut stderr = child.stderr.take().context("no stderr")?;
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let over = Arc::new(AtomicBool::new(false));
    let watch = {
        let (over, pid) = (Arc::clone(&over), child.id());
        thread::spawn(move || memory(pid, &over, begun + deadline))
    };
    let mut result = None;
    let mut lines = BufReader::with_capacity(1 << 20, stdout);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        if result.is_none() && is_result(&line) {
            result = Some(begun.elapsed());
            // What the CLI alone waits for.
            input = None;
        }
        line.clear();
    }
    drop(input);
    let status = child.wait()?;
    let exit = begun.elapsed();
    over.store(true, Ordering::Relaxed);
    let own_pss = watch.join().unwrap_or_default();
    let stderr = errors.join().unwrap_or_default();
    if exit > deadline {
        bail!("it took longer than {deadline:?}: {stderr}");
    }
    Ok(Sample {
        result: result.unwrap_or(exit),
        exit,
        cpu: table::cpu(&fs::read_to_string(&times).unwrap_or_default()),
        own_pss,
        code: status.code(),
        stderr,
        left: left(&home.path().join("work")),
    })
}

fn is_result(line: &[u8]) -> bool {
    // Key order is not stable.
    line.windows(15).any(|part| part == br#""type":"result""#)
}

/// The command below a bash that writes down what it and its children used of the CPU, to the millisecond.
fn timed(command: &Command, times: &Path) -> Command {
    let mut shell = Command::new("bash");
    shell
        .args([
            "-c",
            r#"TIMEFORMAT='%3U %3S'; { time "$@" 2>&3; } 3>&2 2>"$BENCH_TIMES""#,
            "bench",
        ])
        .arg(command.get_program())
        .args(command.get_args())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("LANG", "C.UTF-8")
        .env("BENCH_TIMES", times)
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(folder) = command.get_current_dir() {
        shell.current_dir(folder);
    }
    shell
}

/// The most that all processes below `bash` used together, those of the CLI apart.
fn memory(bash: u32, over: &AtomicBool, until: Instant) -> u64 {
    let mut most = 0;
    while !over.load(Ordering::Relaxed) {
        most = most.max(children(bash).map(own).sum());
        if Instant::now() > until {
            // Whoever hangs is ended, and said so by the caller.
            kill_all(bash);
        }
        thread::sleep(LOOK);
    }
    most
}

fn own(pid: u32) -> u64 {
    let name = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let program = String::from_utf8_lossy(&line).into_owned();
    // The CLI, and the script that stands for it.
    let is_cli = name.ends_with("claude") || program.split('\0').take(3).any(|word| word.ends_with("/claude"));
    if is_cli && !program.contains("--local") {
        return 0;
    }
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let pss = pss.and_then(|text| text.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    pss.unwrap_or(0) + children(pid).map(own).sum::<u64>()
}

fn children(pid: u32) -> impl Iterator<Item = u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let lists: Vec<String> = tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .collect();
    lists
        .join(" ")
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect::<Vec<u32>>()
        .into_iter()
}

fn kill_all(pid: u32) {
    for child in children(pid) {
        kill_all(child);
    }
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

fn left(folder: &Path) -> BTreeMap<String, String> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files
        .filter_map(|file| {
            Some((
                file.file_name().into_string().ok()?,
                fs::read_to_string(file.path()).ok()?,
            ))
        })
        .collect()
}
