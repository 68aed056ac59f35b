//! A model of the world for `decide`: an API server without surprises, a Job controller, a kubelet, and somebody who interferes.

use crds::{AgenticSessionStatus, Phase, condition};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use protocol::{Outcome, Reason, Report, report::Delivery, spec::LiveLimits};
use serde_json::json;

use super::{
    decide::{Attempt, Drain, Plan, Target, Tuned, decide},
    observed::{
        ClaimSeen, Grace, JobSeen, Observed, OurJob, PodSeen, Policy, Resolved, RunnerSeen, SessionSeen, Trouble,
    },
    pod::Disruption,
    validate::{DEFAULT_MAX_ATTEMPTS, Invalid, Request, tests::checked},
};
use crate::settings::TimingSettings;

/// `spec.timeout` of the model's session.
pub(super) const TIMEOUT: u64 = 120;

/// The world, with one session.
pub(super) struct Model {
    pub(super) now: Timestamp,
    pub(super) generation: i64,
    pub(super) suspend: bool,
    pub(super) start_requested: Option<String>,
    pub(super) status: AgenticSessionStatus,
    pub(super) claim: ClaimSeen,
    pub(super) jobs: Vec<(u32, OurJob)>,
    pub(super) pods: Vec<PodSeen>,
    /// Attempts whose Job was ever made.
    pub(super) made: Vec<u32>,
    pub(super) request: Result<Request, Invalid>,
    /// There is a gateway, and records are left when a runner dies.
    pub(super) gateway: bool,
    /// Drain Jobs, and their pods, as those of attempts.
    pub(super) drains: Vec<(u32, OurJob)>,
    pub(super) drain_pods: Vec<PodSeen>,
    /// The session was deleted by its time to live.
    pub(super) expired: bool,
    /// What the runner of the living pod, and its Job, were told last.
    pub(super) told: Vec<Tuned>,
    /// How many pods somebody took away.
    pub(super) forced: u32,
}

/// What happens in the world.
#[derive(Clone, Copy, Debug)]
pub(super) enum Happening {
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
    Suspend(bool),
    StartRequested(u8),
    DrainEnds(Option<Outcome>),
    TimeoutChanged(u64),
    JobSuspended,
    Time(i64),
}

/// Anything that may happen.
pub(super) fn happenings() -> impl Strategy<Value = Happening> {
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
        2 => any::<bool>().prop_map(Happening::Suspend),
        1 => any::<u8>().prop_map(Happening::StartRequested),
        2 => prop::option::of(prop::sample::select(vec![Outcome::Succeeded, Outcome::Undelivered])).prop_map(Happening::DrainEnds),
        1 => (1_u64..400).prop_map(Happening::TimeoutChanged),
        1 => Just(Happening::JobSuspended),
        3 => (1_i64..400).prop_map(Happening::Time),
    ]
}

impl Model {
    pub(super) fn new() -> Self {
        Self {
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            generation: 1,
            suspend: false,
            start_requested: None,
            status: AgenticSessionStatus::default(),
            claim: ClaimSeen::Missing,
            jobs: Vec::new(),
            pods: Vec::new(),
            made: Vec::new(),
            request: checked(json!({"prompt": "p", "timeout": TIMEOUT})),
            gateway: false,
            drains: Vec::new(),
            drain_pods: Vec::new(),
            expired: false,
            told: Vec::new(),
            forced: 0,
        }
    }

    pub(super) fn observed(&self) -> Observed {
        let job = |n: Option<u32>| {
            let found = self.jobs.iter().find(|(number, _)| Some(*number) == n);
            found.map_or(JobSeen::Missing, |(_, job)| JobSeen::Ours(job.clone()))
        };
        let live = matches!(self.status.phase, Phase::Creating | Phase::Running | Phase::Stopping);
        Observed {
            session: SessionSeen {
                generation: Some(self.generation),
                suspend: self.suspend,
                start_requested: self.start_requested.clone(),
                repos: Vec::new(),
                status: self.status.clone(),
            },
            claim: self.claim,
            job: job(self.status.attempt),
            next_job: if live {
                JobSeen::Missing
            } else {
                job(Some(self.status.attempt.unwrap_or(0) + 1))
            },
            earlier: self
                .jobs
                .iter()
                .filter(|(n, _)| Some(*n) < self.status.attempt)
                .map(|(_, job)| job.clone())
                .collect(),
            pods: self.pods.clone(),
            drains: self.drains.clone(),
            drain_pods: self.drain_pods.clone(),
            policy: Policy {
                gateway: self.gateway,
                timing: TimingSettings::default(),
            },
            unsaid: None,
        }
    }

