//! What the operator counts, for `/metrics`.

use std::time::Instant;

use crds::AgenticSessionStatus;
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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Result {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    phase: &'static str,
    reason: String,
}

/// What the operator counts.
pub struct Metrics {
    registry: Registry,
    reconciles: Family<Result, Counter>,
    durations: Histogram,
    status_writes: Counter,
    attempts: Counter,
    ended: Family<Ended, Counter>,
    /// 1 while this process holds the lease.
    pub leader: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("agentic_operator");
        let metrics = Self {
            reconciles: Family::default(),
            // 1 ms to 32 s.
            durations: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            status_writes: Counter::default(),
            attempts: Counter::default(),
            ended: Family::default(),
            leader: Gauge::default(),
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
        registry.register("leader", "1 while this process holds the lease", metrics.leader.clone());
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// The metrics in the `OpenMetrics` text format.
    pub fn text(&self) -> String {
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
        if next.phase.is_terminal() && !old.phase.is_terminal() {
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
    use crds::Phase;

    use super::*;

    #[test]
    fn a_run_is_counted_once_when_it_ends() {
        let metrics = Metrics::default();
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
        let text = metrics.text();
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
