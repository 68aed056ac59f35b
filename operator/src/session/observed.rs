//! What was seen of a session and its children, reduced to what decisions rest on.

use crds::{AgenticSession, AgenticSessionStatus};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, PersistentVolumeClaim, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{Resource as _, ResourceExt as _};
use protocol::{
    Reason,
    names::{annotation, component, label},
    spec::{LiveLimits, Repo},
};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Clock,
    settings::{Settings, TimingSettings},
};

pub use super::{
    job::{InQueue, JobFor, JobSeen, OurJob},
    pod::{Grace, PodSeen, RunnerSeen, Trouble},
};
use super::{repos, validate};

/// Characters of a start request that count: as many as the status field takes that remembers it.
pub const LONGEST_START_REQUEST: usize = 256;

/// A session and its children, as the API server has them now.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The session itself.
    pub session: SessionSeen,
    /// Its volume claim.
    pub claim: ClaimSeen,
    /// The Job of the attempt that status speaks of; [`JobSeen::Missing`] before the first.
    pub job: JobSeen,
    /// The Job of the attempt after that one; looked for only while no attempt is live.
    pub next_job: JobSeen,
    /// Jobs of attempts before that one.
    pub earlier: Vec<OurJob>,
    /// Pods of all its attempts.
    pub pods: Vec<PodSeen>,
    /// Its drain Jobs, by number.
    pub drains: Vec<(u32, OurJob)>,
    /// Pods of its drain Jobs; the number is in the place of the attempt's.
    pub drain_pods: Vec<PodSeen>,
    /// Pods with the session's labels that nothing controls: their Job was taken away from above them before status named them, or
    /// somebody else made them. Nothing that they say is believed, but none works beside an attempt.
    pub bare: Vec<PodSeen>,
    /// What the operator was told.
    pub policy: Policy,
    /// What keeps the current attempt from starting and stands in no status: in the Events of its Job or pod alone.
    pub unsaid: Option<Trouble>,
}

/// What of the operator's settings decisions rest on.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// There is a gateway that takes records.
    pub gateway: bool,
    /// How long things last.
    pub timing: TimingSettings,
    /// The clocks agree. Else nothing is stopped, given up or deleted for the sake of time.
    pub clock_is_sure: bool,
}

impl Policy {
    /// What `settings` say, and the clock.
    pub fn of(settings: &Settings, clock: &Clock) -> Self {
        Self {
            gateway: settings.pod.gateway().is_some(),
            timing: settings.timing,
            clock_is_sure: clock.now().is_sure,
        }
    }
}

/// What of the session itself decisions rest on.
#[derive(Clone, Debug, Default)]
pub struct SessionSeen {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// When it was made. What its status tells of before that was in another life, of which a backup was taken.
    pub created: Option<Timestamp>,
    /// `spec.suspend`.
    pub suspend: bool,
    /// The annotation that asks for the next run.
    pub start_requested: Option<String>,
    /// `spec.repos`, as the runner was told of them.
    pub repos: Vec<Repo>,
    /// The recorded status.
    pub status: AgenticSessionStatus,
}

impl From<&AgenticSession> for SessionSeen {
    fn from(session: &AgenticSession) -> Self {
        Self {
            uid: session.metadata.uid.clone().unwrap_or_default(),
            generation: session.metadata.generation,
            created: session.creation_timestamp().map(|time| time.0),
            suspend: session.spec.suspend.unwrap_or_default(),
            start_requested: session
                .annotations()
                .get(annotation::START_REQUESTED_AT)
                .map(|value| value.chars().take(LONGEST_START_REQUEST).collect()),
            repos: repos::repos(&session.spec),
            status: session.status.clone().unwrap_or_default(),
        }
    }
}

/// Whose an object of a name that a session needs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The session's.
    Ours,
    /// A session's of this name that is gone; garbage collection will take the object.
    Predecessor,
    /// Somebody else's.
    Foreign,
}

