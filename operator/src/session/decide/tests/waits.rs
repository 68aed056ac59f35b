//! How long one waits that others must help.

use crds::{Phase, condition};
use jiff::SignedDuration;
use protocol::Outcome;
use rstest::rstest;

use super::{running, undelivered};
use crate::session::{
    decide::{decide, queued, refused},
    model::{Happening, Model, drain_report},
    observed::{ClaimSeen, InQueue},
    plan::{Plan, Target, Tuned},
    validate::Invalid,
};

/// Looks whenever it said that it would, for so long; answers how long the waits were.
fn waits(model: &mut Model, seconds: i64) -> Vec<i64> {
    let (mut waits, end) = (Vec::new(), model.now + SignedDuration::from_secs(seconds));
    while let Some(wake) = model.look(true).wake.filter(|_| model.now < end) {
        waits.push(wake.as_secs());
        model.happen(Happening::Time(wake.as_secs()));
    }
    waits
}

#[test]
fn one_whose_claim_is_missing_is_looked_at_ever_more_seldom_and_given_up_when_a_start_has_taken_too_long() {
    let mut model = Model {
        claim: ClaimSeen::Absent,
        ..Model::new()
    };
    let began = model.now;
    let waits = waits(&mut model, 10_000);
    assert!(
        waits[0] <= 5 && waits.iter().all(|wait| (1..=300).contains(wait)),
        "{waits:?}"
    );
    assert!(waits.len() < 30, "{waits:?}");
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Failed, Some("ConfigError"))
    );
    assert_eq!(
        model.now.duration_since(began).as_secs(),
        3_600,
        "neither earlier nor later"
    );
}

#[test]
fn a_claim_that_is_made_is_found_within_the_longest_wait() {
    let mut model = Model {
        claim: ClaimSeen::Absent,
        ..Model::new()
    };
    waits(&mut model, 2_000);
    model.claim = ClaimSeen::Ours { bound: true };
    model.look(true);
    assert_eq!((model.status.phase, &*model.made), (Phase::Creating, &[1][..]));
}

#[test]
fn a_name_that_is_taken_is_waited_for_without_end_and_another_reason_anew() {
    let mut model = Model {
        claim: ClaimSeen::Foreign,
        ..Model::new()
    };
    let conflicts = waits(&mut model, 86_400);
    assert!((24..=30).contains(&conflicts[0]), "{conflicts:?}");
    assert!(
        conflicts.iter().rev().take(200).all(|wait| (240..=300).contains(wait)),
        "{conflicts:?}"
    );
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Pending, Some("NameConflict"))
    );
    model.claim = ClaimSeen::Absent;
    let wake = model.look(true).wake.unwrap().as_secs();
    assert!(wake <= 5 && model.status.phase == Phase::Pending, "{wake}");
}

#[test]
fn sessions_that_wait_for_the_same_do_not_come_at_the_same_time() {
    let wake = |uid: &str| {
        let mut model = Model {
            claim: ClaimSeen::Foreign,
            ..Model::new()
        };
        model.request.as_mut().unwrap().uid = uid.to_owned();
        model.look(true);
        model.happen(Happening::Time(1_000));
        model.look(true).wake
    };
    let wakes: std::collections::HashSet<_> = (0..50).map(|n| wake(&n.to_string())).collect();
    assert!(wakes.len() > 5, "{wakes:?}");
}

#[test]
fn sessions_that_wait_for_the_settings_do_not_come_at_the_same_time() {
    let mut model = Model::new();
    model.request = Err(Invalid::NoSettings("forbidden".into()));
    model.look(true);
    model.happen(Happening::Time(1_000));
    let wake = |number: u32| {
        let mut seen = model.observed();
        seen.session.uid = number.to_string();
        decide(&seen, &model.request, model.now).wake
    };
    let wakes: std::collections::HashSet<_> = (0..50).map(wake).collect();
    assert!(wakes.len() > 5, "{wakes:?}");
}

pub(super) fn refuse(model: &mut Model) -> Plan {
    let said = ("Job", "write-poem-job", "exceeded quota: small");
    let plan = refused(&model.observed(), &model.request, said, model.now);
    model.status = plan.status.clone();
    plan
}

#[test]
fn what_was_refused_is_tried_again_later_or_when_the_session_is_changed() {
    let mut model = Model::new();
    assert_eq!(refuse(&mut model).status.reason.as_deref(), Some("QuotaExceeded"));
    let plan = |model: &Model| decide(&model.observed(), &model.request, model.now);
    assert_eq!(plan(&model).create_job, None, "not at once");
    model.generation += 1;
    assert!(plan(&model).create_job.is_some());
    refuse(&mut model);
    assert_eq!(plan(&model).create_job, None);
    let mut tries = 0;
    while model.status.phase == Phase::Pending {
        model.now = model.status.next_attempt_time.clone().unwrap().0;
        assert!(plan(&model).create_job.is_some());
        refuse(&mut model);
        tries += 1;
    }
    assert!(tries < 25, "{tries} in an hour");
    assert_eq!(model.status.phase, Phase::Failed);
}

