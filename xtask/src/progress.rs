//! One line on stderr when a long step begins and one when it ends, so that nobody wonders whether it hangs.

use std::time::{Duration, Instant};

use anyhow::Result;

/// Runs `work` between a line that says what begins and one that says how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    say(&format!("{what} ..."));
    let result = work();
    let took = seconds(begun.elapsed());
    match &result {
        Ok(_) => say(&format!("{what}: done in {took}")),
        // Also here, because a caller that goes on to other steps may not show it.
        Err(error) => say(&format!("{what}: FAILED after {took}: {error:#}")),
    }
    result
}

/// A line of its own.
pub fn say(line: &str) {
    eprintln!("==> {line}");
}

/// `4.2 s`, or `3 min 20 s` from two minutes on.
pub fn seconds(duration: Duration) -> String {
    let whole = duration.as_secs();
    if whole >= 120 {
        format!("{} min {} s", whole / 60, whole % 60)
    } else {
        format!("{:.1} s", duration.as_secs_f32())
    }
}
