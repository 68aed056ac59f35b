//! What is done on news that are old.

use jiff::SignedDuration;
use proptest::prelude::*;

use super::*;
use crate::session::{
    decide::decide,
    model::{Happening, Model, happenings},
    observed::{JobSeen, Observed, OurJob, RunnerSeen},
};

const GROUND: Ground = Ground {
    cut: false,
    untouched: false,
    silent: false,
    reported: false,
    of_attempts: true,
    made: Made::No,
};

/// The session as it once was, its children as they were at another time: watches are behind, each as it pleases.
fn behind(history: &[Observed], session: usize, children: usize) -> Observed {
    let mut seen = history[children % history.len()].clone();
    seen.session = history[session % history.len()].session.clone();
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn what_is_done_on_old_news_ends_nothing_and_hinders_no_end(
        happenings in prop::collection::vec((happenings(), prop::option::of(any::<(usize, usize)>())), 0..60),
    ) {
        let mut model = Model::new();
        // What the watches may show: nothing from before the last look, which wrote, or began with an empty memory.
        let mut history = vec![model.observed()];
        for (happening, look) in happenings {
            model.happen(happening);
            if matches!(happening, Happening::Look { .. } | Happening::Attempt(..)) {
                history.clear();
            }
            history.push(model.observed());
            let Some((session, children)) = look else { continue };
            let seen = behind(&history, session, children);
            let plan = decide(&seen, &model.request, model.now);
            let before = &seen.session.status;
            let ground = Ground {
                silent: false,
                ..Ground::of(&seen, &plan, (false, false, false), model.now)
            };
            match step(before, &plan, ground) {
                Step::Tell => {
                    prop_assert!(plan.only_tells() && !plan.status.phase.is_terminal());
                    if seen.next_job.ours().is_none() {
                        prop_assert_eq!(before.attempt, plan.status.attempt);
                    }
                    // The API server refuses it when the session is another by now.
                    if *before == model.status {
                        model.write(plan.status);
                        history = vec![model.observed()];
                    }
                }
                Step::Conclude => {
                    prop_assert!(plan.only_tells() && before.phase == Phase::Running);
                    if *before == model.status {
                        // What live reads would say of the same pod, though its Job is another by now.
                        let live = decide(&model.observed(), &model.request, model.now).status;
                        if model.pods.iter().any(|pod| Some(&pod.uid) == before.pod_uid.as_ref()) {
                            prop_assert_eq!((live.phase, &live.reason), (plan.status.phase, &plan.status.reason));
                        }
                        model.write(plan.status);
                        history = vec![model.observed()];
                    }
                }
                Step::Release => {
                    prop_assert_eq!(before, &plan.status);
                    for (_, uid) in &plan.release {
                        // The model refuses to let go of what is not recorded.
                        model.let_go(uid);
                    }
                }
                Step::Rest => prop_assert_eq!(before, &plan.status),
                Step::ReadLive | Step::Await => {}
                Step::Ask | Step::Begin => prop_assert!(false, "nothing is silent or new"),
            }
        }
        model.happen(Happening::Suspend(false));
        model.settle();
        prop_assert!(model.status.phase.is_terminal(), "{:#?}", model.status);
        prop_assert!(model.pods.iter().all(|pod| !pod.held), "a settled session holds no pod");
    }
}

fn told(before: Phase, after: Phase, ground: Ground) -> Step {
    let status = |phase| AgenticSessionStatus {
        phase,
        ..Default::default()
    };
    let mut plan = decide(&Model::new().observed(), &Model::new().request, Timestamp::UNIX_EPOCH);
    (plan.create_claim, plan.create_job) = (false, None);
    plan.status = status(after);
    plan.status.message = Some("news".into());
    step(&status(before), &plan, ground)
}

#[test]
fn only_progress_is_told_from_memory() {
    assert_eq!(told(Phase::Creating, Phase::Running, GROUND), Step::Tell);
    for (before, after) in [
        (Phase::Creating, Phase::Pending),
        (Phase::Running, Phase::Completed),
        (Phase::Running, Phase::Running),
        (Phase::Stopping, Phase::Stopped),
        (Phase::Pending, Phase::Failed),
        (Phase::Completed, Phase::Completed),
    ] {
        assert_eq!(told(before, after, GROUND), Step::ReadLive, "{before} {after}");
    }
    let cut = Ground { cut: true, ..GROUND };
    assert_eq!(
        told(Phase::Creating, Phase::Running, cut),
        Step::ReadLive,
        "a result would be lost"
    );
    let silent = Ground { silent: true, ..GROUND };
    assert_eq!(told(Phase::Creating, Phase::Creating, silent), Step::Ask);
}

