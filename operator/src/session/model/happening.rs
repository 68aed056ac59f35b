//! What happens in the model's world.

use jiff::SignedDuration;
use proptest::prelude::*;
use protocol::{Outcome, Reason};

use super::{Model, drain_report};
use crate::session::{
    observed::{RunnerSeen, Trouble},
    pod::{Disruption, Grace, PodSeen},
};

/// What happens in the world.
#[derive(Clone, Copy, Debug)]
pub enum Happening {
    /// The operator looks, and lives to write its status or not.
    Look {
        lives: bool,
    },
    JobController,
    RunnerStarts,
    RunnerEnds(Outcome),
    RunnerDies,
    PodHindered,
    PodTurnsTerminal,
    PodDeleted,
    PodEvicted,
    PodForcedAway,
    JobDeleted,
    /// Somebody deletes the Job and asks for its pods to be left.
    JobTakenFromAbove,
    Suspend(bool),
    StartRequested(u8),
    DrainEnds(Option<Outcome>),
    TimeoutChanged(u64),
    JobSuspended,
    JobLetGo,
    Time(i64),
    /// An attempt from its begin, when its time has come, to its end so many seconds later, under eyes that miss nothing.
    Attempt(Ending, i64),
}

/// How an attempt ends.
#[derive(Clone, Copy, Debug)]
pub enum Ending {
    Reports(Outcome),
    Dies,
    Deleted,
    Evicted,
    ForcedAway,
    Suspended,
}

/// Anything that may happen.
pub fn happenings() -> impl Strategy<Value = Happening> {
    let outcomes = prop::sample::select(vec![
        Outcome::Running,
        Outcome::Succeeded,
        Outcome::Stopped,
        Outcome::StoppedByUser,
        Outcome::AgentError,
        Outcome::NoCredentials,
        Outcome::ModelUnavailable,
        Outcome::Timeout,
        Outcome::Superseded,
    ]);
    prop_oneof![
        12 => any::<bool>().prop_map(|lives| Happening::Look { lives }),
        6 => Just(Happening::JobController),
        5 => Just(Happening::RunnerStarts),
        4 => outcomes.prop_map(Happening::RunnerEnds),
        1 => Just(Happening::RunnerDies),
        1 => Just(Happening::PodHindered),
        3 => Just(Happening::PodTurnsTerminal),
        2 => Just(Happening::PodDeleted),
        1 => Just(Happening::PodEvicted),
        1 => Just(Happening::PodForcedAway),
        1 => Just(Happening::JobDeleted),
        1 => Just(Happening::JobTakenFromAbove),
        2 => any::<bool>().prop_map(Happening::Suspend),
        1 => any::<u8>().prop_map(Happening::StartRequested),
        2 => prop::option::of(prop::sample::select(vec![Outcome::Succeeded, Outcome::Undelivered])).prop_map(Happening::DrainEnds),
        1 => (1_u64..400).prop_map(Happening::TimeoutChanged),
        1 => Just(Happening::JobSuspended),
        1 => Just(Happening::JobLetGo),
        3 => (1_i64..400).prop_map(Happening::Time),
        1 => (400_i64..100_000).prop_map(Happening::Time),
        3 => (endings(), 0_i64..60).prop_map(|(ending, seconds)| Happening::Attempt(ending, seconds)),
    ]
}

fn endings() -> impl Strategy<Value = Ending> {
    prop_oneof![
        1 => Just(Ending::Reports(Outcome::Succeeded)),
        3 => Just(Ending::Reports(Outcome::ModelUnavailable)),
        2 => Just(Ending::Dies),
        2 => Just(Ending::Deleted),
        4 => Just(Ending::Evicted),
        1 => Just(Ending::ForcedAway),
        2 => Just(Ending::Suspended),
    ]
}

