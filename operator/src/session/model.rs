//! A model of the world for `decide`: an API server without surprises, a Job controller, a kubelet, and somebody who interferes.

mod children;
mod happening;
mod rules;

use crds::{AgenticSessionStatus, Phase};
use jiff::Timestamp;
use protocol::Outcome;
use serde_json::json;

use rules::{Tally, Terms};

use super::{
    decide::decide,
    observed::{ClaimSeen, JobSeen, Observed, OurJob, PodSeen, Policy, SessionSeen},
    plan::{Drain, Plan},
    validate::{Invalid, Request, tests::checked},
};
use crate::settings::TimingSettings;

pub use children::drain_report;
pub use happening::{Happening, happenings};

/// `spec.timeout` of the model's session.
pub const TIMEOUT: u64 = 120;

/// The world, with one session.
pub struct Model {
    pub now: Timestamp,
    pub created: Timestamp,
    pub generation: i64,
    pub suspend: bool,
    pub start_requested: Option<String>,
    pub status: AgenticSessionStatus,
    pub claim: ClaimSeen,
    pub jobs: Vec<(u32, OurJob)>,
    pub pods: Vec<PodSeen>,
    /// Attempts whose Job was ever made.
    pub made: Vec<u32>,
    pub request: Result<Request, Invalid>,
    /// There is a gateway, and records are left when a runner dies.
    pub gateway: bool,
    /// Drain Jobs, and their pods, as those of attempts.
    pub drains: Vec<(u32, OurJob)>,
    pub drain_pods: Vec<PodSeen>,
    /// Pods whose Job was taken away from above them before status named them.
    pub bare: Vec<PodSeen>,
    /// The session was deleted by its time to live.
    pub expired: bool,
    /// How often what is under way was told of other limits.
    pub told: usize,
    /// How many pods somebody took away.
    pub forced: u32,
    /// Attempts of the present run that are over.
    pub tally: Tally,
}

impl Model {
    pub fn new() -> Self {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        Self {
            now,
            created: now,
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
            bare: Vec::new(),
            expired: false,
            told: 0,
            forced: 0,
            tally: Tally::default(),
        }
    }

    pub fn observed(&self) -> Observed {
        let job = |n: Option<u32>| {
            let found = self.jobs.iter().find(|(number, _)| Some(*number) == n);
            found.map_or(JobSeen::Missing, |(_, job)| JobSeen::Ours(job.clone()))
        };
        let live = matches!(self.status.phase, Phase::Creating | Phase::Running | Phase::Stopping);
        Observed {
            session: SessionSeen {
                uid: "uid-of-write-poem".to_owned(),
                generation: Some(self.generation),
                created: Some(self.created),
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
            bare: self.bare.clone(),
            policy: Policy {
                gateway: self.gateway,
                timing: TimingSettings::default(),
                clock_is_sure: true,
            },
            unsaid: None,
        }
    }

    pub fn look(&mut self, lives: bool) -> Plan {
        let seen = self.observed();
        let plan = decide(&seen, &self.request, self.now);
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
        for tuned in &plan.tune {
            self.tell(tuned);
        }
        for target in &plan.delete {
            self.delete(target);
        }
        if plan.delete_session {
            assert!(self.status.phase.is_terminal(), "a session is deleted before its end");
            self.expired = true;
        }
        for (_, uid) in &plan.release {
            self.release(uid);
        }
        if lives {
            rules::check_look(&seen, &plan.status, self.now);
            self.write(plan.status.clone());
        }
        plan
    }

    /// Status is written, however old the news that led to it.
    pub fn write(&mut self, status: AgenticSessionStatus) {
        rules::check_change(&self.status, &status);
        let timeout = self.request.as_ref().map_or(TIMEOUT, |request| request.timeout);
        let of_attempt = self.pods.iter().filter(|pod| Some(pod.attempt) == self.status.attempt);
        let terms = Terms {
            timeout,
            ephemeral: self.claim == ClaimSeen::Ephemeral,
            retry_after: of_attempt
                .filter_map(PodSeen::last_word)
                .find_map(|report| report.retry_after),
        };
        self.tally.follow(&self.status, &status, terms, self.now);
        self.status = status;
    }

    /// The world goes on by itself, kindly: what is deleted ends, what waits starts, what runs succeeds.
    pub fn settle(&mut self) {
        for _ in 0..80 {
            self.happen(Happening::JobController);
            for pod in self
                .pods
                .iter_mut()
                .chain(&mut self.drain_pods)
                .chain(&mut self.bare)
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
