//! `decide` in the model of the world.

use crds::Phase;
use jiff::SignedDuration;
use proptest::prelude::*;
use protocol::{Outcome, Report};

use super::{
    decide::{Plan, decide},
    decide_model::{Happening, Model, TIMEOUT, happenings},
    observed::RunnerSeen,
    validate::Invalid,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_at_most_one_attempt_lives_and_every_session_ends(
        gateway in any::<bool>(),
        happenings in prop::collection::vec(happenings(), 0..60),
    ) {
        let mut model = Model { gateway, ..Model::new() };
        for happening in happenings {
            model.happen(happening);
        }
        model.happen(Happening::Suspend(false));
        model.settle();
        prop_assert!(model.status.phase.is_terminal(), "{:#?}", model.status);
        prop_assert!(model.pods.iter().all(|pod| !pod.held), "a settled session holds no pod");
        prop_assert!(model.jobs.is_empty() && model.drains.is_empty(), "Jobs go when they were kept for long enough");
        prop_assert!(model.drain_pods.is_empty(), "{:?}", model.drain_pods);
        let delivered = model.status.conditions.iter().find(|c| c.type_ == crds::condition::EVENTS_DELIVERED).unwrap();
        prop_assert!(delivered.reason != "Undelivered", "{delivered:?}");

        let plan = model.look(true);
        let quiet = Plan {
            create_claim: false,
            create_job: None,
            create_drain: None,
            tune: vec![],
            delete: vec![],
            delete_session: false,
            release: vec![],
            status: model.status.clone(),
            wake: plan.wake,
        };
        prop_assert_eq!(&plan, &quiet, "a settled session is left alone");
        prop_assert_eq!(plan.wake, None);
    }

    #[test]
    fn deciding_twice_about_the_same_changes_nothing_more(happenings in prop::collection::vec(happenings(), 0..40)) {
        let mut model = Model::new();
        for happening in happenings {
            model.happen(happening);
            let mut still = model.observed();
            // Status alone, without its effects in the world: what is decided on it again is the same or less.
            let first = decide(&still, &model.request, model.now);
            prop_assert_eq!(&first, &decide(&still, &model.request, model.now));
            still.session.status = first.status.clone();
            if first.create_job.is_none() && first.status.phase == model.status.phase {
                let second = decide(&still, &model.request, model.now);
                prop_assert_eq!(first.status, second.status);
            }
        }
    }

    #[test]
    fn a_success_is_never_lost(crashes in prop::collection::vec(any::<bool>(), 30)) {
        let mut model = Model::new();
        for lives in crashes {
            model.look(lives);
            model.happen(Happening::JobController);
            model.happen(Happening::RunnerStarts);
        }
        model.look(true);
        model.happen(Happening::RunnerEnds(Outcome::Succeeded));
        model.happen(Happening::PodDeleted);
        model.settle();
        prop_assert_eq!(model.status.phase, Phase::Completed);
        prop_assert_eq!(model.made, vec![1]);
    }
}

fn running() -> Model {
    let mut model = Model::new();
    model.look(true);
    model.happen(Happening::JobController);
    model.look(true);
    model.happen(Happening::RunnerStarts);
    model.look(true);
    assert_eq!(model.status.phase, Phase::Running);
    model
}

#[test]
fn a_runner_that_outlives_its_timeout_is_stopped_two_minutes_later() {
    let mut model = running();
    let wake = model.look(true).wake;
    assert_eq!(wake, Some(SignedDuration::from_secs(TIMEOUT as i64 + 120)));
    model.happen(Happening::Time(TIMEOUT as i64 + 119));
    model.look(true);
    assert_eq!(model.status.phase, Phase::Running);
    model.happen(Happening::Time(1));
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Stopping, Some("Timeout"))
    );
    model.look(true);
    assert!(model.pods[0].deleting);
    model.end_runner(Some(Outcome::Stopped));
    model.happen(Happening::PodTurnsTerminal);
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Failed, Some("Timeout"))
    );
}