#[test]
fn hindrances_that_take_turns_have_the_time_of_one() {
    let mut model = Model::new();
    let began = model.now;
    for turn in 0..1_000 {
        if turn % 2 == 0 {
            model.claim = ClaimSeen::Missing;
            refuse(&mut model);
        } else {
            model.claim = ClaimSeen::Absent;
            model.now = model.now.max(model.status.next_attempt_time.clone().unwrap().0);
            model.look(true);
        }
        if model.status.phase != Phase::Pending {
            break;
        }
        model.happen(Happening::Time(60));
    }
    assert_eq!(model.status.phase, Phase::Failed);
    let lasted = model.now.duration_since(began).as_secs();
    assert!((3_600..4_000).contains(&lasted), "{lasted}");
}

#[rstest]
fn the_time_to_wait_for_something_else_is_none_of_a_starts(#[values(true, false)] for_a_place: bool) {
    let mut model = Model::new();
    refuse(&mut model);
    model.happen(Happening::Time(600));
    if for_a_place {
        wait(&mut model, For::APlace);
    } else {
        let request = model.request.clone();
        model.request = Err(Invalid::Settings("odd".into()));
        model.look(true);
        model.request = request;
    }
    model.happen(Happening::Time(9_000));
    refuse(&mut model);
    assert_eq!(model.status.phase, Phase::Pending, "{:#?}", model.status);
    assert_eq!(model.status.reason.as_deref(), Some("QuotaExceeded"));
}

#[test]
fn the_time_that_others_held_an_attempt_back_is_none_of_the_nexts() {
    let mut model = Model::new();
    model.request.as_mut().unwrap().queue = Some("poets".into());
    model.look(true);
    model.jobs[0].1.suspended = true;
    model.look(true);
    model.happen(Happening::Time(9_000));
    model.happen(Happening::JobLetGo);
    model.jobs[0].1.started = Some(model.now);
    model.happen(Happening::JobController);
    model.look(true);
    assert_eq!(model.status.phase, Phase::Creating);
    model.happen(Happening::JobSuspended);
    model.pods[0].terminal = true;
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Pending, Some("Queued"))
    );
    refuse(&mut model);
    assert_eq!(model.status.phase, Phase::Pending, "{:#?}", model.status);
    model.happen(Happening::Time(3_600));
    assert_eq!(refuse(&mut model).status.phase, Phase::Failed);
}

/// What a session says that waits for a place, or for what was refused.
#[derive(Clone, Copy)]
enum For {
    APlace,
    WhatWasRefused,
}

fn wait(model: &mut Model, what: For) -> Plan {
    match what {
        For::WhatWasRefused => refuse(model),
        For::APlace => {
            let plan = queued(&model.observed(), "Waits for one of the places", model.now);
            model.status = plan.status.clone();
            plan
        }
    }
}

#[rstest]
fn one_that_waits_says_no_more_what_it_could_not_have_before(#[values(For::APlace, For::WhatWasRefused)] what: For) {
    let mut model = Model::new();
    let request = model.request.clone();
    model.request = Err(Invalid::Settings("odd".into()));
    model.look(true);
    let refused = |model: &Model| {
        let mut conditions = model.status.conditions.iter();
        conditions.any(|c| c.type_ == condition::SPEC_ACCEPTED)
    };
    assert!(refused(&model));
    model.request = request;
    wait(&mut model, what);
    assert!(!refused(&model), "{:#?}", model.status);
}

#[rstest]
fn a_start_request_of_one_that_waits_is_answered(#[values(For::APlace, For::WhatWasRefused)] what: For) {
    let mut model = Model::new();
    wait(&mut model, what);
    model.happen(Happening::StartRequested(7));
    wait(&mut model, what);
    assert_eq!(model.status.handled_start_request.as_deref(), Some("7"));
}

#[rstest]
fn what_the_last_run_left_is_recorded_and_goes_while_the_next_waits(
    #[values(For::APlace, For::WhatWasRefused)] what: For,
) {
    let mut model = undelivered();
    model.look(true);
    model.happen(Happening::Suspend(false));
    model.happen(Happening::JobController);
    model.end_drain(Some(&drain_report(Outcome::Succeeded)));
    model.happen(Happening::JobController);
    model.look(true);
    assert_eq!((model.status.phase, model.status.run), (Phase::Pending, Some(2)));
    wait(&mut model, what);
    let mut conditions = model.status.conditions.iter();
    let delivered = conditions.find(|c| c.type_ == condition::EVENTS_DELIVERED);
    assert_eq!(delivered.map(|c| &*c.reason), Some("Delivered"), "{:#?}", model.status);
    model.happen(Happening::Time(3_700));
    if let For::APlace = what {
        let plan = wait(&mut model, what);
        let job = |name: &str, uid: &str| Target::Job(name.into(), uid.into());
        let left = [job("write-poem-drain-1", "drain-1"), job("write-poem-job", "job-1")];
        assert_eq!(plan.delete, left);
        assert_eq!(plan.release.len(), 1, "{:?}", plan.release);
    }
}

