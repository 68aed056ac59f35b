//! Ends a process whose runtime stands still, as on a volume that hangs in the middle of a read: its lease expires, and the
//! agent must not go on without it. The agent's shim ends with the connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Between two signs of life.
const BEAT: Duration = Duration::from_secs(1);

/// Watches the runtime that this is called in; `give_up` is called on a thread when it has stood still for `patience`.
pub fn start(patience: Duration, give_up: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let beats = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&beats);
    tokio::spawn(async move {
        loop {
            beats.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(BEAT).await;
        }
    });
    let watch = move || {
        let (mut last, mut at) = (0, Instant::now());
        // With the runtime's end the count is ours alone.
        while Arc::strong_count(&seen) > 1 {
            std::thread::sleep(BEAT.min(patience / 4));
            let now = seen.load(Ordering::Relaxed);
            if now != last {
                (last, at) = (now, Instant::now());
            } else if at.elapsed() >= patience {
                give_up();
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
        start(Duration::from_secs(3), move || told.send(()).unwrap()).unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(given_up.try_recv().is_err(), "it goes on");
        // The runtime's only thread waits here.
        given_up.recv_timeout(Duration::from_mins(1)).unwrap();
    }
}
