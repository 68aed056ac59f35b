//! Limits that may change while the session runs.

use std::path::PathBuf;

use protocol::spec::LiveLimits;
use tokio::time::Duration;

use crate::limits::Limits;

/// The limits as last read.
pub(super) struct Live {
    /// What was said at the start.
    base: LiveLimits,
    /// Where others may be said. The kubelet replaces it as a whole.
    file: Option<PathBuf>,
    now: LiveLimits,
}

impl Live {
    pub(super) fn new(base: LiveLimits, file: Option<PathBuf>) -> Self {
        Self { base, file, now: base }
    }

    /// Reads them again; returns whether they have changed. A file that is missing or says nothing leaves them as they are.
    pub(super) fn read(&mut self) -> bool {
        let read = self.file.as_ref().and_then(|path| std::fs::read(path).ok());
        let read = read.and_then(|bytes| serde_json::from_slice::<LiveLimits>(&bytes).ok());
        let Some(read) = read else { return false };
        let next = LiveLimits {
            timeout: read.timeout.or(self.base.timeout),
            ..read
        };
        std::mem::replace(&mut self.now, next) != next
    }

    pub(super) fn now(&self) -> LiveLimits {
        self.now
    }

    /// Running time that the run may have.
    pub(super) fn timeout(&self) -> Duration {
        // Ten years: a sum of times must not overflow.
        Duration::from_secs(self.now.timeout.unwrap_or(u64::MAX).min(315_360_000))
    }

    /// How long an interactive session may be idle.
    pub(super) fn inactivity(&self) -> Option<Duration> {
        self.now
            .inactivity_timeout
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs)
    }

    /// What the meter must know.
    pub(super) fn budget(&self) -> Limits {
        (&self.now).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_replaces_the_limits_and_what_is_no_limits_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("limits");
        let base = LiveLimits {
            timeout: Some(90),
            max_turns: Some(3),
            ..LiveLimits::default()
        };
        let mut live = Live::new(base, Some(file.clone()));
        assert!(!live.read(), "there is no file yet");
        std::fs::write(&file, r#"{"maxTokens":7}"#).unwrap();
        assert!(live.read() && !live.read());
        assert_eq!((live.now().max_turns, live.now().max_tokens), (None, Some(7)));
        assert_eq!(live.timeout(), Duration::from_secs(90));
        std::fs::write(&file, "").unwrap();
        assert!(!live.read());
        assert_eq!(live.now().max_tokens, Some(7));
    }
}