#[test]
fn a_job_that_was_just_made_is_told_of_with_its_pod_or_when_none_comes() {
    let told = |made, cut| told(Phase::Pending, Phase::Creating, Ground { cut, made, ..GROUND });
    assert_eq!(told(Made::Just, false), Step::Await);
    assert_eq!(told(Made::Yes, false), Step::Tell);
    assert_eq!(
        told(Made::Yes, true),
        Step::ReadLive,
        "an earlier run's result would be lost"
    );
    assert_eq!(told(Made::No, false), Step::ReadLive);
}

#[test]
fn a_pod_is_waited_for_as_long_as_its_job_is_young_and_may_have_one() {
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let mut model = Model::new();
    model.happen(Happening::Look { lives: true });
    let mut seen = model.observed();
    let JobSeen::Ours(job) = seen.job.clone() else {
        panic!("{seen:#?}")
    };
    for (age, suspended, made) in [
        (0, false, Made::Just),
        (1, false, Made::Just),
        (2, false, Made::Yes),
        (-60, false, Made::Yes),
        (0, true, Made::Yes),
    ] {
        let created = now.checked_sub(SignedDuration::from_secs(age)).ok();
        seen.next_job = JobSeen::Ours(OurJob {
            created,
            suspended,
            ..job.clone()
        });
        assert_eq!(Made::of(&seen, now), made, "{age} s, {suspended}");
    }
}

#[test]
fn of_ends_only_that_is_told_from_memory_of_which_the_attempts_own_report_tells() {
    let reported = Ground {
        reported: true,
        ..GROUND
    };
    assert_eq!(told(Phase::Running, Phase::Failed, reported), Step::Conclude);
    assert_eq!(told(Phase::Running, Phase::Failed, GROUND), Step::ReadLive);
    let cut = Ground { cut: true, ..reported };
    assert_eq!(
        told(Phase::Running, Phase::Failed, cut),
        Step::ReadLive,
        "an earlier run's result would be lost"
    );
    for (before, after) in [
        (Phase::Running, Phase::Pending),
        (Phase::Running, Phase::Stopping),
        (Phase::Stopping, Phase::Stopped),
        (Phase::Pending, Phase::Failed),
    ] {
        assert_eq!(told(before, after, reported), Step::ReadLive, "{before} {after}");
    }
}

#[test]
fn pods_of_attempts_alone_are_let_go_on_memory_and_only_when_that_is_all() {
    let mut plan = decide(&Model::new().observed(), &Model::new().request, Timestamp::UNIX_EPOCH);
    (plan.create_claim, plan.create_job) = (false, None);
    plan.release = vec![("poem-job-x".into(), "p1".into())];
    let status = plan.status.clone();
    assert_eq!(step(&status, &plan, GROUND), Step::Release);
    let of_drains = Ground {
        of_attempts: false,
        ..GROUND
    };
    assert_eq!(step(&status, &plan, of_drains), Step::ReadLive);
    let mut tells_too = plan.clone();
    tells_too.status.message = Some("news".into());
    assert_eq!(step(&status, &tells_too, GROUND), Step::ReadLive);
    plan.create_claim = true;
    assert_eq!(step(&status, &plan, GROUND), Step::ReadLive);
}

#[test]
fn what_makes_something_is_decided_on_live_reads_but_for_a_session_that_nobody_has_touched() {
    let model = Model::new();
    let plan = decide(&model.observed(), &model.request, model.now);
    assert!(plan.create_job.is_some());
    assert_eq!(step(&model.status, &plan, GROUND), Step::ReadLive);
    let untouched = Ground {
        untouched: true,
        ..GROUND
    };
    assert_eq!(step(&model.status, &plan, untouched), Step::Begin);
}

