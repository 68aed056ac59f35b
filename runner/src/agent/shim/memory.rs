//! How many processes the kernel has killed for memory in this container.

use std::fs;

/// The counter of the cgroup that we are in; 0 where it cannot be read.
pub(super) fn oom_kills() -> u64 {
    candidates()
        .iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .and_then(|text| counter(&text))
        .unwrap_or(0)
}

/// In a container the cgroup is mounted as the root, unless it shares the host's view.
fn candidates() -> Vec<String> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut paths = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        if controllers.is_empty() {
            paths.push(format!("/sys/fs/cgroup{path}/memory.events"));
        } else if controllers.split(',').any(|controller| controller == "memory") {
            paths.push(format!("/sys/fs/cgroup/memory{path}/memory.oom_control"));
        }
    }
    paths.push("/sys/fs/cgroup/memory.events".to_owned());
    paths.push("/sys/fs/cgroup/memory/memory.oom_control".to_owned());
    paths
}

fn counter(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|value| value.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_read_from_either_version_of_cgroups() {
        assert_eq!(
            counter("low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n"),
            Some(1)
        );
        assert_eq!(counter("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"), Some(4));
        assert_eq!(counter("oom_kill_disable 0\n"), None);
    }
}
