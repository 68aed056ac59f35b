//! What ends a session, and when it is deleted.

use crds::{Phase, condition};
use protocol::{Outcome, Report, report::Delivery};
use rstest::rstest;

use super::{brought_to, running, undelivered};
use crate::session::{
    decide::{decide, refused},
    model::{Happening, Model, drain_report},
    observed::{ClaimSeen, RunnerSeen},
    plan::Target,
    validate::Invalid,
};

#[test]
fn a_session_that_cannot_be_read_as_a_request_fails_with_what_to_do() {
    let mut model = Model {
        request: Err(Invalid::NotOnePrompt),
        ..Model::new()
    };
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Failed, Some("ConfigError"))
    );
    assert!(model.made.is_empty());
}

#[rstest]
fn an_ended_run_stays_ended_whatever_phase_somebody_else_writes(
    #[values(Phase::Completed, Phase::Failed, Phase::Stopped)] ended: Phase,
    #[values(Phase::Pending, Phase::Creating, Phase::Running, Phase::Stopping)] written: Phase,
) {
    let mut model = brought_to(ended);
    model.happen(Happening::Suspend(false));
    let mut seen = model.observed();
    seen.session.status.phase = written;
    seen.session.status.reason = None;
    let plan = decide(&seen, &model.request, model.now);
    model.status.observed_generation = Some(model.generation);
    assert_eq!(plan.status, model.status);
    assert!(plan.only_tells(), "{plan:#?}");
}

#[test]
fn a_session_is_deleted_when_its_time_is_over_and_its_records_are_delivered_and_not_before() {
    let mut model = Model {
        gateway: true,
        ..running()
    };
    model.request.as_mut().unwrap().ttl = Some(60);
    model.end_runner(None);
    model.end_runner(Some(Outcome::AgentError));
    if let RunnerSeen::Ended { report, .. } = &mut model.pods[0].runner {
        *report = Some(Box::new(Report {
            last_seq: 9,
            acked_seq: 2,
            ..Report::new(Outcome::AgentError, 1)
        }));
    }
    model.happen(Happening::PodTurnsTerminal);
    model.happen(Happening::JobController);
    model.look(true);
    assert_eq!(model.status.phase, Phase::Failed);
    model.look(true);
    model.happen(Happening::JobController);
    model.happen(Happening::Time(300));
    model.look(true);
    assert!(!model.expired, "its records are on their way: {:#?}", model.status);
    model.end_drain(Some(&drain_report(Outcome::Succeeded)));
    model.look(true);
    assert!(!model.expired, "what it delivered is recorded first");
    model.look(true);
    assert!(model.expired, "{:#?}", model.status);
}

fn delivered(model: &Model) -> (&str, &str) {
    let mut conditions = model.status.conditions.iter();
    let found = conditions.find(|c| c.type_ == condition::EVENTS_DELIVERED).unwrap();
    (&found.reason, &found.message)
}

#[test]
fn a_drain_that_finds_no_records_has_delivered_them_also_behind_one_that_could_not_look() {
    let mut model = undelivered();
    for (drain, outcome, events, expected) in [
        (1, Outcome::Stopped, Delivery::Failed, "Undelivered"),
        (2, Outcome::Succeeded, Delivery::Delivered, "Delivered"),
    ] {
        model.look(true);
        model.happen(Happening::JobController);
        model.look(true);
        assert_eq!(model.status.drains, Some(drain));
        model.end_drain(Some(&Report {
            events,
            last_seq: 0,
            acked_seq: 0,
            ..drain_report(outcome)
        }));
        model.happen(Happening::JobController);
        model.look(true);
        assert_eq!(delivered(&model).0, expected, "{:#?}", model.status);
        model.happen(Happening::Time(3_600));
        model.look(true);
        model.look(true);
    }
}

#[test]
fn nothing_is_delivered_from_a_claim_that_is_somebody_elses() {
    let mut model = undelivered();
    model.claim = ClaimSeen::Foreign;
    let plan = model.look(true);
    assert_eq!(plan.create_drain, None);
    let (reason, message) = delivered(&model);
    assert_eq!(reason, "Lost");
    assert!(message.contains("volume is gone"), "{message}");
}

#[test]
fn a_drain_that_somebody_holds_back_is_given_up_with_the_rest() {
    let mut model = undelivered();
    model.look(true);
    model.drains[0].1.suspended = true;
    let says = |model: &Model| {
        delivered(model)
            .1
            .contains("Job write-poem-drain-1, which delivers the rest, is suspended")
    };
    model.look(true);
    assert!(says(&model), "{:?}", delivered(&model));
    model.happen(Happening::Time(24 * 3_600 - 1));
    let job = Target::Job("write-poem-drain-1".into(), "drain-1".into());
    assert!(!model.look(true).delete.contains(&job));
    model.happen(Happening::Time(1));
    assert_eq!(model.look(true).delete, [job]);
    model.look(true);
    model.look(true);
    assert_eq!(delivered(&model).0, "Lost", "{:#?}", model.status);
    assert_eq!((&model.status.drain_job_name, model.status.drains), (&None, Some(1)));
}

#[rstest]
#[case::suspended(Phase::Stopped, false)]
#[case::ended(Phase::Completed, true)]
#[case::running(Phase::Running, false)]
fn a_session_that_is_only_suspended_is_not_deleted_by_its_time(#[case] phase: Phase, #[case] deleted: bool) {
    let mut model = brought_to(phase);
    model.request.as_mut().unwrap().ttl = Some(50);
    model.happen(Happening::Time(49));
    model.look(true);
    assert!(!model.expired);
    model.happen(Happening::Time(1));
    model.look(true);
    assert_eq!(model.expired, deleted);
}

#[test]
fn of_one_run_after_another_the_jobs_of_the_last_five_are_kept() {
    let mut model = Model::new();
    for run in 1..=8_u32 {
        model.start_requested = Some(run.to_string());
        for _ in 0..4 {
            model.happen(Happening::JobController);
            model.look(true);
            model.happen(Happening::RunnerStarts);
            model.look(true);
            model.happen(Happening::RunnerEnds(Outcome::Succeeded));
            model.happen(Happening::PodTurnsTerminal);
            model.look(true);
        }
        assert_eq!((model.status.phase, model.status.run), (Phase::Completed, Some(run)));
        model.happen(Happening::Time(1));
    }
    model.look(true);
    let left: Vec<_> = model.jobs.iter().map(|(number, _)| *number).collect();
    assert_eq!(left, [4, 5, 6, 7, 8]);
    model.happen(Happening::Time(3_601));
    model.look(true);
    assert!(model.jobs.is_empty(), "{left:?}");
}

#[test]
fn what_the_api_server_refuses_is_final_when_the_time_to_start_is_over() {
    let mut model = Model::new();
    let refusal = |model: &mut Model| {
        let said = ("Job", "write-poem-job", "pods \"x\" is forbidden");
        model.status = refused(&model.observed(), &model.request, said, model.now).status;
        model.status.clone()
    };
    assert_eq!(refusal(&mut model).phase, Phase::Pending);
    model.happen(Happening::Time(3_599));
    assert_eq!(refusal(&mut model).phase, Phase::Pending);
    model.happen(Happening::Time(1));
    let last = refusal(&mut model);
    assert_eq!(
        (last.phase, last.reason.as_deref()),
        (Phase::Failed, Some("ConfigError"))
    );
}
