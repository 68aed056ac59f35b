//! The truth of an API server, told late.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use protocol::names::label;
use serde_json::{Value, json};

use crate::session::{
    lean::{self, Lean},
    memory::{Known, Look, Memory, told::Told},
};

pub const NAMESPACE: &str = "poets";
pub const NAME: &str = "poem";

/// Something that happens to the one session, its children, or the watches of them.
#[derive(Clone, Copy, Debug)]
pub enum Happening {
    /// Somebody makes it, or makes it anew.
    Made,
    /// Somebody changes it.
    Changed,
    /// It goes. Its children go later.
    Gone,
    /// The operator makes a Job and then writes the status, if it dies in between, not.
    JobMade {
        dies: bool,
    },
    /// The operator writes the status.
    Written,
    /// The Job controller makes a pod for the newest Job.
    PodMade,
    /// A pod changes.
    PodChanged,
    /// All containers of one have ended.
    PodOver,
    /// The newest Job, or pod, goes.
    JobGone,
    PodGone,
    /// A watch of this kind tells so many events.
    Told(usize, usize),
    /// A watch of this kind failed: all is listed anew, and before that a part, when that list fails too.
    Listed(usize, Option<usize>),
}

pub fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let kind = || 0..3_usize;
    let one = prop_oneof![
        2 => Just(Happening::Made),
        2 => Just(Happening::Changed),
        1 => Just(Happening::Gone),
        4 => any::<bool>().prop_map(|dies| Happening::JobMade { dies }),
        3 => Just(Happening::Written),
        3 => Just(Happening::PodMade),
        3 => Just(Happening::PodChanged),
        1 => Just(Happening::PodOver),
        1 => Just(Happening::JobGone),
        1 => Just(Happening::PodGone),
        10 => (kind(), 1..4_usize).prop_map(|(kind, count)| Happening::Told(kind, count)),
        2 => (kind(), prop::option::of(0..3_usize)).prop_map(|(kind, part)| Happening::Listed(kind, part)),
    ];
    prop::collection::vec(one, 0..80)
}

/// The truth of the API server, what the watches have yet to tell of it, and the memory.
#[derive(Default)]
pub struct World {
    pub version: u64,
    pub uids: u64,
    pub attempts: u32,
    /// By kind and name.
    pub there: [BTreeMap<String, Value>; 3],
    pub untold: [VecDeque<(bool, Value)>; 3],
    /// UID and version of the session, and the Jobs, of our last write.
    pub own: Option<(String, u64, Vec<String>)>,
    /// Jobs that somebody took away again, with the session's UID.
    pub gone: Vec<(String, String)>,
    pub memory: Memory,
}

impl World {
    pub fn put(&mut self, kind: usize, name: &str, mut object: Value) -> u64 {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.there[kind].insert(name.to_owned(), object.clone());
        self.untold[kind].push_back((true, object));
        self.version
    }

    pub fn take(&mut self, kind: usize, name: &str) {
        if let Some(object) = self.there[kind].remove(name) {
            self.version += 1;
            self.untold[kind].push_back((false, object));
        }
    }

    pub fn uid(&mut self) -> String {
        self.uids += 1;
        format!("u{}", self.uids)
    }

    pub fn session(&self) -> Option<&Value> {
        self.there[0].get(NAME)
    }

    pub fn session_uid(&self) -> Option<String> {
        Some(self.session()?["metadata"]["uid"].as_str()?.to_owned())
    }

    pub fn change_session(&mut self, path: &str, value: Value) -> Option<u64> {
        let mut session = self.session()?.clone();
        session["status"][path] = value;
        Some(self.put(0, NAME, session))
    }

