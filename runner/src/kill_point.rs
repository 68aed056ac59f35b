//! Places at which tests have the runner die as by SIGKILL, or the thread hang that comes by. Not in release builds.

/// Variable that names the place, and behind a colon the number from which on it counts: `durable:7`.
pub const VARIABLE: &str = "RUNNER_KILL_AT";
/// Variable that names, in the same way, the place at which threads hang for ever, as on a volume that does not answer.
pub const HANG: &str = "RUNNER_HANG_AT";
/// Variable that names a file to which every place is written when it is passed: what there is to kill at.
pub const LOG: &str = "RUNNER_KILL_LOG";

/// A place with a number of its own: `durable` (the record of this seq is on disk, nobody knows it yet), `sent` (so many
/// messages were written to the CLI).
#[cfg(debug_assertions)]
pub fn reach(place: &str, number: u64) {
    note(place, number);
    let here = |(at, from): &(String, u64)| at == place && number >= *from;
    if die_at().is_some_and(here) {
        die();
    }
    if hang_at().is_some_and(here) {
        hang();
    }
}

/// A place that counts how often it is passed: behind each write, fsync, rename and send.
#[cfg(debug_assertions)]
pub fn pass(place: &str) {
    use std::collections::HashMap;
    use std::sync::{Mutex, PoisonError};

    static PASSED: Mutex<Option<HashMap<String, u64>>> = Mutex::new(None);
    let number = {
        let mut passed = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
        let number = passed.get_or_insert_default().entry(place.to_owned()).or_default();
        *number += 1;
        *number
    };
    reach(place, number);
}

#[cfg(debug_assertions)]
fn die_at() -> Option<&'static (String, u64)> {
    static AT: std::sync::OnceLock<Option<(String, u64)>> = std::sync::OnceLock::new();
    AT.get_or_init(|| named(VARIABLE)).as_ref()
}

#[cfg(debug_assertions)]
fn hang_at() -> Option<&'static (String, u64)> {
    static AT: std::sync::OnceLock<Option<(String, u64)>> = std::sync::OnceLock::new();
    AT.get_or_init(|| named(HANG)).as_ref()
}

#[cfg(debug_assertions)]
fn named(variable: &str) -> Option<(String, u64)> {
    let at = std::env::var(variable).ok()?;
    let (place, from) = at.split_once(':').unwrap_or((&at, "0"));
    Some((place.to_owned(), from.parse().ok()?))
}

#[cfg(debug_assertions)]
fn note(place: &str, number: u64) {
    use std::io::Write as _;

    if let Some(path) = std::env::var_os(LOG)
        && let Ok(mut file) = std::fs::File::options().create(true).append(true).open(path)
    {
        let _ = file.write_all(format!("{place}:{number}\n").as_bytes());
    }
}

#[cfg(debug_assertions)]
fn die() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    // Until the signal arrives nothing more may happen.
    hang();
}

#[cfg(debug_assertions)]
fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

/// A place: in a release build nothing happens there.
#[cfg(not(debug_assertions))]
pub fn reach(_place: &str, _number: u64) {}

/// A place: in a release build nothing happens there.
#[cfg(not(debug_assertions))]
pub fn pass(_place: &str) {}
