//! What the operator counts, for `/metrics`.

use std::{
    sync::atomic::AtomicU64,
    time::{Duration, Instant},
};

use crds::{AgenticSessionStatus, Phase};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{
    calls::Writes,
    session::{Memory, Queue},
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Result {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    phase: &'static str,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InPhase {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tokens {
    kind: &'static str,
}

/// What the operator counts.
pub struct Metrics {
    registry: Registry,
    sessions: Family<InPhase, Gauge>,
    queue_depth: Gauge,
    queue_wait: Histogram,
    time_to_job: Histogram,
    session_duration: Histogram,
    cost: Counter<f64, AtomicU64>,
    tokens: Family<Tokens, Counter>,
    reconciles: Family<Result, Counter>,
    durations: Histogram,
    status_writes: Counter,
    attempts: Counter,
    ended: Family<Ended, Counter>,
    /// 1 while this process holds the lease.
    pub leader: Gauge,
    /// Seconds that this machine's clock is ahead of the API server's.
    pub clock_ahead: Gauge,
}

impl Metrics {
    /// With what the client counts.
    pub fn new(writes: Writes) -> Self {
        let mut registry = Registry::with_prefix("agentic_operator");
        let metrics = Self {
            reconciles: Family::default(),
            // 1 ms to 32 s.
            durations: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            status_writes: Counter::default(),
            attempts: Counter::default(),
            ended: Family::default(),
            sessions: Family::default(),
            queue_depth: Gauge::default(),
            queue_wait: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            time_to_job: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            // 1 s to 9 hours.
            session_duration: Histogram::new(exponential_buckets(1.0, 2.0, 16)),
            cost: Counter::default(),
            tokens: Family::default(),
            leader: Gauge::default(),
            clock_ahead: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register("reconciles", "Looks at sessions, by result", metrics.reconciles.clone());
        registry.register_with_unit(
            "reconcile_duration",
            "Time that a look takes",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register(
            "status_writes",
            "Writes of a session's status",
            metrics.status_writes.clone(),
        );
        registry.register("attempts", "Attempts begun", metrics.attempts.clone());
        registry.register(
            "runs_ended",
            "Runs that ended, by phase and reason",
            metrics.ended.clone(),
        );
        registry.register(
            "api_writes",
            "Writes that the API server took, by verb and kind",
            writes,
        );
        registry.register("sessions", "Sessions by phase", metrics.sessions.clone());
        registry.register(
            "queue_depth",
            "Sessions that wait to be looked at",
            metrics.queue_depth.clone(),
        );
        for (name, help, histogram) in [
            (
                "queue_wait",
                "Time from a change to the look at it",
                &metrics.queue_wait,
            ),
            (
                "time_to_job",
                "Time from seeing a new session to its Job",
                &metrics.time_to_job,
            ),
            (
                "session_duration",
                "Running time of runs that ended",
                &metrics.session_duration,
            ),
        ] {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        registry.register(
            "cost_usd",
            "What ended attempts cost, in US dollars",
            metrics.cost.clone(),
        );
        registry.register("tokens", "Tokens of ended attempts, by kind", metrics.tokens.clone());
        registry.register_with_unit(
            "clock_ahead",
            "How far this machine's clock is ahead of the API server's",
            Unit::Seconds,
            metrics.clock_ahead.clone(),
        );
        registry.register("leader", "1 while this process holds the lease", metrics.leader.clone());
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// A session waited for so long to be looked at.
    pub fn waited(&self, time: Duration) {
        self.queue_wait.observe(time.as_secs_f64());
    }

    /// The first Job of a session was made so long after the session was seen.
    pub fn job_made(&self, age: Duration) {
        self.time_to_job.observe(age.as_secs_f64());
    }

    /// The metrics in the `OpenMetrics` text format.
    pub fn text(&self, memory: &Memory, queue: &Queue) -> String {
        self.queue_depth.set(i64::try_from(queue.depth()).unwrap_or(i64::MAX));
        let phases = memory.phases();
        for phase in Phase::ALL {
            let count = phases.get(phase.as_str()).copied().unwrap_or(0);
            self.sessions
                .get_or_create(&InPhase { phase: phase.as_str() })
                .set(count);
        }
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// A look begins.
    pub fn reconcile_started(&self) -> Timer<'_> {
        Timer {
            metrics: self,
            since: Instant::now(),
        }
    }

    /// A status was written.
    pub fn status_written(&self, old: &AgenticSessionStatus, next: &AgenticSessionStatus) {
        self.status_writes.inc();
        if next.attempt.is_some() && old.attempt != next.attempt {
            self.attempts.inc();
        }
        self.spent(old, next);
        if next.phase.is_terminal() && !old.phase.is_terminal() {
            self.session_duration.observe(next.running_seconds.unwrap_or(0) as f64);
            // The reasons are those of one enum: few.
            let reason = next.reason.clone().unwrap_or_default();
            self.ended
                .get_or_create(&Ended {
                    phase: next.phase.as_str(),
                    reason,
                })
                .inc();
        }
    }
}

impl Metrics {
    /// Totals never fall: what they grew by was spent.
    fn spent(&self, old: &AgenticSessionStatus, next: &AgenticSessionStatus) {
        let usd = |status: &AgenticSessionStatus| status.cost_usd.as_ref().and_then(|usd| usd.parse::<f64>().ok());
        let grown = usd(next).unwrap_or(0.0) - usd(old).unwrap_or(0.0);
        if grown > 0.0 {
            self.cost.inc_by(grown);
        }
        let usage = |status: &AgenticSessionStatus| {
            status.usage.as_ref().map_or([0; 4], |usage| {
                [
                    usage.input_tokens,
                    usage.output_tokens,
                    usage.cache_read_input_tokens,
                    usage.cache_creation_input_tokens,
                ]
            })
        };
        let kinds = ["input", "output", "cache_read", "cache_creation"];
        for ((kind, before), after) in kinds.into_iter().zip(usage(old)).zip(usage(next)) {
            if after > before {
                self.tokens.get_or_create(&Tokens { kind }).inc_by(after - before);
            }
        }
    }
}

/// Measures one look.
pub struct Timer<'a> {
    metrics: &'a Metrics,
    since: Instant,
}

impl Timer<'_> {
    /// The look is over.
    pub fn finished(self, result: &'static str) {
        self.metrics.reconciles.get_or_create(&Result { result }).inc();
        self.metrics.durations.observe(self.since.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_counted_once_when_it_ends() {
        let metrics = Metrics::new(Writes::default());
        let running = AgenticSessionStatus {
            phase: Phase::Running,
            attempt: Some(1),
            ..Default::default()
        };
        let failed = AgenticSessionStatus {
            phase: Phase::Failed,
            reason: Some("Timeout".into()),
            ..running.clone()
        };
        metrics.status_written(&running, &failed);
        metrics.status_written(&failed, &failed);
        metrics.reconcile_started().finished("ok");
        let text = metrics.text(&Memory::default(), &Queue::new(1));
        assert!(
            text.contains(r#"agentic_operator_runs_ended_total{phase="Failed",reason="Timeout"} 1"#),
            "{text}"
        );
        assert!(
            text.contains(r#"agentic_operator_reconciles_total{result="ok"} 1"#),
            "{text}"
        );
    }
}