    pub fn job_made(&mut self, dies: bool) {
        let Some(owner) = self.session_uid() else { return };
        // Attempts are numbered, a namesake's anew.
        self.attempts += 1;
        while self.there[1].contains_key(&job_name(self.attempts)) {
            self.attempts += 1;
        }
        let (n, uid) = (self.attempts, self.uid());
        let name = job_name(n);
        let job = json!({
            "metadata": {
                "name": name, "namespace": NAMESPACE, "uid": uid, "labels": {label::SESSION: NAME, label::SESSION_UID: owner},
                "ownerReferences": [{"apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession", "name": NAME, "uid": owner, "controller": true}],
            },
            "spec": {}, "status": {},
        });
        self.put(1, &name, job);
        if !dies {
            self.written(json!(n), vec![name]);
        }
    }

    pub fn written(&mut self, attempt: Value, jobs: Vec<String>) {
        let Some(uid) = self.session_uid() else { return };
        // Like the operator: it writes on what it has read live.
        if let Some(version) = self.change_session("attempt", attempt) {
            self.memory
                .wrote(NAMESPACE, NAME, &uid, Some(&version.to_string()), jobs.clone());
            self.own = Some((uid, version, jobs));
        }
    }

    pub fn pod_made(&mut self) {
        let Some((job, found)) = self.there[1].last_key_value() else {
            return;
        };
        let (job, found) = (job.clone(), found.clone());
        let (n, uid) = (self.there[2].len(), self.uid());
        let name = format!("{job}-{n}");
        let pod = json!({
            "metadata": {
                "name": name, "namespace": NAMESPACE, "uid": uid,
                "labels": {
                    label::SESSION: NAME, label::COMPONENT: "attempt",
                    label::SESSION_UID: found["metadata"]["labels"][label::SESSION_UID],
                },
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": found["metadata"]["uid"], "controller": true}],
            },
            "spec": {}, "status": {},
        });
        self.put(2, &name, pod);
    }

    pub fn tell(&mut self, kind: usize) {
        if let Some((there, object)) = self.untold[kind].pop_front() {
            self.deliver(kind, if there { Told::Apply } else { Told::Delete }, Some(object));
        }
    }

    pub fn list(&mut self, kind: usize, part: Option<usize>) {
        let all: Vec<_> = self.there[kind].values().cloned().collect();
        if let Some(part) = part {
            self.deliver(kind, Told::Init, None);
            for object in all.iter().take(part) {
                self.deliver(kind, Told::InitApply, Some(object.clone()));
            }
        }
        self.untold[kind].clear();
        self.deliver(kind, Told::Init, None);
        for object in all {
            self.deliver(kind, Told::InitApply, Some(object));
        }
        self.deliver(kind, Told::InitDone, None);
    }

    pub fn deliver(&self, kind: usize, told: Told, object: Option<Value>) {
        match kind {
            0 => drop(self.memory.session_event(told.about(object.map(read::<lean::Session>)))),
            1 => drop(self.memory.job_event(told.about(object.map(read::<Lean<_>>)))),
            _ => drop(self.memory.pod_event(told.about(object.map(read::<Lean<_>>)))),
        }
    }

