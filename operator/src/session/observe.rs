//! What the cluster says now: live reads, so that no decision rests on a cache.

use crds::{AgenticSession, Phase};
use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Event, PersistentVolumeClaim, Pod},
};
use kube::{Api, Client, ResourceExt as _, api::ListParams, core::DeserializeGuard};
use protocol::names::{component, label};

use super::{
    build,
    decide::next_attempt,
    observed::{
        ClaimSeen, JobFor, JobSeen, Observed, OurJob, PodSeen, Policy, RunnerSeen, SessionSeen, bare_pod_of, pod_of,
        pod_of_job, trouble_of,
    },
};

/// How long the Job controller may take to make a pod before its Events are asked why there is none.
const POD_EXPECTED_WITHIN: i64 = 3;
/// How long a pod with a node may take to start before its Events are asked what it waits for.
const START_EXPECTED_WITHIN: i64 = 10;

/// A read that failed.
#[derive(Debug, thiserror::Error)]
#[error("failed to read {what} of session {session}")]
pub struct Error {
    /// What was read.
    pub what: &'static str,
    /// Whose.
    pub session: String,
    /// Why.
    #[source]
    pub source: kube::Error,
}

/// A session as the API server has it.
pub enum Found {
    /// It is gone, or going: its children follow by garbage collection.
    Gone,
    /// It cannot be read as this operator's schema has it.
    Unreadable {
        /// Its UID.
        uid: String,
        /// Why not.
        why: String,
    },
    /// It is there.
    Live(Box<AgenticSession>),
}

/// Reads the session itself.
pub async fn session(client: &Client, namespace: &str, name: &str) -> Result<Found, Error> {
    let sessions: Api<DeserializeGuard<AgenticSession>> = Api::namespaced(client.clone(), namespace);
    let found = sessions.get_opt(name).await.map_err(|source| Error {
        what: "the object",
        session: name.to_owned(),
        source,
    })?;
    Ok(match found {
        None => Found::Gone,
        Some(DeserializeGuard(Err(unreadable))) => Found::Unreadable {
            uid: unreadable.metadata.uid.unwrap_or_default(),
            why: unreadable.error,
        },
        Some(DeserializeGuard(Ok(session))) if session.metadata.deletion_timestamp.is_some() => Found::Gone,
        Some(DeserializeGuard(Ok(session))) => Found::Live(Box::new(session)),
    })
}

/// Whether an attempt of the session of this UID may work: as a Job that is not over, or a pod.
pub async fn works(client: &Client, namespace: &str, name: &str, uid: &str) -> Result<bool, Error> {
    let failed = |source| Error {
        what: "the Jobs or the pods",
        session: name.to_owned(),
        source,
    };
    let attempts = format!(
        "{}={uid},{}={}",
        label::SESSION_UID,
        label::COMPONENT,
        component::ATTEMPT
    );
    let attempts = ListParams::default().labels(&attempts);
    let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
    let jobs = jobs.list(&attempts).await.map_err(failed)?.items;
    if jobs.iter().map(OurJob::from).any(|job| !job.finished && !job.suspended) {
        return Ok(true);
    }
    // After the Jobs: one that is over then has made its pod.
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = pods.list(&attempts).await.map_err(failed)?.items;
    Ok(pods.iter().any(|pod| !PodSeen::of(pod, 0, "").is_over()))
}

