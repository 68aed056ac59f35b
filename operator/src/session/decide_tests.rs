//! `decide` in the model of the world.

use crds::Phase;
use jiff::SignedDuration;
use proptest::prelude::*;
use protocol::{Outcome, Report};
use rstest::rstest;

use super::{
    decide::{Plan, decide},
    decide_model::{Happening, Model, TIMEOUT, happenings},
    observed::{ClaimSeen, RunnerSeen},
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
    fn no_attempt_follows_one_whose_workspace_went_with_its_pod(
        gateway in any::<bool>(),
        happenings in prop::collection::vec(happenings(), 0..60),
    ) {
        let mut model = Model { gateway, claim: ClaimSeen::Ephemeral, ..Model::new() };
        let mut begun = None;
        let mut check = |model: &Model| {
            let started = model.pods.iter().find(|pod| pod.runner != RunnerSeen::Waiting);
            begun = begun.or(started.map(|pod| pod.attempt));
            // Of a pod that was taken away, finalizers and all, before anybody looked, nothing tells.
            model.forced > 0 || begun.is_none_or(|begun| model.made.iter().all(|made| *made <= begun))
        };
        for happening in happenings {
            model.happen(happening);
            prop_assert!(check(&model), "{:?} after {:?}", model.made, model.status);
        }
        model.happen(Happening::Suspend(false));
        model.settle();
        prop_assert!(check(&model), "{:?} after {:?}", model.made, model.status);
        prop_assert!(model.status.phase.is_terminal(), "{:#?}", model.status);
        prop_assert!(model.pods.iter().all(|pod| !pod.held), "a settled session holds no pod");
        prop_assert_eq!(model.status.drains, None, "there is nothing to deliver from");
        let delivered = model.status.conditions.iter().find(|c| c.type_ == crds::condition::EVENTS_DELIVERED).unwrap();
        prop_assert!(delivered.reason != "Undelivered", "{delivered:?}");
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
    running_with(ClaimSeen::Missing)
}

fn running_with(claim: ClaimSeen) -> Model {
    let mut model = Model { claim, ..Model::new() };
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
fn a_workspace_that_went_with_its_pod_is_not_gone_on_with() {
    let mut model = Model {
        gateway: true,
        ..running_with(ClaimSeen::Ephemeral)
    };
    let ready = model.status.conditions.iter().find(|c| c.type_ == "WorkspaceReady");
    assert_eq!(ready.map(|c| (&*c.status, &*c.reason)), Some(("True", "Ephemeral")));
    model.end_runner(Some(Outcome::ModelUnavailable));
    model.happen(Happening::PodTurnsTerminal);
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref()),
        (Phase::Failed, Some("ModelUnavailable"))
    );
    assert!(
        model.status.message.as_ref().unwrap().contains("went with the pod"),
        "{:?}",
        model.status.message
    );
    model.happen(Happening::StartRequested(7));
    model.settle();
    assert_eq!((model.status.phase, model.status.run), (Phase::Failed, Some(1)));
    assert_eq!(
        model.status.handled_start_request.as_deref(),
        Some("7"),
        "it is answered by an Event"
    );
    assert_eq!(model.made, vec![1]);
}