impl Model {
    pub fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Look { lives } => {
                self.look(lives);
            }
            Happening::JobController => self.job_controller(),
            Happening::RunnerStarts => {
                let since = Some(self.now);
                self.runner(|runner| (*runner == RunnerSeen::Waiting).then_some(RunnerSeen::Running { since }));
            }
            Happening::RunnerEnds(outcome) => self.end_runner(Some(outcome)),
            Happening::RunnerDies => self.end_runner(None),
            Happening::PodHindered => {
                let since = Some(self.now);
                let trouble = Trouble {
                    reason: Reason::ImagePullFailed,
                    message: "no such image".into(),
                    since,
                    grace: Grace::Container,
                };
                for pod in self
                    .pods
                    .iter_mut()
                    .filter(|pod| pod.runner == RunnerSeen::Waiting && !pod.is_over())
                {
                    pod.trouble = Some(trouble.clone());
                }
            }
            Happening::PodTurnsTerminal => {
                for pod in &mut self.pods {
                    pod.terminal |= matches!(pod.runner, RunnerSeen::Ended { .. });
                }
            }
            Happening::PodDeleted => self.pods.iter_mut().for_each(|pod| pod.deleting = true),
            Happening::PodEvicted => {
                for pod in self.pods.iter_mut().filter(|pod| !pod.is_judgeable()) {
                    pod.deleting = true;
                    pod.disruption = Some(Disruption {
                        reason: Reason::Evicted,
                        message: "drained".into(),
                    });
                }
            }
            Happening::PodForcedAway => {
                // Somebody takes finalizers and all: the Job controller knows nothing of it and makes another.
                self.pods.pop();
                self.forced += 1;
            }
            Happening::JobDeleted => {
                if let Some((number, _)) = self.jobs.pop() {
                    self.pods
                        .iter_mut()
                        .filter(|pod| pod.attempt == number)
                        .for_each(|pod| pod.deleting = true);
                }
            }
            Happening::JobTakenFromAbove => {
                if let Some((number, _)) = self.jobs.pop() {
                    let named = self.status.pod_uid.clone();
                    let left = |pod: &mut PodSeen| pod.attempt == number && Some(&pod.uid) != named.as_ref();
                    for mut pod in self.pods.extract_if(.., left) {
                        // A Job that is made anew, and its pod, have the UIDs of those before them here.
                        pod.uid = format!("{}-left-{}", pod.uid, self.bare.len());
                        self.bare.push(pod);
                    }
                }
            }
            Happening::Suspend(suspend) => {
                self.generation += i64::from(self.suspend != suspend);
                self.suspend = suspend;
            }
            Happening::DrainEnds(outcome) => self.end_drain(outcome.map(drain_report).as_ref()),
            Happening::TimeoutChanged(timeout) => {
                self.generation += 1;
                if let Ok(request) = &mut self.request {
                    request.timeout = timeout;
                    request.limits.timeout = Some(timeout);
                    request.asked.timeout = Some(timeout);
                    request.generation = Some(self.generation);
                }
            }
            Happening::JobSuspended => {
                // The Job controller deletes the pods of a Job that is suspended.
                if let Some((number, job)) = self.jobs.last_mut().filter(|(_, job)| !job.finished) {
                    job.suspended = true;
                    for pod in self.pods.iter_mut().filter(|pod| pod.attempt == *number) {
                        pod.deleting = true;
                    }
                }
            }
            Happening::JobLetGo => self.jobs.iter_mut().for_each(|(_, job)| job.suspended = false),
            Happening::Attempt(ending, seconds) => self.attempt(ending, seconds),
            Happening::StartRequested(value) => self.start_requested = Some(value.to_string()),
            Happening::Time(seconds) => self.now += SignedDuration::from_secs(seconds),
        }
        self.sweep();
    }

    fn attempt(&mut self, ending: Ending, seconds: i64) {
        if let Some(due) = &self.status.next_attempt_time {
            self.now = self.now.max(due.0);
        }
        for step in [Happening::JobLetGo, Happening::JobController, Happening::RunnerStarts] {
            self.look(true);
            self.happen(step);
        }
        self.look(true);
        self.happen(Happening::Time(seconds));
        match ending {
            Ending::Reports(outcome) => self.happen(Happening::RunnerEnds(outcome)),
            Ending::Dies => self.happen(Happening::RunnerDies),
            Ending::Deleted => self.happen(Happening::PodDeleted),
            Ending::Evicted => self.happen(Happening::PodEvicted),
            Ending::ForcedAway => self.happen(Happening::PodForcedAway),
            Ending::Suspended => self.happen(Happening::JobSuspended),
        }
        self.happen(Happening::RunnerEnds(Outcome::Stopped));
        self.happen(Happening::PodTurnsTerminal);
        self.look(true);
        self.happen(Happening::JobController);
        self.look(true);
    }
}
