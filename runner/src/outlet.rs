//! stdout and stderr: written by threads of their own, so that a reader who does not read holds up nothing.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that may wait for the reader; a single text may be longer.
const MAX_WAITING: usize = 4 << 20;
/// How long what is left may take at the end.
const LAST: Duration = Duration::from_secs(2);

/// Says how many lines are missing, as a line of the output.
pub type Missing = fn(u64) -> String;

/// An output that never waits. What its reader does not take in time is left out and counted; a line says so where it
/// would have been. It is written when the outlet is dropped, as far as the reader takes it.
pub struct Outlet {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    room: usize,
    missing: Missing,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// The thread has something in its hands.
    writing: bool,
    left_out: u64,
    closed: bool,
    /// Nobody will read any more.
    broken: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self, mut to: impl Write) {
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() && state.left_out == 0 {
                if state.closed {
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let mut text = std::mem::take(&mut state.waiting);
            if text.is_empty() {
                // All that came before is written, and what comes next is kept again.
                text = (self.missing)(std::mem::take(&mut state.left_out)).into_bytes();
            }
            state.writing = true;
            drop(state);
            let broken = to.write_all(&text).and_then(|()| to.flush()).is_err();
            let mut state = self.state();
            state.writing = false;
            state.broken |= broken;
            self.changed.notify_all();
            if state.broken {
                return;
            }
        }
    }
}

impl Outlet {
    /// An outlet to `to`, such as stdout.
    pub fn to(to: impl Write + Send + 'static, missing: Missing) -> Self {
        Self::with_room(to, missing, MAX_WAITING)
    }

    fn with_room(to: impl Write + Send + 'static, missing: Missing, room: usize) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            room,
            missing,
        });
        let carrier = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("outlet".to_owned());
        if thread.spawn(move || carrier.carry(to)).is_err() {
            shared.state().broken = true;
        }
        Self { shared }
    }

    /// Writes whole lines, as soon as the reader takes them.
    pub fn say(&self, lines: &[u8]) {
        let mut state = self.shared.state();
        let full = !state.waiting.is_empty() && state.waiting.len() + lines.len() > self.shared.room;
        if state.broken {
            return;
        }
        if full || state.left_out > 0 {
            let some = |line: &&[u8]| !line.is_empty();
            state.left_out += lines.split(|byte| *byte == b'\n').filter(some).count().max(1) as u64;
        } else {
            state.waiting.extend_from_slice(lines);
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST;
        let mut state = self.shared.state();
        state.closed = true;
        self.shared.changed.notify_all();
        while !state.broken && (state.writing || !state.waiting.is_empty() || state.left_out > 0) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for &Outlet {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.say(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn missing(lines: u64) -> String {
        format!("{lines} missing\n")
    }

    #[test]
    fn what_a_reader_does_not_take_is_left_out_and_counted_where_it_was() {
        let (mut reader, writer) = io::pipe().unwrap();
        let outlet = Outlet::with_room(writer, missing, 1 << 20);
        let line = format!("{}\n", "x".repeat(99_999));
        // More than the pipe, the thread's hands and the queue hold together.
        for _ in 0..40 {
            outlet.say(line.as_bytes());
        }
        let read = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text)
        });
        let shared = Arc::clone(&outlet.shared);
        let deadline = Instant::now() + Duration::from_mins(1);
        while shared.state().left_out > 0 {
            assert!(Instant::now() < deadline, "the reader takes it");
            std::thread::yield_now();
        }
        outlet.say(b"last\n");
        drop(outlet);
        drop(shared);
        let text = read.join().unwrap().unwrap();
        let whole = text.matches(&line).count();
        assert!((10..40).contains(&whole), "{whole}");
        assert!(
            text.ends_with(&format!("x\n{} missing\nlast\n", 40 - whole)),
            "{}",
            &text[text.len() - 40..]
        );
    }

    #[test]
    fn what_was_said_last_is_written_before_the_end() {
        let (mut reader, writer) = io::pipe().unwrap();
        let outlet = Outlet::to(writer, missing);
        outlet.say(b"one\n");
        outlet.say(b"two\n");
        drop(outlet);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntwo\n");
    }

    #[test]
    fn a_reader_that_is_gone_is_nobodys_loss() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let outlet = Outlet::to(writer, missing);
        let begun = Instant::now();
        for _ in 0..10 {
            outlet.say(&vec![b'x'; 1 << 20]);
        }
        drop(outlet);
        assert!(begun.elapsed() < Duration::from_mins(1));
    }
}
