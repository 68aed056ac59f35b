//! Ends a process whose runtime stands still, as on a volume that hangs in the middle of a read: its lease expires, and the
//! agent must not go on without it. The agent's shim ends with the connection.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use protocol::Outcome;

/// Between two signs of life.
const BEAT: Duration = Duration::from_secs(1);

/// Why a runtime stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its thread waits: for a volume, or for a file that is none.
    Waits,
    /// Its thread works on one thing, or waits for a processor to do so.
    Works,
}

impl Cause {
    /// Outcome of the attempt.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Waits => Outcome::VolumeUnavailable,
            Self::Works => Outcome::RunnerError,
        }
    }

    /// For people.
    pub fn message(self, patience: Duration) -> String {
        let seconds = patience.as_secs();
        match self {
            Self::Waits => format!("the runner stood still for {seconds} s: a volume or a file does not answer"),
            Self::Works => format!(
                "the runner came to nothing else for {seconds} s: it had too much to do at once, or too little of the processor"
            ),
        }
    }
}

/// Time that a thread has worked or waited for a processor.
struct Work(PathBuf);

impl Work {
    fn of_this_thread() -> Self {
        let thread = rustix::thread::gettid().as_raw_nonzero();
        Self(format!("/proc/self/task/{thread}/schedstat").into())
    }

    /// Where the kernel does not count it, nothing.
    fn so_far(&self) -> Duration {
        let counted = std::fs::read_to_string(&self.0).unwrap_or_default();
        let nanoseconds = counted
            .split_ascii_whitespace()
            .take(2)
            .filter_map(|text| text.parse::<u64>().ok());
        Duration::from_nanos(nanoseconds.sum())
    }
}

/// Signs of life.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    /// Given by whoever holds the runtime's thread for long, and gets on.
    pub fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it was given.
    pub fn beats(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Watches the runtime that this is called in, which has one thread; `give_up` is called on another when it has stood still
/// for `patience`, and given no `pulse` meanwhile.
pub fn start(pulse: &Pulse, patience: Duration, give_up: impl FnOnce(Cause) + Send + 'static) -> std::io::Result<()> {
    let work = Work::of_this_thread();
    let runtime = Arc::new(());
    let lives = Arc::downgrade(&runtime);
    let (beats, seen) = (pulse.clone(), pulse.clone());
    tokio::spawn(async move {
        // This task alone holds it, so that it goes with the runtime.
        while Arc::strong_count(&runtime) == 1 {
            beats.beat();
            tokio::time::sleep(BEAT).await;
        }
    });
    let watch = move || {
        let (mut last, mut at, mut worked) = (0, Instant::now(), work.so_far());
        while lives.strong_count() > 0 {
            std::thread::sleep(BEAT.min(patience / 4));
            let now = seen.beats();
            if now != last {
                (last, at, worked) = (now, Instant::now(), work.so_far());
            } else if at.elapsed() >= patience {
                let works = work.so_far().saturating_sub(worked) >= patience / 2;
                give_up(if works { Cause::Works } else { Cause::Waits });
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("watchdog".to_owned())
        .spawn(watch)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_runtime_that_stands_still_is_given_up_and_one_that_goes_on_is_not() {
        let (told, given_up) = mpsc::channel();
        start(&Pulse::default(), Duration::from_secs(3), move |cause| {
            told.send(cause).unwrap();
        })
        .unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(given_up.try_recv().is_err(), "it goes on");
        // The runtime's only thread waits here.
        assert_eq!(given_up.recv_timeout(Duration::from_mins(1)), Ok(Cause::Waits));
    }

    #[tokio::test]
    async fn who_works_long_and_gets_on_is_not_given_up_until_it_does_not() {
        let (told, given_up) = mpsc::channel();
        let pulse = Pulse::default();
        start(&pulse, Duration::from_secs(3), move |cause| told.send(cause).unwrap()).unwrap();
        let begun = Instant::now();
        // The runtime's only thread is held here.
        while begun.elapsed() < Duration::from_secs(5) {
            pulse.beat();
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(given_up.try_recv().is_err(), "it gets on");
        assert_eq!(given_up.recv_timeout(Duration::from_mins(1)), Ok(Cause::Waits));
    }

    #[tokio::test]
    async fn a_runtime_that_has_too_much_to_do_is_told_from_one_that_waits() {
        let (told, given_up) = mpsc::channel();
        start(&Pulse::default(), Duration::from_secs(2), move |cause| {
            told.send(cause).unwrap();
        })
        .unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        let begun = Instant::now();
        let cause = loop {
            if let Ok(cause) = given_up.try_recv() {
                break cause;
            }
            assert!(begun.elapsed() < Duration::from_mins(1), "it is given up");
            std::hint::spin_loop();
        };
        assert_eq!(cause, Cause::Works);
    }
}
