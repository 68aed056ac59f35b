//! What may be done on what the watches have told, which may be behind.
//!
//! To rest; to tell of progress, which the API server refuses when the session is another by now; to tell of the end that a pod's
//! report tells of, since a container that has ended says the same for ever; and to let go of pods whose report is recorded, since
//! what is recorded stays so. Whatever else makes, takes away or ends is decided once more on live reads.

use crds::{AgenticSession, AgenticSessionStatus, Phase};
use jiff::Timestamp;
use kube::ResourceExt as _;

use protocol::Reason;

use super::{
    Basis, Decided, Error, Found, LOOK_FOR_POD, Settled, apply, build, carry_out, decide, gate,
    memory::Known,
    observe, observed,
    observed::{Observed, PodSeen},
    plan::Plan,
    record,
    validate::{Claim, Request},
};
use crate::{context::Context, project_settings};

/// How long a Job's pod is waited for, seconds, before status tells of the Job alone.
const POD_PATIENCE: i64 = 2;

/// What follows from a plan that was made on what is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is nothing to do.
    Rest,
    /// The status is written: it tells of progress, and of nothing that ends.
    Tell,
    /// A Job was just made. Its pod comes within a moment, and the status tells of both at once.
    Await,
    /// Something should have come further by now. Why, and whether that is over, stands in Events alone, which are not remembered.
    Ask,
    /// The status is written: it tells of the end that the attempt's own report tells of.
    Conclude,
    /// Pods are let go whose report is recorded.
    Release,
    /// A session of which no attempt was made so far gets what it needs.
    Begin,
    /// It is decided on live reads.
    ReadLive,
}

/// What a plan rests on besides what was observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude each other")]
pub(super) struct Ground {
    /// A status must not be built on what is remembered.
    pub cut: bool,
    /// No attempt of the session was made so far, and it has no children.
    pub untouched: bool,
    /// Something of it should have come further by now.
    pub silent: bool,
    /// The pod that status names has ended and left a report that says why.
    pub reported: bool,
    /// All that is let go are pods of attempts.
    pub of_attempts: bool,
    /// The Job of an attempt that status does not tell of.
    pub made: Made,
}

/// The Job of an attempt that status does not tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// There is none that lives.
    No,
    /// It was made a moment ago, and has no pod yet.
    Just,
    /// It has a pod, or should have.
    Yes,
}

impl Made {
    fn of(observed: &Observed, now: Timestamp) -> Self {
        let Some(job) = observed.next_job.ours().filter(|job| !job.finished && !job.deleting) else {
            return Self::No;
        };
        let has_pod = observed.pods.iter().any(|pod| pod.job_uid == job.uid);
        // By the API server's clock, in whole seconds.
        let age = job.created.map(|created| now.duration_since(created).as_secs());
        if age.is_some_and(|age| (-1..POD_PATIENCE).contains(&age)) && !has_pod && !job.suspended {
            Self::Just
        } else {
            Self::Yes
        }
    }
}

impl Ground {
    /// `childless` of a session that has neither Jobs nor pods, `newborn` of one that nobody has done anything about.
    fn of(observed: &Observed, plan: &Plan, (cut, newborn, childless): (bool, bool, bool), now: Timestamp) -> Self {
        let status = &observed.session.status;
        let waits = status.attempt.is_none() && status.reason.as_deref() == Some(Reason::Queued.as_str());
        let its_own = |pod: &&PodSeen| Some(pod.attempt) == status.attempt && Some(&pod.uid) == status.pod_uid.as_ref();
        // Repositories are not remembered.
        let said = |pod: &PodSeen| {
            let report = pod.last_word().filter(|report| report.attempt == pod.attempt);
            report.is_some_and(|report| report.repos.is_empty())
        };
        let of_attempts = |uid: &String| observed.pods.iter().any(|pod| pod.uid == *uid);
        Self {
            cut,
            untouched: childless && (newborn || waits),
            silent: observe::is_silent(observed, now),
            reported: observed.pods.iter().find(its_own).is_some_and(said),
            of_attempts: plan.release.iter().all(|(_, uid)| of_attempts(uid)),
            made: Made::of(observed, now),
        }
    }
}

