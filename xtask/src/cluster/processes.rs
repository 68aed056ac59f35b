//! The cluster's daemons: started, watched, and stopped by what identifies them for sure.
//!
//! A pid alone may by now belong to somebody else, so a pid file also holds the process's start time. And since whoever
//! starts a daemon may be killed before writing the file, each daemon carries a mark in its environment.

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::command;

/// Variable in the environment of every daemon, and of what they start in turn: the state folder of their cluster.
const MARK: &str = "AGENTIC_CLUSTER_STATE";

/// The daemons of one cluster, with their pid files and logs under its state folder.
pub(super) struct Processes {
    state: PathBuf,
    /// What comes before each command: a program that enters the network namespace, or one that ties its life to ours.
    prefix: Vec<OsString>,
}

impl Processes {
    /// `prefix` must `exec` what follows it, so that the pid is the daemon's own.
    pub(super) fn new(state: &Path, prefix: Vec<OsString>) -> Result<Self> {
        for folder in ["pid", "log"] {
            let folder = state.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        }
        Ok(Self {
            state: state.to_owned(),
            prefix,
        })
    }

    /// The file with all that a daemon has said.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.state.join("log").join(format!("{name}.log"))
    }

    /// Starts a daemon in a process group of its own, so that Ctrl-C in a terminal does not reach it.
    pub(super) fn spawn(&self, name: &str, program: &Path, arguments: &[String]) -> Result<()> {
        self.spawn_with(name, &self.prefix, program, arguments)
    }

    /// Like [`Self::spawn`], but outside the cluster's network namespace.
    pub(super) fn spawn_on_host(&self, name: &str, program: &Path, arguments: &[String]) -> Result<()> {
        self.spawn_with(name, &[], program, arguments)
    }

    fn spawn_with(&self, name: &str, prefix: &[OsString], program: &Path, arguments: &[String]) -> Result<()> {
        let mut words: Vec<OsString> = prefix.to_vec();
        words.push(program.into());
        words.extend(arguments.iter().map(OsString::from));
        let log = File::create(self.log(name))?;
        let child = Command::new(&words[0])
            .args(&words[1..])
            .env(MARK, &self.state)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("failed to start {name} ({})", words[0].display()))?;
        let process = Process::of(child.id())
            .with_context(|| format!("{name} ended at once:\n{}", command::tail(&self.log(name), 10)))?;
        fs::write(self.state.join("pid").join(name), process.to_string())?;
        Ok(())
    }

    /// Waits until `ready`, and gives up early when the daemon has ended.
    pub(super) fn wait(&self, name: &str, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let begun = Instant::now();
        while !ready() {
            if !is_alive(&self.state, name) {
                bail!(
                    "{name} has ended; the end of its log:\n{}",
                    command::tail(&self.log(name), 20)
                );
            }
            if begun.elapsed() > limit {
                bail!(
                    "{name} is not ready after {limit:?}; the end of its log:\n{}",
                    command::tail(&self.log(name), 20)
                );
            }
            thread::sleep(Duration::from_millis(30));
        }
        Ok(())
    }

    /// Kills one daemon at once and waits until it is gone.
    pub(super) fn kill(&self, name: &str) -> Result<()> {
        let process =
            recorded(&self.state.join("pid").join(name)).with_context(|| format!("{name} was never started"))?;
        process.signal(Signal::KILL);
        let begun = Instant::now();
        while process.is_alive() {
            if begun.elapsed() > Duration::from_secs(10) {
                bail!("{name} survives SIGKILL");
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Ends every process of a state folder's cluster; also those of a run that was killed before it could note their pids.
pub(super) fn stop_all(state: &Path) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut running = marked(state);
        let files = fs::read_dir(state.join("pid")).into_iter().flatten().flatten();
        running.extend(
            files
                .filter_map(|entry| recorded(&entry.path()))
                .filter(Process::is_alive),
        );
        if running.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(10) {
            bail!("these processes of {} survive SIGKILL: {running:?}", state.display());
        }
        // At once: the cluster's data is deleted next, so there is nothing to be saved.
        for process in running {
            process.signal(Signal::KILL);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a daemon of a state folder runs.
pub(super) fn is_alive(state: &Path, name: &str) -> bool {
    recorded(&state.join("pid").join(name)).is_some_and(|process| process.is_alive())
}

/// All processes of the machine that carry the mark of a state folder, inherited ones included.
fn marked(state: &Path) -> Vec<Process> {
    let mark = [MARK.as_bytes(), b"=", state.as_os_str().as_bytes()].concat();
    let folders = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = folders.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let is_marked = environment.split(|byte| *byte == 0).any(|variable| variable == mark);
        is_marked.then(|| Process::of(pid)).flatten()
    })
    .collect()
}

fn recorded(file: &Path) -> Option<Process> {
    let text = fs::read_to_string(file).ok()?;
    let (pid, started) = text.trim().split_once(' ')?;
    Some(Process {
        pid: pid.parse().ok()?,
        started: started.parse().ok()?,
    })
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pid: u32,
    /// Clock ticks after boot, field 22 of `/proc/<pid>/stat`.
    started: u64,
}

impl Process {
    /// The process that has this pid now, unless it has ended.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name in parentheses and may itself hold any character.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        if matches!(*fields.first()?, "Z" | "X") {
            return None;
        }
        Some(Self {
            pid,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid)
            .ok()
            .and_then(Pid::from_raw)
            .filter(|_| self.is_alive())
        {
            let _ = kill_process(pid, signal);
        }
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_of_another_process_with_the_same_number_ends_nobody() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        let earlier = Process {
            started: process.started - 1,
            ..process
        };
        earlier.signal(Signal::KILL);
        assert!(process.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_daemon_without_a_pid_file_is_found_by_its_mark_and_another_clusters_is_left_alone() {
        let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let start = |state: &Path| {
            let processes = Processes::new(state, Vec::new()).unwrap();
            processes.spawn("sleeper", Path::new("sleep"), &["60".into()]).unwrap();
        };
        start(ours.path());
        start(other.path());
        fs::remove_file(ours.path().join("pid/sleeper")).unwrap();
        assert_eq!(marked(ours.path()).len(), 1);
        stop_all(ours.path()).unwrap();
        assert_eq!(marked(ours.path()), []);
        assert!(is_alive(other.path(), "sleeper"));
        stop_all(other.path()).unwrap();
    }

    #[test]
    fn a_daemon_that_ends_is_reported_with_its_last_words() {
        let state = tempfile::tempdir().unwrap();
        let processes = Processes::new(state.path(), Vec::new()).unwrap();
        processes
            .spawn(
                "broken",
                Path::new("sh"),
                &["-c".into(), "sleep 0.1; echo no such thing; exit 3".into()],
            )
            .unwrap();
        let error = processes.wait("broken", Duration::from_secs(20), || false).unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");
    }
}
