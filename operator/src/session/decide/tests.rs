//! `decide` in the model of the world.

mod attempts;
mod clock;
mod ends;
mod losses;
mod starts;
mod waits;

use crds::Phase;
use jiff::SignedDuration;
use proptest::prelude::*;
use protocol::Outcome;

use super::decide;
use crate::session::{
    model::{Happening, Model, happenings},
    observed::{ClaimSeen, RunnerSeen},
    plan::Plan,
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
    fn what_no_watch_tells_of_is_looked_at_in_time(
        gateway in any::<bool>(),
        happenings in prop::collection::vec(happenings(), 0..40),
        later in prop_oneof![1_i64..400, 400_i64..100_000],
    ) {
        let mut model = Model { gateway, ..Model::new() };
        model.request.as_mut().unwrap().ttl = Some(7_200);
        for happening in happenings {
            model.happen(happening);
        }
        let is_quiet = |model: &Model, plan: &Plan| plan.only_tells() && plan.status == model.status;
        let mut plan = model.look(true);
        for _ in 0..20 {
            let recorded = model.status.clone();
            plan = model.look(true);
            if plan.only_tells() && plan.status == recorded {
                break;
            }
        }
        prop_assume!(!model.expired);
        prop_assert!(is_quiet(&model, &plan), "{plan:#?}");
        if plan.wake.is_none_or(|wake| wake.as_secs() > later) {
            let then = model.now + SignedDuration::from_secs(later);
            let missed = decide(&model.observed(), &model.request, then);
            prop_assert!(is_quiet(&model, &missed), "{:?} misses {missed:#?}", plan.wake);
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

/// A run has ended without a final report, and there is a gateway.
fn undelivered() -> Model {
    let mut model = Model {
        gateway: true,
        ..running()
    };
    model.end_runner(None);
    model.happen(Happening::PodTurnsTerminal);
    model.happen(Happening::JobController);
    // It counts as a try: suspended, it ends.
    model.happen(Happening::Suspend(true));
    model.look(true);
    model.look(true);
    assert_eq!(model.status.phase, Phase::Stopped);
    model
}
