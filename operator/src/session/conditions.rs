//! Conditions of a session's status.

use crds::{AgenticSessionStatus, condition};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use protocol::{Reason, Report, report::Delivery};

/// What became of records and trace.
pub fn deliveries(next: &mut AgenticSessionStatus, report: &Report, now: Timestamp) {
    let (status, reason, message) = match report.events {
        Delivery::Delivered => ("True", Reason::Delivered, "All records are acknowledged.".to_owned()),
        Delivery::Failed => {
            let message = format!(
                "Acknowledged to {} of {}; the rest is on the session's volume.",
                report.acked_seq, report.last_seq
            );
            ("False", Reason::Undelivered, message)
        }
        Delivery::Off => ("Unknown", Reason::NoGateway, "There is no gateway.".to_owned()),
    };
    set(next, condition::EVENTS_DELIVERED, status, reason, &message, now);
    let (status, reason, message) = match report.traces {
        Delivery::Delivered => ("True", Reason::Delivered, "The trace has arrived."),
        Delivery::Failed => (
            "False",
            Reason::Undelivered,
            "Not all of the trace arrived; see the runner's log.",
        ),
        Delivery::Off => ("Unknown", Reason::TracingOff, "Tracing is not configured."),
    };
    set(next, condition::TRACES_DELIVERED, status, reason, message, now);
}

/// Sets a condition; the time stays when its status does.
pub fn set(status: &mut AgenticSessionStatus, type_: &str, is: &str, reason: Reason, message: &str, now: Timestamp) {
    let old = status.conditions.iter().position(|c| c.type_ == type_);
    let since = old
        .map(|at| &status.conditions[at])
        .filter(|c| c.status == is)
        .map(|c| c.last_transition_time.clone());
    let condition = Condition {
        type_: type_.to_owned(),
        status: is.to_owned(),
        reason: reason.as_str().to_owned(),
        message: bounded(message),
        last_transition_time: since.unwrap_or(Time(now)),
        observed_generation: status.observed_generation,
    };
    match old {
        Some(at) => status.conditions[at] = condition,
        None => status.conditions.push(condition),
    }
}

/// Takes conditions away that say nothing of the new attempt.
pub fn remove(status: &mut AgenticSessionStatus, types: &[&str]) {
    status.conditions.retain(|c| !types.contains(&&*c.type_));
}

/// Messages come from kubelets, registries and models: status stays small.
pub fn bounded(message: &str) -> String {
    let cut = message.chars().take(1_024).collect::<String>();
    if cut.len() < message.len() { cut + "…" } else { cut }
}