    pub(super) fn look(&mut self, lives: bool) -> Plan {
        let before = self.status.clone();
        let plan = decide(&self.observed(), &self.request, self.now);
        if plan.create_claim {
            assert_eq!(self.claim, ClaimSeen::Missing);
            self.claim = ClaimSeen::Ours { bound: true };
        }
        if let Some(attempt) = plan.create_job {
            self.make_job(attempt);
        }
        if let Some(Drain { number, .. }) = plan.create_drain {
            self.make_drain(number);
        }
        self.told.extend(plan.tune.iter().cloned());
        for target in &plan.delete {
            self.delete(target);
        }
        if plan.delete_session {
            assert!(before.phase.is_terminal(), "a session is deleted before its end");
            self.expired = true;
        }
        for (_, uid) in &plan.release {
            self.release(uid);
        }
        if lives {
            self.status = plan.status.clone();
            check_transition(&before, &self.status);
        }
        plan
    }

    fn make_job(&mut self, attempt: Attempt) {
        let living = self.pods.iter().filter(|pod| !pod.is_over()).count();
        assert_eq!(living, 0, "attempt {} begins while a pod lives", attempt.number);
        assert!(
            self.drain_pods.iter().all(PodSeen::is_over) && self.drains.iter().all(|(_, job)| job.finished),
            "attempt {} begins beside a drain",
            attempt.number
        );
        assert!(
            self.jobs.iter().all(|(_, job)| job.finished),
            "another Job may still make a pod"
        );
        assert!(
            !self.made.contains(&attempt.number),
            "attempt {} is made twice",
            attempt.number
        );
        self.made.push(attempt.number);
        let job = OurJob {
            name: super::build::job_name("write-poem", attempt.number),
            uid: format!("job-{}", attempt.number),
            created: Some(self.now),
            resolved: Some(Resolved {
                generation: Some(self.generation),
                used_seconds: attempt.used_seconds,
                limits: LiveLimits {
                    timeout: Some(TIMEOUT),
                    ..LiveLimits::default()
                },
                ..Resolved::default()
            }),
            ..OurJob::default()
        };
        self.jobs.push((attempt.number, job));
    }

    fn make_drain(&mut self, number: u32) {
        assert!(self.gateway, "a drain without a gateway");
        assert!(self.status.phase.is_terminal(), "a drain in the middle of a run");
        assert!(
            self.pods.iter().chain(&self.drain_pods).all(PodSeen::is_over),
            "a drain begins while a pod lives"
        );
        assert!(
            self.drains.iter().all(|(n, job)| *n < number && job.finished),
            "a drain beside another"
        );
        let job = OurJob {
            name: super::build::drain_name("write-poem", number),
            uid: format!("drain-{number}"),
            created: Some(self.now),
            ..OurJob::default()
        };
        self.drains.push((number, job));
    }

    fn delete(&mut self, target: &Target) {
        match target {
            Target::Pod(_, uid) => {
                assert_eq!(
                    self.status.phase,
                    Phase::Stopping,
                    "a pod is deleted before status says so"
                );
                if let Some(pod) = self.pods.iter_mut().find(|pod| pod.uid == *uid) {
                    pod.deleting = true;
                }
            }
            Target::Job(_, uid) if uid.starts_with("drain-") => {
                for pod in self
                    .drain_pods
                    .iter_mut()
                    .filter(|pod| format!("drain-{}", pod.attempt) == *uid)
                {
                    pod.deleting = true;
                }
                self.drains.retain(|(_, job)| job.uid != *uid);
            }
            Target::Job(_, uid) => {
                for pod in self
                    .pods
                    .iter_mut()
                    .filter(|pod| format!("job-{}", pod.attempt) == *uid)
                {
                    pod.deleting = true;
                }
                self.jobs.retain(|(_, job)| job.uid != *uid);
            }
        }
    }

