//! What is read of the objects that watches bring: the parts that decisions rest on. The rest, managed fields and pod templates
//! above all, is most of their bytes, and is skipped and not built.

use std::{borrow::Cow, collections::BTreeMap, fmt::Debug};

use crds::AgenticSession;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        batch::v1::{Job, JobSpec, JobStatus},
        core::v1::{Container, Pod, PodSpec, PodStatus},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
};
use kube::Resource;
use protocol::names::{REPORT_FINALIZER, annotation, label};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::compact;

/// Annotations that decisions rest on. Others may hold the whole object once more.
const ANNOTATIONS: [&str; 3] = [annotation::START_REQUESTED_AT, annotation::RESOLVED, annotation::LIMITS];

/// Characters of why a session cannot be read.
const LONGEST_ERROR: usize = 512;
/// Labels that are looked at.
const LABELS: [&str; 7] = [
    label::SESSION,
    label::SESSION_UID,
    label::ATTEMPT,
    label::COMPONENT,
    label::MANAGED_BY,
    label::KUEUE_QUEUE,
    label::KUEUE_PRIORITY,
];

/// A kind of which a part is read.
pub trait Part: Sized {
    /// That part as it is on the wire.
    type Wire: DeserializeOwned;
    /// The object with that part alone.
    fn part(wire: Self::Wire) -> Self;
}

/// An object of which only a part was read.
#[derive(Clone, Debug)]
pub struct Lean<K>(pub K);

impl<'de, K: Part> Deserialize<'de> for Lean<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        K::Wire::deserialize(deserializer).map(|wire| Self(K::part(wire)))
    }
}

impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>> Resource for Lean<K> {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind(of: &()) -> Cow<'_, str> {
        K::kind(of)
    }

    fn group(of: &()) -> Cow<'_, str> {
        K::group(of)
    }

    fn version(of: &()) -> Cow<'_, str> {
        K::version(of)
    }

    fn plural(of: &()) -> Cow<'_, str> {
        K::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.meta()
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.meta_mut()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
pub struct Head {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    deletion_grace_period_seconds: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    finalizers: Option<Vec<String>>,
    owner_references: Option<Vec<OwnerReference>>,
}

impl From<Head> for ObjectMeta {
    fn from(mut head: Head) -> Self {
        // Whoever makes a session may put a quarter of a megabyte here.
        if let Some(annotations) = &mut head.annotations {
            annotations.retain(|name, _| ANNOTATIONS.contains(&&**name));
        }
        if let Some(labels) = &mut head.labels {
            labels.retain(|name, _| LABELS.contains(&&**name));
        }
        if let Some(finalizers) = &mut head.finalizers {
            finalizers.retain(|finalizer| finalizer == REPORT_FINALIZER);
        }
        if let Some(owners) = &mut head.owner_references {
            owners.retain(|owner| owner.controller == Some(true));
        }
        Self {
            name: head.name,
            namespace: head.namespace,
            uid: head.uid,
            resource_version: head.resource_version,
            generation: head.generation,
            creation_timestamp: head.creation_timestamp,
            deletion_timestamp: head.deletion_timestamp,
            deletion_grace_period_seconds: head.deletion_grace_period_seconds,
            labels: head.labels,
            annotations: head.annotations,
            finalizers: head.finalizers,
            owner_references: head.owner_references,
            ..Self::default()
        }
    }
}

/// A Job without its template.
#[derive(Deserialize)]
pub struct JobWire {
    metadata: Head,
    #[serde(default)]
    spec: JobPart,
    status: Option<JobStatus>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct JobPart {
    suspend: Option<bool>,
    active_deadline_seconds: Option<i64>,
}

impl Part for Job {
    type Wire = JobWire;

    fn part(wire: JobWire) -> Self {
        Self {
            metadata: wire.metadata.into(),
            spec: Some(JobSpec {
                suspend: wire.spec.suspend,
                active_deadline_seconds: wire.spec.active_deadline_seconds,
                ..JobSpec::default()
            }),
            status: wire.status,
        }
    }
}

/// A pod without its containers, but for how init containers are started.
#[derive(Deserialize)]
pub struct PodWire {
    metadata: Head,
    #[serde(default)]
    spec: PodPart,
    status: Option<PodStatus>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodPart {
    node_name: Option<String>,
    init_containers: Vec<ContainerPart>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPart {
    name: String,
    restart_policy: Option<String>,
}

impl Part for Pod {
    type Wire = PodWire;

    fn part(wire: PodWire) -> Self {
        let init_containers = wire.spec.init_containers.into_iter().map(|container| Container {
            name: container.name,
            restart_policy: container.restart_policy,
            ..Container::default()
        });
        Self {
            metadata: wire.metadata.into(),
            spec: Some(PodSpec {
                node_name: wire.spec.node_name,
                init_containers: Some(init_containers.collect()),
                ..PodSpec::default()
            }),
            status: wire.status,
        }
    }
}

/// A session that may be unreadable as the installed schema has it: one such must not stop the watch of the others.
#[derive(Clone, Debug)]
pub struct Session {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// What of it decisions rest on, or why it cannot be read.
    pub content: Result<Box<AgenticSession>, String>,
}

/// Spec and status are read apart, so that a session whose own cannot be read has a name still.
#[derive(Deserialize)]
struct SessionWire {
    metadata: Head,
    spec: Option<Box<RawValue>>,
    status: Option<Box<RawValue>>,
}

fn parse<T: DeserializeOwned>(text: Option<&RawValue>) -> serde_json::Result<T> {
    serde_json::from_str(text.map_or("null", RawValue::get))
}

impl<'de> Deserialize<'de> for Session {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = SessionWire::deserialize(deserializer)?;
        let metadata = ObjectMeta::from(wire.metadata);
        let content = parse(wire.spec.as_deref())
            .and_then(|spec| Ok((spec, parse(wire.status.as_deref())?)))
            .map(|(spec, status)| {
                Box::new(AgenticSession {
                    metadata: metadata.clone(),
                    spec: compact::spec(spec),
                    status,
                })
            })
            .map_err(|error| error.to_string().chars().take(LONGEST_ERROR).collect());
        Ok(Self { metadata, content })
    }
}

impl Resource for Session {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind(of: &()) -> Cow<'_, str> {
        AgenticSession::kind(of)
    }

