//! Attempts: what follows one, and when.

use crds::{Phase, condition};
use jiff::SignedDuration;
use protocol::{Outcome, Reason, Report, spec::LiveLimits};
use rstest::rstest;

use super::{brought_to, running};
use crate::session::{
    model::{Happening, Model, TIMEOUT},
    observed::{ClaimSeen, Resolved, RunnerSeen},
    plan::{Plan, Target, Tuned},
    pod::Disruption,
};

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

#[rstest]
#[case::by_itself(None, None)]
#[case::by_an_eviction(Some(Outcome::Stopped), Some(1))]
fn a_runner_that_ends_after_the_time_to_start_has_started(#[case] outcome: Option<Outcome>, #[case] free: Option<u32>) {
    let mut model = running();
    model.happen(Happening::TimeoutChanged(7_200));
    model.look(true);
    model.happen(Happening::Time(3_700));
    if free.is_some() {
        model.happen(Happening::PodEvicted);
    }
    model.end_runner(outcome);
    // The kubelet tells of the runner's end before that of the pod: the agent is still being stopped.
    let plan = model.look(true);
    assert_eq!(
        (model.status.phase, plan.wake),
        (Phase::Running, None),
        "{:?}",
        model.status.message
    );
    model.happen(Happening::PodTurnsTerminal);
    model.happen(Happening::JobController);
    model.look(true);
    let says = (
        model.status.phase,
        model.status.reason.as_deref(),
        model.status.free_retries,
    );
    assert_eq!(
        says,
        (Phase::Pending, Some("Retrying"), free),
        "{:?}",
        model.status.message
    );
}

#[test]
fn an_image_whose_long_pull_fails_once_is_pulled_again() {
    let mut model = brought_to(Phase::Creating);
    model.happen(Happening::JobController);
    model.look(true);
    let since = Some(model.now);
    model.happen(Happening::Time(900));
    model.happen(Happening::PodHindered);
    // All that the kubelet tells is when the pod's sandbox was ready.
    model.pods[0].trouble.as_mut().unwrap().since = since;
    model.look(true);
    let says = |model: &Model| (model.status.phase, model.status.reason.clone().unwrap());
    assert_eq!(says(&model), (Phase::Creating, "ImagePullFailed".into()));
    model.happen(Happening::Time(299));
    model.look(true);
    model.happen(Happening::RunnerStarts);
    model.look(true);
    assert_eq!(says(&model), (Phase::Running, "Running".into()));
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
fn the_eleventh_eviction_ends_the_run() {
    let mut model = running();
    for n in 1..=11 {
        model.happen(Happening::PodEvicted);
        model.end_runner(Some(Outcome::Stopped));
        model.happen(Happening::PodTurnsTerminal);
        model.look(true);
        let expected = if n == 11 { Phase::Failed } else { Phase::Pending };
        assert_eq!(model.status.phase, expected, "{n}: {:?}", model.status);
        model.happen(Happening::Time(300));
        for next in [
            Happening::JobController,
            Happening::JobController,
            Happening::RunnerStarts,
        ] {
            model.look(true);
            model.happen(next);
        }
        model.look(true);
    }
    assert_eq!(
        (model.status.reason.as_deref(), model.status.attempt),
        (Some("Evicted"), Some(11))
    );
}

#[test]
fn an_evicted_attempt_has_used_its_time_though_the_kubelet_forgot_when_it_began() {
    let mut model = running();
    model.happen(Happening::Time(100));
    let pod = model.pods.last_mut().unwrap();
    // The containers' state is `ContainerStatusUnknown` then: no times, and no report.
    pod.runner = RunnerSeen::Ended {
        since: None,
        until: None,
        exit_code: 137,
        out_of_memory: false,
        said: "ContainerStatusUnknown".into(),
        report: None,
    };
    pod.terminal = true;
    pod.disruption = Some(Disruption {
        reason: Reason::Evicted,
        message: "The node was low on resource: memory.".into(),
    });
    model.happen(Happening::JobController);
    model.look(true);
    assert_eq!(
        (model.status.free_retries, model.status.running_seconds),
        (Some(1), Some(100))
    );
}

#[test]
fn a_session_that_ended_before_anybody_looked_is_recorded_as_running_first() {
    let mut model = Model::new();
    model.look(true);
    model.happen(Happening::JobController);
    model.happen(Happening::RunnerStarts);
    model.end_runner(Some(Outcome::Succeeded));
    assert_eq!(model.status.phase, Phase::Creating);
    model.look(true);
    assert_eq!(model.status.phase, Phase::Running);
    model.look(true);
    assert_eq!(model.status.phase, Phase::Completed);
}

#[test]
fn a_timeout_that_is_raised_moves_the_backstop_and_tells_job_and_pod_once() {
    let mut model = running();
    model.happen(Happening::TimeoutChanged(1_000));
    let plan = model.look(true);
    assert_eq!(plan.tune.len(), 2, "{:?}", plan.tune);
    assert_eq!(plan.wake, Some(SignedDuration::from_secs(1_000 + 120)));
    assert_eq!(model.look(true).tune, [], "what was told is not told again");
}

#[test]
fn another_spec_does_not_bring_the_settings_of_today_to_an_attempt_under_way() {
    let mut model = running();
    let limits = |timeout, max_turns| LiveLimits {
        timeout,
        max_turns,
        ..LiveLimits::default()
    };
    // The time came from the namespace, the turns from the session.
    model.jobs[0].1.resolved = Some(Resolved {
        generation: Some(1),
        limits: limits(Some(5_000), Some(9)),
        asked: Some(limits(None, Some(9))),
        ..Resolved::default()
    });
    model.generation = 2;
    let request = model.request.as_mut().unwrap();
    request.generation = Some(2);
    (request.limits, request.asked) = (limits(Some(70), Some(4)), limits(None, Some(4)));
    let plan = model.look(true);
    let told = plan.tune.iter().find_map(|tuned| match tuned {
        Tuned::Job(_, _, resolved) => Some(*resolved),
        Tuned::Pod(..) | Tuned::Queue(..) => None,
    });
    let told = told.unwrap();
    assert_eq!(told.limits, limits(Some(5_000), Some(4)));
    assert_eq!(told.asked, Some(limits(None, Some(4))), "what is compared with next");
}

#[test]
fn a_session_that_is_stopped_before_it_has_a_pod_is_over_with_its_job() {
    let mut model = brought_to(Phase::Creating);
    model.happen(Happening::Suspend(true));
    assert_eq!(model.look(true).delete, [], "what is not recorded justifies nothing");
    assert_eq!(model.status.phase, Phase::Stopping);
    let job = Target::Job("write-poem-job".into(), "job-1".into());
    assert_eq!(model.look(true).delete, [job]);
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Stopped, Some("StoppedByUser"))
    );
}