#[test]
fn an_image_that_cannot_be_pulled_fails_the_session_after_five_minutes() {
    let mut model = Model::new();
    model.look(true);
    model.happen(Happening::JobController);
    model.happen(Happening::PodHindered);
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Creating, Some("ImagePullFailed"))
    );
    model.happen(Happening::Time(301));
    model.look(true);
    assert_eq!(model.status.phase, Phase::Stopping);
    model.look(true);
    model.pods[0].terminal = true;
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Failed, Some("ImagePullFailed"))
    );
    assert!(model.status.message.unwrap().contains("no such image"));
}

#[test]
fn the_model_apis_own_word_goes_before_and_the_third_failure_is_final() {
    let mut model = running();
    let mut waits = Vec::new();
    for retry_after in [None, Some(77)] {
        let now = model.now;
        let plan = rate_limited(&mut model, retry_after);
        let wait = plan.status.next_attempt_time.unwrap().0.duration_since(now);
        waits.push(wait.as_secs());
        model.happen(Happening::Time(wait.as_secs() - 1));
        assert_eq!(model.look(true).create_job, None, "not before its time");
        model.happen(Happening::Time(1));
        assert!(model.look(true).create_job.is_some());
        model.happen(Happening::JobController);
        model.happen(Happening::RunnerStarts);
        model.look(true);
    }
    assert_eq!(waits, [10, 77]);
    let last = rate_limited(&mut model, Some(77)).status;
    assert_eq!(
        (last.phase, last.reason.as_deref()),
        (Phase::Failed, Some("RateLimited"))
    );
    assert_eq!(last.next_attempt_time, None);
}

#[test]
fn the_second_wait_is_twice_the_first() {
    let mut model = running();
    rate_limited(&mut model, None);
    model.happen(Happening::Time(10));
    model.look(true);
    model.happen(Happening::JobController);
    model.happen(Happening::RunnerStarts);
    model.look(true);
    let now = model.now;
    let plan = rate_limited(&mut model, None);
    assert_eq!(
        plan.status.next_attempt_time.unwrap().0.duration_since(now).as_secs(),
        20
    );
}

/// The attempt ends with 429.
fn rate_limited(model: &mut Model, retry_after: Option<u64>) -> Plan {
    let now = model.now;
    let report = Report {
        retry_after,
        ..Report::new(Outcome::RateLimited, model.status.attempt.unwrap())
    };
    model.pods.last_mut().unwrap().runner = RunnerSeen::Ended {
        since: Some(now),
        until: Some(now),
        exit_code: 75,
        out_of_memory: false,
        said: String::new(),
        report: Some(Box::new(report)),
    };
    model.happen(Happening::PodTurnsTerminal);
    model.happen(Happening::JobController);
    model.look(true)
}

#[test]
fn evictions_do_not_use_up_attempts() {
    let mut model = running();
    for _ in 0..5 {
        model.happen(Happening::PodEvicted);
        model.end_runner(Some(Outcome::Stopped));
        model.happen(Happening::PodTurnsTerminal);
        model.happen(Happening::JobController);
        model.look(true);
        assert_eq!(model.status.phase, Phase::Pending);
        model.happen(Happening::Time(300));
        model.look(true);
        model.look(true);
        model.happen(Happening::JobController);
        model.happen(Happening::RunnerStarts);
        model.look(true);
        assert_eq!(model.status.phase, Phase::Running, "{:?}", model.status);
    }
    assert_eq!((model.status.attempt, model.status.free_retries), (Some(6), Some(5)));
}

#[test]
fn an_interrupted_session_does_not_go_on_by_itself() {
    let mut model = running();
    model.end_runner(Some(Outcome::StoppedByUser));
    model.look(true);
    model.happen(Happening::PodTurnsTerminal);
    model.happen(Happening::JobController);
    model.look(true);
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Stopped, Some("StoppedByUser"))
    );
    model.start_requested = Some("now".into());
    model.look(true);
    model.look(true);
    assert_eq!(model.made, [1, 2]);
}

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