    /// Lets go of a pod that may be gone by now.
    pub(super) fn let_go(&mut self, uid: &str) {
        if self.pods.iter().any(|pod| pod.uid == uid) {
            self.release(uid);
        }
    }

    fn release(&mut self, uid: &str) {
        if let Some(pod) = self.drain_pods.iter_mut().find(|pod| pod.uid == uid) {
            let current = self.status.drain_job_name.is_some() && self.status.drains == Some(pod.attempt);
            assert!(!current, "a drain's report is let go before it is recorded");
            pod.held = false;
            self.sweep();
            return;
        }
        let judged = !matches!(self.status.phase, Phase::Creating | Phase::Running | Phase::Stopping);
        let pod = self.pods.iter_mut().find(|pod| pod.uid == uid).unwrap();
        let current = self.status.attempt.unwrap_or(0);
        assert!(
            pod.attempt < current || (judged && pod.attempt == current),
            "a report is let go before it is recorded"
        );
        pod.held = false;
        self.sweep();
    }

    /// Deleted pods go when nothing holds them: neither our finalizer nor that of a Job which has not counted them yet.
    fn sweep(&mut self) {
        let jobs = &self.jobs;
        let tracked = |pod: &PodSeen| jobs.iter().any(|(n, job)| *n == pod.attempt && !job.finished);
        self.pods
            .retain(|pod| pod.held || tracked(pod) || !(pod.deleting && pod.is_over()));
        let drains = &self.drains;
        let tracked = |pod: &PodSeen| drains.iter().any(|(n, job)| *n == pod.attempt && !job.finished);
        self.drain_pods
            .retain(|pod| pod.held || tracked(pod) || !(pod.deleting && pod.is_over()));
        // Of an attempt that was never recorded and of which somebody took Job and pod away, nothing tells any more.
        let (jobs, pods, recorded) = (&self.jobs, &self.pods, self.status.attempt);
        self.made.retain(|made| {
            Some(*made) <= recorded
                || jobs.iter().any(|(n, _)| n == made)
                || pods.iter().any(|pod| pod.attempt == *made)
        });
    }

    pub(super) fn happen(&mut self, happening: Happening) {
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
            Happening::StartRequested(value) => self.start_requested = Some(value.to_string()),
            Happening::Time(seconds) => self.now += SignedDuration::from_secs(seconds),
        }
        self.sweep();
    }

    /// Counts pods that are over, and makes the ones that are missing.
    fn job_controller(&mut self) {
        let now = self.now;
        for (jobs, pods) in [
            (&mut self.jobs, &mut self.pods),
            (&mut self.drains, &mut self.drain_pods),
        ] {
            for (number, job) in jobs {
                if pods.iter().any(|pod| pod.attempt == *number && pod.is_over()) {
                    job.finished = true;
                    job.finished_at.get_or_insert(now);
                }
                if !job.finished && pods.iter().all(|pod| pod.attempt != *number) {
                    pods.push(pod_of(job, *number, self.forced, now));
                }
            }
        }
    }

    /// A drain's pod ends, with this report.
    pub(super) fn end_drain(&mut self, report: Option<&Report>) {
        for pod in self.drain_pods.iter_mut().filter(|pod| !pod.is_over()) {
            pod.runner = RunnerSeen::Ended {
                since: None,
                until: None,
                exit_code: 75,
                out_of_memory: false,
                said: String::new(),
                report: report.cloned().map(Box::new),
            };
            pod.terminal = true;
        }
    }

    fn runner(&mut self, change: impl Fn(&RunnerSeen) -> Option<RunnerSeen>) {
        for pod in self.pods.iter_mut().filter(|pod| !pod.is_over()) {
            if let Some(next) = change(&pod.runner) {
                pod.runner = next;
                pod.trouble = None;
            }
        }
    }

    pub(super) fn end_runner(&mut self, outcome: Option<Outcome>) {
        let (now, attempt) = (self.now, self.pods.last().map_or(1, |pod| pod.attempt));
        self.runner(|runner| match runner {
            RunnerSeen::Running { since } => Some(RunnerSeen::Ended {
                since: *since,
                until: Some(now),
                exit_code: outcome.map_or(137, |outcome| outcome.exit_code().into()),
                out_of_memory: false,
                said: String::new(),
                report: outcome.map(|outcome| Box::new(Report::new(outcome, attempt))),
            }),
            RunnerSeen::Waiting | RunnerSeen::Ended { .. } => None,
        });
    }

    /// The world goes on by itself, kindly: what is deleted ends, what waits starts, what runs succeeds.
    pub(super) fn settle(&mut self) {
        for _ in 0..80 {
            self.happen(Happening::JobController);
            for pod in self
                .pods
                .iter_mut()
                .chain(&mut self.drain_pods)
                .filter(|pod| pod.deleting)
            {
                pod.terminal = true;
            }
            self.jobs.iter_mut().for_each(|(_, job)| job.suspended = false);
            self.sweep();
            self.look(true);
            self.happen(Happening::RunnerStarts);
            self.look(true);
            self.happen(Happening::RunnerEnds(Outcome::Succeeded));
            self.happen(Happening::PodTurnsTerminal);
            self.end_drain(Some(&drain_report(Outcome::Succeeded)));
            self.happen(Happening::Time(60));
            self.look(true);
        }
    }
}