#[test]
fn a_workspace_that_went_with_its_pod_does_not_come_back_after_a_stop() {
    let mut model = running_with(ClaimSeen::Ephemeral);
    model.happen(Happening::Suspend(true));
    model.look(true);
    model.look(true);
    model.end_runner(Some(Outcome::Stopped));
    model.happen(Happening::PodTurnsTerminal);
    model.look(true);
    model.happen(Happening::Suspend(false));
    model.settle();
    assert_eq!(
        (model.status.phase, model.status.reason.as_deref(), model.status.run),
        (Phase::Stopped, Some("StoppedByUser"), Some(1))
    );
    assert_eq!(model.made, vec![1]);
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

/// A session that is brought to `phase`, its runs counted from there.
fn brought_to(phase: Phase) -> Model {
    let mut model = match phase {
        Phase::Pending => Model::new(),
        Phase::Creating => {
            let mut model = Model::new();
            model.look(true);
            model
        }
        _ => running(),
    };
    match phase {
        Phase::Pending | Phase::Creating | Phase::Running => return model,
        Phase::Stopping | Phase::Stopped => model.happen(Happening::Suspend(true)),
        Phase::Completed => model.end_runner(Some(Outcome::Succeeded)),
        Phase::Failed => model.end_runner(Some(Outcome::AgentError)),
    }
    model.look(true);
    if phase == Phase::Stopped {
        model.look(true);
        model.end_runner(Some(Outcome::Stopped));
    }
    model.happen(Happening::PodTurnsTerminal);
    model.happen(Happening::JobController);
    model.look(true);
    assert_eq!(model.status.phase, phase);
    model
}

#[rstest]
#[case(Phase::Pending, false, 1)]
#[case(Phase::Creating, false, 1)]
#[case(Phase::Running, false, 1)]
// One that comes while the agent is being stopped is kept; so is the wish to go on. Together they are one run.
#[case(Phase::Stopping, false, 2)]
#[case(Phase::Stopping, true, 1)]
#[case(Phase::Completed, false, 2)]
#[case(Phase::Completed, true, 1)]
#[case(Phase::Failed, false, 2)]
#[case(Phase::Failed, true, 1)]
#[case(Phase::Stopped, false, 2)]
#[case(Phase::Stopped, true, 1)]
fn clicks_in_a_phase_begin_so_many_runs(
    #[case] phase: Phase,
    #[case] suspended: bool,
    #[case] runs: u32,
    #[values(1, 2)] clicks: u8,
    #[values(false, true)] seen_between: bool,
) {
    let mut model = brought_to(phase);
    model.happen(Happening::Suspend(suspended));
    for click in 0..clicks {
        model.happen(Happening::StartRequested(click));
        if seen_between {
            model.look(true);
        }
    }
    if suspended {
        // Nothing goes on by itself while it is.
        for _ in 0..10 {
            model.end_runner(Some(Outcome::Stopped));
            model.happen(Happening::PodTurnsTerminal);
            model.happen(Happening::JobController);
            model.look(true);
        }
    } else {
        model.settle();
    }
    assert_eq!(model.status.run, Some(runs), "{:#?}", model.status);
    assert!(model.status.phase.is_terminal());
    let last = (clicks - 1).to_string();
    assert_eq!(model.status.handled_start_request.as_deref(), Some(&*last));
}

#[test]
fn a_request_that_is_there_at_creation_is_the_first_run() {
    let mut model = Model::new();
    model.happen(Happening::StartRequested(7));
    model.settle();
    assert_eq!((model.status.run, &*model.made), (Some(1), &[1][..]));
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
    model.end_drain(Some(&super::decide_model::drain_report(Outcome::Succeeded)));
    model.look(true);
    assert!(!model.expired, "what it delivered is recorded first");
    model.look(true);
    assert!(model.expired, "{:#?}", model.status);
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
fn what_the_api_server_refuses_is_final_when_the_time_to_start_is_over() {
    let mut model = Model::new();
    let refused = |model: &mut Model| {
        let said = ("Job", "write-poem-job", "pods \"x\" is forbidden");
        model.status = super::decide::refused(&model.observed(), &model.request, said, model.now).status;
        model.status.clone()
    };
    assert_eq!(refused(&mut model).phase, Phase::Pending);
    model.happen(Happening::Time(3_599));
    assert_eq!(refused(&mut model).phase, Phase::Pending);
    model.happen(Happening::Time(1));
    let last = refused(&mut model);
    assert_eq!(
        (last.phase, last.reason.as_deref()),
        (Phase::Failed, Some("ConfigError"))
    );
}

#[test]
fn a_timeout_that_is_raised_moves_the_backstop_and_tells_job_and_pod_once() {
    let mut model = running();
    model.happen(Happening::TimeoutChanged(1_000));
    let plan = model.look(true);
    assert_eq!(plan.tune.len(), 2, "{:?}", plan.tune);
    assert_eq!(plan.wake, Some(SignedDuration::from_secs(1_000 + 120)));
    for tuned in std::mem::take(&mut model.told) {
        match tuned {
            super::decide::Tuned::Job(_, _, resolved) => model.jobs[0].1.resolved = Some(resolved),
            super::decide::Tuned::Pod(_, _, limits) => model.pods[0].limits = Some(limits),
        }
    }
    assert_eq!(model.look(true).tune, [], "what was told is not told again");
}

#[test]
fn a_suspended_session_says_so_whatever_it_asks_for_and_what_it_may_not_have_when_it_goes_on() {
    let not_here = Invalid::NotAllowed {
        field: "runnerSecrets",
        asked: "theirs".into(),
        list: "allowedSecrets",
        allowed: "none".into(),
    };
    let mut model = Model::new();
    model.request = Err(not_here);
    let says = |model: &Model| (model.status.phase, model.status.reason.clone().unwrap());
    model.look(true);
    assert_eq!(says(&model), (Phase::Pending, "ConfigError".into()));
    model.happen(Happening::Suspend(true));
    model.look(true);
    assert_eq!(says(&model), (Phase::Pending, "Suspended".into()));
    let why = model
        .status
        .conditions
        .iter()
        .find(|c| c.type_ == crds::condition::SPEC_ACCEPTED);
    assert!(
        why.unwrap().message.contains("theirs"),
        "what is wrong is said all the same"
    );
    model.happen(Happening::Suspend(false));
    model.look(true);
    assert_eq!(says(&model), (Phase::Pending, "ConfigError".into()));
}
