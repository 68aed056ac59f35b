//! What may be done on what the watches have told, which may be behind: to rest, and to tell of progress, which the API server
//! refuses when the session is another by now. Whatever makes, takes away or ends is decided once more on live reads.

use crds::{AgenticSession, AgenticSessionStatus, Phase};
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{
    Basis, Decided, Error, Found, Settled, apply, build, carry_out, decide,
    decide::Plan,
    gate,
    memory::Known,
    observe, observed, record,
    validate::{Claim, Request},
};
use crate::context::Context;

/// What follows from a plan that was made on what is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is nothing to do.
    Rest,
    /// The status is written: it tells of progress, and of nothing that ends.
    Tell,
    /// Something should have come further by now. Why, and whether that is over, stands in Events alone, which are not remembered.
    Ask,
    /// A session that nobody has done anything about gets what it needs.
    Begin,
    /// It is decided on live reads.
    ReadLive,
}

/// What a plan rests on besides what was observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ground {
    /// A status must not be built on what is remembered.
    pub cut: bool,
    /// Nobody has done anything about the session, and it has no children.
    pub untouched: bool,
    /// Something of it should have come further by now.
    pub silent: bool,
}

/// Decides what is done about a plan.
pub(super) fn step(before: &AgenticSessionStatus, plan: &Plan, ground: Ground) -> Step {
    if !plan.only_tells() {
        return if ground.untouched && plan.create_job.is_some() {
            Step::Begin
        } else {
            Step::ReadLive
        };
    }
    let same = *before == plan.status;
    let progress = match before.phase {
        Phase::Pending => plan.status.phase == Phase::Pending,
        Phase::Creating => matches!(plan.status.phase, Phase::Creating | Phase::Running),
        _ => false,
    };
    match (same, progress) {
        (true, _) | (_, true) if ground.silent => Step::Ask,
        (true, _) => Step::Rest,
        (false, true) if !ground.cut => Step::Tell,
        (false, _) => Step::ReadLive,
    }
}

/// Does what can be done on what is remembered; `None` when that is not enough.
pub(super) async fn act(context: &Context, known: Known, now: Timestamp) -> Result<Option<Settled>, Error> {
    let Known {
        session,
        cut,
        newborn,
        jobs,
        pods,
    } = known;
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let alone = jobs.is_empty() && pods.is_empty();
    let observed = observe::remembered(&session, jobs, pods, observed::Policy::of(&context.settings));
    let Decided { request, limit, plan } = decide(context, &session, &observed, Basis::Remembered, now).await?;
    let ground = Ground {
        cut,
        // Who waits for a place has no claim yet.
        untouched: newborn && alone && limit.is_none(),
        silent: observe::is_silent(&observed, now),
    };
    if !ground.silent {
        context.memory.answered(&namespace, &name);
    }
    match step(&observed.session.status, &plan, ground) {
        Step::Ask if context.memory.ask(&namespace, &name) => return Ok(None),
        Step::Rest | Step::Ask => {}
        Step::Tell => match record(context, &session, &plan, Vec::new()).await {
            // The session is another by now, and the watch has not told yet.
            Err(error) if error.is_race() => return Ok(None),
            result => result?,
        },
        Step::Begin => {
            return match request {
                Ok(request) => begin(context, &session, &request, now).await,
                Err(_) => Ok(None),
            };
        }
        Step::ReadLive => return Ok(None),
    }
    gate::settle(context, &session, &plan, &request);
    Ok(Some(Settled::Live { wake: plan.wake }))
}

/// Begins a session that was seen to be made and has nothing yet: its claim, if it has one, is made while it is read once more.
async fn begin(
    context: &Context,
    remembered: &AgenticSession,
    request: &Request,
    now: Timestamp,
) -> Result<Option<Settled>, Error> {
    let (namespace, name) = (remembered.namespace().unwrap_or_default(), remembered.name_any());
    let claim = match &request.claim {
        Claim::Ephemeral { .. } => None,
        Claim::Own { .. } | Claim::Existing(_) => {
            let claim = build::claim(request).filter(|claim| claim.metadata.owner_references.is_some());
            let Some(claim) = claim else { return Ok(None) };
            Some(claim)
        }
    };
    let create = async {
        match &claim {
            Some(claim) => apply::create(&context.client, &namespace, "claim", claim).await,
            None => Ok(()),
        }
    };
    let (claim, session) = tokio::join!(create, observe::session(&context.client, &namespace, &name));
    let Found::Live(session) = session? else {
        return Ok(None);
    };
    // Whatever is wrong with the claim is found out, and said, by a whole look.
    if claim.is_err() || session.metadata.resource_version != remembered.metadata.resource_version {
        return Ok(None);
    }
    let observed = observe::newborn(&session, observed::Policy::of(&context.settings));
    carry_out(context, &session, &observed, now).await.map(Some)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::session::{
        decide::decide,
        decide_model::{Happening, Model, happenings},
        observed::Observed,
    };

    const GROUND: Ground = Ground {
        cut: false,
        untouched: false,
        silent: false,
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
                if matches!(happening, Happening::Look { .. }) {
                    history.clear();
                }
                history.push(model.observed());
                let Some((session, children)) = look else { continue };
                let seen = behind(&history, session, children);
                let plan = decide(&seen, &model.request, model.now);
                let before = &seen.session.status;
                match step(before, &plan, GROUND) {
                    Step::Tell => {
                        prop_assert!(plan.only_tells() && !plan.status.phase.is_terminal());
                        prop_assert_eq!(before.attempt, plan.status.attempt);
                        // The API server refuses it when the session is another by now.
                        if *before == model.status {
                            model.status = plan.status;
                            history = vec![model.observed()];
                        }
                    }
                    Step::Rest => prop_assert_eq!(before, &plan.status),
                    Step::ReadLive => {}
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
}