/// Reads the children.
///
/// The pods come last: a Job that is over when it is read had its pod before, and that pod is held by its finalizer until its
/// report is recorded, so a pod that is not found then is gone for good.
pub async fn children(
    client: &Client,
    session: &AgenticSession,
    policy: Policy,
    now: Timestamp,
) -> Result<Observed, Error> {
    let (namespace, name) = (session.namespace().unwrap_or_default(), session.name_any());
    let uid = session.uid().unwrap_or_default();
    let failed = |what| {
        let session = name.clone();
        move |source| Error { what, session, source }
    };
    let seen = SessionSeen::from(session);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &namespace);
    let live = is_live(&seen);
    let existing = session.spec.workspace.as_ref().and_then(|w| w.existing_claim.clone());
    let own = || (!is_ephemeral(session)).then(|| build::own_claim_name(&name));
    let claim_name = existing.clone().or_else(own);
    let (mut jobs, claim) = tokio::try_join!(
        jobs(client, &namespace, session, &seen, live),
        get(&claims, claim_name.as_deref())
    )
    .map_err(failed("the Jobs or the claim"))?;
    let listed = self::pods(client, &namespace, &uid).await.map_err(failed("the pods"))?;
    let mut found: Vec<_> = listed.iter().filter_map(|pod| pod_of(pod, &name)).collect();
    let strays = strays(client, &namespace, &name, &jobs, &found).await;
    found.extend(strays.map_err(failed("the pods"))?);
    let deserted = deserted(client, &namespace, &seen, &jobs, &found).await;
    found.extend(deserted.map_err(failed("the pods"))?);
    let mut bare: Vec<_> = listed.iter().filter_map(|pod| bare_pod_of(pod, &name)).collect();
    bare.retain(|pod| found.iter().all(|(_, followed)| followed.uid != pod.uid));
    let (pods, drain_pods) = sort_pods(found.into_iter(), &jobs.current, &seen);
    if let Some(job) = jobs.current.ours().filter(|job| !live && !job.finished && !job.counted)
        && pods.iter().all(|pod| pod.job_uid != job.uid)
    {
        // Its pod may have been counted, and then have gone, since the Job was read.
        let again = get(&Api::namespaced(client.clone(), &namespace), Some(&job.name)).await;
        let again: Option<Job> = again.map_err(failed("the Job"))?;
        jobs.current = JobSeen::of(again.as_ref(), &session.metadata);
    }
    let unsaid = match silent(jobs.current.ours(), &pods, seen.status.attempt, now).filter(|_| live) {
        // Only the explanation hangs on it.
        Some(uid) => last_event(client, &namespace, uid).await.unwrap_or_else(|error| {
            tracing::warn!(session = name, namespace, %error, "failed to read Events");
            None
        }),
        None => None,
    };
    Ok(Observed {
        claim: match existing {
            Some(_) => ClaimSeen::existing(claim.as_ref()),
            None if claim_name.is_none() => ClaimSeen::Ephemeral,
            None => ClaimSeen::of(claim.as_ref(), &session.metadata),
        },
        session: seen,
        job: jobs.current,
        next_job: jobs.next,
        earlier: jobs.earlier,
        drains: jobs.drains,
        unsaid: unsaid.as_ref().and_then(trouble_of),
        pods,
        drain_pods,
        bare,
        policy,
    })
}

/// The children as they are remembered.
///
/// Claims are not watched: that of a runner that has started is bound, and what else there is about claims shows when one is needed,
/// which is decided on live reads.
pub fn remembered(
    session: &AgenticSession,
    jobs: Vec<OurJob>,
    pods: Vec<(JobFor, PodSeen)>,
    policy: Policy,
) -> Observed {
    let seen = SessionSeen::from(session);
    let live = is_live(&seen);
    let jobs = Jobs::sort(jobs.into_iter(), &session.name_any(), &seen, live);
    let (pods, drain_pods) = sort_pods(pods.into_iter(), &jobs.current, &seen);
    let bound = pods.iter().any(|pod| pod.runner != RunnerSeen::Waiting);
    Observed {
        claim: if is_ephemeral(session) {
            ClaimSeen::Ephemeral
        } else {
            ClaimSeen::Ours { bound }
        },
        session: seen,
        job: jobs.current,
        next_job: jobs.next,
        earlier: jobs.earlier,
        drains: jobs.drains,
        unsaid: None,
        pods,
        drain_pods,
        // A session that has some is not remembered.
        bare: Vec::new(),
        policy,
    }
}

/// A session that was seen to be made, whose claim we have just made if it has one: it has nothing else.
pub fn newborn(session: &AgenticSession, policy: Policy) -> Observed {
    remembered(session, Vec::new(), Vec::new(), policy)
}

fn is_ephemeral(session: &AgenticSession) -> bool {
    let workspace = session.spec.workspace.as_ref();
    workspace.and_then(|workspace| workspace.ephemeral).unwrap_or_default()
}

