//! Jobs and pods of the model's world: made, counted, deleted and let go as a cluster does it.

use crds::Phase;
use jiff::{SignedDuration, Timestamp};
use protocol::{Outcome, Report, report::Delivery, spec::LiveLimits};

use super::{Model, TIMEOUT, rules::is_live};
use crate::session::{
    build,
    observed::{OurJob, PodSeen, Resolved, RunnerSeen},
    plan::{Attempt, Target, Tuned},
};

impl Model {
    pub fn make_job(&mut self, attempt: Attempt) {
        let living = self.pods.iter().chain(&self.bare).filter(|pod| !pod.is_over()).count();
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
        let due = self.status.next_attempt_time.as_ref();
        assert!(
            due.is_none_or(|due| due.0 <= self.now),
            "attempt {} begins too early",
            attempt.number
        );
        self.made.push(attempt.number);
        let job = OurJob {
            name: build::job_name("write-poem", attempt.number),
            uid: format!("job-{}", attempt.number),
            created: Some(self.now),
            resolved: Some(Resolved {
                generation: Some(self.generation),
                used_seconds: attempt.used_seconds,
                limits: LiveLimits {
                    timeout: Some(self.request.as_ref().map_or(TIMEOUT, |request| request.timeout)),
                    ..LiveLimits::default()
                },
                asked: self.request.as_ref().ok().map(|request| request.asked),
                ..Resolved::default()
            }),
            suspended: attempt.held,
            ..OurJob::default()
        };
        self.jobs.push((attempt.number, job));
    }

    pub fn make_drain(&mut self, number: u32) {
        assert!(self.gateway, "a drain without a gateway");
        assert!(self.status.phase.is_terminal(), "a drain in the middle of a run");
        assert!(
            self.pods
                .iter()
                .chain(&self.drain_pods)
                .chain(&self.bare)
                .all(PodSeen::is_over),
            "a drain begins while a pod lives"
        );
        assert!(
            self.drains.iter().all(|(n, job)| *n < number && job.finished),
            "a drain beside another"
        );
        let job = OurJob {
            name: build::drain_name("write-poem", number),
            uid: format!("drain-{number}"),
            created: Some(self.now),
            ..OurJob::default()
        };
        self.drains.push((number, job));
    }

    pub fn delete(&mut self, target: &Target) {
        match target {
            Target::Pod(_, uid) if self.bare.iter().any(|pod| pod.uid == *uid) => {
                let its_own = self.bare.iter_mut().filter(|pod| pod.uid == *uid);
                its_own.for_each(|pod| pod.deleting = true);
            }
            Target::Pod(_, uid) => {
                assert_eq!(
                    self.status.phase,
                    Phase::Stopping,
                    "a pod is deleted before status says so"
                );
                if let Some(pod) = self.pods.iter_mut().find(|pod| pod.uid == *uid) {
                    assert!(
                        !pod.deleting && !pod.is_over(),
                        "a pod is deleted that ends or has ended"
                    );
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
                self.check_job_may_go(uid);
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

    /// What has ended is kept, and with it the log, for as long as is set unless five newer are; in any case until its end is in status.
    fn check_job_may_go(&self, uid: &str) {
        let Some((attempt, job)) = self.jobs.iter().find(|(_, job)| job.uid == uid && job.finished) else {
            return;
        };
        let under_way = is_live(&self.status) && self.status.attempt == Some(*attempt);
        assert!(!under_way, "Job {} goes before its end is recorded", job.name);
        let kept = self.now.duration_since(job.finished_at.unwrap());
        let newer = self.jobs.iter().filter(|(n, job)| n > attempt && job.finished).count();
        assert!(
            kept >= SignedDuration::from_hours(1) || newer >= 5,
            "Job {} was kept for {kept:#} only",
            job.name
        );
    }

    /// What is under way is told of other limits.
    pub fn tell(&mut self, tuned: &Tuned) {
        self.told += 1;
        match tuned {
            Tuned::Job(_, uid, resolved) => {
                let (_, job) = self.jobs.iter_mut().find(|(_, job)| job.uid == *uid).unwrap();
                assert_ne!(job.resolved, Some(*resolved), "the Job knows that");
                job.resolved = Some(*resolved);
            }
            Tuned::Queue(_, uid, queue) => {
                let mut jobs = self.jobs.iter_mut().map(|(_, job)| job);
                let job = jobs.find(|job| job.uid == *uid).unwrap();
                assert!(job.suspended, "a Job that may run is moved to another queue");
                job.queue = Some(Box::new(queue.clone()));
            }
            Tuned::Pod(_, uid, limits) => {
                let pod = self.pods.iter_mut().find(|pod| pod.uid == *uid).unwrap();
                assert_ne!(pod.limits, Some(*limits), "the pod knows that");
                pod.limits = Some(*limits);
            }
        }
    }

    /// Lets go of a pod that may be gone by now.
    pub fn let_go(&mut self, uid: &str) {
        if self.pods.iter().any(|pod| pod.uid == uid) {
            self.release(uid);
        }
    }

    pub fn release(&mut self, uid: &str) {
        if let Some(pod) = self.drain_pods.iter_mut().find(|pod| pod.uid == uid) {
            let current = self.status.drain_job_name.is_some() && self.status.drains == Some(pod.attempt);
            assert!(!current, "a drain's report is let go before it is recorded");
            pod.held = false;
            self.sweep();
            return;
        }
        if let Some(pod) = self.bare.iter_mut().find(|pod| pod.uid == uid) {
            assert!(pod.is_over(), "a pod that nobody followed is let go while it lives");
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
    pub fn sweep(&mut self) {
        let jobs = &self.jobs;
        let tracked = |pod: &PodSeen| jobs.iter().any(|(n, job)| *n == pod.attempt && !job.finished);
        self.pods
            .retain(|pod| pod.held || tracked(pod) || !(pod.deleting && pod.is_over()));
        let drains = &self.drains;
        let tracked = |pod: &PodSeen| drains.iter().any(|(n, job)| *n == pod.attempt && !job.finished);
        self.drain_pods
            .retain(|pod| pod.held || tracked(pod) || !(pod.deleting && pod.is_over()));
        self.bare.retain(|pod| pod.held || !(pod.deleting && pod.is_over()));
        // Of an attempt that was never recorded and of which somebody took Job and pod away, nothing tells any more.
        let (jobs, pods, recorded) = (&self.jobs, &self.pods, self.status.attempt);
        self.made.retain(|made| {
            Some(*made) <= recorded
                || jobs.iter().any(|(n, _)| n == made)
                || pods.iter().any(|pod| pod.attempt == *made)
        });
    }

    /// Counts pods that are over, and makes the ones that are missing.
    pub fn job_controller(&mut self) {
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
                if !job.finished && !job.suspended && pods.iter().all(|pod| pod.attempt != *number) {
                    pods.push(pod_of(job, *number, self.forced, now));
                }
            }
        }
    }

    /// A drain's pod ends, with this report.
    pub fn end_drain(&mut self, report: Option<&Report>) {
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

    pub fn runner(&mut self, change: impl Fn(&RunnerSeen) -> Option<RunnerSeen>) {
        for pod in self.pods.iter_mut().filter(|pod| !pod.is_over()) {
            if let Some(next) = change(&pod.runner) {
                pod.runner = next;
                pod.trouble = None;
            }
        }
    }

    pub fn end_runner(&mut self, outcome: Option<Outcome>) {
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
}

/// What a drain leaves.
pub fn drain_report(outcome: Outcome) -> Report {
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
