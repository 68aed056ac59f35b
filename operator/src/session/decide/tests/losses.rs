//! Jobs, pods and workspaces that go though nobody of ours took them away.

use crds::{Phase, condition};
use protocol::{Outcome, Reason, spec::LiveLimits};
use rstest::rstest;

use super::{running, running_with};
use crate::session::{
    model::{Happening, Model},
    observed::{ClaimSeen, RunnerSeen},
    pod::Disruption,
    validate::Invalid,
};

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

#[rstest]
#[case::evicted(Reason::Evicted, Phase::Pending)]
#[case::on_a_node_that_was_lost(Reason::NodeLost, Phase::Failed)]
fn after_a_workspace_that_went_with_a_pod_another_attempt_follows_where_no_agent_can_have_begun(
    #[case] reason: Reason,
    #[case] expected: Phase,
) {
    let mut model = Model {
        claim: ClaimSeen::Ephemeral,
        ..Model::new()
    };
    model.look(true);
    model.happen(Happening::JobController);
    model.look(true);
    let pod = &mut model.pods[0];
    assert_eq!(pod.runner, RunnerSeen::Waiting);
    pod.terminal = true;
    pod.disruption = Some(Disruption {
        reason,
        message: "gone".into(),
    });
    model.look(true);
    assert_eq!(model.status.phase, expected, "{:?}", model.status.message);
}

#[test]
fn a_pod_that_went_while_nobody_looked_ran_until_its_job_was_over_at_the_latest() {
    let mut model = running();
    model.happen(Happening::Time(50));
    model.pods.clear();
    (model.jobs[0].1.finished, model.jobs[0].1.finished_at) = (true, Some(model.now));
    model.happen(Happening::Time(86_400));
    model.look(true);
    assert_eq!(
        (model.status.phase, model.status.running_seconds),
        (Phase::Pending, Some(50)),
        "{:?}",
        model.status.message
    );
}

#[rstest]
fn a_pod_that_lost_its_job_before_status_named_it_ends_before_another_begins(
    #[values(true, false)] recorded: bool,
    #[values(ClaimSeen::Missing, ClaimSeen::Ephemeral)] claim: ClaimSeen,
) {
    let mut model = Model {
        claim,
        gateway: true,
        ..Model::new()
    };
    model.look(recorded);
    model.happen(Happening::JobController);
    model.happen(Happening::RunnerStarts);
    model.happen(Happening::JobTakenFromAbove);
    model.look(true);
    if recorded {
        let delivered = model
            .status
            .conditions
            .iter()
            .find(|c| c.type_ == condition::EVENTS_DELIVERED);
        assert_eq!(delivered.map(|c| &*c.status), Some("False"), "it may have left records");
    }
    for _ in 0..3 {
        // The model begins nothing beside a pod that lives.
        model.look(true);
        model.happen(Happening::Time(60));
    }
    assert!(model.jobs.is_empty() && model.bare[0].deleting, "{:#?}", model.bare);
    model.settle();
    assert!(model.bare.is_empty(), "its report is let go: {:?}", model.bare);
    let lost = recorded && claim == ClaimSeen::Ephemeral;
    let end = if lost { Phase::Failed } else { Phase::Completed };
    assert_eq!(model.status.phase, end, "{:#?}", model.status);
}

#[test]
fn an_attempt_whose_job_was_taken_away_keeps_its_limits_while_nobody_knows_what_is_allowed() {
    let mut model = running();
    model.jobs.clear();
    let told = LiveLimits {
        timeout: Some(9_000),
        ..LiveLimits::default()
    };
    model.pods[0].limits = Some(told);
    model.request = Err(Invalid::NoSettings("forbidden".into()));
    assert!(model.look(true).tune.is_empty());
    model.happen(Happening::Time(8_000));
    model.look(true);
    assert_eq!(model.status.phase, Phase::Running, "{:#?}", model.status);
    model.happen(Happening::Time(2_000));
    model.look(true);
    assert_eq!(model.status.phase, Phase::Stopping);
}
