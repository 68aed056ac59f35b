//! Ends everything that the agent left running. Tools run in sessions of their own, so a process group is not enough.

use std::collections::HashMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, kill_process_group};
use tokio::time::{Duration, Instant, sleep};

/// How long the kernel may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Kills everything below this process and reaps it.
pub(in crate::agent) async fn everything() {
    everything_but(None).await;
}

/// As [`everything`]; returns how `watched` ended.
pub(super) async fn everything_but(watched: Option<Pid>) -> Option<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    let mut ended = None;
    loop {
        // Orphans come to us, so who has no child has nobody below. All of /proc need not be read to know that.
        if !reap(watched, &mut ended) {
            return ended;
        }
        let left = kill();
        if !reap(watched, &mut ended) || left == 0 || Instant::now() >= deadline {
            return ended;
        }
        sleep(PAUSE).await;
    }
}

/// Reaps who has ended, and notes how `watched` did; returns whether there are children left.
fn reap(watched: Option<Pid>, ended: &mut Option<ExitStatus>) -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                if Some(pid) == watched {
                    *ended = Some(ExitStatus::from_raw(status.as_raw()));
                }
            }
            Ok(None) => return true,
            Err(error) => return error != Errno::CHILD,
        }
    }
}

/// Kills what is there now; returns how many processes that were.
fn kill() -> usize {
    let below = descendants(getpid().as_raw_nonzero().get());
    if getpid() == Pid::INIT && !below.is_empty() {
        // kill(-1): all of the container at once, so that nothing can fork faster than it is killed. Only ever as the
        // first process of a PID namespace, where it reaches nothing else.
        let _ = kill_process_group(Pid::INIT, Signal::KILL);
    }
    for pid in &below {
        if let Some(pid) = Pid::from_raw(*pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    below.len()
}

/// Every process below `root`. Orphans come to us, so nothing escapes by losing its parent.
fn descendants(root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some(parent) = fs::read_to_string(entry.path().join("stat"))
            .ok()
            .and_then(|stat| parent(&stat))
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut open) = (Vec::new(), vec![root]);
    while let Some(pid) = open.pop() {
        let below = children.remove(&pid).unwrap_or_default();
        open.extend(&below);
        found.extend(below);
    }
    found
}

/// The parent in a line of `/proc/<pid>/stat`; the name before it can hold anything, also a parenthesis.
fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_found_behind_any_name() {
        assert_eq!(parent("12 (a) b) c) S 7 12 12 0"), Some(7));
        assert_eq!(parent("12"), None);
    }
}
