//! What one look at a session leads to.

use crds::AgenticSessionStatus;
use jiff::SignedDuration;
use protocol::spec::LiveLimits;

use super::observed::{InQueue, Resolved};

/// A new attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Its number.
    pub number: u32,
    /// The run that it belongs to.
    pub run: u32,
    /// Running time that the run has used, seconds.
    pub used_seconds: u64,
    /// The last one was held back by whoever admits Jobs: this one waits for them too.
    pub held: bool,
}

/// A new drain Job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Its number.
    pub number: u32,
    /// The last attempt, whose run it delivers.
    pub attempt: Attempt,
}

/// What of the session changed while an attempt is under way; by name and UID of what is changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tuned {
    /// The Job's resolved values, and with them its deadline.
    Job(String, String, Resolved),
    /// The annotation that the pod's runner reads.
    Pod(String, String, LiveLimits),
    /// The queue in which the Job waits.
    Queue(String, String, InQueue),
}

/// Something that is deleted, if it still is what was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A pod, by name and UID.
    Pod(String, String),
    /// A Job, by name and UID.
    Job(String, String),
}

/// What is done about what was observed.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The claim is made.
    pub create_claim: bool,
    /// The Job of an attempt is made.
    pub create_job: Option<Attempt>,
    /// A drain Job is made.
    pub create_drain: Option<Drain>,
    /// What is changed of the attempt under way.
    pub tune: Vec<Tuned>,
    /// What is deleted; only what the recorded status already justifies.
    pub delete: Vec<Target>,
    /// The session itself is deleted: its time after the end is over.
    pub delete_session: bool,
    /// Pods, by name and UID, whose report is recorded: their finalizer is removed.
    pub release: Vec<(String, String)>,
    /// What status then says.
    pub status: AgenticSessionStatus,
    /// When to look again though nothing changes.
    pub wake: Option<SignedDuration>,
}

impl Plan {
    /// To do nothing.
    pub fn nothing(status: AgenticSessionStatus) -> Self {
        Self {
            create_claim: false,
            create_job: None,
            create_drain: None,
            tune: Vec::new(),
            delete: Vec::new(),
            delete_session: false,
            release: Vec::new(),
            status,
            wake: None,
        }
    }

    /// Status is all that it may change.
    pub fn only_tells(&self) -> bool {
        let Self {
            create_claim,
            create_job,
            create_drain,
            tune,
            delete: _,
            delete_session: _,
            release: _,
            status: _,
            wake: _,
        } = self;
        let makes = *create_claim || create_job.is_some() || create_drain.is_some() || !tune.is_empty();
        !makes && !self.takes_away()
    }

    /// It takes something away.
    pub fn takes_away(&self) -> bool {
        !self.delete.is_empty() || self.delete_session || !self.release.is_empty()
    }

    /// To let go of pods is all that it does; status apart.
    pub fn only_lets_go(&self) -> bool {
        let rest = Self {
            release: Vec::new(),
            ..self.clone()
        };
        !self.release.is_empty() && rest.only_tells()
    }

    /// To look again at that time at the latest.
    pub fn wake_in(&mut self, wait: SignedDuration) {
        self.wake = self.wake.into_iter().chain([wait]).min();
    }
}