    pub fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Made => {
                self.take(0, NAME);
                self.attempts = 0;
                let uid = self.uid();
                let session = json!({
                    "metadata": {"name": NAME, "namespace": NAMESPACE, "uid": uid, "generation": 1},
                    "spec": {"prompt": "a haiku"}, "status": {"phase": "Pending"},
                });
                self.put(0, NAME, session);
            }
            Happening::Changed => drop(self.change_session("message", json!(self.version.to_string()))),
            Happening::Gone => self.take(0, NAME),
            Happening::JobMade { dies } => self.job_made(dies),
            Happening::Written => self.written(json!(7), Vec::new()),
            Happening::PodMade => self.pod_made(),
            Happening::PodChanged => {
                if let Some((name, pod)) = self.there[2].last_key_value() {
                    let (name, mut pod) = (name.clone(), pod.clone());
                    pod["status"]["message"] = json!(self.version.to_string());
                    self.put(2, &name, pod);
                }
            }
            Happening::PodOver => {
                if let Some((name, pod)) = self.there[2].first_key_value() {
                    let (name, mut pod) = (name.clone(), pod.clone());
                    pod["status"]["phase"] = json!("Failed");
                    self.put(2, &name, pod);
                }
            }
            Happening::JobGone => {
                if let Some(name) = self.there[1].keys().last().cloned() {
                    let owner = self.there[1][&name]["metadata"]["labels"][label::SESSION_UID].as_str();
                    self.gone.push((owner.unwrap_or_default().to_owned(), name.clone()));
                    self.take(1, &name);
                }
            }
            Happening::PodGone => {
                if let Some(name) = self.there[2].keys().last().cloned() {
                    self.take(2, &name);
                }
            }
            Happening::Told(kind, count) => (0..count).for_each(|_| self.tell(kind)),
            Happening::Listed(kind, part) => self.list(kind, part),
        }
    }

    /// Attempts that may work for a session that is not there.
    pub fn left(&self) -> usize {
        let uid = self.session_uid();
        let left = |object: &&Value| object["metadata"]["labels"][label::SESSION_UID].as_str() != uid.as_deref();
        let jobs = self.there[1].values().filter(left).map(|job| &job["metadata"]["uid"]);
        let alive = self.there[2].values().filter(|pod| pod["status"]["phase"] != "Failed");
        let pods = alive
            .filter(left)
            .map(|pod| &pod["metadata"]["ownerReferences"][0]["uid"]);
        jobs.chain(pods).map(Value::to_string).collect::<BTreeSet<_>>().len()
    }

    pub fn look(&self) -> Option<Known> {
        match self.memory.look(NAMESPACE, NAME) {
            Look::Known(known) => Some(*known),
            Look::Unknown | Look::Behind | Look::Gone => None,
        }
    }

    /// What is known has our own writes, and is of one session.
    pub fn check(&self) -> Result<(), TestCaseError> {
        let Some(known) = self.look() else { return Ok(()) };
        let metadata = &known.session.metadata;
        let version: u64 = metadata
            .resource_version
            .as_deref()
            .unwrap_or_default()
            .parse()
            .unwrap();
        if let Some((uid, own, jobs)) = &self.own
            && metadata.uid.as_ref() == Some(uid)
        {
            prop_assert!(version >= *own, "known is version {version}, and we wrote {own}");
            for job in jobs
                .iter()
                .filter(|job| !self.gone.contains(&(uid.clone(), (*job).clone())))
            {
                prop_assert!(
                    known.jobs.iter().any(|known| known.name == *job),
                    "our Job {job} is not known"
                );
            }
        }
        let ours = |uid: &str| {
            let told = self.there[1].values().chain(self.untold[1].iter().map(|(_, job)| job));
            told.filter(|job| job["metadata"]["uid"] == uid)
                .all(|job| job["metadata"]["ownerReferences"][0]["uid"].as_str() == metadata.uid.as_deref())
        };
        prop_assert!(known.jobs.iter().all(|job| ours(&job.uid)), "a Job of a namesake");
        prop_assert!(
            known.pods.iter().all(|(_, pod)| ours(&pod.job_uid)),
            "a pod of a namesake"
        );
        Ok(())
    }

    /// Everything is told.
    pub fn tell_all(&mut self) {
        for kind in 0..3 {
            while !self.untold[kind].is_empty() {
                self.tell(kind);
            }
        }
    }

    /// What is true of the session's children of a kind, as UID and last message.
    pub fn truth(&self, kind: usize) -> Vec<String> {
        let uid = self.session_uid();
        let of = |object: &&Value| object["metadata"]["labels"][label::SESSION_UID].as_str() == uid.as_deref();
        let mut found: Vec<_> = self.there[kind]
            .values()
            .filter(of)
            .map(|object| {
                let said = object["status"]["message"].as_str().unwrap_or_default();
                format!("{} {said}", object["metadata"]["uid"].as_str().unwrap_or_default())
            })
            .collect();
        found.sort();
        found
    }
}

pub fn job_name(n: u32) -> String {
    crate::session::build::job_name(NAME, n)
}

pub fn read<K: serde::de::DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).unwrap()
}