#[test]
fn the_time_before_the_next_attempt_is_waited_for_whatever_is_changed() {
    let mut model = running();
    model.end_runner(Some(Outcome::ModelUnavailable));
    model.happen(Happening::PodTurnsTerminal);
    model.happen(Happening::JobController);
    model.look(true);
    assert!(model.status.next_attempt_time.is_some());
    model.generation += 1;
    model.look(true);
    assert_eq!(model.made, [1]);
}

#[test]
fn one_that_was_suspended_while_it_waited_has_all_its_time_when_it_goes_on() {
    let mut model = Model {
        claim: ClaimSeen::Absent,
        ..Model::new()
    };
    waits(&mut model, 1_000);
    model.happen(Happening::Suspend(true));
    model.look(true);
    model.happen(Happening::Time(9_000));
    model.happen(Happening::Suspend(false));
    model.look(true);
    assert_eq!(model.status.phase, Phase::Pending, "{:#?}", model.status);
}

#[test]
fn one_that_was_restored_from_a_backup_has_all_its_time_to_begin() {
    let mut model = Model {
        claim: ClaimSeen::Absent,
        ..Model::new()
    };
    model.look(true);
    model.happen(Happening::Time(86_400));
    model.created = model.now;
    model.look(true);
    assert_eq!(model.status.phase, Phase::Pending, "{:#?}", model.status);
    waits(&mut model, 10_000);
    assert_eq!(model.now.duration_since(model.created).as_secs(), 3_600);
    assert_eq!(model.status.phase, Phase::Failed);
}

#[test]
fn a_job_that_was_let_go_and_whose_pod_ended_before_anybody_looked_was_admitted() {
    let mut model = Model::new();
    model.request.as_mut().unwrap().queue = Some("poets".into());
    model.look(true);
    model.jobs[0].1.suspended = true;
    model.look(true);
    let admitted = |model: &Model| {
        let found = model.status.conditions.iter().find(|c| c.type_ == condition::ADMITTED);
        found.unwrap().status.clone()
    };
    assert_eq!(admitted(&model), "False");
    model.jobs[0].1.suspended = false;
    model.happen(Happening::JobController);
    model.happen(Happening::RunnerStarts);
    model.end_runner(Some(Outcome::Succeeded));
    model.happen(Happening::PodTurnsTerminal);
    model.look(true);
    model.look(true);
    assert_eq!((model.status.phase, &*admitted(&model)), (Phase::Completed, "True"));
}

#[test]
fn a_job_that_waits_is_moved_to_the_queue_that_its_session_names_by_now_and_one_that_may_run_is_not() {
    let queue = |name: &str, priority: Option<&str>| InQueue {
        name: name.into(),
        priority: priority.map(Into::into),
    };
    let mut model = Model::new();
    model.look(true);
    let job = &mut model.jobs[0].1;
    (job.suspended, job.queue) = (true, Some(Box::new(queue("night", None))));
    let names = |model: &mut Model, name: &str, priority: Option<&str>| {
        let request = model.request.as_mut().unwrap();
        (request.queue, request.queue_priority) = (Some(name.into()), priority.map(Into::into));
    };
    names(&mut model, "night", None);
    assert_eq!(model.look(true).tune, [], "it is there");
    let (low, high) = (Some("low"), Some("high"));
    // Kueue lets nobody remove a priority.
    for (name, priority, then) in [
        ("day", None, None),
        ("day", low, low),
        ("day", high, high),
        ("dusk", None, high),
    ] {
        names(&mut model, name, priority);
        let moved = Tuned::Queue("write-poem-job".into(), "job-1".into(), queue(name, then));
        assert_eq!(model.look(true).tune, [moved]);
        assert_eq!(model.look(true).tune, [], "once");
    }
    model.happen(Happening::JobLetGo);
    names(&mut model, "night", None);
    assert_eq!(model.look(true).tune, []);
}

#[test]
fn the_time_to_start_begins_when_whoever_admits_jobs_lets_the_job_go() {
    let mut model = Model::new();
    model.look(true);
    model.jobs[0].1.suspended = true;
    model.happen(Happening::Time(1_000_000));
    assert_eq!(model.look(true).wake, None, "it may wait for ever");
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Creating, Some("Queued"))
    );
    model.jobs[0].1.started = Some(model.now);
    model.happen(Happening::JobLetGo);
    model.happen(Happening::Time(3_599));
    model.look(true);
    assert_eq!(model.status.phase, Phase::Creating);
    model.happen(Happening::Time(1));
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Stopping, Some("PodRejected"))
    );
}