/// What happens between an attempt that lost its place and the next.
#[derive(Clone, Copy)]
enum Between {
    Nothing,
    Suspended,
    WithoutItsClaim,
}

#[rstest]
fn one_whose_place_was_taken_away_waits_for_it_again_whatever_comes_between(
    #[values(Between::Nothing, Between::Suspended, Between::WithoutItsClaim)] between: Between,
) {
    let mut model = running();
    model.happen(Happening::JobSuspended);
    model.happen(Happening::RunnerEnds(Outcome::Stopped));
    model.happen(Happening::PodTurnsTerminal);
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Pending, Some("Queued"))
    );
    model.happen(Happening::JobController);
    match between {
        Between::Nothing => {}
        Between::Suspended => {
            model.happen(Happening::Suspend(true));
            model.look(true);
            assert_eq!(model.status.reason.as_deref(), Some("Suspended"));
            model.happen(Happening::Suspend(false));
        }
        Between::WithoutItsClaim => {
            model.claim = ClaimSeen::Absent;
            model.look(true);
            assert_eq!(model.status.reason.as_deref(), Some("ConfigError"));
            model.claim = ClaimSeen::Ours { bound: true };
        }
    }
    let plan = model.look(true);
    assert_eq!(
        plan.create_job.map(|attempt| (attempt.number, attempt.held)),
        Some((2, true))
    );
    let admitted = plan.status.conditions.iter().find(|c| c.type_ == condition::ADMITTED);
    assert_eq!(admitted.map(|c| &*c.status), Some("False"));
    assert_eq!(plan.status.reason.as_deref(), Some("Queued"), "and says so");
}

#[test]
fn a_session_that_was_restored_long_after_it_ran_goes_on_as_one_that_ran_until_then() {
    let mut model = running();
    model.happen(Happening::Time(50));
    (model.jobs, model.pods) = (Vec::new(), Vec::new());
    model.happen(Happening::Time(86_400));
    model.created = model.now;
    model.happen(Happening::Time(3));
    model.look(true);
    let says = (
        model.status.phase,
        model.status.reason.as_deref(),
        model.status.running_seconds,
    );
    assert_eq!(
        says,
        (Phase::Pending, Some("Retrying"), Some(3)),
        "{:?}",
        model.status.message
    );
}