    fn group(of: &()) -> Cow<'_, str> {
        AgenticSession::group(of)
    }

    fn version(of: &()) -> Cow<'_, str> {
        AgenticSession::version(of)
    }

    fn plural(of: &()) -> Cow<'_, str> {
        AgenticSession::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::session::observed::{JobFor, OurJob, pod_of};

    fn pod() -> serde_json::Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "poem-job-x", "namespace": "poets", "uid": "p1", "resourceVersion": "7",
                "creationTimestamp": "2026-01-02T03:04:05Z", "deletionTimestamp": "2026-01-02T03:05:05Z",
                "deletionGracePeriodSeconds": 60,
                "finalizers": ["vteam.ambient-code/report"],
                "labels": {"app.kubernetes.io/component": "attempt"},
                "annotations": {"vteam.ambient-code/limits": "{\"timeout\": 60}"},
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "poem-job", "uid": "j1", "controller": true}],
                "managedFields": [{"manager": "m", "fieldsV1": {"f:metadata": {}}}],
            },
            "spec": {
                "nodeName": "n1",
                "initContainers": [{"name": "agent", "image": "i", "restartPolicy": "Always"}, {"name": "copy", "image": "i"}],
                "containers": [{"name": "runner", "image": "i", "env": [{"name": "PROMPT", "value": "long"}]}],
            },
            "status": {
                "phase": "Failed", "message": "said",
                "initContainerStatuses": [{"name": "copy", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"terminated": {"exitCode": 3, "reason": "Error"}}}],
            },
        })
    }

    #[test]
    fn a_pod_that_was_read_in_part_says_the_same_as_the_whole() {
        let whole: Pod = serde_json::from_value(pod()).unwrap();
        let Lean(part) = serde_json::from_value::<Lean<Pod>>(pod()).unwrap();
        let (seen, of_part) = (pod_of(&whole, "poem").unwrap(), pod_of(&part, "poem").unwrap());
        assert_eq!(seen.0, JobFor::Attempt(1));
        assert!(seen.1.init_failed.is_some() && seen.1.held && seen.1.scheduled && seen.1.limits.is_some());
        assert_eq!(format!("{seen:?}"), format!("{of_part:?}"));
    }

    #[test]
    fn a_job_that_was_read_in_part_says_the_same_as_the_whole() {
        let job = json!({
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {"name": "poem-job", "uid": "j1", "creationTimestamp": "2026-01-02T03:04:05Z",
                "annotations": {"vteam.ambient-code/resolved": "{\"usedSeconds\": 3}"}},
            "spec": {"suspend": true, "activeDeadlineSeconds": 99, "template": {"spec": {"containers": [], "restartPolicy": "Never"}}},
            "status": {"startTime": "2026-01-02T03:04:06Z", "conditions": [
                {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "lastTransitionTime": "2026-01-02T03:14:06Z"}]},
        });
        let whole: Job = serde_json::from_value(job.clone()).unwrap();
        let Lean(part) = serde_json::from_value::<Lean<Job>>(job).unwrap();
        let seen = OurJob::from(&whole);
        assert!(seen.suspended && seen.deadline_exceeded && seen.resolved.is_some() && seen.started.is_some());
        assert_eq!(seen, OurJob::from(&part));
    }

    #[test]
    fn a_start_request_of_any_length_is_read_and_what_others_note_is_not() {
        let Session { metadata, .. } = serde_json::from_value(json!({
            "metadata": {"name": "odd", "annotations": {annotation::START_REQUESTED_AT: "x".repeat(5_000), "other": "note"}},
            "spec": {"prompt": "p"},
        }))
        .unwrap();
        let annotations = metadata.annotations.unwrap();
        assert_eq!(annotations.len(), 1);
        assert_eq!(annotations[annotation::START_REQUESTED_AT].len(), 5_000);
    }

    #[test]
    fn a_session_that_cannot_be_read_keeps_its_name_and_says_why() {
        let session: Session = serde_json::from_value(json!({
            "metadata": {"name": "odd", "namespace": "poets"}, "spec": {"prompt": 7},
        }))
        .unwrap();
        assert_eq!(session.metadata.name.as_deref(), Some("odd"));
        assert!(session.content.unwrap_err().contains("string"));
    }
}
