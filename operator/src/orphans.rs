//! Ends what outlives its session.
//!
//! Garbage collection does, when a session is deleted, but not when somebody asks for its children to be left, or holds the session with
//! a finalizer of their own. An agent must not work on for a session that is gone.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Resource as _, ResourceExt as _,
    api::{DeleteParams, Preconditions},
    core::{ObjectMeta, PartialObjectMeta},
    runtime::watcher::Event,
};
use protocol::names::label;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    session::{self, Found, Lean, Orphan},
};

/// How often they are looked for, at most.
const TICK: Duration = Duration::from_secs(5);

/// The longest wait before one is looked at again that stays, or cannot be ended.
const SELDOM: Duration = Duration::from_mins(5);

/// A pod with a session's label that no Job controls.
#[derive(Clone)]
struct Place {
    namespace: String,
    name: String,
    session: String,
}

/// Pods of sessions that no Job controls any more, by UID.
#[derive(Default)]
pub struct Bare(Mutex<HashMap<String, Place>>);

impl Bare {
    /// Notes what concerns such pods.
    pub fn see(&self, event: &Event<Lean<Pod>>) {
        match event {
            Event::Apply(Lean(pod)) | Event::InitApply(Lean(pod)) => {
                let controlled = pod
                    .owner_references()
                    .iter()
                    .any(|owner| owner.controller == Some(true));
                let uid = pod.uid().unwrap_or_default();
                if controlled || pod.metadata.deletion_timestamp.is_some() {
                    self.held().remove(&uid);
                } else {
                    let place = Place {
                        namespace: pod.namespace().unwrap_or_default(),
                        name: pod.name_any(),
                        session: pod.labels().get(label::SESSION).cloned().unwrap_or_default(),
                    };
                    self.held().insert(uid, place);
                }
            }
            Event::Delete(Lean(pod)) => {
                self.held().remove(pod.uid().as_deref().unwrap_or_default());
            }
            Event::Init | Event::InitDone => {}
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        // Every change is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What seems to have outlived its session, by UID.
struct Suspects {
    grace: Duration,
    of: HashMap<String, Suspect>,
}

struct Suspect {
    /// UID of the session that has the name.
    session: Option<String>,
    due: Instant,
    wait: Duration,
}

impl Suspects {
    /// Whether one is looked at now: after a grace, and then ever more seldom, since what somebody made a session's own may be left as it
    /// is for as long as it lives. Anew when the session is another.
    fn is_due(&mut self, uid: &str, session: Option<String>, now: Instant) -> bool {
        if self.of.get(uid).is_none_or(|suspect| suspect.session != session) {
            let suspect = Suspect {
                session,
                due: now + self.grace,
                wait: TICK,
            };
            self.of.insert(uid.to_owned(), suspect);
        }
        let suspect = self.of.get_mut(uid).filter(|suspect| suspect.due <= now);
        suspect.is_some_and(|suspect| {
            suspect.due = now + suspect.wait;
            suspect.wait = (suspect.wait * 2).min(SELDOM);
            true
        })
    }
}

/// Runs until `stop`.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let grace = Duration::from_secs(context.settings.timing.orphan_grace.into());
    let mut suspects = Suspects {
        grace,
        of: HashMap::new(),
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(TICK.min(grace.max(Duration::from_secs(1)))) => {}
        }
        let jobs = context.memory.orphans();
        let pods: Vec<_> = context.bare.held().clone().into_iter().collect();
        let now: HashSet<_> = jobs
            .iter()
            .map(|job| &job.uid)
            .chain(pods.iter().map(|(uid, _)| uid))
            .collect();
        suspects.of.retain(|uid, _| now.contains(uid));
        let mut due = |uid: &str, namespace: &str, session: &str| {
            suspects.is_due(
                uid,
                context.memory.uid_of_one_that_stays(namespace, session),
                Instant::now(),
            )
        };
        for job in &jobs {
            if !due(&job.uid, &job.namespace, &job.session) {
                continue;
            }
            let _under_way = context.under_way.token();
            if let Err(error) = end_job(&context, job).await {
                tracing::warn!(namespace = job.namespace, job = job.job, %error, "failed to end what outlived its session");
            }
        }
        for (uid, place) in &pods {
            let Place {
                namespace,
                name,
                session,
            } = place;
            if !due(uid, namespace, session) {
                continue;
            }
            let _under_way = context.under_way.token();
            if let Err(error) = end_pod(&context, namespace, name, uid).await {
                tracing::warn!(namespace, pod = name, %error, "failed to end what outlived its session");
            }
        }
    }
}

/// Its pods follow, and their reports are let go as those of every session that is gone.
async fn end_job(context: &Context, orphan: &Orphan) -> Result<(), Error> {
    let jobs: Api<Job> = Api::namespaced(context.client.clone(), &orphan.namespace);
    let job = jobs.get_metadata_opt(&orphan.job).await?;
    let Some(job) = job.filter(|job| job.uid().as_ref() == Some(&orphan.uid)) else {
        return Ok(());
    };
    if !is_ours(&job.metadata) || !is_left(context, &orphan.namespace, &job.metadata).await? {
        return Ok(());
    }
    tracing::warn!(
        namespace = orphan.namespace,
        job = orphan.job,
        "outlived its session: deleted"
    );
    gone(jobs.delete(&orphan.job, &this_one(&orphan.uid)).await)
}

async fn end_pod(context: &Context, namespace: &str, name: &str, uid: &str) -> Result<(), Error> {
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), namespace);
    let pod: Option<PartialObjectMeta<Pod>> = pods.get_metadata_opt(name).await?;
    let Some(pod) = pod.filter(|pod| pod.uid().as_deref() == Some(uid)) else {
        context.bare.held().remove(uid);
        return Ok(());
    };
    let controlled = pod
        .owner_references()
        .iter()
        .any(|owner| owner.controller == Some(true));
    if controlled || !is_ours(&pod.metadata) || !is_left(context, namespace, &pod.metadata).await? {
        return Ok(());
    }
    tracing::warn!(namespace, pod = name, "outlived its session: deleted");
    gone(pods.delete(name, &this_one(uid)).await)
}