#[test]
fn that_the_pod_of_status_told_its_end_is_known_by_its_own_report_alone() {
    let mut model = Model::new();
    for happening in [
        Happening::Look { lives: true },
        Happening::JobController,
        Happening::Look { lives: true },
        Happening::RunnerStarts,
        Happening::Look { lives: true },
        Happening::RunnerEnds(protocol::Outcome::Succeeded),
    ] {
        model.happen(happening);
    }
    let seen = model.observed();
    let plan = decide(&seen, &model.request, model.now);
    let is_reported = |change: fn(&mut Observed)| {
        let mut seen = seen.clone();
        change(&mut seen);
        Ground::of(&seen, &plan, (false, false, false), model.now).reported
    };
    assert!(is_reported(|_| {}));
    assert!(!is_reported(|seen| seen.session.status.pod_uid = Some("another".into())));
    assert!(!is_reported(|seen| seen.session.status.attempt = Some(2)));
    assert!(
        !is_reported(|seen| (seen.session.status.attempt, seen.pods[0].attempt) = (Some(2), 2)),
        "of an earlier attempt"
    );
    assert!(
        !is_reported(|seen| {
            if let RunnerSeen::Ended {
                report: Some(report), ..
            } = &mut seen.pods[0].runner
            {
                report.repos.push(protocol::report::RepoReport {
                    index: 0,
                    branch: "b".into(),
                    commit: "c".into(),
                    pushed: true,
                });
            }
        }),
        "repositories are not remembered"
    );
}

#[test]
fn a_session_is_untouched_while_it_has_no_children_and_is_new_or_waits_for_its_first_place() {
    let model = Model::new();
    let plan = decide(&model.observed(), &model.request, model.now);
    for (newborn, childless, reason, attempt, expected) in [
        (true, true, None, None, true),
        (false, true, None, None, false),
        (true, false, None, None, false),
        (false, true, Some("Queued"), None, true),
        (false, false, Some("Queued"), None, false),
        (false, true, Some("Retrying"), None, false),
        (false, true, Some("Queued"), Some(1), false),
    ] {
        let mut seen = model.observed();
        seen.session.status.reason = reason.map(str::to_owned);
        seen.session.status.attempt = attempt;
        let ground = Ground::of(&seen, &plan, (false, newborn, childless), model.now);
        assert_eq!(
            ground.untouched, expected,
            "{newborn} {childless} {reason:?} {attempt:?}"
        );
    }
}

#[test]
fn pods_that_are_let_go_are_of_attempts_or_not() {
    let mut model = Model::new();
    model.happen(Happening::Look { lives: true });
    model.happen(Happening::JobController);
    let seen = model.observed();
    let mut plan = decide(&seen, &model.request, model.now);
    let its_own = seen.pods[0].uid.clone();
    for (uids, expected) in [
        (vec![&*its_own], true),
        (vec!["drain"], false),
        (vec![&*its_own, "drain"], false),
    ] {
        plan.release = uids.iter().map(|uid| ("p".to_owned(), (*uid).to_owned())).collect();
        assert_eq!(
            Ground::of(&seen, &plan, (false, false, false), model.now).of_attempts,
            expected
        );
    }
}

#[test]
fn a_job_that_ends_is_not_waited_for_and_one_with_a_pod_neither() {
    let mut model = Model::new();
    model.happen(Happening::Look { lives: true });
    model.happen(Happening::JobController);
    let mut seen = model.observed();
    let JobSeen::Ours(mut job) = seen.job.clone() else {
        panic!("{seen:#?}")
    };
    job.created = Some(model.now);
    let mut made = |change: fn(&mut OurJob), of_another: bool| {
        let mut job = job.clone();
        change(&mut job);
        seen.pods[0].job_uid = if of_another { "another".into() } else { job.uid.clone() };
        seen.next_job = JobSeen::Ours(job);
        Made::of(&seen, model.now)
    };
    assert_eq!(made(|_| {}, false), Made::Yes);
    assert_eq!(made(|_| {}, true), Made::Just);
    assert_eq!(made(|job| job.finished = true, true), Made::No);
    assert_eq!(made(|job| job.deleting = true, true), Made::No);
}

#[test]
fn what_a_waiting_session_waits_for_is_told_from_memory() {
    assert_eq!(told(Phase::Pending, Phase::Pending, GROUND), Step::Tell);
}