/// Decides what is done about a plan.
pub(super) fn step(before: &AgenticSessionStatus, plan: &Plan, ground: Ground) -> Step {
    let same = *before == plan.status;
    if !plan.only_tells() {
        return match plan.create_job {
            Some(_) if ground.untouched => Step::Begin,
            None if same && ground.of_attempts && plan.only_lets_go() => Step::Release,
            _ => Step::ReadLive,
        };
    }
    let concludes =
        before.phase == Phase::Running && before.attempt == plan.status.attempt && plan.status.phase.is_terminal();
    if before.phase == Phase::Pending && plan.status.phase == Phase::Creating {
        return match ground.made {
            Made::Just => Step::Await,
            Made::Yes if !ground.cut => Step::Tell,
            _ => Step::ReadLive,
        };
    }
    let progress = match before.phase {
        Phase::Pending => plan.status.phase == Phase::Pending,
        Phase::Creating => matches!(plan.status.phase, Phase::Creating | Phase::Running),
        _ => false,
    };
    match (same, progress) {
        (true, _) | (_, true) if ground.silent => Step::Ask,
        (true, _) => Step::Rest,
        (false, true) if !ground.cut => Step::Tell,
        (false, _) if concludes && ground.reported && !ground.cut => Step::Conclude,
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
    let session = &session;
    let known = (cut, newborn, jobs.is_empty() && pods.is_empty());
    let observed = observe::remembered(
        session,
        jobs,
        pods,
        observed::Policy::of(&context.settings, &context.clock),
    );
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let Some(Decided { request, mut plan }) = decide(context, session, &observed, Basis::Remembered, now).await? else {
        return Ok(Some(Settled::COME_AGAIN));
    };
    let ground = Ground::of(&observed, &plan, known, now);
    if !ground.silent {
        context.memory.answered(&namespace, &name);
    }
    let step = step(&observed.session.status, &plan, ground);
    match step {
        Step::Ask if context.memory.ask(&namespace, &name) => return Ok(None),
        Step::Rest | Step::Ask => {}
        Step::Await => plan.wake_in(LOOK_FOR_POD),
        Step::Tell | Step::Conclude => match record(context, session, &plan, Vec::new()).await {
            // The session is another by now, and the watch has not told yet.
            Err(error) if error.is_race() => return Ok(None),
            result => result?,
        },
        Step::Release => {
            for (pod, uid) in &plan.release {
                apply::release(&context.client, &namespace, pod, uid).await?;
                context.memory.released(&namespace, &name, uid);
            }
        }
        Step::Begin => {
            return match request {
                Ok(request) => begin(context, session, &request, now).await,
                Err(_) => Ok(None),
            };
        }
        Step::ReadLive => return Ok(None),
    }
    gate::settle(context, session, &plan, &request);
    let over = step == Step::Rest && plan.status.phase.is_terminal() && plan.wake.is_none();
    Ok(Some(if over {
        Settled::Over
    } else {
        Settled::Live { wake: plan.wake }
    }))
}

/// Begins a session that has nothing yet: its claim, if it has one, is made while it is read once more.
///
/// A predecessor may have made claim and Job and not lived to record them, too late for our first lists. Then the claim, or at the
/// latest the Job, is there under its name, and all is read.
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
    let (claim, session, settings) = tokio::join!(
        create,
        observe::session(&context.client, &namespace, &name),
        project_settings::read(&context.client, &namespace)
    );
    let Found::Live(session) = session? else {
        return Ok(None);
    };
    // Whatever is wrong with the claim is found out, and said, by a whole look.
    if claim.is_err() || session.metadata.resource_version != remembered.metadata.resource_version {
        return Ok(None);
    }
    let observed = observe::newborn(&session, observed::Policy::of(&context.settings, &context.clock));
    let basis = Basis::Read(settings.map_err(Error::Settings)?);
    match carry_out(context, &session, &observed, basis, now).await {
        // There is a Job of that name. Whose, and what follows, is found out by a whole look.
        Err(Error::Apply(error)) if error.is_race() => Ok(None),
        settled => settled.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use proptest::prelude::*;

    use super::*;
    use crate::session::{
        decide::decide,
        model::{Happening, Model, happenings},
        observed::{JobSeen, Observed, OurJob},
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
}
