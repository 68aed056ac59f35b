//! Conditions of a session's status.

use crds::{AgenticSessionStatus, condition};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use protocol::{Outcome, Reason, Report, report::Delivery};

/// What became of records and trace, as the attempt's last report has it.
pub fn deliveries(next: &mut AgenticSessionStatus, report: &Report, gateway: bool, now: Timestamp) {
    events(next, Some(report), gateway, now);
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

/// What became of the records of an attempt or a drain that left this report, or none.
///
/// A report that is not final was written before the last records were: how many there are, nobody knows but the volume.
pub fn events(next: &mut AgenticSessionStatus, report: Option<&Report>, gateway: bool, now: Timestamp) {
    let last = report.filter(|report| report.outcome != Outcome::Running);
    let (status, reason, message) = match last {
        Some(report) if report.events == Delivery::Delivered => {
            ("True", Reason::Delivered, "All records are acknowledged.".to_owned())
        }
        Some(report) if gateway || report.events == Delivery::Failed => {
            // One that was told to stop may not have come to say what became of its records.
            if report.events == Delivery::Off && report.acked_seq >= report.last_seq {
                ("True", Reason::Delivered, "All records are acknowledged.".to_owned())
            } else {
                (
                    "False",
                    Reason::Undelivered,
                    numbers(next, "the rest is on the session's volume"),
                )
            }
        }
        None if gateway => {
            let rest = "the runner left no final report: what is missing is on the session's volume";
            ("False", Reason::Undelivered, numbers(next, rest))
        }
        Some(_) | None => ("Unknown", Reason::NoGateway, "There is no gateway.".to_owned()),
    };
    set(next, condition::EVENTS_DELIVERED, status, reason, &message, now);
}

/// The run ended without a runner: there is nothing to deliver but what earlier attempts left, which the condition tells of.
pub fn no_events(next: &mut AgenticSessionStatus, gateway: bool, now: Timestamp) {
    if next.conditions.iter().any(|c| c.type_ == condition::EVENTS_DELIVERED) {
        return;
    }
    let (status, reason, message) = if gateway {
        (
            "True",
            Reason::Delivered,
            "The runner did not start: there are no records.",
        )
    } else {
        ("Unknown", Reason::NoGateway, "There is no gateway.")
    };
    set(next, condition::EVENTS_DELIVERED, status, reason, message, now);
}

/// What is left cannot be delivered now, and why.
pub fn held_up(next: &mut AgenticSessionStatus, why: &str, now: Timestamp) {
    if denied(next, condition::EVENTS_DELIVERED) == Some(Reason::Undelivered.as_str()) {
        let why = why.trim_end_matches('.');
        let message = numbers(next, why);
        set(
            next,
            condition::EVENTS_DELIVERED,
            "False",
            Reason::Undelivered,
            &message,
            now,
        );
    }
}

/// What was not delivered will not come any more.
pub fn lost(next: &mut AgenticSessionStatus, why: &str, now: Timestamp) {
    let message = numbers(next, why);
    set(next, condition::EVENTS_DELIVERED, "False", Reason::Lost, &message, now);
}

fn numbers(status: &AgenticSessionStatus, rest: &str) -> String {
    format!(
        "Acknowledged to {} of {}; {rest}.",
        status.acked_seq.unwrap_or(0),
        status.last_seq.unwrap_or(0)
    )
}

/// The reason of a condition that says no.
pub fn denied<'a>(status: &'a AgenticSessionStatus, type_: &str) -> Option<&'a str> {
    let found = status.conditions.iter().find(|c| c.type_ == type_)?;
    (found.status == "False").then_some(&*found.reason)
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
