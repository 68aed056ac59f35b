//! What is not done for the sake of time while the clock may be wrong.

use crds::{Phase, condition};
use protocol::Reason;
use rstest::rstest;

use super::{brought_to, running, undelivered, waits::refuse};
use crate::session::{
    decide::{decide, refused},
    model::{Happening, Model},
    observed::ClaimSeen,
    plan::Plan,
};

/// What is decided when the clocks disagree, and when they do not, after so long.
fn after(model: &mut Model, seconds: i64) -> (Plan, Plan) {
    model.happen(Happening::Time(seconds));
    let mut seen = model.observed();
    let sure = decide(&seen, &model.request, model.now);
    seen.policy.clock_is_sure = false;
    (decide(&seen, &model.request, model.now), sure)
}

#[test]
fn no_agent_is_stopped_for_a_time_that_may_not_have_come() {
    let mut model = running();
    let (unsure, sure) = after(&mut model, 7_200);
    assert_eq!(
        (unsure.status.phase, sure.status.phase),
        (Phase::Running, Phase::Stopping)
    );
    assert!(unsure.wake.unwrap().as_secs() >= 30, "{:?}", unsure.wake);
    model.happen(Happening::Suspend(true));
    let (unsure, _) = after(&mut model, 0);
    assert_eq!(unsure.status.phase, Phase::Stopping, "a person's word is one");
}

#[test]
fn no_start_is_given_up_for_a_time_that_may_not_have_come() {
    let mut model = brought_to(Phase::Creating);
    model.happen(Happening::JobController);
    model.look(true);
    let (unsure, sure) = after(&mut model, 7_200);
    assert_eq!(
        (unsure.status.phase, sure.status.phase),
        (Phase::Creating, Phase::Stopping)
    );

    let mut model = Model {
        claim: ClaimSeen::Absent,
        ..Model::new()
    };
    model.look(true);
    let (unsure, sure) = after(&mut model, 7_200);
    assert_eq!(
        (unsure.status.phase, sure.status.phase),
        (Phase::Pending, Phase::Failed)
    );

    let mut model = Model::new();
    refuse(&mut model);
    model.happen(Happening::Time(7_200));
    let mut seen = model.observed();
    seen.policy.clock_is_sure = false;
    let said = ("Job", "write-poem-job", "exceeded quota: small");
    let unsure = refused(&seen, &model.request, said, model.now);
    assert_eq!(unsure.status.phase, Phase::Pending);
    assert_eq!(refuse(&mut model).status.phase, Phase::Failed);
}

#[rstest]
#[case::its_job_is_kept(None)]
#[case::it_is_kept_itself(Some(50))]
fn nothing_is_deleted_for_a_time_that_may_not_have_come(#[case] ttl: Option<u64>) {
    let mut model = brought_to(Phase::Completed);
    model.happen(Happening::JobController);
    model.look(true);
    model.request.as_mut().unwrap().ttl = ttl;
    let (unsure, sure) = after(&mut model, 7_200);
    assert!(unsure.delete.is_empty() && !unsure.delete_session, "{unsure:#?}");
    assert!(unsure.wake.unwrap().as_secs() >= 30, "it is looked at again");
    assert_eq!((sure.delete.len(), sure.delete_session), (1, ttl.is_some()));
}

#[test]
fn no_records_are_given_up_for_a_time_that_may_not_have_come() {
    let mut model = undelivered();
    model.look(true);
    model.drains.clear();
    model.drain_pods.clear();
    model.status.drain_job_name = None;
    let delivered = |plan: &Plan| {
        let found = plan
            .status
            .conditions
            .iter()
            .find(|c| c.type_ == condition::EVENTS_DELIVERED);
        found.map(|c| c.reason.clone())
    };
    let (unsure, sure) = after(&mut model, 100_000);
    assert_eq!(delivered(&unsure).as_deref(), Some(Reason::Undelivered.as_str()));
    assert_eq!(delivered(&sure).as_deref(), Some(Reason::Lost.as_str()));
}