/// The UID is the authority: a name can be used again.
pub(super) fn owner(meta: &ObjectMeta, session: &ObjectMeta) -> Owner {
    let controller = meta
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true));
    let of_our_kind = |o: &OwnerReference| {
        o.kind == AgenticSession::kind(&())
            && o.api_version
                .split('/')
                .next()
                .is_some_and(|g| g == AgenticSession::group(&()))
    };
    match controller {
        Some(o) if session.uid.as_deref() == Some(&*o.uid) => Owner::Ours,
        // The session of this name that lives has another UID, so this one's does not exist any more.
        Some(o) if of_our_kind(o) && session.name.as_deref() == Some(&*o.name) => Owner::Predecessor,
        _ => Owner::Foreign,
    }
}

/// The claim of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimSeen {
    /// There is none of that name.
    Missing,
    /// It is the session's.
    Ours {
        /// It has its volume.
        bound: bool,
    },
    /// It is being deleted, or waits for garbage collection: the name will be free.
    Going,
    /// It belongs to somebody else.
    Foreign,
    /// The session names one that must exist, and it does not, or not for long any more.
    Absent,
    /// The session has none (`workspace.ephemeral`): the workspace goes with the pod.
    Ephemeral,
}

impl ClaimSeen {
    /// What a claim is that a session names.
    pub fn existing(claim: Option<&PersistentVolumeClaim>) -> Self {
        match claim {
            Some(claim) if claim.metadata.deletion_timestamp.is_none() => Self::Ours { bound: is_bound(claim) },
            _ => Self::Absent,
        }
    }

    /// What `claim` is to `session`.
    pub fn of(claim: Option<&PersistentVolumeClaim>, session: &ObjectMeta) -> Self {
        let Some(claim) = claim else { return Self::Missing };
        match owner(&claim.metadata, session) {
            _ if claim.metadata.deletion_timestamp.is_some() => Self::Going,
            Owner::Foreign if is_retained(claim, session) => Self::Ours { bound: is_bound(claim) },
            Owner::Foreign => Self::Foreign,
            Owner::Predecessor => Self::Going,
            Owner::Ours => Self::Ours { bound: is_bound(claim) },
        }
    }
}

fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound")
}

/// One that is retained has no owner, so that it outlives the session: its label says whose it is.
fn is_retained(claim: &PersistentVolumeClaim, session: &ObjectMeta) -> bool {
    claim.owner_references().is_empty()
        && session.uid.is_some()
        && claim.labels().get(label::SESSION_UID) == session.uid.as_ref()
}

/// What was resolved for an attempt when its Job was made; kept on the Job as [`annotation::RESOLVED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resolved {
    /// Generation of the session that it was resolved from: a later one may have changed the limits.
    pub generation: Option<i64>,
    /// What earlier attempts of the run used of the running time, seconds.
    pub used_seconds: u64,
    /// Seconds that the pod may take to start.
    pub start_timeout: u64,
    /// Attempts of a run that count.
    pub max_attempts: u32,
    /// What may change while the attempt runs, as it was last applied.
    pub limits: LiveLimits,
    /// What of that the session itself asked for; the rest came from the namespace, and stays as it was then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked: Option<LiveLimits>,
}

impl Default for Resolved {
    fn default() -> Self {
        Self {
            generation: None,
            used_seconds: 0,
            start_timeout: validate::DEFAULT_START_TIMEOUT,
            max_attempts: validate::DEFAULT_MAX_ATTEMPTS,
            limits: LiveLimits::default(),
            asked: None,
        }
    }
}

/// Reads a pod as one of the session's, by the Job that controls it: labels anybody can write on a pod of their own.
pub fn pod_of(pod: &Pod, session: &str) -> Option<(JobFor, PodSeen)> {
    let (job, seen) = pod_of_job(pod, session)?;
    let part = match job {
        JobFor::Attempt(_) => component::ATTEMPT,
        JobFor::Drain(_) => component::DRAIN,
    };
    (pod.labels().get(label::COMPONENT).map(String::as_str) == Some(part)).then_some((job, seen))
}

