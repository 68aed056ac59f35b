//! What is still said of an attempt whose runtime stands still, from a thread of its own: the report, and the agent's end.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use protocol::{Outcome, Report};
use rustix::net::{Shutdown, shutdown};

use crate::report::ReportFile;
use crate::watchdog::Cause;

/// The last that was known of the attempt; one for a process.
#[derive(Default)]
pub struct LastWord(Mutex<Known>);

#[derive(Default)]
struct Known {
    path: PathBuf,
    file: Option<Arc<ReportFile>>,
    report: Option<Report>,
    /// The connection to the agent's shim, while there is one.
    agent: Weak<OwnedFd>,
}

impl LastWord {
    /// For an attempt that will leave its report there.
    pub fn of(path: PathBuf, attempt: u32) -> Self {
        Self(Mutex::new(Known {
            path,
            report: Some(Report::new(Outcome::Running, attempt)),
            ..Known::default()
        }))
    }

    /// What the report says now.
    pub fn reported(&self, file: &Arc<ReportFile>, report: Report) {
        let mut known = self.lock();
        known.file = Some(Arc::clone(file));
        // Whoever ended it knows better why.
        known.report = Some(report).filter(|report| report.outcome == Outcome::Running);
    }

    /// Who the agent is.
    pub fn agent(&self, line: Weak<OwnedFd>) {
        self.lock().agent = line;
    }

    /// Ends the agent, and says how the attempt ended unless that was said.
    pub fn say(&self, cause: Cause, message: &str) {
        // The thread that stands still may hold it.
        let Ok(known) = self.0.try_lock() else { return };
        if let Some(line) = known.agent.upgrade() {
            // Our end closes it too, but not while a thread of ours waits for a disk and cannot be ended.
            let _ = shutdown(&line, Shutdown::Both);
        }
        let Some(report) = &known.report else { return };
        let report = Report {
            outcome: cause.outcome(),
            message: message.to_owned(),
            ..report.clone()
        };
        let file = match &known.file {
            Some(file) => Arc::clone(file),
            None => match ReportFile::open(&known.path) {
                Ok(file) => Arc::new(file),
                Err(_) => return,
            },
        };
        let _ = file.write(&report);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn read(path: &std::path::Path) -> Report {
        Report::from_message(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn an_attempt_that_stands_still_is_reported_with_what_is_known_and_its_agent_is_let_go() {
        use std::io::Read as _;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        let word = LastWord::of(path.clone(), 3);
        word.say(Cause::Waits, "before there was anything");
        let before = read(&path);
        assert_eq!((before.outcome, before.attempt), (Outcome::VolumeUnavailable, 3));

        let file = Arc::new(ReportFile::open(&path).unwrap());
        let known = Report {
            turns: 7,
            ..Report::new(Outcome::Running, 3)
        };
        word.reported(&file, known.clone());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let line = Arc::new(OwnedFd::from(ours));
        word.agent(Arc::downgrade(&line));
        word.say(Cause::Works, "too much to do");
        let said = read(&path);
        assert_eq!((said.outcome, said.turns), (Outcome::RunnerError, 7));
        assert_eq!(said.message, "too much to do");
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "the shim sees the end");

        let ended = Report::new(Outcome::Timeout, 3);
        file.write(&ended).unwrap();
        word.reported(&file, ended);
        word.say(Cause::Waits, "late");
        assert_eq!(read(&path).outcome, Outcome::Timeout);
    }
}