/// Whether something of the attempt that is observed should have come further by now, and Events may say why it has not.
pub fn is_silent(observed: &Observed, now: Timestamp) -> bool {
    is_live(&observed.session)
        && silent(
            observed.job.ours(),
            &observed.pods,
            observed.session.status.attempt,
            now,
        )
        .is_some()
}

fn is_live(seen: &SessionSeen) -> bool {
    matches!(seen.status.phase, Phase::Creating | Phase::Running | Phase::Stopping)
}

fn sort_pods(
    found: impl Iterator<Item = (JobFor, PodSeen)>,
    job: &JobSeen,
    seen: &SessionSeen,
) -> (Vec<PodSeen>, Vec<PodSeen>) {
    let (mut pods, mut drain_pods) = (Vec::new(), Vec::new());
    for (what, pod) in found {
        match what {
            JobFor::Attempt(_) => pods.push(pod),
            JobFor::Drain(_) => drain_pods.push(pod),
        }
    }
    if let Some(job) = job.ours() {
        // A pod of another Job of that name is not this attempt's.
        pods.retain(|pod| Some(pod.attempt) != seen.status.attempt || pod.job_uid == job.uid);
    }
    (pods, drain_pods)
}

/// The Jobs of a session.
struct Jobs {
    current: JobSeen,
    next: JobSeen,
    earlier: Vec<OurJob>,
    drains: Vec<(u32, OurJob)>,
}

impl Jobs {
    /// Tells the session's Jobs apart.
    fn sort(ours: impl Iterator<Item = OurJob>, session: &str, seen: &SessionSeen, live: bool) -> Self {
        let mut found = Self {
            current: JobSeen::Missing,
            next: JobSeen::Missing,
            earlier: Vec::new(),
            drains: Vec::new(),
        };
        let next = next_attempt(&seen.status).number;
        for job in ours {
            match JobFor::of(&job.name, session) {
                Some(JobFor::Drain(number)) => found.drains.push((number, job)),
                Some(JobFor::Attempt(n)) if Some(n) == seen.status.attempt => found.current = JobSeen::Ours(job),
                Some(JobFor::Attempt(n)) if n == next && !live => found.next = JobSeen::Ours(job),
                Some(JobFor::Attempt(n)) if n < next => found.earlier.push(job),
                Some(JobFor::Attempt(_)) | None => {}
            }
        }
        found
    }
}

/// The label finds ours; a name that is needed and not among them may be somebody else's, or one whose label was taken away.
async fn jobs(
    client: &Client,
    namespace: &str,
    session: &AgenticSession,
    seen: &SessionSeen,
    live: bool,
) -> kube::Result<Jobs> {
    let name = session.name_any();
    let api: Api<Job> = Api::namespaced(client.clone(), namespace);
    let ours = ListParams::default().labels(&format!("{}={}", label::SESSION_UID, session.uid().unwrap_or_default()));
    let listed = api.list(&ours).await?.items;
    let ours = listed
        .iter()
        .filter_map(|job| JobSeen::of(Some(job), &session.metadata).into_ours());
    let next = next_attempt(&seen.status).number;
    let mut found = Jobs::sort(ours, &name, seen, live);
    let needed = |job: &JobSeen, n: u32| (*job == JobSeen::Missing).then(|| build::job_name(&name, n));
    let current = seen
        .status
        .attempt
        .filter(|_| live)
        .and_then(|n| needed(&found.current, n));
    let next = needed(&found.next, next).filter(|_| seen.status.phase == Phase::Pending);
    let (current, next) = tokio::try_join!(get(&api, current.as_deref()), get(&api, next.as_deref()))?;
    if current.is_some() {
        found.current = JobSeen::of(current.as_ref(), &session.metadata);
    }
    if next.is_some() {
        found.next = JobSeen::of(next.as_ref(), &session.metadata);
    }
    Ok(found)
}

async fn get<K>(api: &Api<K>, name: Option<&str>) -> kube::Result<Option<K>>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned + kube::Resource,
{
    match name {
        Some(name) => api.get_opt(name).await,
        None => Ok(None),
    }
}

