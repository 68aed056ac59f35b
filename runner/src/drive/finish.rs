//! The end of an attempt: nothing runs any more, the end is recorded, and what can be delivered is.

use std::path::Path;

use protocol::report::Delivery;
use protocol::{Outcome, Report};
use tokio::time::{Duration, Instant, timeout, timeout_at};

use super::ladder::KILLED;
use super::{Attempt, End};
use crate::kill_point;
use crate::report::ReportFile;
use crate::status::Phase;

/// How long acknowledgements are waited for.
const ACKS: Duration = Duration::from_secs(30);
/// How long the trace may take.
const TRACES: Duration = Duration::from_secs(10);
/// How long the volume may take to record the end.
const CLOSED: Duration = Duration::from_secs(10);
/// How long the volume may take to release the lease.
const RELEASED: Duration = Duration::from_secs(5);
/// How long responses in flight may take to be accounted for.
const SETTLED: Duration = Duration::from_secs(2);

/// The end of an attempt that never got to its records. `events`: what becomes of those that earlier ones left.
pub(super) fn without_records(path: &Path, attempt: u32, events: Delivery, end: &End) -> Outcome {
    let report = Report {
        events,
        message: end.message.clone(),
        ..Report::new(end.outcome, attempt)
    };
    let written = ReportFile::open(path).and_then(|file| file.write(&report));
    if let Err(error) = written {
        tracing::error!(%error, "there is no report");
    }
    tell(end);
    end.outcome
}

/// Says on stderr why it did not go well.
fn tell(end: &End) {
    if !end.message.is_empty() {
        tracing::error!(outcome = ?end.outcome, "{}", end.message);
    }
}

impl Attempt {
    /// Ends the attempt; returns its outcome.
    pub(super) async fn finish(mut self, mut end: End) -> Outcome {
        end.message = self.journal.redacted(&end.message);
        tell(&end);
        self.publish(|status| status.phase = Phase::Ending);
        if let Some(proxy) = &self.proxy {
            self.retry_after = proxy.witness().retry_after.filter(|_| end.outcome.is_transient());
            proxy.cut();
        }
        // Whatever kills us from here on, the report says how it ended.
        self.write_report(&end);
        if let Some(agent) = &mut self.agent
            && !agent.kill(KILLED).await
        {
            // A shim whose runner is gone goes, and takes everything with it.
            self.agent = None;
        }
        if end.outcome == Outcome::Superseded || !self.keeper.holding().is_held() {
            // The records are another runner's now, or may be.
            return end.outcome;
        }
        match timeout(CLOSED, self.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(error = %super::chain(&error), "the end of the attempt could not be recorded");
            }
            Err(_) => tracing::error!("the end of the attempt could not be recorded: the volume does not answer"),
        }
        let delivered = self.deliver().await;
        kill_point::reach("report", 0);
        self.write_final(&end, delivered);
        kill_point::reach("reported", 0);
        // Before the next runner on this folder may listen there.
        self.control = None;
        if let Err(error) = self.keeper.release(RELEASED).await {
            tracing::warn!(%error, "the lease could not be released");
        }
        crate::kill_point::pass("released");
        end.outcome
    }

    /// Accounts for the responses that were cut, and writes the end.
    async fn close(&mut self) -> Result<(), crate::spool::SpoolError> {
        if let Some(proxy) = self.proxy.take() {
            let deadline = Instant::now() + SETTLED;
            let settled = timeout_at(deadline, proxy.settled());
            tokio::pin!(settled);
            loop {
                tokio::select! {
                    biased;
                    // On a full disk nothing of it can be kept, but the end still can.
                    Some(event) = self.metered.recv() => drop(self.meter(event)),
                    _ = &mut settled => break,
                }
            }
            while let Ok(event) = self.metered.try_recv() {
                let _ = self.meter(event);
            }
        }
        let outcome = self.ending;
        let seq = self.journal.end(outcome)?;
        self.journal.spool().durable(seq).await?;
        crate::kill_point::pass("ended");
        Ok(())
    }

    /// Waits for acknowledgements and for the trace, at the same time.
    async fn deliver(&mut self) -> (Delivery, Delivery) {
        let exporter = self.journal.take_exporter();
        let traces = async {
            match exporter {
                Some(exporter) => exporter.finish(Instant::now() + TRACES).await,
                None => Delivery::Off,
            }
        };
        let events = async {
            match timeout(ACKS, self.acknowledged()).await {
                Ok(delivery) => delivery,
                Err(_) => Delivery::Failed,
            }
        };
        tokio::join!(events, traces)
    }

    /// Serves the uplink until everything is acknowledged.
    async fn acknowledged(&mut self) -> Delivery {
        loop {
            let last = self.journal.spool().next_seq() - 1;
            let Some(uplink) = &mut self.uplink else {
                return Delivery::Off;
            };
            let request = tokio::select! {
                acked = uplink.acknowledged(last) => {
                    return if acked { Delivery::Delivered } else { Delivery::Failed };
                }
                request = uplink.request() => request,
            };
            let Some(request) = request else {
                return Delivery::Failed;
            };
            if self.journal.append_again(request).await.is_err() {
                return Delivery::Failed;
            }
        }
    }

    /// Leaves a report when the totals have changed, so that a runner that is killed has told what it used.
    pub(super) fn report_totals(&mut self) {
        let history = self.journal.history();
        let totals = (history.rounds, history.usage(), history.conversation);
        if self.ending == Outcome::Running && self.reported != totals {
            self.reported = totals;
            self.write_report(&End::new(Outcome::Running, ""));
        }
    }

    /// Leaves a report in case we are killed before the last one.
    pub(super) fn write_report(&mut self, end: &End) {
        self.ending = end.outcome;
        // What was not delivered when we died was not delivered.
        let pending = |on: bool| if on { Delivery::Failed } else { Delivery::Off };
        let events = pending(self.uplink.is_some());
        let traces = pending(self.trace_id.is_some());
        self.write_final(end, (events, traces));
    }

    fn write_final(&self, end: &End, (events, traces): (Delivery, Delivery)) {
        let Some(file) = &self.report else { return };
        let history = self.journal.history();
        let report = Report {
            turns: history.rounds,
            usage: history.usage(),
            cost_usd: history.cost(),
            last_seq: self.journal.spool().next_seq() - 1,
            acked_seq: self.uplink.as_ref().map_or(0, crate::uplink::Uplink::acked),
            events,
            traces,
            retry_after: self.retry_after,
            repos: self.repos.clone(),
            sdk_session_id: history.conversation.map(|id| id.to_string()),
            trace_id: self.trace_id.clone(),
            message: end.message.clone(),
            result: self.journal.redacted(&history.result),
            ..Report::new(end.outcome, self.journal.attempt())
        };
        if let Err(error) = file.write(&report) {
            tracing::error!(%error, "the report could not be written");
        }
        self.last_word.reported(file, report);
    }
}
