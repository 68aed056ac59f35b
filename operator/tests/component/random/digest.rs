//! What a session has come to, without what differs between two that are the same: names of places, identities, times, and
//! how many attempts there were before.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{Api, ResourceExt as _, api::ListParams};
use protocol::names::label;
use serde_json::{Map, Value, json};

use crate::world::World;

/// The children as they are made, and what the status says of them.
pub async fn digest(world: &World, session: &str) -> Value {
    let Some(object) = world.sessions().get_opt(session).await.unwrap() else {
        return Value::Null;
    };
    let status = object.status.clone().unwrap_or_default();
    let job = match &status.job_name {
        // The Job of an attempt that was before this run is none of it.
        Some(name) if status.attempt >= status.first_attempt && status.phase != crds::Phase::Pending => {
            world.jobs().get_opt(name).await.unwrap()
        }
        _ => None,
    };
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &world.namespace);
    let of_session = ListParams::default().labels(&format!("{}={session}", label::SESSION));
    let claims = claims.list(&of_session).await.unwrap().items;
    let uid = object.uid().unwrap_or_default();
    let plain = |value: Value| plain(value, &world.namespace, &uid);
    // One that waits may have a claim of earlier runs.
    let waits = status.phase == crds::Phase::Pending;
    let says = json!({"phase": status.phase, "reason": status.reason, "message": status.message});
    json!({
        "says": plain(says),
        "job": job.map(|job| {
            let job = serde_json::to_value(job).unwrap();
            plain(json!({"metadata": meta(&job["metadata"]), "spec": job["spec"]}))
        }),
        "claims": claims.into_iter().filter(|_| !waits).map(|claim| {
            let claim = serde_json::to_value(claim).unwrap();
            plain(json!({"metadata": meta(&claim["metadata"]), "spec": claim["spec"]}))
        }).collect::<Vec<_>>(),
    })
}

/// The whole status of a session at its end, but for what counts what was before.
pub async fn status(world: &World, session: &str) -> Value {
    let Some(object) = world.sessions().get_opt(session).await.unwrap() else {
        return Value::Null;
    };
    let uid = object.uid().unwrap_or_default();
    let mut status = serde_json::to_value(object.status).unwrap();
    let fields = status.as_object_mut().unwrap();
    for counted in [
        "observedGeneration",
        "startTime",
        "completionTime",
        "jobName",
        "podName",
        "podUID",
        "run",
        "attempt",
        "firstAttempt",
        "runningSeconds",
        "drains",
    ] {
        fields.remove(counted);
    }
    let mut conditions = fields["conditions"].as_array().cloned().unwrap_or_default();
    // Nobody binds claims here.
    conditions.retain(|condition| condition["type"] != crds::condition::WORKSPACE_READY);
    conditions.sort_by_key(|condition| condition["type"].to_string());
    for condition in &mut conditions {
        let condition = condition.as_object_mut().unwrap();
        condition.remove("lastTransitionTime");
        condition.remove("observedGeneration");
    }
    fields["conditions"] = Value::Array(conditions);
    plain(status, &world.namespace, &uid)
}

fn meta(meta: &Value) -> Value {
    let mut labels = meta["labels"].as_object().cloned().unwrap_or_default();
    labels.remove("controller-uid");
    labels.remove("batch.kubernetes.io/controller-uid");
    // What somebody else wrote on an object stays there.
    labels.remove("team");
    let mut annotations = meta["annotations"].as_object().cloned().unwrap_or_default();
    annotations.remove("note");
    json!({
        "name": meta["name"],
        "labels": labels,
        "annotations": annotations,
        "owners": meta["ownerReferences"].as_array().into_iter().flatten().map(|owner| json!([owner["kind"], owner["name"], owner["controller"]])).collect::<Vec<_>>(),
    })
}

/// The same with every name of a place and every count as one word.
fn plain(value: Value, namespace: &str, uid: &str) -> Value {
    match value {
        Value::String(text) => {
            let inner: Option<Value> = text
                .starts_with('{')
                .then(|| serde_json::from_str(&text).ok())
                .flatten();
            match inner {
                Some(inner) => plain(inner, namespace, uid),
                None => Value::String(words(&text.replace(namespace, "NAMESPACE").replace(uid, "UID"))),
            }
        }
        Value::Array(list) => list.into_iter().map(|value| plain(value, namespace, uid)).collect(),
        Value::Object(map) => Value::Object(members(map, namespace, uid)),
        other => other,
    }
}

fn members(map: Map<String, Value>, namespace: &str, uid: &str) -> Map<String, Value> {
    // The environment is a list of names and values.
    let is_attempt = map.get("name").is_some_and(|name| name == "ATTEMPT");
    map.into_iter()
        .filter(|(name, _)| {
            ![
                "generation",
                "controller-uid",
                "batch.kubernetes.io/controller-uid",
                "selector",
                "suspend",
            ]
            .contains(&&**name)
        })
        .map(|(name, value)| {
            let counted = [label::ATTEMPT, "run"].contains(&&*name) || (is_attempt && name == "value");
            let value = if counted {
                json!("N")
            } else {
                plain(value, namespace, uid)
            };
            (name, value)
        })
        .collect()
}

/// `poem-job-3-x7k2p` is `poem-job`, `attempt 3` is `attempt N`, and a time is any time.
fn words(text: &str) -> String {
    let mut words: Vec<String> = text.split(' ').map(str::to_owned).collect();
    for at in 0..words.len() {
        if let Some(place) = words[at].find("poem-job") {
            let tail: String = words[at][place + 8..]
                .chars()
                .filter(|c| !(c.is_ascii_alphanumeric() || *c == '-'))
                .collect();
            words[at] = format!("{}poem-job{tail}", &words[at][..place]);
        }
        if at > 0 && words[at - 1].to_lowercase() == "attempt" {
            words[at] = words[at].replace(|c: char| c.is_ascii_digit(), "N");
        }
        if words[at].trim_end_matches('.').parse::<jiff::Timestamp>().is_ok() {
            "TIME".clone_into(&mut words[at]);
        }
    }
    words.join(" ")
}
