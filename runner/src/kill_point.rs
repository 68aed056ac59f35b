//! Places at which tests have the runner die as by SIGKILL. Not in release builds.

/// Variable that names the place, and behind a colon the number from which on it counts: `durable:7`.
pub const VARIABLE: &str = "RUNNER_KILL_AT";

/// A place: `durable` (a record of this seq is on disk, nobody knows it yet), `sent` (this many messages were written to
/// the CLI), `interrupt` (a user's, on disk and not done), `report` (about to be written for the last time), `reported`.
#[cfg(debug_assertions)]
pub fn reach(place: &str, number: u64) {
    use std::sync::OnceLock;

    static AT: OnceLock<Option<(String, u64)>> = OnceLock::new();
    let at = AT.get_or_init(|| {
        let at = std::env::var(VARIABLE).ok()?;
        let (place, from) = at.split_once(':').unwrap_or((&at, "0"));
        Some((place.to_owned(), from.parse().ok()?))
    });
    if let Some((at, from)) = at
        && at == place
        && number >= *from
    {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // Until the signal arrives nothing more may happen.
        loop {
            std::thread::park();
        }
    }
}

/// A place: in a release build nothing happens there.
#[cfg(not(debug_assertions))]
pub fn reach(_place: &str, _number: u64) {}