/// An object that could not be looked at or deleted.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Observe(#[from] session::ObserveError),
}

/// Made by us: nobody controls it but a session, or nobody any more.
fn is_ours(meta: &ObjectMeta) -> bool {
    let labels = meta.labels.as_ref();
    let managed = labels
        .and_then(|labels| labels.get(label::MANAGED_BY))
        .map(String::as_str)
        == Some(label::MANAGER);
    let mut controllers = meta
        .owner_references
        .iter()
        .flatten()
        .filter(|owner| owner.controller == Some(true));
    managed && controllers.all(|owner| owner.kind == crds::AgenticSession::kind(&()))
}

/// Whether the session that its labels name is gone, or going.
async fn is_left(context: &Context, namespace: &str, meta: &ObjectMeta) -> Result<bool, Error> {
    let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name));
    let (Some(session), Some(uid)) = (label(label::SESSION), label(label::SESSION_UID)) else {
        return Ok(false);
    };
    Ok(match session::find(&context.client, namespace, session).await? {
        Found::Gone => true,
        Found::Live(session) => session.uid().as_ref() != Some(uid),
        Found::Unreadable { .. } => false,
    })
}

fn this_one(uid: &str) -> DeleteParams {
    DeleteParams {
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            ..Preconditions::default()
        }),
        ..DeleteParams::background()
    }
}

/// Gone or replaced is done.
fn gone<T>(result: kube::Result<T>) -> Result<(), Error> {
    match result {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, controller: Option<bool>, deleted: bool) -> Lean<Pod> {
        let owner = |controller| json!({"apiVersion": "batch/v1", "kind": "Job", "name": "poem-job", "uid": "j1", "controller": controller});
        let metadata = json!({
            "namespace": "poets", "name": format!("pod-{uid}"), "uid": uid,
            "ownerReferences": controller.map(owner).into_iter().collect::<Vec<_>>(),
            "deletionTimestamp": deleted.then_some("2026-01-02T03:04:05Z"),
        });
        Lean(serde_json::from_value(json!({"metadata": metadata})).unwrap())
    }

    #[test]
    fn a_pod_is_bare_while_nobody_controls_it_and_nobody_has_deleted_it() {
        let bare = Bare::default();
        let known = || {
            let mut known: Vec<_> = bare.held().values().map(|place| place.name.clone()).collect();
            known.sort();
            known
        };
        bare.see(&Event::InitApply(pod("a", None, false)));
        bare.see(&Event::Apply(pod("b", Some(false), false)));
        bare.see(&Event::Apply(pod("c", Some(true), false)));
        bare.see(&Event::Apply(pod("d", None, true)));
        bare.see(&Event::Apply(pod("e", None, false)));
        assert_eq!(known(), ["pod-a", "pod-b", "pod-e"]);
        bare.see(&Event::Apply(pod("a", Some(true), false)));
        bare.see(&Event::Apply(pod("b", None, true)));
        bare.see(&Event::Delete(pod("e", None, false)));
        assert_eq!(known(), [""; 0]);
    }

    #[test]
    fn what_stays_is_looked_at_ever_more_seldom_and_anew_when_its_session_is_another() {
        let mut suspects = Suspects {
            grace: Duration::from_secs(30),
            of: HashMap::new(),
        };
        let begin = Instant::now();
        let mut looks = |seconds: std::ops::Range<u64>, session: Option<&str>| -> Vec<u64> {
            let due = |at: &u64| suspects.is_due("j1", session.map(str::to_owned), begin + Duration::from_secs(*at));
            seconds.step_by(5).filter(due).collect()
        };
        assert_eq!(looks(0..1_000, Some("s1")), [30, 35, 45, 65, 105, 185, 345, 645, 945]);
        assert_eq!(looks(1_000..1_050, None), [1_030, 1_035, 1_045], "the session is gone");
    }

    #[rstest]
    #[case::nobodys(json!({}), true)]
    #[case::a_sessions(json!({"kind": "AgenticSession", "controller": true}), true)]
    #[case::a_jobs(json!({"kind": "Job", "controller": true}), false)]
    #[case::one_that_is_only_named(json!({"kind": "Job", "controller": false}), true)]
    fn what_somebody_else_controls_is_not_ended(#[case] mut owner: Value, #[case] ours: bool) {
        let owners = owner.as_object_mut().filter(|owner| !owner.is_empty()).map(|owner| {
            owner.extend([
                ("apiVersion".into(), json!("a/v1")),
                ("name".into(), json!("n")),
                ("uid".into(), json!("u")),
            ]);
            json!([owner])
        });
        let meta = |manager: &str| -> ObjectMeta {
            serde_json::from_value(json!({"labels": {label::MANAGED_BY: manager}, "ownerReferences": owners})).unwrap()
        };
        assert_eq!(is_ours(&meta(label::MANAGER)), ours);
        assert!(!is_ours(&meta("helm")), "made by somebody else");
    }

    #[test]
    fn what_is_gone_or_replaced_is_done_with_and_what_is_refused_is_not() {
        let answer = |code: u16, reason: &str| {
            let status = json!({"code": code, "reason": reason, "status": "Failure", "message": ""});
            gone::<()>(Err(kube::Error::Api(serde_json::from_value(status).unwrap()))).is_ok()
        };
        assert!(answer(404, "NotFound") && answer(409, "Conflict") && !answer(403, "Forbidden"));
    }
}