/// Reads a pod that nothing controls and that has the labels of a session's pod.
pub fn bare_pod_of(pod: &Pod, session: &str) -> Option<PodSeen> {
    let labels = pod.labels();
    let is = |name: &str, value: &str| labels.get(name).is_some_and(|is| is == value);
    let part = is(label::COMPONENT, component::ATTEMPT) || is(label::COMPONENT, component::DRAIN);
    let ours = part && is(label::MANAGED_BY, label::MANAGER) && is(label::SESSION, session);
    let controlled = pod
        .owner_references()
        .iter()
        .any(|owner| owner.controller == Some(true));
    (ours && !controlled).then(|| PodSeen::of(pod, 0, ""))
}

/// Reads a pod as one of the session's by its Job alone: for those of a Job that is known to be the session's.
pub fn pod_of_job(pod: &Pod, session: &str) -> Option<(JobFor, PodSeen)> {
    let owner = pod.owner_references().iter().find(|o| o.controller == Some(true))?;
    if owner.kind != "Job" || owner.api_version != "batch/v1" {
        return None;
    }
    let job = JobFor::of(&owner.name, session)?;
    let (JobFor::Attempt(number) | JobFor::Drain(number)) = job;
    Some((job, PodSeen::of(pod, number, &owner.uid)))
}

/// The kubelet's words for a volume of a Secret or `ConfigMap` that is not there (`pkg/volume`).
fn names_no_secret(said: &str) -> bool {
    let missing = |kind| said.contains(&format!("{kind} \"")) && said.contains("not found");
    missing("secret") || missing("configmap") || said.contains("references non-existent secret key")
}

/// Reads the last Event of a Job or pod, if it tells of something that hinders.
pub fn trouble_of(event: &Event) -> Option<Trouble> {
    let said = event.message.as_deref().unwrap_or("no reason is given");
    let object = event.involved_object.name.as_deref().unwrap_or_default();
    let (reason, message) = match event.reason.as_deref()? {
        "FailedCreate" if said.contains("exceeded quota") => (
            Reason::QuotaExceeded,
            format!("the API server refuses the pod of Job {object}: {said}"),
        ),
        "FailedCreate" => (
            Reason::PodRejected,
            format!("the API server refuses the pod of Job {object}: {said}"),
        ),
        "FailedMount" if names_no_secret(said) => (
            Reason::ConfigError,
            format!("pod {object} needs a Secret or an entry of it that does not exist, create it: {said}"),
        ),
        "FailedMount" | "FailedAttachVolume" | "FailedMapVolume" => (
            Reason::VolumeUnavailable,
            format!("a volume of pod {object} is not available: {said}"),
        ),
        "FailedCreatePodSandBox" => (Reason::ConfigError, format!("pod {object} cannot be set up: {said}")),
        _ => return None,
    };
    Some(Trouble {
        reason,
        message,
        since: None,
        grace: Grace::Start,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::no_secret(
        r#"MountVolume.SetUp failed for volume "mcp" : secret "tracker-token" not found"#,
        Reason::ConfigError
    )]
    #[case::no_entry(
        r#"MountVolume.SetUp failed for volume "mcp" : references non-existent secret key: token"#,
        Reason::ConfigError
    )]
    #[case::a_disk(
        r#"MountVolume.MountDevice failed for volume "pvc-1" : rpc error: volume not found"#,
        Reason::VolumeUnavailable
    )]
    fn a_secret_that_cannot_be_mounted_is_named_and_is_no_volume_that_is_away(
        #[case] said: &str,
        #[case] expected: Reason,
    ) {
        let event = Event {
            reason: Some("FailedMount".to_owned()),
            message: Some(said.to_owned()),
            ..Event::default()
        };
        let trouble = trouble_of(&event).unwrap();
        assert_eq!(trouble.reason, expected);
        assert!(trouble.message.contains(said), "{}", trouble.message);
    }
}
