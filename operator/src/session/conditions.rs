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

/// The condition of a type.
pub fn find<'a>(status: &'a AgenticSessionStatus, type_: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|c| c.type_ == type_)
}

/// The reason of a condition that says no.
pub fn denied<'a>(status: &'a AgenticSessionStatus, type_: &str) -> Option<&'a str> {
    let found = find(status, type_)?;
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

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const THEN: Timestamp = Timestamp::UNIX_EPOCH;

    fn now() -> Timestamp {
        "2026-01-02T03:04:05Z".parse().unwrap()
    }

    /// Four of its records were acknowledged, of five.
    fn status() -> AgenticSessionStatus {
        AgenticSessionStatus {
            acked_seq: Some(4),
            last_seq: Some(5),
            ..AgenticSessionStatus::default()
        }
    }

    fn said(status: &AgenticSessionStatus, type_: &str) -> (String, String, String, Timestamp) {
        let found: Vec<_> = status.conditions.iter().filter(|c| c.type_ == type_).collect();
        let [one] = found[..] else { panic!("{found:?}") };
        (
            one.status.clone(),
            one.reason.clone(),
            one.message.clone(),
            one.last_transition_time.0,
        )
    }

    #[rstest]
    #[case::all(Some((Outcome::Succeeded, Delivery::Delivered, 5)), [("True", "Delivered", "All records"); 2])]
    #[case::not_all(Some((Outcome::Succeeded, Delivery::Failed, 4)), [("False", "Undelivered", "4 of 5; the rest is on"); 2])]
    #[case::not_known_by_the_runner(Some((Outcome::Succeeded, Delivery::Failed, 5)), [("False", "Undelivered", "4 of 5"); 2])]
    #[case::stopped_before_it_said_so(
        Some((Outcome::Stopped, Delivery::Off, 5)), [("True", "Delivered", "All records"), ("Unknown", "NoGateway", "no gateway")],
    )]
    #[case::stopped_in_the_middle(
        Some((Outcome::Stopped, Delivery::Off, 4)), [("False", "Undelivered", "4 of 5"), ("Unknown", "NoGateway", "no gateway")],
    )]
    #[case::not_final(
        Some((Outcome::Running, Delivery::Delivered, 5)),
        [("False", "Undelivered", "4 of 5; the runner left no final report"), ("Unknown", "NoGateway", "no gateway")],
    )]
    #[case::no_report(None, [("False", "Undelivered", "no final report"), ("Unknown", "NoGateway", "no gateway")])]
    fn records_are_delivered_only_where_a_last_report_says_so(
        #[case] report: Option<(Outcome, Delivery, u64)>,
        #[case] with_and_without_a_gateway: [(&str, &str, &str); 2],
    ) {
        let report = report.map(|(outcome, events, acked_seq)| Report {
            events,
            acked_seq,
            last_seq: 5,
            ..Report::new(outcome, 1)
        });
        for (gateway, expected) in [true, false].into_iter().zip(with_and_without_a_gateway) {
            let mut next = status();
            events(&mut next, report.as_ref(), gateway, now());
            let (is, reason, message, _) = said(&next, condition::EVENTS_DELIVERED);
            assert_eq!((&*is, &*reason), (expected.0, expected.1));
            assert!(message.contains(expected.2), "{message}");
        }
    }

    #[test]
    fn a_run_without_a_runner_leaves_said_what_earlier_attempts_left() {
        for (gateway, expected) in [(true, ("True", "Delivered")), (false, ("Unknown", "NoGateway"))] {
            let mut next = status();
            set(&mut next, condition::FINISHED, "True", Reason::Timeout, "", THEN);
            no_events(&mut next, gateway, now());
            let (is, reason, ..) = said(&next, condition::EVENTS_DELIVERED);
            assert_eq!((&*is, &*reason), expected);
            lost(&mut next, "the volume is gone", now());
            let before = next.clone();
            no_events(&mut next, gateway, now());
            assert_eq!(next, before);
            assert_eq!(
                said(&next, condition::EVENTS_DELIVERED).2,
                "Acknowledged to 4 of 5; the volume is gone."
            );
        }
    }

    #[test]
    fn what_holds_up_a_delivery_is_said_while_there_is_one_to_make() {
        let mut next = status();
        events(&mut next, None, true, THEN);
        held_up(&mut next, "a quota is full.", now());
        let (is, reason, message, since) = said(&next, condition::EVENTS_DELIVERED);
        assert_eq!(
            (&*is, &*reason, since),
            ("False", "Undelivered", THEN),
            "no other status than before"
        );
        assert_eq!(message, "Acknowledged to 4 of 5; a quota is full.");
        for others in [Some(Delivery::Delivered), None] {
            match others {
                Some(delivered) => {
                    let report = Report {
                        events: delivered,
                        ..Report::new(Outcome::Succeeded, 1)
                    };
                    events(&mut next, Some(&report), true, now());
                }
                None => lost(&mut next, "the session was deleted", now()),
            }
            let before = next.clone();
            held_up(&mut next, "a quota is full.", now());
            assert_eq!(next, before);
        }
    }

    #[rstest]
    #[case(Delivery::Delivered, "True", "Delivered")]
    #[case(Delivery::Failed, "False", "Undelivered")]
    #[case(Delivery::Off, "Unknown", "TracingOff")]
    fn the_trace_is_as_the_report_says(#[case] traces: Delivery, #[case] is: &str, #[case] reason: &str) {
        let mut next = status();
        let report = Report {
            traces,
            ..Report::new(Outcome::Succeeded, 1)
        };
        deliveries(&mut next, &report, true, now());
        let found = said(&next, condition::TRACES_DELIVERED);
        assert_eq!((&*found.0, &*found.1), (is, reason));
        assert_eq!(next.conditions.len(), 2, "and of the records it is said too");
    }

    #[test]
    fn a_condition_is_since_its_status_is_and_no_longer_than_a_message_may_be() {
        let mut next = AgenticSessionStatus {
            observed_generation: Some(7),
            ..status()
        };
        set(&mut next, condition::ADMITTED, "False", Reason::Queued, "wait", THEN);
        set(
            &mut next,
            condition::ADMITTED,
            "False",
            Reason::Queued,
            &"é".repeat(1_024),
            now(),
        );
        assert_eq!(
            said(&next, condition::ADMITTED),
            ("False".into(), "Queued".into(), "é".repeat(1_024), THEN)
        );
        set(
            &mut next,
            condition::ADMITTED,
            "True",
            Reason::Admitted,
            &"é".repeat(1_025),
            now(),
        );
        let (_, _, message, since) = said(&next, condition::ADMITTED);
        assert_eq!((message, since), ("é".repeat(1_024) + "…", now()));
        assert_eq!(
            (
                denied(&next, condition::ADMITTED),
                next.conditions[0].observed_generation
            ),
            (None, Some(7))
        );
        set(&mut next, condition::FINISHED, "True", Reason::Timeout, "", now());
        remove(&mut next, &[condition::ADMITTED]);
        assert_eq!(
            next.conditions.iter().map(|c| &*c.type_).collect::<Vec<_>>(),
            [condition::FINISHED]
        );
    }
}