/// What a drain leaves.
pub(super) fn drain_report(outcome: Outcome) -> Report {
    let events = if outcome == Outcome::Succeeded {
        Delivery::Delivered
    } else {
        Delivery::Failed
    };
    Report {
        events,
        last_seq: 17,
        acked_seq: if outcome == Outcome::Succeeded { 17 } else { 5 },
        ..Report::new(outcome, 1)
    }
}

fn pod_of(job: &OurJob, number: u32, forced: u32, now: Timestamp) -> PodSeen {
    PodSeen {
        name: format!("{}-{forced}", job.name),
        uid: format!("pod-{}-{forced}", job.uid),
        attempt: number,
        job_uid: job.uid.clone(),
        created: Some(now),
        deleting: false,
        deleted: None,
        scheduled: true,
        terminal: false,
        held: true,
        disruption: None,
        disk_full: false,
        init_failed: None,
        message: String::new(),
        runner: RunnerSeen::Waiting,
        trouble: None,
        limits: job.resolved.map(|resolved| resolved.limits),
        agent_restarts: 0,
        agent_out_of_memory: false,
    }
}

fn check_transition(before: &AgenticSessionStatus, after: &AgenticSessionStatus) {
    if before.phase.is_terminal() && before.run == after.run {
        assert_eq!(
            (
                before.phase,
                &before.reason,
                before.attempt,
                before.completion_time.clone()
            ),
            (after.phase, &after.reason, after.attempt, after.completion_time.clone()),
            "an ended run stays ended"
        );
    }
    assert!(after.attempt >= before.attempt && after.run >= before.run);
    let made = after.attempt.unwrap_or(0) - after.first_attempt.unwrap_or(1).min(after.attempt.unwrap_or(0));
    if after.phase == Phase::Creating {
        assert!(
            made < DEFAULT_MAX_ATTEMPTS + after.free_retries.unwrap_or(0),
            "more attempts than there are"
        );
    }
    if after.phase == Phase::Completed {
        assert_ne!(before.phase, Phase::Creating, "`Running` is never skipped");
    }
    let finished = after.conditions.iter().any(|c| c.type_ == condition::FINISHED);
    assert_eq!(
        finished,
        after.phase.is_terminal(),
        "the condition and the phase say the same"
    );
    assert_eq!(after.completion_time.is_some(), after.phase.is_terminal());
    assert!(
        after.reason.is_some() && after.message.is_some(),
        "there is always a why"
    );
}
