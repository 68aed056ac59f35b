//! What begins a run, and what keeps one from beginning.

use crds::Phase;
use protocol::Outcome;
use rstest::rstest;

use super::{brought_to, running};
use crate::session::{
    model::{Happening, Model},
    validate::Invalid,
};

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