/// The label finds them; the Job that controls one makes it the session's.
async fn pods(client: &Client, namespace: &str, uid: &str) -> kube::Result<Vec<Pod>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let ours = ListParams::default().labels(&format!("{}={uid}", label::SESSION_UID));
    Ok(pods.list(&ours).await?.items)
}

/// Pods of the session's Jobs that the label does not find: somebody took it off. A pod that lives must not pass for one that is gone.
async fn strays(
    client: &Client,
    namespace: &str,
    session: &str,
    jobs: &Jobs,
    found: &[(JobFor, PodSeen)],
) -> kube::Result<Vec<(JobFor, PodSeen)>> {
    let ours = jobs.current.ours().into_iter().chain(jobs.next.ours());
    let ours = ours
        .chain(&jobs.earlier)
        .chain(jobs.drains.iter().map(|(_, job)| job))
        .filter(|job| found.iter().all(|(_, pod)| pod.job_uid != job.uid));
    let ours: Vec<_> = ours.collect();
    if ours.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<_> = ours.iter().map(|job| &*job.name).collect();
    // Kubernetes' own label, by which the Job's controller finds its pods.
    let of_jobs = ListParams::default().labels(&format!("batch.kubernetes.io/job-name in ({})", names.join(",")));
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let listed = pods.list(&of_jobs).await?.items;
    let strays = listed.iter().filter_map(|pod| pod_of_job(pod, session));
    Ok(strays
        .filter(|(_, pod)| ours.iter().any(|job| job.uid == pod.job_uid))
        .collect())
}

/// The pod of the attempt that status speaks of, when its Job was taken away from above it, and perhaps its labels too: it runs on, and
/// must not pass for one that is gone.
async fn deserted(
    client: &Client,
    namespace: &str,
    seen: &SessionSeen,
    jobs: &Jobs,
    found: &[(JobFor, PodSeen)],
) -> kube::Result<Option<(JobFor, PodSeen)>> {
    let status = &seen.status;
    let (Some(name), Some(uid), Some(attempt)) = (&status.pod_name, &status.pod_uid, status.attempt) else {
        return Ok(None);
    };
    if found.iter().any(|(_, pod)| pod.uid == *uid) {
        return Ok(None);
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = pods.get_opt(name).await?.filter(|pod| pod.uid().as_ref() == Some(uid));
    let job = jobs.current.ours().map_or("", |job| &*job.uid);
    Ok(pod.map(|pod| (JobFor::Attempt(attempt), PodSeen::of(&pod, attempt, job))))
}

/// UID of what should have come further by now and does not say in its status why it has not: the Job that has no pod, or the
/// pod that has a node.
fn silent<'a>(job: Option<&'a OurJob>, pods: &'a [PodSeen], attempt: Option<u32>, now: Timestamp) -> Option<&'a str> {
    let overdue = |since: Option<Timestamp>, seconds| since.is_some_and(|t| now.duration_since(t).as_secs() >= seconds);
    match pods.iter().find(|pod| Some(pod.attempt) == attempt) {
        None => job
            // One that is suspended waits for whoever admits it, and says so itself.
            .filter(|job| !job.suspended && overdue(job.started.or(job.created), POD_EXPECTED_WITHIN))
            .map(|job| &*job.uid),
        Some(pod) => {
            let waits = pod.scheduled && pod.trouble.is_none() && pod.runner == RunnerSeen::Waiting;
            (waits && overdue(pod.created, START_EXPECTED_WITHIN)).then_some(&*pod.uid)
        }
    }
}

/// The newest Event about an object: what an older one tells of may be overcome.
async fn last_event(client: &Client, namespace: &str, uid: &str) -> kube::Result<Option<Event>> {
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let about = ListParams::default()
        .fields(&format!("involvedObject.uid={uid}"))
        .limit(100);
    let when = |event: &Event| {
        let last = event.last_timestamp.as_ref().map(|t| t.0);
        last.or(event.event_time.as_ref().map(|t| t.0))
            .or(event.metadata.creation_timestamp.as_ref().map(|t| t.0))
    };
    Ok(events.list(&about).await?.items.into_iter().max_by_key(when))
}
